# SPDX-License-Identifier: Apache-2.0
"""A valid call of each op on small tensors, and changes that make it invalid."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from op_cases import video_ids

import adacache_kernels
from adacache_kernels import METRICS
from adacache_kernels._choices import NORMS, ROUNDINGS

ROWS, FRAMES, TOKENS, CHANNELS = 2, 3, 6, 8
#: The ops on [B, N, C]; `decide` and the attention ops have separate tests.
TOKEN_OPS = (
    "gated_residual",
    "gated_residual_meter",
    "stack_residual_meter",
    "residual_meter",
    "reuse_residual",
    "extrapolate_residual",
    "extrapolate_residual_meter",
    "layer_norm_modulate",
    "rms_norm_modulate",
    "norm_modulate_float8",
    "gated_residual_norm",
    "gated_residual_norm_float8",
    "gated_residual_norm_meter",
)
MODULATORS = ("gate", "shift", "scale")
TABLES = ("gate_table", "shift_table", "scale_table")
INDICES = ("x_rows", "residual_rows", "rows")
OUTPUTS = ("out", "norm_out", "norm_scale")
FLOAT8 = torch.float8_e4m3fn


def parameters(op: str) -> list[str]:
    return list(inspect.signature(getattr(adacache_kernels, op)).parameters)


def lead(op: str) -> str:
    """The tensor that sets shape, dtype and device."""
    return parameters(op)[0]


def written(op: str) -> list[str]:
    names = [
        name
        for name in ("residual", "residual_scale")
        if op.endswith("meter") and "residual_scale" in parameters(op)
    ]
    return names + outputs_of(op)


def outputs_of(op: str) -> list[str]:
    return [name for name in OUTPUTS if name in parameters(op)]


def as_output(op: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype of this output. A norm with a scale is float8."""
    return tensor.to(FLOAT8) if name == "norm_out" and "norm_scale" in outputs_of(op) else tensor


def unwritten(op: str, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """All outputs, filled with NaN."""
    return {
        name: as_output(
            op,
            name,
            torch.full((ROWS, TOKENS, 1 if name == "norm_scale" else CHANNELS), torch.nan, device=device),
        )
        for name in outputs_of(op)
    }


def good_call(
    op: str, device: torch.device, *, float8: bool = False, outputs: bool = False, tables: bool = False
) -> dict[str, Any]:
    """Arguments by name: required ones, weight, bias, video_of_row, and optionally outputs and tables."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device)

    call: dict[str, Any] = {}
    for name in parameters(op):
        if name in ("x", "y", "residual", "old", "x_in", "x_out", "computed"):
            call[name] = normal(ROWS, TOKENS, CHANNELS)
        elif name in MODULATORS:
            call[name] = normal(ROWS, 1 if name == "shift" else FRAMES, CHANNELS)
        elif name in ("weight", "bias"):
            call[name] = normal(CHANNELS)
        elif name in TABLES and tables:
            call[name] = normal(1, 1, CHANNELS)
    if "frames" in parameters(op):
        call |= {"frames": FRAMES, "strides": (1, 2), "metric": "l2", "num_videos": 2}
    if "video_of_row" in parameters(op):
        call["video_of_row"] = video_ids([1, 0], device)
    if op.startswith("extrapolate_residual"):
        call |= {"factors": [normal(ROWS, TOKENS, CHANNELS) for _ in range(2)], "coefficients": normal(2, 2)}
    if op == "reuse_residual":
        call["reuse"] = torch.tensor([True, False], device=device)
    if float8:
        call["residual"] = call["residual"].to(FLOAT8)
        call["residual_scale"] = normal(ROWS, TOKENS).abs()
    return call | (unwritten(op, device) if outputs else {})


def run(op: str, call: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    results = getattr(adacache_kernels, op)(**call)
    return results if isinstance(results, tuple) else (results,)


def copied(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in call.items()}


def by_schema(op: str, call: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    """The arguments in schema order."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(getattr(adacache_kernels, op)).parameters.items()
    }
    values = defaults | call
    for name, choices in (("metric", METRICS), ("rounding", ROUNDINGS), ("norm", NORMS)):
        if name in values:
            values[name] = choices[values[name]]
    return [list(values[name]) if name == "strides" else values[name] for name in names]


