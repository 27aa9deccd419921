# SPDX-License-Identifier: Apache-2.0
"""Times temporal attention as in STDiT3 and Latte, which rearrange tokens around PyTorch attention, against
the op temporal_attention, which reads them in place. A wrong result is not timed.

python benchmarks/temporal_attention.py [--device cuda --dtype bfloat16 --places 3600] [--frames 15]
                                        [--models stdit3 latte] [--no-compile] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import (
    DTYPES,
    add_common_arguments,
    environment,
    input_sets,
    measure,
    print_table,
    refuse,
    write_json,
)

from adacache_kernels import temporal_attention

PASSES = 4  # over [B, N, C]: reads q, k and v, writes the result
EAGER, COMPILED, BARE = "model code, eager", "model code, torch.compile", "attention only"
FUSED, FUSED_OUT, COPY = "temporal_attention", "temporal_attention out=", "copy of the same bytes"
EPS = 1e-6


@dataclass(frozen=True)
class Model:
    """The temporal attention of a model: head layout, and whether q and k have norm and rotary embedding."""

    heads: int
    dim: int
    norm_and_rope: bool


MODELS = {"stdit3": Model(16, 72, True), "latte": Model(16, 72, False)}


@dataclass(frozen=True)
class Inputs:
    """The same values in the layout of the op and in that of the model, and the weights."""

    x: torch.Tensor  # [B, N, C], rearranged by the model before its projection
    qkv: torch.Tensor  # [B, N, 3, heads, dim]
    by_place: torch.Tensor  # [B * places, frames, 3, heads, dim]
    frames: int
    weights: tuple[torch.Tensor, ...]  # q_weight, k_weight, cos, sin; empty without norm_and_rope


def as_the_model(inputs: Inputs) -> torch.Tensor:
    """`STDiT3Block.attention` and `SelfAttention` of `adacache.models.stdit3`, without the projections. Latte
    has no norm and rotary embedding."""
    rows, tokens, channels = inputs.x.shape
    inputs.x.unflatten(1, (inputs.frames, -1)).transpose(1, 2).flatten(0, 1)
    attended = attention(*rotated(inputs)).transpose(1, 2).flatten(2)
    return attended.unflatten(0, (rows, -1)).transpose(1, 2).reshape(rows, tokens, channels)


def rotated(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    q, k, v = inputs.by_place.permute(2, 0, 3, 1, 4)
    if inputs.weights:
        q_weight, k_weight, cos, sin = inputs.weights
        angles = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        q, k = rotate(rms_norm(q, q_weight), *angles), rotate(rms_norm(k, k_weight), *angles)
    return q, k, v


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def fused(inputs: Inputs, out: torch.Tensor | None = None) -> torch.Tensor:
    return temporal_attention(inputs.qkv, *inputs.weights, frames=inputs.frames, out=out)


def make_inputs(
    model: Model, rows: int, frames: int, places: int, dtype: torch.dtype, device: torch.device
) -> Inputs:
    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    qkv = normal(rows, frames * places, 3, model.heads, model.dim)
    by_place = qkv.unflatten(1, (frames, places)).transpose(1, 2).flatten(0, 1).contiguous()
    weights: tuple[torch.Tensor, ...] = ()
    if model.norm_and_rope:
        frequency = 10000.0 ** (-torch.arange(0, model.dim, 2, device=device) / model.dim)
        angle = torch.outer(torch.arange(frames, device=device, dtype=torch.float32), frequency)
        weights = (1 + normal(model.dim) / 4, 1 + normal(model.dim) / 4, angle.cos(), angle.sin())
    return Inputs(normal(rows, frames * places, model.heads * model.dim), qkv, by_place, frames, weights)


def check(inputs: Inputs) -> None:
    """Exits if the error in row 0 exceeds twice the error of the model code plus a rounding."""
    one = Inputs(
        inputs.x[:1],
        inputs.qkv[:1],
        inputs.by_place[: inputs.by_place.shape[0] // inputs.x.shape[0]],
        inputs.frames,
        inputs.weights,
    )
    wide = Inputs(
        one.x.double(),
        one.qkv.double(),
        one.by_place.double(),
        one.frames,
        tuple(weight.double() for weight in one.weights),
    )
    exact = as_the_model(wide)
    eager_error = (as_the_model(one).double() - exact).abs().max().item()
    allowed = 2 * eager_error + torch.finfo(inputs.x.dtype).eps / 2 * exact.abs().max().item()
    for out in (None, torch.full_like(one.x, torch.nan)):
        error = (fused(one, out).double() - exact).abs().max().item()
        if not error <= allowed:
            refuse(f"temporal_attention: error {error:.3g}, allowed {allowed:.3g}")


def time_model(name: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    model, device, dtype = MODELS[name], torch.device(given.device), DTYPES[given.dtype]
    channels = model.heads * model.dim
    tensor_bytes = given.rows * given.frames * given.places * channels * dtype.itemsize
    sets = [
        make_inputs(model, given.rows, given.frames, given.places, dtype, device)
        for _ in range(input_sets(7 * tensor_bytes, device))
    ]
    check(sets[0])
    out = torch.empty_like(sets[0].x)
    ready = rotated(sets[0])
    # The same bytes as the op, half of them read, half written.
    source, target = (torch.empty(PASSES // 2 * out.numel(), dtype=dtype, device=device) for _ in range(2))

    def turns(function: Callable[[Inputs], object]) -> Callable[[int], object]:
        return lambda turn: function(sets[turn % len(sets)])

    candidates = {
        EAGER: turns(as_the_model),
        BARE: lambda turn: attention(*ready),
        FUSED: turns(fused),
        FUSED_OUT: turns(lambda inputs: fused(inputs, out)),
        COPY: lambda turn: target.copy_(source),
    }
    if not given.no_compile:
        candidates[COMPILED] = turns(torch.compile(as_the_model))
    timings = measure(candidates, device, repeat=given.repeat, warmup=3)
    copied = timings[COPY].median
    return [
        {"model": name}
        | asdict(timing)
        | {
            "gigabytes_per_second": PASSES * tensor_bytes / timing.median / 1e6,
            "share_of_copy_rate": copied / timing.median,
            "times_eager": timings[EAGER].median / timing.median,
            "times_compiled": timings[COMPILED].median / timing.median if COMPILED in timings else None,
        }
        for timing in timings.values()
    ]


def table_line(record: dict[str, Any]) -> Sequence[str]:
    # The chains move more than the minimum bytes, so a rate would be meaningless for them.
    rated = record["name"] in (FUSED, FUSED_OUT, COPY)
    compiled = record["times_compiled"]
    return (
        f"{record['model']}: {record['name']}",
        f"{record['median']:.3g}",
        f"{record['gigabytes_per_second']:.1f}" if rated else "",
        f"{100 * record['share_of_copy_rate']:.0f} %" if rated else "",
        f"{record['times_eager']:.2f}",
        "" if compiled is None else f"{compiled:.2f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    parser.add_argument("--rows", type=int, default=2, help="B (default: 2, guidance)")
    parser.add_argument("--frames", type=int, default=15, help="latent frames (default: 15)")
    parser.add_argument("--places", type=int, default=400, help="tokens per frame (default: 400)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    facts = environment(torch.device(given.device))
    print(
        f"{given.rows} x ({given.frames} * {given.places}) {given.dtype} on {facts['device']}, "
        f"{facts['threads']} threads, torch {facts['torch']}"
    )
    print(f"medians of {given.repeat} interleaved rounds; GB/s: minimum bytes ({PASSES} passes) over time\n")
    records = [record for name in given.models for record in time_model(name, given)]
    print_table(["", "ms", "GB/s", "of copy rate", "x eager", "x compile"], [table_line(r) for r in records])
    if given.json:
        facts |= {name: getattr(given, name) for name in ("rows", "frames", "places", "dtype", "repeat")}
        write_json(given.json, {"benchmark": "temporal_attention", **facts, "candidates": records})


if __name__ == "__main__":
    main()
