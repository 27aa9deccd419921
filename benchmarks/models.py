# SPDX-License-Identifier: Apache-2.0
"""Times models at real width with few blocks: plain, on fused blocks, and the steps of AdaCache.

python benchmarks/models.py [--families latte cogvideox] [--dtypes bfloat16 float32] [--tokens 4000]
                            [--blocks 2] [--without-layers] [--device cuda] [--json FILE]

Rows of one model and dtype run in the same rounds. "exact" results must equal the plain ones; a wrong one is
not timed. With --without-layers, attention and MLP return recorded outputs, so that only the norms, gates and
residuals of the blocks are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adacache
import torch
from measure import DTYPES, environment, measure, print_table, refuse, write_json
from torch import Tensor, nn

MANY = 100_000
"""Steps of a request, so that none of those that are timed is one of the last, which are always computed."""
ALWAYS, NEVER = {1e9: 1}, {1e9: MANY}
"""Codebooks that compute every step, and none after the second."""
PLAIN, REUSED = "plain eager", "AdaCache reused"
TIERS = ("exact", "close")


@dataclass(frozen=True)
class Family:
    """A class of diffusers at real width.

    Attributes:
        name: of the class.
        config: of the model; `layers` names the number of its blocks.
        inputs: (frames, side, channels per head) -> arguments of the model, for a grid of side * side tokens
            per frame.
        frames: latent frames.
        children: of the blocks, which --without-layers replaces.
        text: the child that embeds the text, which --without-layers replaces too.
    """

    name: str
    config: dict[str, Any]
    inputs: Callable[[int, int, int], dict[str, Any]]
    frames: int
    children: tuple[str, ...]
    layers: str = "num_layers"
    text: str | None = None


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def _allegro_rotary(frames: int, side: int, width: int) -> Any:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(
        embed_dim=width,
        crops_coords=((0, 0), (side, side)),
        grid_size=(side, side),
        temporal_size=frames,
        interpolation_scale=(1.0, 1.0, 1.0),
        device="cpu",
    )
    places = torch.cartesian_prod(*(torch.as_tensor(grid, dtype=torch.long) for grid in (t, h, w)))
    return tuple(tables), tuple(places.T.reshape(3, 1, -1).contiguous())


FAMILIES = {
    "latte": Family(
        "LatteTransformer3DModel",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": 1152,
            "attention_bias": True,
            "sample_size": 64,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": 4096,
            "video_length": 16,
        },
        lambda frames, side, width: {
            "hidden_states": _randn(1, 4, frames, 2 * side, 2 * side),
            "encoder_hidden_states": _randn(1, 120, 4096),
        },
        frames=16,
        children=("attn1", "attn2", "ff"),
        text="caption_projection",
    ),
    "cogvideox": Family(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 30,
            "attention_head_dim": 64,
            "use_rotary_positional_embeddings": True,
        },
        lambda frames, side, width: {
            "hidden_states": _randn(1, frames, 16, 2 * side, 2 * side),
            "encoder_hidden_states": _randn(1, 226, 4096),
        },
        frames=13,
        children=("attn1", "ff"),
    ),
    "wan": Family(
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960},
        lambda frames, side, width: {
            "hidden_states": _randn(1, 16, frames, 2 * side, 2 * side),
            "encoder_hidden_states": _randn(1, 512, 4096),
        },
        frames=21,
        children=("attn1", "attn2", "ffn"),
        text="condition_embedder.text_embedder",
    ),
    "ltx": Family(
        "LTXVideoTransformer3DModel",
        {"num_attention_heads": 32, "attention_head_dim": 64, "cross_attention_dim": 2048},
        lambda frames, side, width: {
            "hidden_states": _randn(1, frames * side * side, 128),
            "encoder_hidden_states": _randn(1, 128, 4096),
            "encoder_attention_mask": torch.ones(1, 128),
            "num_frames": frames,
            "height": side,
            "width": side,
        },
        frames=16,
        children=("attn1", "attn2", "ff"),
        text="caption_projection",
    ),
    "hunyuan": Family(
        "HunyuanVideoTransformer3DModel",
        {
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "rope_axes_dim": (16, 56, 56),
        },
        lambda frames, side, width: {
            "hidden_states": _randn(1, 16, frames, 2 * side, 2 * side),
            "encoder_hidden_states": _randn(1, 256, 4096),
            "encoder_attention_mask": torch.ones(1, 256),
            "pooled_projections": _randn(1, 768),
            "guidance": torch.full((1,), 6000.0),
        },
        frames=33,
        children=("attn", "ff", "ff_context", "proj_mlp", "proj_out"),
        text="context_embedder",
    ),
    "mochi": Family(
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "pooled_projection_dim": 1536,
            "text_embed_dim": 4096,
        },
        lambda frames, side, width: {
            "hidden_states": _randn(1, 12, frames, 2 * side, 2 * side),
            "encoder_hidden_states": _randn(1, 256, 32 * width),
            "encoder_attention_mask": torch.ones(1, 256).bool(),
        },
        frames=28,
        children=("attn1", "ff", "ff_context"),
        text="time_embed.caption_proj",
    ),
    "allegro": Family(
        "AllegroTransformer3DModel",
        {"num_attention_heads": 24, "attention_head_dim": 96, "cross_attention_dim": 2304},
        lambda frames, side, width: {
            "hidden_states": _randn(1, 4, frames, 2 * side, 2 * side),
            "encoder_hidden_states": _randn(1, 512, 4096),
            "attention_mask": torch.ones(1, frames, 2 * side, 2 * side),
            "encoder_attention_mask": torch.ones(1, 512),
            "image_rotary_emb": _allegro_rotary(frames, side, width),
        },
        frames=22,
        children=("attn1", "attn2", "ff"),
        text="caption_projection",
    ),
    "ltx2": Family(
        "LTX2VideoTransformer3DModel",
        {
            "num_attention_heads": 32,
            "attention_head_dim": 128,
            "cross_attention_dim": 4096,
            "audio_num_attention_heads": 32,
            "audio_attention_head_dim": 64,
            "audio_cross_attention_dim": 2048,
        },
        lambda frames, side, width: {
            "hidden_states": _randn(1, frames * side * side, 128),
            "audio_hidden_states": _randn(1, 126, 128),
            "encoder_hidden_states": _randn(1, 128, 3840),
            "audio_encoder_hidden_states": _randn(1, 128, 3840),
            "num_frames": frames,
            "height": side,
            "width": side,
            "audio_num_frames": 126,
        },
        frames=16,
        children=(
            *("attn1", "attn2", "audio_to_video_attn", "ff"),
            *("audio_attn1", "audio_attn2", "video_to_audio_attn", "audio_ff"),
        ),
        text="caption_projection",
    ),
    "kandinsky": Family(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 16,
            "out_visual_dim": 16,
            "model_dim": 1792,
            "ff_dim": 7168,
            "axes_dims": (16, 24, 24),
            "num_text_blocks": 1,
        },
        lambda frames, side, width: {
            "hidden_states": _randn(1, frames, 2 * side, 2 * side, 16),
            "encoder_hidden_states": _randn(1, 256, 3584),
            "pooled_projections": _randn(1, 768),
            "visual_rope_pos": [torch.arange(size) for size in (frames, side, side)],
            "text_rope_pos": torch.arange(256),
        },
        frames=31,
        children=("self_attention", "cross_attention", "feed_forward"),
        layers="num_visual_blocks",
        text="text_embeddings",
    ),
    "cosmos": Family(
        "CosmosTransformer3DModel",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 128,
            "concat_padding_mask": False,
            "extra_pos_embed_type": None,
        },
        lambda frames, side, width: {
            "hidden_states": _randn(1, 16, frames, 2 * side, 2 * side),
            "encoder_hidden_states": _randn(1, 512, 1024),
            "fps": 16,
        },
        frames=24,
        children=("attn1", "attn2", "ff"),
    ),
    "sana": Family(
        "SanaVideoTransformer3DModel",
        {
            "num_attention_heads": 20,
            "attention_head_dim": 112,
            "cross_attention_head_dim": 112,
            "cross_attention_dim": 2240,
        },
        lambda frames, side, width: {
            "hidden_states": _randn(1, 16, frames, 2 * side, 2 * side),
            "encoder_hidden_states": _randn(1, 300, 2304),
        },
        frames=21,
        children=("attn1", "attn2", "ff"),
        text="caption_projection",
    ),
}


class Recorded(nn.Module):
    """Returns what the layer in its place returned once."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


