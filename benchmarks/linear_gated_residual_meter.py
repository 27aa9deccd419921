"""Times the fused linear_gated_residual_meter beside the linear layer and the meter, and fills the table by
which the op chooses.

python benchmarks/linear_gated_residual_meter.py [--dtype bfloat16 float16] [--write]
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from cases import SHAPES, Shape
from measure import DTYPES, input_sets, measure, print_table, refuse

from adacache_kernels import linear_gated_residual_meter
from adacache_kernels.ops._fused_table import TABLE, size_class

#: K: the projection after attention, and the second linear layer of an MLP.
INNER_OVER_CHANNELS = (1, 4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float16"], choices=DTYPES)
    parser.add_argument("--repeat", type=int, default=30, help="rounds (default: 30)")
    parser.add_argument("--write", action="store_true", help="put the ratios into the package's table")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        refuse("the fused op runs on a GPU")
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    lines = []
    table: dict[str, Any] = json.loads(TABLE.read_text())
    for dtype in arguments.dtype:
        for shape_name, shape in SHAPES.items():
            for times in INNER_OVER_CHANNELS:
                inner = times * shape.channels
                ratio, fused = time_one(shape, inner, DTYPES[dtype], device, arguments.repeat)
                size = size_class(inner, shape.channels, shape.rows * shape.places)
                table.setdefault(name, {}).setdefault(dtype, {})[size] = round(ratio, 3)
                lines.append([f"{dtype} {shape_name} K={inner}", f"{fused:.3f}", f"{ratio:.3f}"])
    print_table([name, "ms", "two ops / fused"], lines)
    if arguments.write:
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        print(f"\nwritten to {TABLE}")


def time_one(
    shape: Shape, inner: int, dtype: torch.dtype, device: torch.device, repeat: int
) -> tuple[float, float]:
    """Time of the two ops over that of the fused one, and that in milliseconds."""
    size = (shape.rows, shape.frames * shape.places)

    def random(*of: int) -> torch.Tensor:
        return torch.randn(*of, dtype=dtype, device=device)

    weight, bias = random(shape.channels, inner) / inner**0.5, random(shape.channels)
    gate = random(shape.rows, 1, shape.channels)
    one_set = torch.Size((*size, inner + 3 * shape.channels)).numel() * weight.element_size()
    sets = [
        (random(*size, inner), *(random(*size, shape.channels) for _ in range(2)))
        for _ in range(min(4, input_sets(one_set, device)))
    ]
    out = random(*size, shape.channels)

    def call(turn: int, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
        a, x, residual = sets[turn % len(sets)]
        return linear_gated_residual_meter(
            a, weight, bias, x, gate, residual, frames=shape.frames, out=out, fused=fused
        )

    a, x, residual = sets[0]
    given = [residual.clone() for _ in range(2)]
    results = [
        linear_gated_residual_meter(a, weight, bias, x, gate, kept, frames=shape.frames, fused=fused)
        for kept, fused in zip(given, (False, True), strict=True)
    ]
    # y is rounded once, from sums in another order.
    unit = torch.finfo(dtype).eps
    largest = float(given[0].abs().max())
    if not torch.allclose(results[0][0], results[1][0], rtol=4 * unit, atol=4 * unit * largest):
        refuse("the two differ by more than a rounding of y")
    timings = measure(
        {"two": lambda turn: call(turn, False), "fused": lambda turn: call(turn, True)}, device, repeat=repeat
    )
    return timings["two"].median / timings["fused"].median, timings["fused"].median


if __name__ == "__main__":
    main()
