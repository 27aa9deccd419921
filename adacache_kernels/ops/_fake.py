"""Schemas and fake kernels of the ops: what tracing needs to know of them. Shared by the compiled and the
Triton ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..columns import sum_columns

_METER = "Tensor? video_of_row, int num_videos, int frames, int[] strides, int metric"
_NORM = "Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps"
_CACHE = "Tensor(a!) residual, Tensor(b!)? residual_scale"
_REUSE = (
    "Tensor x, Tensor residual, Tensor? residual_scale, Tensor? x_rows, Tensor? residual_rows, "
    "Tensor? video_of_row, Tensor? reuse"
)
_EXTRAPOLATE = (
    "Tensor x, Tensor[] factors, Tensor coefficients, Tensor? x_rows, Tensor? residual_rows, "
    "Tensor? video_of_row"
)
_GATED = "Tensor x, Tensor y, Tensor? gate"
_ROWS = "Tensor? x_rows, Tensor? residual_rows"
_ROTARY = "Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, bool interleaved"
_STACK = f"Tensor x_out, Tensor x_in, {_CACHE}, Tensor? rows, {_METER}"

#: As the compiled library defines them; `tests/ops` compares the two.
SCHEMAS = {
    "gated_residual": f"({_GATED}, Tensor? x_rows) -> Tensor",
    "gated_residual_out": f"({_GATED}, Tensor? x_rows, Tensor(a!) out) -> ()",
    "gated_residual_meter": f"({_GATED}, {_CACHE}, {_ROWS}, {_METER}) -> (Tensor, Tensor)",
    "gated_residual_meter_out": f"({_GATED}, {_CACHE}, {_ROWS}, {_METER}, Tensor(c!) out) -> Tensor",
    "stack_residual_meter": f"({_STACK}) -> Tensor",
    "stack_residual_meter_out": f"({_STACK}, Tensor(c!) out) -> Tensor",
    "residual_meter": f"(Tensor residual, Tensor old, {_METER}) -> Tensor",
    "reuse_residual": f"({_REUSE}) -> Tensor",
    "reuse_residual_out": f"({_REUSE}, Tensor(a!) out) -> ()",
    "extrapolate_residual": f"({_EXTRAPOLATE}) -> Tensor",
    "extrapolate_residual_out": f"({_EXTRAPOLATE}, Tensor(a!) out) -> ()",
    "layer_norm_modulate": f"(Tensor x, {_NORM}, Tensor? x_rows) -> Tensor",
    "layer_norm_modulate_out": f"(Tensor x, {_NORM}, Tensor? x_rows, Tensor(a!) out) -> ()",
    "gated_residual_norm": f"({_GATED}, {_NORM}, Tensor? x_rows) -> (Tensor, Tensor)",
    "gated_residual_norm_out": (
        f"({_GATED}, {_NORM}, Tensor? x_rows, Tensor(a!) out, Tensor(b!) norm_out) -> ()"
    ),
    "gated_residual_norm_meter": (
        f"({_GATED}, {_CACHE}, {_NORM}, {_ROWS}, {_METER}) -> (Tensor, Tensor, Tensor)"
    ),
    "gated_residual_norm_meter_out": (
        f"({_GATED}, {_CACHE}, {_NORM}, {_ROWS}, {_METER}, Tensor(c!) out, Tensor(d!) norm_out) -> Tensor"
    ),
    "decide": (
        "(Tensor sums, Tensor(a!) state, Tensor thresholds, Tensor rates, int step, int num_steps, int site, "
        "int frames, int[] strides, int metric, int rule, float elements, int first_step, int last_step, "
        "float scale, float power, float divisor, float gradient_weight) -> ()"
    ),
    "fused_qk_norm_rope": f"(Tensor(a!) qkv, {_ROTARY}, float eps) -> ()",
    "temporal_attention": f"(Tensor qkv, {_ROTARY}, int frames, float eps, float scale) -> Tensor",
    "temporal_attention_out": (
        f"(Tensor qkv, {_ROTARY}, int frames, float eps, float scale, Tensor(a!) out) -> ()"
    ),
}

#: The arguments of each op by name, in their order.
ARGUMENTS = {
    name: tuple(argument.name for argument in torch._C.parse_schema(name + schema).arguments)
    for name, schema in SCHEMAS.items()
}


def fresh_outputs(op: str, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """Allocate what `op` gives beside its sums: what its `_out` variant takes as the last arguments."""
    if f"{op}_out" not in SCHEMAS or op == "stack_residual_meter":  # whose `out` is no result but a copy
        return ()
    first: torch.Tensor = arguments[0]
    if op == "temporal_attention":
        rows, tokens, _, heads, dim = first.shape
        return (first.new_empty((rows, tokens, heads * dim)),)
    x_rows = dict(zip(ARGUMENTS[op], arguments, strict=True))["x_rows"]
    size = first.shape if x_rows is None else (x_rows.shape[0], *first.shape[1:])
    out = torch.empty_like(first) if x_rows is None else first.new_empty(size)
    return (out, first.new_empty(size)) if "norm_out" in ARGUMENTS[f"{op}_out"] else (out,)


def register_fake_kernels() -> None:
    """Give the compiled ops their fake kernels; without the compiled library there are no ops to give them
    to."""
    for name, fake in FAKE_KERNELS.items():
        if hasattr(torch.ops.adacache, name):
            torch.library.register_fake(f"adacache::{name}", fake)


def _fake_kernel(name: str) -> Callable[..., Any]:
    names = ARGUMENTS[name]

    def fake(*given: Any) -> Any:
        tensors = [tensor for value in given for tensor in (value if isinstance(value, list) else (value,))]
        # A meta tensor among others brings the call here and not to the kernel, which would have refused it.
        if len({tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)}) > 1:
            raise RuntimeError("all tensors: expected one device")
        results = () if name.endswith("_out") else fresh_outputs(name, given)
        if "metric" in names and name != "decide":
            named = dict(zip(names, given, strict=True))
            size = (named["num_videos"], len(sum_columns(named["strides"])))
            results += (given[0].new_empty(size, dtype=torch.float64),)
        return results if len(results) > 1 else results[0] if results else None

    return fake


FAKE_KERNELS: dict[str, Callable[..., Any]] = {name: _fake_kernel(name) for name in SCHEMAS}