def bad_calls(op: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Per test id: the argument that the error must name, and the changes to a valid call."""
    return {f"{name}-{what}": (name, changes) for name, what, changes in _bad(op)}


def _bad(op: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    first, has = lead(op), set(parameters(op))
    wide = torch.randn(ROWS, TOKENS, 2 * CHANNELS)
    tokens = torch.randn(ROWS, TOKENS, CHANNELS)
    yield first, "two_dimensions", {first: tokens[0]}
    yield first, "float64", {first: tokens.double()}
    yield first, "strided_channels", {first: wide[:, :, ::2]}
    for name in sorted(has & {"y", "residual", "old", "x_in", "computed", "out", "norm_out"} - {first}):
        both = unwritten(op) if "out" in name else {}
        typed = as_output(op, name, tokens)
        longer = as_output(op, name, torch.randn(ROWS, TOKENS, CHANNELS + 1))
        yield name, "other_channels", {**both, name: longer}
        yield name, "fewer_tokens", {**both, name: typed[:, 1:]}
        yield name, "one_row", {**both, name: typed[:1]}
        yield name, "two_dimensions", {**both, name: typed[0]}
        yield name, "float64", {**both, name: tokens.double()}
        yield name, "other_device", {**both, name: typed.to("meta")}
        yield name, "strided_channels", {**both, name: as_output(op, name, wide)[:, :, ::2]}
        if not (op == "reuse_residual" and name == "residual"):
            yield name, "other_dtype", {**both, name: tokens.half()}
            yield name, "not_a_tensor", {**both, name: 1.5}
        if name in written(op):
            yield name, "expanded_rows", {**both, name: typed[:1].expand(ROWS, TOKENS, CHANNELS)}
            yield name, "expanded_tokens", {**both, name: typed[:, :1].expand(ROWS, TOKENS, CHANNELS)}
    for name in sorted(has & set(MODULATORS)):
        yield name, "two_dimensions", {name: tokens[:, 0]}
        yield name, "one_row", {name: tokens[:1, :1]}
        yield name, "four_groups", {name: tokens[:, :4]}
        yield name, "other_channels", {name: tokens[:, :1, :1]}
        yield name, "other_dtype", {name: tokens[:, :1].half()}
        yield name, "other_device", {name: tokens[:, :1].to("meta")}
        yield name, "strided_channels", {name: wide[:, :1, ::2]}
        yield name, "expanded_channels", {name: tokens[:, :1, :1].expand(ROWS, 1, CHANNELS)}
        if "frames" in has:
            yield name, "two_groups", {name: tokens[:, :2]}
    for name in sorted(has & set(TABLES)):
        table = tokens[:1, :1]
        yield name, "two_dimensions", {name: table[0]}
        yield name, "two_rows", {name: tokens[:, :1]}
        yield name, "two_groups", {name: tokens[:1, :2]}
        yield name, "one_channel", {name: table[:, :, :1]}
        yield name, "float16", {name: table.half()}
        yield name, "other_device", {name: table.to("meta")}
        yield name, "strided_channels", {name: wide[:1, :1, ::2]}
        yield name, "without_modulator", {name: table, name.removesuffix("_table"): None}
    for name in sorted(has & {"rounding", "norm"}):
        yield name, "unknown", {name: "float64"}
        yield name, "not_a_string", {name: 0}
    present = [name for name in MODULATORS if name in has]
    if len(present) > 1 and "frames" not in has:
        one, other = present[-2:]
        yield other, f"other_groups_than_{one}", {one: tokens[:, :3], other: tokens[:, :2]}
    for name in sorted(has & {"weight", "bias"}):
        yield name, "two_dimensions", {name: tokens[0, :1]}
        yield name, "one_channel", {name: tokens[0, 0, :1]}
        yield name, "other_dtype", {name: tokens[0, 0].half()}
        yield name, "other_device", {name: tokens[0, 0].to("meta")}
        yield name, "not_contiguous", {name: wide[0, 0, ::2]}
    for name in sorted(has & set(INDICES)):
        # Row counts match those of the other arguments, so that only the index is invalid.
        yield name, "two_dimensions", {name: video_ids([0, 1])[None]}
        yield name, "int64", {name: torch.tensor([0, 1])}
        yield name, "other_device", {name: video_ids([0, 1], "meta")}
        yield name, "not_contiguous", {name: video_ids([0, 0, 1, 1])[::2]}
        if name != "x_rows":
            yield name, "too_short", {name: video_ids([0])}
    if "residual_scale" in has:
        eight, scale = tokens.to(FLOAT8), torch.ones(ROWS, TOKENS)
        name = "residual_scale"
        yield name, "without_float8", {name: scale}
        yield name, "missing", {"residual": eight}
        yield name, "three_dimensions", {"residual": eight, name: scale[:, :, None]}
        yield name, "fewer_tokens", {"residual": eight, name: scale[:, 1:]}
        yield name, "float64", {"residual": eight, name: scale.double()}
        yield name, "other_device", {"residual": eight, name: scale.to("meta")}
        if name in written(op):
            yield name, "expanded_tokens", {"residual": eight, name: scale[:, :1].expand(ROWS, TOKENS)}
        e5m2 = tokens.to(torch.float8_e5m2)
        yield "residual", "float8_e5m2", {"residual": e5m2, name: scale}
    if "frames" in has:
        yield "frames", "zero", {"frames": 0}
        yield "frames", "not_a_divisor", {"frames": 4}
        yield "strides", "zero", {"strides": (0,)}
        yield "strides", "negative", {"strides": (-1,)}
        yield "strides", "too_long", {"strides": (1, FRAMES)}
        yield "strides", "too_many", {"strides": (1,) * 9}
        yield "num_videos", "zero", {"num_videos": 0}
        yield "video_of_row", "missing_for_two_videos", {"video_of_row": None}
        yield "metric", "unknown", {"metric": "l3"}
        yield "metric", "not_a_string", {"metric": 0}
    if "video_of_row" in has:
        yield "video_of_row", "too_short", {"video_of_row": video_ids([0])}
        yield "video_of_row", "two_dimensions", {"video_of_row": video_ids([0, 1])[None]}
        yield "video_of_row", "int64", {"video_of_row": torch.tensor([0, 1])}
        yield "video_of_row", "float32", {"video_of_row": torch.zeros(2)}
        yield "video_of_row", "other_device", {"video_of_row": video_ids([0, 0], "meta")}
        yield "video_of_row", "not_contiguous", {"video_of_row": video_ids([0, 0, 0, 0])[::2]}
    if op == "reuse_residual":
        yes = torch.tensor([True, True])
        yield "reuse", "float32", {"reuse": torch.ones(2)}
        yield "reuse", "two_dimensions", {"reuse": yes[None]}
        yield "reuse", "three_videos", {"reuse": torch.tensor([True] * 3), "video_of_row": None}
        yield "reuse", "other_device", {"reuse": yes.to("meta")}
        yield "reuse", "not_contiguous", {"reuse": torch.tensor([True] * 4)[::2]}
    if op.startswith("extrapolate_residual"):
        yield "factors", "none", {"factors": [], "coefficients": torch.ones(2, 0)}
        yield (
            "factors",
            "too_many",
            {"factors": [tokens] * 5, "coefficients": torch.ones(2, 5)},
        )
        yield "factors", "two_dtypes", {"factors": [tokens, tokens.half()]}
        yield "factors", "float64", {"factors": [tokens.double()] * 2}
        yield "factors", "two_shapes", {"factors": [tokens, tokens[:, 1:]]}
        yield "factors", "other_device", {"factors": [tokens, tokens.to("meta")]}
        yield "factors", "strided_channels", {"factors": [tokens, wide[:, :, ::2]]}
        yield "coefficients", "float64", {"coefficients": torch.ones(2, 2).double()}
        yield "coefficients", "one_dimension", {"coefficients": torch.ones(2)}
        yield "coefficients", "three_factors", {"coefficients": torch.ones(2, 3)}
        three = {"coefficients": torch.ones(3, 2)} | ({} if "computed" in has else {"video_of_row": None})
        yield "coefficients", "three_videos", three
        yield "coefficients", "other_device", {"coefficients": torch.ones(2, 2, device="meta")}
        yield "coefficients", "not_contiguous", {"coefficients": torch.ones(2, 4)[:, ::2]}
    if "computed" in has:
        other = {"computed": None, "other_coefficients": torch.ones(2, 2)}
        yield "computed", "missing_without_other_coefficients", {"computed": None}
        yield "other_coefficients", "with_computed", {"other_coefficients": torch.ones(2, 2)}
        yield "other_coefficients", "one_video", other | {"other_coefficients": torch.ones(1, 2)}
        yield "other_coefficients", "float64", other | {"other_coefficients": torch.ones(2, 2).double()}
    if "norm_scale" in has:
        name, all_outputs = "norm_scale", unwritten(op)
        scale = all_outputs[name]
        yield name, "two_dimensions", all_outputs | {name: scale[:, :, 0]}
        yield name, "fewer_tokens", all_outputs | {name: scale[:, 1:]}
        yield name, "two_channels", all_outputs | {name: scale.repeat(1, 1, 2)}
        yield name, "float64", all_outputs | {name: scale.double()}
        yield name, "other_device", all_outputs | {name: scale.to("meta")}
        yield name, "expanded_tokens", all_outputs | {name: scale[:, :1].expand(ROWS, TOKENS, 1)}
        yield "norm_out", "float8_e5m2", all_outputs | {"norm_out": tokens.to(torch.float8_e5m2)}
    if len(outputs := unwritten(op)) > 1:
        for name in outputs:
            yield name, "missing", {other: tensor for other, tensor in outputs.items() if other != name}
