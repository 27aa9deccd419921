# SPDX-License-Identifier: Apache-2.0
"""Training scenes of the Wan and Latte examples: captions, drawing, classification."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn, which contains the handwritten digits, is not installed")

from clips import HEADINGS
from scenes.captions import (
    CHANNELS,
    GROUNDS,
    MOTIONS,
    TOKENS,
    VOCABULARY,
    all_prompts,
    calibration_prompts,
    embed,
    evaluation_prompts,
    held_out_prompts,
    null_captions,
    parse,
    training_prompts,
)
from scenes.drawing import (
    BAR_LEVEL,
    BOX,
    CUT,
    FRAMES,
    JITTER,
    SIZE,
    SPEEDS,
    Scenes,
    draw_grounds,
    draw_scenes,
)
from scenes.evaluate import Reader

PROMPTS = all_prompts()[::7]


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return draw_scenes(PROMPTS, torch.Generator().manual_seed(5))


def test_each_prompt_is_parsed_from_its_text() -> None:
    for prompt in all_prompts():
        assert parse(str(prompt)) == prompt
    assert parse("ONE 7  racing left over crowded ground cut view").digit == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one 7 flying left over plain ground, cut view", r"word 3 .*expected still or .* got flying"),
        ("one 7 racing left", "word 5 .*expected over, got the end"),
        ("one 7 racing left over plain ground, cut view again", "expected 9 words, got 10"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_captions_are_scaled_words() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY) <= CHANNELS
    vectors = embed([PROMPTS[0], str(PROMPTS[1])])
    assert vectors.shape == null_captions(2).shape == (2, TOKENS, CHANNELS)
    torch.testing.assert_close(vectors.square().mean(-1), torch.ones(2, TOKENS))
    assert len(torch.unique(embed(all_prompts()).flatten(1), dim=0)) == len(all_prompts())
    assert embed([]).shape == (0, TOKENS, CHANNELS)


def test_the_prompts_are_split() -> None:
    training, held_out = set(training_prompts()), set(held_out_prompts())
    assert training | held_out == set(all_prompts())
    assert not training & held_out
    assert (len(training), len(held_out)) == (3456, 384)
    assert set(calibration_prompts(2)) <= training
    assert set(evaluation_prompts(4)) <= held_out
    classes = [(prompt.motion, prompt.ground) for prompt in evaluation_prompts(4)]
    assert all(classes.count((motion, ground)) == 4 for motion in MOTIONS for ground in GROUNDS)
    with pytest.raises(ValueError, match="per_class: expected at most"):
        evaluation_prompts(100)


def test_shape_range_and_seed(scenes: Scenes) -> None:
    assert scenes.video.shape == (len(PROMPTS), 1, FRAMES, SIZE, SIZE)
    assert scenes.video.dtype == torch.float32
    assert scenes.video.abs().max() <= 1
    assert torch.equal(draw_scenes(PROMPTS, torch.Generator().manual_seed(5)).video, scenes.video)
    assert not torch.equal(draw_scenes(PROMPTS, torch.Generator().manual_seed(6)).video, scenes.video)


def test_digits_move_as_the_prompt_says_within_the_frame(scenes: Scenes) -> None:
    boxes = scenes.position[~scenes.position.isnan()]
    assert boxes.min() >= BOX / 2 - 1e-4
    assert boxes.max() <= SIZE - BOX / 2 + 1e-4
    step = scenes.position.diff(dim=2)
    for row, prompt in enumerate(PROMPTS):
        wanted = SPEEDS[prompt.motion] * torch.tensor(HEADINGS[prompt.direction])
        assert (scenes.velocity[row] - wanted).abs().max() <= JITTER * SPEEDS[prompt.motion] + 1e-6
        within = [k for k in range(FRAMES - 1) if prompt.view != "cut" or k != CUT - 1]
        torch.testing.assert_close(step[row, 0, within], scenes.velocity[row].expand(len(within), 2))
        second = step[row, 1, within]
        if prompt.count == "one":
            assert second.isnan().all()
        else:
            torch.testing.assert_close(second, -scenes.velocity[row].expand(len(within), 2))


def test_views_have_their_effect(scenes: Scenes) -> None:
    change = scenes.video[:, 0].diff(dim=1).abs().mean((2, 3))
    for row, prompt in enumerate(PROMPTS):
        at_cut, others = change[row, CUT - 1], change[row, [*range(CUT - 1), *range(CUT, FRAMES - 1)]]
        if prompt.view == "cut":
            assert at_cut > 0.01
        if prompt.motion == "still":
            moves = prompt.view == "panning" and prompt.ground != "plain"
            assert (others > 0).all() if moves else (others < 1e-6).all(), str(prompt)
        if prompt.view == "barred":
            lines = scenes.video[row, 0] == BAR_LEVEL
            assert bool(lines.all(1).any() or lines.all(2).any())


def test_grounds_are_darker_than_bars_and_differ_in_kind() -> None:
    kinds = list(GROUNDS) * 20
    ground = draw_grounds(kinds, torch.Generator().manual_seed(0)).unflatten(0, (20, 3))
    assert ground.max() < BAR_LEVEL
    assert ground.min() >= -1
    plain, striped, crowded = ground.flatten(2).std(2).mean(0)
    assert plain == 0
    assert min(striped, crowded) > 0.1


def test_a_reader_of_training_digits_reads_held_out_ones() -> None:
    reader = Reader(all_prompts()[::17])
    prompts = evaluation_prompts(4)
    report = reader.report(
        draw_scenes(prompts, torch.Generator().manual_seed(1), split="test").video, prompts
    )
    assert report.digit_accuracy > 0.85
    assert report.speed_correlation > 0.98
    assert report.direction_accuracy > 0.98
    shuffled = prompts[24:] + prompts[:24]
    video = draw_scenes(prompts, torch.Generator().manual_seed(1)).video
    assert reader.report(video, shuffled).digit_accuracy < 0.5
