# SPDX-License-Identifier: Apache-2.0
"""Calls each op with random tensors and checks all outputs and all memory that it must not change.

Expected values are computed in NumPy: in float32 if results must be bit-identical, otherwise in float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from op_cases import Buffer, Shape, check_sums, exact_sums, random_gate, random_tensor, same_bits, video_ids

import adacache_kernels

FLOAT8 = torch.float8_e4m3fn
SMALL = Shape(2, 3, 5, 40)
MODULATORS = ["row", "frame", "token", "shared", "row_expanded"]
VALUES = ["normal", "tiny", "huge", "special", "flat", "sparse"]


@dataclass(frozen=True)
class Case:
    """The arguments of a call. Each op uses the fields that it supports."""

    shape: Shape = SMALL
    dtype: torch.dtype = torch.float32
    seed: int = 0
    #: Layouts of the tensors in order of creation, repeated cyclically.
    layouts: tuple[str, ...] = ("contiguous",)
    values: str = "normal"
    gate: str | None = "frame"
    shift: str | None = "row"
    scale: str | None = "frame"
    #: The modulators and vectors in float32 beside a 16-bit x.
    wide: tuple[str, ...] = ()
    #: The modulators with a table; those that are absent have none.
    tables: tuple[str, ...] = ()
    rounding: str = "eager"
    norm: str = "layer"
    weight: bool = False
    bias: bool = False
    eps: float = 1e-6
    kept: torch.dtype | None = None  # None: the dtype of x
    strides: tuple[int, ...] = (1,)
    metric: str = "l1"
    videos: tuple[int, ...] | None = None
    num_videos: int = 1
    reuse: tuple[bool, ...] | None = None
    factors: int = 2
    compare: str = "forecast"  # what a forecast is measured against; or "computed"
    x_total: int | None = None  # rows of x, if it is indexed by x_rows
    kept_total: int | None = None
    out: str = "fresh"  # allocated; or "given", or "x" for in place

    @property
    def metering(self) -> dict[str, Any]:
        strides = tuple(stride for stride in self.strides if stride < self.shape.frames)
        return {
            "frames": self.shape.frames,
            "strides": strides,
            "num_videos": self.num_videos,
            "metric": self.metric,
        }


def judge_gated(op: str, case: Case, device: torch.device) -> None:
    """gated_residual and the ops that fuse it."""
    meters, norms, float8 = op.endswith("meter"), "norm" in op, op.endswith("float8")
    tensors = Tensors(case, device)
    x = tensors.stream("x", case.x_total)
    y = tensors.stream("y")
    gate = tensors.modulator("gate", case.gate)
    x_rows = tensors.rows(case.x_total, distinct=False)
    keywords: dict[str, Any] = {"x_rows": x_rows, "rounding": case.rounding} | tensors.tables("gate")
    arguments = [x, y, gate]
    if meters:
        kept, kept_scale, old = tensors.cache()
        kept_rows = tensors.rows(case.kept_total, distinct=True)
        arguments.append(kept)
        keywords |= {"residual_scale": kept_scale, "residual_rows": kept_rows, **case.metering}
        keywords["video_of_row"] = None if case.videos is None else video_ids(case.videos, device)
    if norms:
        shift, scale = tensors.modulator("shift", case.shift), tensors.modulator("scale", case.scale)
        arguments += [shift, scale]
        keywords |= tensors.affine() | tensors.tables("shift", "scale") | {"eps": case.eps, "norm": case.norm}
    out = tensors.output(x if x_rows is None else None)
    keywords["out"] = out
    if norms:
        keywords |= tensors.norm_outputs(float8, given=out is not None)

    product = numbers(y)
    if gate is not None:
        product = modulation(gate, keywords["gate_table"], case.shape) * product
    new = rounded(product, case.dtype)
    added = product if case.rounding == "float32" else numbers(new)
    expected = rounded(pick(numbers(x), x_rows) + added, case.dtype)

    results = getattr(adacache_kernels, op)(*arguments, **keywords)
    results = results if isinstance(results, tuple) else (results,)
    x_out, sums = results[0], results[-1]
    check_bits("x_out", x_out, expected)
    written = ["out", "norm_out", "norm_scale"]
    if out is not None:
        assert x_out is out
        assert not norms or results[1] is keywords["norm_out"]
        assert not float8 or results[2] is keywords["norm_scale"]
        written += ["x"] if out is x else []
    if float8:
        check_norm_float8(*results[1:], expected, shift, scale, keywords, case)
    elif norms:
        check_norm(results[1], expected, shift, scale, keywords, case)
    if meters:
        check_cache(new, kept, kept_scale, kept_rows, tensors)
        check_meter(sums, new, pick(old, kept_rows), case)
        written += ["residual", "residual_scale"]
    tensors.check_rest(written)


def judge_stack_residual_meter(case: Case, device: torch.device) -> None:
    tensors = Tensors(case, device)
    total = case.kept_total
    x_out, x_in = tensors.stream("x_out"), tensors.stream("x_in", total)
    kept, kept_scale, old = tensors.cache()
    rows = tensors.rows(total, distinct=True)
    out = tensors.output(x_in, total)
    before = None if out is None else out.clone()
    new = rounded(numbers(x_out) - pick(numbers(x_in), rows), case.dtype)
    sums = adacache_kernels.stack_residual_meter(
        x_out,
        x_in,
        kept,
        residual_scale=kept_scale,
        rows=rows,
        video_of_row=None if case.videos is None else video_ids(case.videos, device),
        out=out,
        **case.metering,
    )
    check_cache(new, kept, kept_scale, rows, tensors)
    check_meter(sums, new, pick(old, rows), case)
    if out is not None and before is not None:
        before[slice(None) if rows is None else rows.long()] = x_out
        check_bits("out", out, before.cpu())
    tensors.check_rest(["residual", "residual_scale", "out", *(["x_in"] if out is x_in else [])])


def judge_residual_meter(case: Case, device: torch.device) -> None:
    tensors = Tensors(case, device)
    new, old = tensors.stream("residual"), tensors.stream("old")
    videos = None if case.videos is None else video_ids(case.videos, device)
    sums = adacache_kernels.residual_meter(new, old, video_of_row=videos, **case.metering)
    check_meter(sums, new.cpu(), numbers(old), case)
    tensors.check_rest([])


def judge_reuse_residual(case: Case, device: torch.device) -> None:
    tensors = Tensors(case, device)
    x = tensors.stream("x", case.x_total)
    kept, kept_scale, values = tensors.cache()
    x_rows = tensors.rows(case.x_total, distinct=False)
    kept_rows = tensors.rows(case.kept_total, distinct=False)
    out = tensors.output(x if x_rows is None else None)
    before = pick(numbers(x), x_rows)
    expected = rounded(before + pick(values, kept_rows), case.dtype)
    if case.reuse is not None:
        owners = owner_of_row(case.videos, len(case.reuse), case.shape.rows)
        reuses = torch.tensor([case.reuse[video] for video in owners], dtype=torch.bool)
        expected = torch.where(reuses[:, None, None], expected, rounded(before, case.dtype))
    x_out = adacache_kernels.reuse_residual(
        x,
        kept,
        residual_scale=kept_scale,
        x_rows=x_rows,
        residual_rows=kept_rows,
        video_of_row=None if case.videos is None else video_ids(case.videos, device),
        reuse=None if case.reuse is None else torch.tensor(case.reuse, device=device),
        out=out,
    )
    check_bits("x_out", x_out, expected)
    assert out is None or x_out is out
    tensors.check_rest(["out", *(["x"] if out is x else [])])


def judge_extrapolate_residual(op: str, case: Case, device: torch.device) -> None:
    meters = op.endswith("meter")
    tensors = Tensors(case, device)
    rows = case.shape.rows
    x = tensors.stream("x", case.x_total)
    factors = [
        tensors.stream(f"factors[{index}]", case.kept_total, case.kept or case.dtype)
        for index in range(case.factors)
    ]
    x_rows = tensors.rows(case.x_total, distinct=False)
    kept_rows = tensors.rows(case.kept_total, distinct=False)
    out = tensors.output(x if x_rows is None else None)
    coefficients = tensors.coefficients()
    owners = owner_of_row(case.videos, coefficients.shape[0], rows)
    of_row = coefficients.cpu().numpy()[owners]

    def forecast(by_row: numpy.ndarray) -> numpy.ndarray:
        terms = [
            by_row[:, index, None, None] * pick(numbers(factor), kept_rows)
            for index, factor in enumerate(factors)
        ]
        return functools.reduce(numpy.add, terms)

    change = forecast(of_row)
    keywords: dict[str, Any] = {}
    if meters:
        keywords = case.metering
        if case.compare == "computed":
            keywords["computed"] = tensors.stream("computed")
            old = numbers(keywords["computed"])
        else:
            keywords["other_coefficients"] = tensors.coefficients()
            old = forecast(keywords["other_coefficients"].cpu().numpy()[owners])
    expected = rounded(pick(numbers(x), x_rows) + change, case.dtype)
    results = getattr(adacache_kernels, op)(
        x,
        factors,
        coefficients,
        video_of_row=None if case.videos is None else video_ids(case.videos, device),
        x_rows=x_rows,
        residual_rows=kept_rows,
        out=out,
        **keywords,
    )
    x_out = results[0] if meters else results
    check_bits("x_out", x_out, expected)
    assert out is None or x_out is out
    if meters:
        check_meter(results[1], torch.from_numpy(change), old, case)
    tensors.check_rest(["out", *(["x"] if out is x else [])])


def judge_norm_modulate(op: str, case: Case, device: torch.device) -> None:
    float8 = op.endswith("float8")
    if not float8:
        case = dataclasses.replace(case, norm=op.partition("_")[0])
    tensors = Tensors(case, device)
    x = tensors.stream("x", case.x_total)
    shift, scale = tensors.modulator("shift", case.shift), tensors.modulator("scale", case.scale)
    keywords = tensors.affine() | tensors.tables("shift", "scale")
    x_rows = tensors.rows(case.x_total, distinct=False)
    values = rounded(pick(numbers(x), x_rows), case.dtype)
    arguments = (x, shift, scale)
    keywords |= {"eps": case.eps, "x_rows": x_rows}
    if float8:
        outputs = tensors.norm_outputs(float8, given=case.out != "fresh")
        results = adacache_kernels.norm_modulate_float8(*arguments, norm=case.norm, **outputs, **keywords)
        check_norm_float8(*results, values, shift, scale, keywords, case)
        for result, output in zip(results, outputs.values(), strict=True):
            assert output is None or result is output
        tensors.check_rest(["norm_out", "norm_scale"])
        return
    out = tensors.output(x if x_rows is None else None)
    y = getattr(adacache_kernels, op)(*arguments, out=out, **keywords)
    check_norm(y, values, shift, scale, keywords, case)
    assert out is None or y is out
    tensors.check_rest(["out", *(["x"] if out is x else [])])


def _quiet(judge: Callable[[Case, torch.device], None]) -> Callable[[Case, torch.device], None]:
    @functools.wraps(judge)
    def quiet(case: Case, device: torch.device) -> None:
        with numpy.errstate(all="ignore"):  # cases include overflow and NaN
            judge(case, device)

    return quiet


#: Per op, a function that runs and checks one case.
JUDGES: dict[str, Callable[[Case, torch.device], None]] = {
    "gated_residual": _quiet(functools.partial(judge_gated, "gated_residual")),
    "gated_residual_meter": _quiet(functools.partial(judge_gated, "gated_residual_meter")),
    "gated_residual_norm": _quiet(functools.partial(judge_gated, "gated_residual_norm")),
    "gated_residual_norm_meter": _quiet(functools.partial(judge_gated, "gated_residual_norm_meter")),
    "stack_residual_meter": _quiet(judge_stack_residual_meter),
    "residual_meter": _quiet(judge_residual_meter),
    "reuse_residual": _quiet(judge_reuse_residual),
    "extrapolate_residual": _quiet(functools.partial(judge_extrapolate_residual, "extrapolate_residual")),
    "extrapolate_residual_meter": _quiet(
        functools.partial(judge_extrapolate_residual, "extrapolate_residual_meter")
    ),
    "layer_norm_modulate": _quiet(functools.partial(judge_norm_modulate, "layer_norm_modulate")),
    "rms_norm_modulate": _quiet(functools.partial(judge_norm_modulate, "rms_norm_modulate")),
    "norm_modulate_float8": _quiet(functools.partial(judge_norm_modulate, "norm_modulate_float8")),
    "gated_residual_norm_float8": _quiet(functools.partial(judge_gated, "gated_residual_norm_float8")),
}


class Tensors:
    """The tensors of one call, each with its own layout, and copies of their contents before the call."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(case.seed)
        self.buffers: dict[str, Buffer] = {}
        self.before: dict[str, torch.Tensor] = {}

    def stream(self, name: str, rows: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        shape, dtype = self.case.shape, dtype or self.case.dtype
        size = (shape.rows if rows is None else rows, shape.tokens, shape.channels)
        values = random_tensor(self.generator, *size, dtype=torch.float64)
        return self._keep(name, self._as_asked(values, dtype).to(dtype).to(self.device))

    def cache(self) -> tuple[torch.Tensor, torch.Tensor | None, numpy.ndarray]:
        """The kept residual, its scales, and its values."""
        dtype = self.case.kept or self.case.dtype
        if dtype != FLOAT8:
            kept = self.stream("residual", self.case.kept_total, dtype)
            return kept, None, numbers(kept)
        shape = self.case.shape
        rows = shape.rows if self.case.kept_total is None else self.case.kept_total
        numbers8 = torch.randn(rows, shape.tokens, shape.channels, generator=self.generator) * 100
        kept = self._keep("residual", numbers8.clamp(-448, 448).to(FLOAT8).to(self.device))
        scales = torch.rand(rows, shape.tokens, 1, generator=self.generator) / 64
        scale = self._keep("residual_scale", scales.to(self.device))[:, :, 0]
        return kept, scale, numbers(scale)[:, :, None] * numbers(kept)

    def modulator(self, name: str, kind: str | None) -> torch.Tensor | None:
        if kind is None:
            return None
        shape = self.case.shape
        modulator = random_gate(self.generator, shape, kind, torch.float64, "cpu")
        modulator = modulator.to(self._dtype_of(name)).to(self.device)
        if kind in ("shared", "row_expanded"):
            return (modulator[:1] if kind == "shared" else modulator[:, :1]).expand(modulator.shape)
        return self._keep(name, modulator)

    def tables(self, *names: str) -> dict[str, torch.Tensor | None]:
        tables: dict[str, torch.Tensor | None] = {}
        for name in names:
            present = name in self.case.tables and getattr(self.case, name) is not None
            # Six modulators in one table, like in a model.
            table = torch.randn(1, 6, self.case.shape.channels, generator=self.generator).to(self.device)
            tables[f"{name}_table"] = table[:, 2:3] if present else None
        return tables

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.case.wide else self.case.dtype

    def affine(self) -> dict[str, torch.Tensor | None]:
        vectors: dict[str, torch.Tensor | None] = {}
        for name, given in (("weight", self.case.weight), ("bias", self.case.bias)):
            vectors[name] = None
            if given:
                vector = torch.randn(self.case.shape.channels, generator=self.generator)
                vectors[name] = vector.to(self._dtype_of(name)).to(self.device)
        return vectors

    def coefficients(self) -> torch.Tensor:
        case = self.case
        videos = case.num_videos if case.videos is not None or case.num_videos == 1 else case.shape.rows
        return torch.randn(videos, case.factors, generator=self.generator).to(self.device)

    def rows(self, total: int | None, *, distinct: bool) -> torch.Tensor | None:
        if total is None:
            return None
        batch = self.case.shape.rows
        if distinct:
            picked = torch.randperm(total, generator=self.generator)[:batch]
        else:
            picked = torch.randint(max(total, 1), (batch,), generator=self.generator)
        return picked.to(torch.int32).to(self.device)

    def output(self, x: torch.Tensor | None, rows: int | None = None) -> torch.Tensor | None:
        """None, a new tensor, or x for an in-place call."""
        if self.case.out == "x" and x is not None:
            return x
        return None if self.case.out == "fresh" else self.fresh("out", rows)

    def norm_outputs(self, float8: bool, *, given: bool) -> dict[str, torch.Tensor | None]:
        names = ("norm_out", "norm_scale") if float8 else ("norm_out",)
        return {name: self.fresh(name, float8=float8) if given else None for name in names}

    def fresh(self, name: str, rows: int | None = None, *, float8: bool = False) -> torch.Tensor:
        shape, dtype = self.case.shape, FLOAT8 if float8 else self.case.dtype
        size = (shape.rows if rows is None else rows, shape.tokens, shape.channels)
        if name == "norm_scale":
            size, dtype = (*size[:2], 1), torch.float32
        return self._keep(name, torch.full(size, torch.nan, device=self.device).to(dtype))

    def check_rest(self, written: Sequence[str]) -> None:
        """Inputs are unchanged, and so is all memory around the tensors."""
        for name, buffer in self.buffers.items():
            assert name in written or same_bits(buffer.tensor, self.before[name]), name
            buffer.check_surroundings()

    def _keep(self, name: str, values: torch.Tensor) -> torch.Tensor:
        in_place = name in ("x", "x_in") and self.case.out == "x"
        written = in_place or name in ("residual", "residual_scale", "out", "norm_out", "norm_scale")
        layout = self.case.layouts[len(self.buffers) % len(self.case.layouts)]
        if written and layout.startswith("shared"):
            layout = "contiguous"
        self.buffers[name] = Buffer(values, layout)
        self.before[name] = self.buffers[name].tensor.clone()
        return self.buffers[name].tensor

    def _as_asked(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        kind, half = self.case.values, dtype == torch.float16
        if kind == "tiny":
            return values * (1e-6 if half else 1e-30)
        if kind == "huge":
            return values * (1e3 if half else 1e6)  # gate*y overflows in float16
        if kind == "special" and values.numel():
            count = 1 + values.numel() // 500
            places = torch.randint(values.numel(), (count,), generator=self.generator)
            choice = torch.randint(4, (count,), generator=self.generator)
            values.view(-1)[places] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0]).double()[choice]
        if kind == "flat" and values.numel():  # zero variance per token
            return values[:, :, :1].expand(values.shape)
        if kind == "sparse":
            return values * (torch.rand(*values.shape[:2], 1, generator=self.generator) < 0.5)
        return values


