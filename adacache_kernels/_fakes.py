# SPDX-License-Identifier: Apache-2.0
"""The arguments of the ops by name, and fake kernels for tracing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ._schemas import OPS, SCHEMAS
from .columns import sum_columns

#: The arguments of each schema in order: name, type, and whether the op writes to it.
ARGUMENTS = {
    name: tuple(
        (
            argument.name,
            str(argument.type),
            argument.alias_info is not None and argument.alias_info.is_write,
        )
        for argument in torch._C.parse_schema(name + schema).arguments
    )
    for name, schema in SCHEMAS.items()
}
NAMES = {name: tuple(argument[0] for argument in arguments) for name, arguments in ARGUMENTS.items()}
#: The further arguments of the `_out` variant of each op.
OUTPUTS = {op: NAMES[f"{op}_out"][len(NAMES[op]) :] if row.outputs else () for op, row in OPS.items()}
FLOAT8 = torch.float8_e4m3fn


def fresh_outputs(op: str, arguments: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """Allocate the outputs of `op` without sums: the last arguments of its `_out` variant."""
    names = OUTPUTS.get(op, ())
    if not names or op == "stack_residual_meter":
        return ()
    first: torch.Tensor = arguments[0]
    if op == "temporal_attention":
        rows, tokens, _, heads, dim = first.shape
        return (first.new_empty((rows, tokens, heads * dim)),)
    x_rows = dict(zip(NAMES[op], arguments, strict=True))["x_rows"]
    rows = (first if x_rows is None else x_rows).shape[0]
    _, tokens, channels = first.shape

    def fresh(name: str) -> torch.Tensor:
        if name == "out" and x_rows is None:
            return torch.empty_like(first)
        if name == "norm_scale":
            return first.new_empty((rows, tokens, 1), dtype=torch.float32)
        return first.new_empty((rows, tokens, channels), dtype=dtype_of_output(op, name, first))

    return tuple(map(fresh, names))


def dtype_of_output(op: str, name: str, first: torch.Tensor) -> torch.dtype:
    """Of `out` or `norm_out`."""
    return FLOAT8 if name == "norm_out" and "norm_scale" in OUTPUTS[op] else first.dtype


def register_fake_kernels() -> None:
    """Register fake kernels for the compiled ops, if their library is loaded."""
    for name, fake in FAKE_KERNELS.items():
        if hasattr(torch.ops.adacache, name):
            torch.library.register_fake(f"adacache::{name}", fake)


def _fake_kernel(name: str) -> Callable[..., Any]:
    names = NAMES[name]

    def fake(*given: Any) -> Any:
        tensors = [tensor for value in given for tensor in (value if isinstance(value, list) else (value,))]
        # If one tensor is on meta, the dispatcher calls this instead of the kernel, which would raise.
        if len({tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)}) > 1:
            raise RuntimeError("all tensors: expected one device")
        results = fresh_outputs(name, given)
        if "metric" in names and name != "decide":
            named = dict(zip(names, given, strict=True))
            size = (named["num_videos"], len(sum_columns(named["strides"])))
            results += (given[0].new_empty(size, dtype=torch.float64),)
        return results if len(results) > 1 else results[0] if results else None

    return fake


FAKE_KERNELS: dict[str, Callable[..., Any]] = {name: _fake_kernel(name) for name in SCHEMAS}
