# SPDX-License-Identifier: Apache-2.0
"""The generator of training clips."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn, which contains the handwritten digits, is not installed")

from adacache.digits.captions import Prompt, all_prompts
from clips import (
    BOX,
    FRAMES,
    HEADINGS,
    JITTER,
    SIZE,
    SPEEDS,
    Clips,
    digit_images,
    draw_backgrounds,
    draw_clips,
    draw_digits,
)
from evaluate import Reader, velocities


@pytest.fixture(scope="module")
def clips() -> Clips:
    return draw_clips(all_prompts(), torch.Generator().manual_seed(5))


def test_shape_range_and_seed(clips: Clips) -> None:
    assert clips.video.shape == (360, 1, FRAMES, SIZE, SIZE)
    assert clips.video.dtype == torch.float32
    assert clips.video.min() >= -1
    assert clips.video.max() <= 1
    assert (clips.video.amax((1, 3, 4)) > 0.5).all(), "a frame without a bright digit"
    again = draw_clips(all_prompts(), torch.Generator().manual_seed(5))
    other = draw_clips(all_prompts(), torch.Generator().manual_seed(6))
    assert torch.equal(again.video, clips.video)
    assert not torch.equal(other.video, clips.video)


def test_the_path_stays_within_the_frame(clips: Clips) -> None:
    assert clips.position.min() >= BOX / 2 - 1e-4
    assert clips.position.max() <= SIZE - BOX / 2 + 1e-4


def test_speed_and_direction_match_the_prompts(clips: Clips) -> None:
    for prompt, velocity in zip(all_prompts(), clips.velocity, strict=True):
        along = torch.tensor(HEADINGS[prompt.direction]) @ velocity
        assert abs(along - SPEEDS[prompt.motion]) <= JITTER * SPEEDS[prompt.motion] + 1e-6
        torch.testing.assert_close(velocity.norm(), along.abs())
    torch.testing.assert_close(clips.position.diff(dim=1), clips.velocity[:, None].expand(-1, FRAMES - 1, -1))


def test_pixels_move_at_the_stated_velocity(clips: Clips) -> None:
    assert (velocities(clips.video) - clips.velocity).abs().max() < 0.1


def test_a_resting_clip_is_still_and_its_background_static(clips: Clips) -> None:
    prompts = all_prompts()
    resting = torch.tensor([prompt.motion == "resting" for prompt in prompts])
    change = clips.video.diff(dim=2).abs().amax((1, 2, 3, 4))
    assert change[resting].max() == 0
    assert change[~resting].min() > 0.1
    # A corner that a box in the opposite half never reaches.
    noisy = Prompt(3, "racing", "right", "noisy")
    clip = draw_clips([noisy], torch.Generator().manual_seed(0))
    upper = bool(clip.position[0, 0, 1] > SIZE / 2)
    strip = clip.video[0, 0, :, :4] if upper else clip.video[0, 0, :, -4:]
    assert strip.diff(dim=0).abs().max() == 0
    assert strip[0].std() > 0.02


def test_a_shifted_digit_is_drawn_shifted() -> None:
    image = digit_images()[0][:1]
    here, there = draw_digits(image, torch.tensor([[[12.3, 15.6], [14.3, 12.6]]]))[0]
    torch.testing.assert_close(here[3:, :-2], there[:-3, 2:], atol=1e-5, rtol=0)


def test_a_pixel_sized_cell_keeps_its_value() -> None:
    image = torch.zeros(1, 8, 8)
    image[0, 2, 5] = 0.75
    # Put the centre of cell (x 5, y 2) on the centre of pixel (x 19, y 11).
    cell = BOX / 8
    centre = torch.tensor([[[19.5 - 1.5 * cell, 11.5 + 1.5 * cell]]])
    drawn = draw_digits(image, centre)[0, 0]
    assert drawn.argmax() == 11 * SIZE + 19
    torch.testing.assert_close(drawn.max(), torch.tensor(0.75))


def test_backgrounds_are_dark_and_differ_in_kind() -> None:
    kinds = ["plain", "striped", "noisy"] * 20
    ground = draw_backgrounds(kinds, torch.Generator().manual_seed(0)).unflatten(0, (20, 3))
    assert ground.max() <= 0
    plain, striped, noisy = ground.unbind(1)
    assert plain.flatten(1).std(1).max() == 0
    assert striped.std(1).max() < 1e-6 < striped.std(2).min()
    assert min(noisy.std(1).mean(), noisy.std(2).mean()) > 0.05


def test_splits_are_disjoint_and_contain_every_digit() -> None:
    train, test = digit_images("train"), digit_images("test")
    assert len(train[0]) + len(test[0]) == 1797
    assert 0.19 < len(test[0]) / 1797 < 0.21
    assert (test[1].bincount() > 30).all()
    assert len(train[1].bincount()) == 10
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', got 'val'"):
        digit_images("val")


def test_a_classifier_of_training_digits_reads_held_out_ones() -> None:
    prompts = all_prompts()
    reader = Reader(per_prompt=3)
    report = reader.report(draw_clips(prompts, torch.Generator().manual_seed(1), split="test").video, prompts)
    assert report.digit_accuracy > 0.93
    assert report.speed_correlation > 0.99
    assert report.direction_accuracy == 1
    shuffled = prompts[180:] + prompts[:180]
    video = draw_clips(prompts, torch.Generator().manual_seed(1)).video
    assert reader.report(video, shuffled).digit_accuracy < 0.3