def numbers(tensor: torch.Tensor) -> numpy.ndarray:
    return numpy.array(tensor.detach().cpu().float().numpy())


def rounded(values: numpy.ndarray, dtype: torch.dtype) -> torch.Tensor:
    assert values.dtype == numpy.float32
    return torch.from_numpy(numpy.ascontiguousarray(values)).to(dtype)


def pick(values: numpy.ndarray, rows: torch.Tensor | None) -> numpy.ndarray:
    return values if rows is None else values[rows.cpu().numpy()]


def by_token(modulator: torch.Tensor, shape: Shape) -> numpy.ndarray:
    """The modulator expanded to one value per token."""
    values = numbers(modulator)
    groups = values.shape[1]
    return values if groups in (1, shape.tokens) else values.repeat(shape.tokens // groups, 1)


def modulation(modulator: torch.Tensor, table: torch.Tensor | None, shape: Shape) -> numpy.ndarray:
    """The modulator per token, and its table, added in float32."""
    values = by_token(modulator, shape)
    return values if table is None else numbers(table) + values


def owner_of_row(videos: Sequence[int] | None, count: int, rows: int) -> list[int]:
    return list(videos) if videos is not None else list(range(rows)) if count > 1 else [0] * rows


def check_bits(name: str, given: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit-identical, except for the payload of NaNs."""
    given = given.detach().cpu()
    assert given.shape == expected.shape, name
    assert given.dtype == expected.dtype, name
    if same_bits(given, expected):
        return
    one, other = numbers(given), numbers(expected)
    same = (one.view(numpy.int32) == other.view(numpy.int32)) | (numpy.isnan(one) & numpy.isnan(other))
    where = tuple(index[0] for index in numpy.nonzero(~same)) if not same.all() else ()
    assert not where, f"{name}{list(map(int, where))}: got {one[where]}, expected {other[where]}"


def check_meter(sums: torch.Tensor, new: torch.Tensor, old: numpy.ndarray, case: Case) -> None:
    metering = case.metering
    exact, scale = exact_sums(
        new,
        torch.from_numpy(old),
        metering["frames"],
        metering["strides"],
        case.metric,
        case.videos,
        case.num_videos,
    )
    check_sums(sums, exact, scale, case.shape.channels)


def check_cache(
    new: torch.Tensor,
    kept: torch.Tensor,
    scale: torch.Tensor | None,
    rows: torch.Tensor | None,
    tensors: Tensors,
) -> None:
    """The indexed rows of the cache contain the new residual; all other rows are unchanged."""
    expected = tensors.before["residual"].cpu()
    mine = slice(None) if rows is None else rows.cpu().numpy().astype(int)
    if scale is None or not tensors.case.shape.channels:  # with C = 0 the scale is undefined
        expected[mine] = new.to(expected.dtype)
        check_bits("residual", kept, expected)
        return
    values = numbers(new)
    largest = abs(values).max(-1, initial=0)
    negligible = largest < numpy.float32(2.0**-100)
    one = numpy.float32(1)
    scales = numpy.where(negligible, one, largest * (one / numpy.float32(448)))
    inverse = numpy.where(negligible, one, numpy.float32(448) / largest)
    stored = rounded(values * inverse[:, :, None], FLOAT8)
    expected_scale = tensors.before["residual_scale"].cpu()[:, :, 0]
    expected.view(torch.uint8)[mine] = stored.view(torch.uint8)
    expected_scale[mine] = torch.from_numpy(scales)
    check_bits("residual_scale", scale, expected_scale)
    check_bits("residual", kept, expected)
    # The error of float8: 3 mantissa bits, or the spacing of subnormals.
    error = abs(numbers(kept)[mine] * numbers(scale)[mine][:, :, None] - values)
    finite = numpy.isfinite(largest)
    bound = abs(values) * 2.0**-4 * 1.001 + (scales * 2.0**-10)[:, :, None]
    assert (error[finite] <= bound[finite]).all()


def check_norm(
    given: torch.Tensor,
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    keywords: dict[str, Any],
    case: Case,
) -> None:
    """Compares with the norm in float64: within the error bound of float32 arithmetic and one rounding to the
    dtype, and within twice the error of eager PyTorch."""
    dtype, channels = case.dtype, case.shape.channels
    assert given.dtype == dtype
    assert given.shape == x.shape
    if given.numel() == 0:
        return
    weight, bias = keywords["weight"], keywords["bias"]
    exact, bound, gain, move = exact_norm(x, shift, scale, keywords, case)
    unit = torch.finfo(dtype).eps / 2
    floor = torch.finfo(dtype).smallest_normal * unit
    bound = bound + unit * abs(exact) + floor
    result = numbers(given).astype(float)
    finite = numpy.isfinite(exact) & (abs(exact) < 0.999 * torch.finfo(dtype).max)
    overflown = numpy.isfinite(exact) & ~finite
    assert (numpy.isfinite(result) == numpy.isfinite(exact))[~overflown].all()
    error = abs(result - exact)
    worst = numpy.where(finite, error / bound, 0)
    assert worst.max() <= 1, (
        f"{worst.max()} times the bound at {numpy.unravel_index(worst.argmax(), worst.shape)}"
    )

    vectors = [None if vector is None else vector.cpu().to(dtype) for vector in (weight, bias)]
    if case.norm == "layer":
        normed = torch.nn.functional.layer_norm(x, (channels,), *vectors, case.eps)
    else:
        normed = torch.nn.functional.rms_norm(x, (channels,), vectors[0], case.eps)
        normed = normed if vectors[1] is None else normed + vectors[1]
    gain_like_x, move_like_x = (rounded(value.astype(numpy.float32), dtype) for value in (gain - 1, move))
    eager = numbers(normed * (1 + gain_like_x) + move_like_x).astype(float)
    finite &= numpy.isfinite(eager)
    allowed = 2 * abs(eager - exact)[finite].max(initial=0) + bound[finite].max(initial=0)
    assert error[finite].max(initial=0) <= allowed


def check_norm_float8(
    given: torch.Tensor,
    given_scale: torch.Tensor,
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    keywords: dict[str, Any],
    case: Case,
) -> None:
    """Compares with the norm in float64: within the error bound of float32 arithmetic and of float8, which is
    3 mantissa bits or the spacing of subnormals. The largest magnitude of a token is stored as 448."""
    assert given.dtype == FLOAT8
    assert given_scale.dtype == torch.float32
    assert given.shape == x.shape
    assert given_scale.shape == (*x.shape[:2], 1)
    if given.numel() == 0:
        return
    exact, bound, _, _ = exact_norm(x, shift, scale, keywords, case)
    stored, scales = numbers(given).astype(float), numbers(given_scale).astype(float)
    finite = numpy.isfinite(exact).all(-1)
    assert numpy.isnan(stored[~finite]).all()
    assert numpy.isnan(scales[~finite]).all()
    exact, bound, stored, scales = (values[finite] for values in (exact, bound, stored, scales))
    error, allowed = abs(stored * scales - exact), bound + (abs(exact) + bound) * 2.0**-4 + scales * 2.0**-10
    assert (error <= 1.001 * allowed).all()
    largest, uncertain = (values.max(-1, keepdims=True) for values in (abs(exact), bound))
    negligible = (scales == 1) & (largest <= uncertain + 2.0**-100)
    assert (negligible | (abs(448 * scales - largest) <= uncertain + largest * 2.0**-22)).all()
    assert (negligible | (abs(stored).max(-1, keepdims=True) == 448)).all()


def exact_norm(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    keywords: dict[str, Any],
    case: Case,
) -> tuple[numpy.ndarray, ...]:
    """The norm in float64, the error bound of float32 arithmetic, 1 + scale, and shift."""
    channels = case.shape.channels
    values = numbers(x).astype(float)
    weight, bias = keywords["weight"], keywords["bias"]
    layer = case.norm == "layer"
    centred = values - values.mean(-1, keepdims=True) if layer else values
    deviation = 1 / numpy.sqrt((centred**2).mean(-1, keepdims=True) + case.eps)
    one, zero = numpy.ones(1), numpy.zeros(1)
    factor = one if weight is None else numbers(weight).astype(float)
    offset = zero if bias is None else numbers(bias).astype(float)
    gain, move = one, zero
    if scale is not None:
        gain = 1 + modulation(scale, keywords["scale_table"], case.shape).astype(float)
    if shift is not None:
        move = modulation(shift, keywords["shift_table"], case.shape).astype(float)
    exact = (centred * deviation * factor + offset) * gain + move

    # Each mean has an error of one ulp per addition of a float32 run; the variance has that error twice.
    additions = channels / 16 + 16
    largest = abs(values).max(-1, keepdims=True) * deviation
    largest = numpy.where(numpy.isnan(largest), 0, largest)  # rms: an infinity makes the other elements 0
    magnitude = (largest + abs(centred) * deviation) * abs(factor)
    magnitude = (magnitude + abs(offset)) * (1 + abs(gain - 1)) + abs(move)
    return exact, additions * 2.0**-24 * magnitude, gain, move