def build(family: Family, blocks: int, width: int | None, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights, in float32 where `from_pretrained` keeps it so.

    Args:
        width: channels per head, if not the real ones.
    """
    import diffusers

    config = {**family.config, family.layers: blocks}
    if width is not None:
        config |= _narrowed(family, width)
    torch.manual_seed(0)
    model = getattr(diffusers, family.name)(**config).eval().requires_grad_(False).to(device)
    kept = set(model._keep_in_fp32_modules or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model


def _heads_and_width(family: Family) -> tuple[int, int]:
    """Number of heads, and channels per head."""
    config = family.config
    if "model_dim" in config:
        return config["model_dim"] // sum(config["axes_dims"]), sum(config["axes_dims"])
    return config["num_attention_heads"], config["attention_head_dim"]


def _narrowed(family: Family, width: int) -> dict[str, Any]:
    """The part of a family's config that the channels per head determine."""
    heads, _ = _heads_and_width(family)
    side, audio = width // 6 * 2, max(4, width // 2)
    axes = (width - 2 * side, side, side)
    values = {
        "attention_head_dim": width,
        "cross_attention_head_dim": width,
        "cross_attention_dim": width * heads,
        "rope_axes_dim": axes,
        "axes_dims": axes,
        "model_dim": width * heads,
        "pooled_projection_dim": 12 * width,
        "text_embed_dim": 32 * width,
        "audio_attention_head_dim": audio,
        "audio_cross_attention_dim": audio * family.config.get("audio_num_attention_heads", 0),
    }
    return {name: value for name, value in values.items() if name in family.config}


def without_layers(family: Family, model: Any, call: Callable[[], Any]) -> None:
    """Replaces attention and MLP of all blocks, and the text embedder, by what they return in a call."""
    replaced = [
        (parent, name)
        for part in model.children()
        if isinstance(part, nn.ModuleList)
        for parent in part
        for name in family.children
        if getattr(parent, name, None) is not None
    ]
    if family.text is not None:
        path, _, name = family.text.rpartition(".")
        replaced.append((model.get_submodule(path), name))
    outputs: dict[tuple[nn.Module, str], Any] = {}
    hooks = []
    for key in replaced:

        def note(module: Any, args: Any, output: Any, key: Any = key) -> None:
            outputs[key] = output

        hooks.append(getattr(*key).register_forward_hook(note))
    call()
    for hook in hooks:
        hook.remove()
    for (parent, name), output in outputs.items():
        setattr(parent, name, Recorded(output))


def shared_copy(model: Any) -> Any:
    """A copy of a model with the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def rows_of(
    family: Family,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tokens: int,
    blocks: int = 2,
    width: int | None = None,
    repeat: int = 5,
    layers: bool = True,
) -> list[dict[str, Any]]:
    """Milliseconds and kept bytes of one family in one dtype."""
    side = max(1, round(math.sqrt(tokens / family.frames)))
    torch.manual_seed(1)
    values = {
        name: _moved(value, device, dtype)
        for name, value in family.inputs(family.frames, side, width or _heads_and_width(family)[1]).items()
    }
    model = build(family, blocks, width, dtype, device)
    timestep = torch.full((1,), 500, device=device)

    def call(one: Any) -> Tensor:
        with torch.no_grad():
            output: Tensor = one(**values, timestep=timestep, return_dict=False)[0]
        return output

    if not layers:
        without_layers(family, model, lambda: call(model))
    plain = call(model)
    models, handles = {PLAIN: model}, {}
    with contextlib.ExitStack() as requests:
        for tier in TIERS:
            one = models[f"fused, {tier}"] = shared_copy(model)
            adacache.accelerate(one, fused=tier)
        for name, fused, codebook in (
            ("AdaCache computed, wrapped blocks", False, ALWAYS),
            *((f"AdaCache computed, {tier}", tier, ALWAYS) for tier in TIERS),
            (REUSED, True, NEVER),
        ):
            one = models[name] = shared_copy(model)
            policy = adacache.AdaCache(codebook=codebook)
            handles[name] = adacache.enable(one, policy, num_steps=MANY, fused=fused)
            requests.enter_context(handles[name].request())
            for _ in range(2):
                call(one)
        for name, one in models.items():
            exact = "close" not in name and name != REUSED
            output = call(one)
            if (exact and not torch.equal(output, plain)) or not torch.isfinite(output).all():
                refuse(f"{family.name}: {name} gives another result than {PLAIN}")
        candidates = {name: functools.partial(_round, call, one) for name, one in models.items()}
        timings = measure(candidates, device, repeat=repeat)
        kept = {name: handle.trace.cache_bytes for name, handle in handles.items()}
    return [
        {
            "family": family.name,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": family.frames * side * side,
            "blocks": blocks,
            "layers": layers,
            "run": name,
            "ms": timings[name].median,
            "least": timings[name].least,
            "most": timings[name].most,
            "speedup": timings[PLAIN].median / timings[name].median,
            "kept_bytes": kept.get(name, 0),
        }
        for name in models
    ]


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """An argument on a device; a floating-point tensor in the dtype."""
    if isinstance(value, list | tuple):
        return type(value)(_moved(one, device, torch.float32) for one in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _round(call: Callable[[Any], Tensor], model: Any, turn: int) -> Tensor:
    return call(model)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=DTYPES)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--tokens", type=int, default=4000, help="video tokens, approximately (default: 4000)"
    )
    parser.add_argument("--blocks", type=int, default=2, help="blocks, or pairs of blocks (default: 2)")
    parser.add_argument("--width", type=int, help="channels per head (default: the real number)")
    parser.add_argument("--without-layers", action="store_true", help="norms, gates and residuals alone")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    rows = [
        row
        for name in given.families
        for dtype in given.dtypes
        for row in rows_of(
            FAMILIES[name],
            DTYPES[dtype],
            device,
            tokens=given.tokens,
            blocks=given.blocks,
            width=given.width,
            repeat=given.repeat,
            layers=not given.without_layers,
        )
    ]
    print_table(
        ("model, dtype, run", "ms", "x plain", "kept MB"),
        [
            (
                f"{row['family']}, {row['dtype']}, {row['run']}",
                f"{row['ms']:.1f}",
                f"{row['speedup']:.2f}",
                f"{row['kept_bytes'] / 1e6:.1f}",
            )
            for row in rows
        ],
    )
    if given.json is not None:
        write_json(given.json, {"environment": environment(device), "rows": rows})


if __name__ == "__main__":
    main()
