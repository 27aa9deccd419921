"""The metric site, where a gated residual is formed and its change measured: one op against the published
chain of operations.

python benchmarks/metric_site.py [--device cuda --dtype bfloat16 --places 5400] [--json FILE]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch
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

from adacache_kernels import gated_residual_meter, sum_columns

PASSES = 5  # reads x, y and the old residual, writes x_out and the new residual
EAGER, COMPILED, FUSED, FUSED_OUT = (
    "eager chain",
    "torch.compile of it",
    "gated_residual_meter",
    "... with out=",
)
COPY, COPY_FRESH = "copy into existing memory", "copy into fresh memory"


def published_chain(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, old: torch.Tensor, frames: int
) -> tuple[torch.Tensor, ...]:
    """The metric site as published (`compute_next_step` with motion regularisation, stride 1), without its
    host syncs."""
    residual = gate * y
    x_out = x + residual
    difference = (residual - old).norm(p=1)
    magnitude = old.norm(p=1)
    by_frame = residual.unflatten(1, (frames, -1))
    later, earlier = by_frame[:, 1:], by_frame[:, :-1]
    motion = (later - earlier).norm(p=1)
    return x_out, residual, difference, magnitude, motion, later.norm(p=1), earlier.norm(p=1)


def check(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, old: torch.Tensor, frames: int) -> None:
    """Bits of x_out and residual against eager, sums against float64."""
    x_out, residual, *_ = published_chain(x, y, gate, old, frames)
    for out in (None, torch.full_like(x, torch.nan)):
        mine = old.clone()
        given, sums = gated_residual_meter(x, y, gate, mine, frames=frames, out=out)
        if not torch.equal(given, x_out) or not torch.equal(mine, residual):
            refuse("gated_residual_meter does not give the bits of eager PyTorch")
        total = dict(zip(sum_columns((1,)), sums[0].tolist(), strict=True))
        for column, exact in _exact_sums(residual, old, frames).items():
            if not abs(total[column] - exact) <= 1e-5 * exact:
                refuse(f"{column} is {total[column]}, expected {exact}")


def _exact_sums(residual: torch.Tensor, old: torch.Tensor, frames: int) -> dict[str, float]:
    exact = dict.fromkeys(("abs_diff", "abs_old", "abs_new", "motion_diff_1", "motion_sum_1"), 0.0)
    for new_row, old_row in zip(residual, old, strict=True):
        new, before = new_row.double(), old_row.double()
        by_frame = new.unflatten(0, (frames, -1))
        exact["abs_diff"] += (new - before).abs().sum().item()
        exact["abs_old"] += before.abs().sum().item()
        exact["abs_new"] += new.abs().sum().item()
        exact["motion_diff_1"] += (by_frame[1:] - by_frame[:-1]).abs().sum().item()
        exact["motion_sum_1"] += (by_frame[1:].abs().sum() + by_frame[:-1].abs().sum()).item()
    return exact


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    parser.add_argument("--rows", type=int, default=2, help="B (default: 2, guidance)")
    parser.add_argument("--frames", type=int, default=15, help="latent frames (default: 15)")
    parser.add_argument("--places", type=int, default=400, help="tokens per frame (default: 400)")
    parser.add_argument("--channels", type=int, default=1152, help="C (default: 1152)")
    given = parser.parse_args()
    device, dtype, frames = torch.device(given.device), DTYPES[given.dtype], given.frames
    size = (given.rows, frames * given.places, given.channels)

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    one = torch.empty(size, dtype=dtype, device=device)
    tensor_bytes = one.numel() * one.element_size()
    sets = [
        [torch.randn(size, dtype=dtype, device=device) for _ in range(3)]
        for _ in range(input_sets(3 * tensor_bytes, device))
    ]
    gate = torch.randn(given.rows, 1, given.channels, dtype=dtype, device=device)
    out = torch.empty_like(one)
    check(*sets[0][:2], gate, sets[0][2], frames)
    compiled = torch.compile(published_chain)

    def arguments(turn: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        x, y, old = sets[turn % len(sets)]
        return x, y, gate, old

    timings = measure(
        {
            EAGER: lambda turn: published_chain(*arguments(turn), frames),
            COMPILED: lambda turn: compiled(*arguments(turn), frames),
            FUSED: lambda turn: gated_residual_meter(*arguments(turn), frames=frames),
            FUSED_OUT: lambda turn: gated_residual_meter(*arguments(turn), frames=frames, out=out),
            COPY: lambda turn: out.copy_(arguments(turn)[0]),
            COPY_FRESH: lambda turn: arguments(turn)[0].clone(),
        },
        device,
        repeat=given.repeat,
        warmup=3,
    )
    copy_rate = 2 * tensor_bytes / timings[COPY].median
    eager, compile_time = timings[EAGER].median, timings[COMPILED].median
    facts = environment(device)
    print(
        f"{list(size)} {given.dtype} on {facts['device']}, {facts['threads']} threads, torch {facts['torch']}"
    )
    print(f"medians of {given.repeat} interleaved rounds; GB/s over the least bytes, {PASSES} passes or 2\n")
    rows, records = [], []
    for name, timing in timings.items():
        passes = 2 if name in (COPY, COPY_FRESH) else PASSES
        rate = passes * tensor_bytes / timing.median
        record = asdict(timing) | {
            "gigabytes_per_second": rate / 1e6,
            "share_of_copy_rate": rate / copy_rate,
            "times_eager": eager / timing.median,
            "times_compiled": compile_time / timing.median,
        }
        records.append(record)
        rows.append(
            [
                name,
                f"{timing.median:.2f}",
                f"{rate / 1e6:.1f}",
                f"{100 * rate / copy_rate:.0f} %",
                f"{eager / timing.median:.2f}",
                f"{compile_time / timing.median:.2f}",
            ]
        )
    print_table(["", "ms", "GB/s", "of copy rate", "x eager", "x compile"], rows)
    if given.json:
        facts |= {"size": list(size), "frames": frames, "dtype": given.dtype, "repeat": given.repeat}
        write_json(given.json, {"benchmark": "metric_site", **facts, "candidates": records})


if __name__ == "__main__":
    main()
