# SPDX-License-Identifier: Apache-2.0
"""The two networks, and pipelines of diffusers around them. The networks work on pixels: there is no VAE.

A pipeline is called with the arguments of `call_arguments`:

    pipe = wan_pipeline("unipc")
    clips = pipe(**call_arguments(pipe, ["one 7 racing left over crowded ground, steady view"], [0])).frames
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from scenes.captions import CHANNELS, Prompt, embed, null_captions

FOLDER = Path(__file__).parent
FRAMES, SIZE = 16, 32
STEPS, GUIDANCE, SHIFT = 50, 2.5, 3.0
"""Denoising steps, guidance scale and timestep shift (Wan) of the examples."""

CLASSES: dict[str, Any] = {"wan": WanTransformer3DModel, "latte": LatteTransformer3DModel}
CONFIGS: dict[str, dict[str, Any]] = {
    "wan": {
        "patch_size": (2, 8, 8),
        "num_attention_heads": 4,
        "attention_head_dim": 48,
        "in_channels": 1,
        "out_channels": 1,
        "text_dim": CHANNELS,
        "freq_dim": 128,
        "ffn_dim": 576,
        "num_layers": 5,
        "rope_max_seq_len": 32,
    },
    "latte": {
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 3,
        "cross_attention_dim": 128,
        "attention_bias": True,
        "sample_size": SIZE,
        "patch_size": 8,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "caption_channels": CHANNELS,
        "video_length": FRAMES,
    },
}
"""Shapes of the networks: wan has 128 tokens per clip, latte 256."""


def wan_pipeline(solver: str = "unipc", weights: str | Path | None = None) -> WanPipeline:
    """A pipeline of the trained Wan network.

    Args:
        solver: "unipc" (UniPC of order 2, as in Wan's released pipelines) or "euler".
        weights: see `load`.
    """
    schedulers = {
        "unipc": lambda: UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        ),
        "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    }
    if solver not in schedulers:
        raise ValueError(f"solver: expected 'unipc' or 'euler', got {solver!r}")
    return _quiet(
        WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=schedulers[solver](),
            transformer=load("wan", weights),
        )
    )


def latte_pipeline(weights: str | Path | None = None) -> LattePipeline:
    """A pipeline of the trained Latte network, with DDIM. See `load` for `weights`."""
    return _quiet(
        LattePipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            scheduler=noise_schedule(),
            transformer=load("latte", weights),
        )
    )


def call_arguments(
    pipe: WanPipeline | LattePipeline, prompts: Sequence[str | Prompt], seeds: Sequence[int]
) -> dict[str, Any]:
    """Arguments of a call of `pipe` that generates one clip for each prompt and seed.

    The call's `frames` are clips [V, 1, 16, 32, 32] float32, about -1 .. 1.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"seeds: expected one per prompt, got {len(seeds)} for {len(prompts)} prompts")
    # Without a VAE the pipelines assume one that scales by 8 in space and, for Wan, by 4 in time.
    frames = (
        {"num_frames": 4 * FRAMES - 3}
        if isinstance(pipe, WanPipeline)
        else {"video_length": FRAMES, "negative_prompt": None}
    )
    return {
        "prompt_embeds": embed(prompts),
        "negative_prompt_embeds": null_captions(len(prompts)),
        "latents": noise(seeds),
        "height": 8 * SIZE,
        "width": 8 * SIZE,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "output_type": "latent",
        **frames,
    }


def noise(seeds: Sequence[int]) -> Tensor:
    """Standard normal noise of each seed: [V, 1, 16, 32, 32] float32, the `latents` of a call."""
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(1, FRAMES, SIZE, SIZE, generator=source) for source in sources])


def load(name: str, weights: str | Path | None = None) -> nn.Module:
    """The trained network "wan" or "latte", in float32.

    Args:
        weights: a safetensors file beside a config of the same name with the suffix .json; None: the file in
            this folder.
    """
    path = FOLDER / f"{name}.safetensors" if weights is None else Path(weights)
    model = CLASSES[name].from_config(json.loads(path.with_suffix(".json").read_text()))
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)


def noise_schedule() -> DDIMScheduler:
    """The schedule of Latte: linear betas, noise prediction.

    "trailing" makes the first step start from pure noise.
    """
    return DDIMScheduler(clip_sample=False, timestep_spacing="trailing")


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
