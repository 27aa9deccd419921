# SPDX-License-Identifier: Apache-2.0
"""STDiT3: strict weight loading, packed and padded captions, odd sizes, conditioning, FLOPs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adacache.commands.cli import main
from adacache.commands.flops import VIDEOS, count_flops, latent_size
from adacache.models.rectified_flow import RectifiedFlow, timestep_transform
from adacache.models.stdit3 import STDiT3, STDiT3Config
from models import GOLDEN, denoise, inputs, relative_error
from safetensors.torch import load_file, save_file

CONFIG = STDiT3Config(depth=4, hidden_size=96, num_heads=4, caption_channels=32, model_max_length=12)


def velocity(model: STDiT3, **changes: object) -> torch.Tensor:
    values = inputs(1)
    arguments = {
        "x": torch.cat((values["z"], values["z"])),
        "timestep": torch.tensor([700.0, 700.0]),
        "y": values["y"],
        "mask": values["mask"],
        **changes,
    }
    with torch.no_grad():
        return model(**arguments)


def test_weights_of_several_files(model: STDiT3, tmp_path: Path) -> None:
    state = load_file(next(GOLDEN.glob("weights_*.safetensors")))
    keys = sorted(state)
    save_file({key: state[key] for key in keys[:50]}, tmp_path / "a.safetensors")
    save_file({key: state[key] for key in keys[50:]}, tmp_path / "b.safetensors")
    loaded = STDiT3.from_safetensors(CONFIG, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert torch.equal(velocity(loaded), velocity(model))
    assert sorted(loaded.state_dict()) == keys


def test_weight_errors(tmp_path: Path) -> None:
    state = load_file(next(GOLDEN.glob("weights_*.safetensors")))
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"missing spatial_blocks\.4"):
        STDiT3.from_safetensors(STDiT3Config(**{**vars(CONFIG), "depth": 5}), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"unexpected spatial_blocks\.3"):
        STDiT3.from_safetensors(STDiT3Config(**{**vars(CONFIG), "depth": 3}), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"y_proj.fc1.weight: expected \[96, 64\], got \[96, 32\]"):
        STDiT3.from_safetensors(
            STDiT3Config(**{**vars(CONFIG), "caption_channels": 64}), tmp_path / "a.safetensors"
        )
    with pytest.raises(ValueError, match="is in two of the files"):
        STDiT3.from_safetensors(CONFIG, tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="no file"):
        STDiT3.from_safetensors(CONFIG, tmp_path / "none.safetensors")
    torch.save(state, tmp_path / "pickle.safetensors")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        STDiT3.from_safetensors(CONFIG, tmp_path / "pickle.safetensors")


def test_parameter_names_equal_the_release() -> None:
    with torch.device("meta"):
        model = STDiT3()
    assert len(model.state_dict()) == 2 * 28 * 17 + 21
    assert model.state_dict()["rope.freqs"].shape == (36,)
    assert model.state_dict()["x_embedder.proj.weight"].shape == (1152, 4, 1, 2, 2)
    assert model.state_dict()["y_embedder.y_embedding"].shape == (300, 4096)


def test_packed_captions_equal_padded_ones(model: STDiT3) -> None:
    values = inputs(1)
    packed = values["y"][:, 0, :9].reshape(1, 18, 32)
    assert relative_error(velocity(model, y=packed, mask=[9, 9]), velocity(model)) < 1e-6
    uneven = torch.cat((values["y"][0, 0, :9], values["y"][1, 0, :4]))[None]
    mask = torch.zeros(2, 12)
    mask[0, :9] = mask[1, :4] = 1
    assert relative_error(velocity(model, y=uneven, mask=[9, 4]), velocity(model, mask=mask)) < 1e-6
    assert relative_error(velocity(model, mask=None), velocity(model)) > 1e-3


def test_masked_tokens_have_no_effect(model: STDiT3) -> None:
    y = inputs(1)["y"].clone()
    y[:, :, 9:] = 100.0
    assert torch.equal(velocity(model, y=y), velocity(model))


def test_x_mask_of_all_true_changes_nothing(model: STDiT3) -> None:
    everything = velocity(model, x_mask=torch.ones(2, 5, dtype=torch.bool))
    assert relative_error(everything, velocity(model)) < 1e-6
    some = torch.ones(2, 5, dtype=torch.bool)
    some[:, 0] = False
    assert relative_error(velocity(model, x_mask=some), everything) > 1e-3


def test_conditioning_has_an_effect(model: STDiT3) -> None:
    base = velocity(model)
    assert not torch.equal(velocity(model, fps=8.0), base)
    assert not torch.equal(velocity(model, height=640, width=960), base)
    as_tensors = velocity(model, fps=torch.tensor([24.0, 24.0]), height=torch.tensor([64.0]), width=96)
    assert relative_error(as_tensors, base) < 1e-6


def test_sizes_that_are_no_multiple_of_the_patch(model: STDiT3) -> None:
    values = inputs(1)
    x = torch.cat((values["z"], values["z"]))[:, :, :, :7, :11]
    assert velocity(model, x=x).shape == (2, 8, 5, 7, 11)


def test_timesteps_of_the_sampler(model: STDiT3) -> None:
    even = RectifiedFlow(num_steps=4).timesteps(height=64, width=96, latent_frames=5)
    assert even == [1000, 750, 500, 250]
    moved = RectifiedFlow(num_steps=4, use_timestep_transform=True).timesteps(
        height=720, width=1280, latent_frames=15
    )
    ratio = (720 * 1280 / 512**2 * 15) ** 0.5
    assert moved[0] == 1000
    assert moved[2] == pytest.approx(1000 * ratio * 0.5 / (1 + (ratio - 1) * 0.5))
    assert timestep_transform(torch.tensor(500.0), height=512, width=512, latent_frames=1) == 500
    values = inputs(1)
    flow = RectifiedFlow(num_steps=6, guidance_scale=4.0)
    final = flow.sample(
        model, values["z"], values["y"], mask=values["mask"], height=64, width=96, progress=list
    )
    assert relative_error(final, denoise(model, values, 6)) < 1e-5
    with pytest.raises(ValueError, match="y: expected 2V = 2 rows"):
        flow.sample(model, values["z"], values["y"][:1])
    with pytest.raises(ValueError, match="num_steps: expected at least 1"):
        RectifiedFlow(num_steps=0).sample(model, values["z"], values["y"])


@pytest.mark.parametrize(("video", "tera"), [("480p-2s", 113.01), ("720p-2s", 283.66)])
def test_flops_of_the_published_network(video: str, tera: float) -> None:
    flops = count_flops(latent_size(*VIDEOS[video]))
    assert flops.computed / 1e12 == pytest.approx(tera, rel=0.005)
    assert flops.reused < flops.computed / 1000
    assert flops.schedule(30, 12.0) == 12 * flops.computed + 18 * flops.reused
    with pytest.raises(ValueError, match=r"computed_steps: expected a number in 0..30, got 31"):
        flops.schedule(30, 31)


def test_flops_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flops", "--computed-steps", "12", "--video", "480p-2s", "--video", "17x64x64"]) == 0
    out = capsys.readouterr().out
    assert "113.02" in out
    assert "5x8x8" in out
    assert main(["flops", "--video", "17x64"]) == 2
    assert "video: expected 480p-2s" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in out
    assert "gated_residual_meter" in out
    assert "not triton" in out
