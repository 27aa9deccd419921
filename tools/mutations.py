"""Faults for tools/mutation_check.py: each an exact text of one file, what takes its place, and the tests
that have to catch it.

To add one, pick the cheapest selection that could; `python tools/mutation_check.py --only NAME` tries it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Selection:
    """Tests that are quick enough to run once for each fault: with one of them they have to end with exit
    status 1, or by a signal. `library`: the CPU library is built before; `compile`: commands that have to
    succeed before."""

    commands: Sequence[Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    library: bool = False
    compile: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    find: str
    replace: str
    selection: str


def pytest(*arguments: str) -> list[str]:
    return ["python", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]


def interpreted(*arguments: str) -> Selection:
    environment = {"TRITON_INTERPRET": "1", "ADACACHE_TEST_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}
    return Selection([pytest("-W", "ignore::RuntimeWarning", *arguments)], environment)


def library(name: str) -> Selection:
    """Tests of one op on the CPU library."""
    return Selection([pytest(f"tests/ops/test_{name}.py", "-k", "cpu")], library=True)


SELECTIONS = {
    "cpu gated_residual_meter": library("gated_residual_meter"),
    "cpu gated_residual_norm": library("gated_residual_norm"),
    "cpu reuse_residual": library("reuse_residual"),
    "cpu stack_residual_meter": library("stack_residual_meter"),
    "cpu extrapolate_residual": library("extrapolate_residual"),
    "cpu decide": library("decide"),
    "layer": Selection([pytest("tests/layer/test_adacache.py", "-k", "rule_written_out or half_precision")]),
    "triton meter": interpreted("tests/ops/test_gated_residual_meter.py", "-k", "random_cases or strides"),
}

MUTATIONS = [
    # The CPU library.
    Mutation(
        "out is written with the strides of x",
        "csrc/cpu/isa/gated_residual.h",
        "        out(token_of<T>(p.out, p.out_strides, row, token)),",
        "        out(token_of<T>(p.out, p.x_strides, row, token)),",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "the last frame is left out",
        "csrc/cpu/isa/meter.h",
        "  for (int64_t frame = 0; frame < shape.frames; ++frame) {",
        "  for (int64_t frame = 0; frame + 1 < shape.frames; ++frame) {",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "a last channel that is alone is left out",
        "csrc/cpu/isa/tokens.h",
        "  if (channel < channels) body(channel, channels - channel);",
        "  if (channel + 1 < channels) body(channel, channels - channel);",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "x_rows is not looked at",
        "csrc/cpu/isa/gated_residual_meter.h",
        "    const int64_t x_row = row_of(p.x_rows, unit.row);",
        "    const int64_t x_row = unit.row;",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "the gate is skipped at the end of a token",
        "csrc/cpu/isa/gated_residual.h",
        "    if (gate) r =",
        "    if (gate && count == lane_count) r =",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "every frame takes the gate of the first",
        "csrc/cpu/isa/tokens.h",
        "row * modulator.batch + frame * modulator.frame +",
        "row * modulator.batch + 0 * frame +",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "gate * y is not rounded before it is added",
        "csrc/cpu/isa/gated_residual.h",
        "round<T>(multiply(widen(load_part(gate + c, count)), r.value));",
        "RoundedLanes<T>{round<T>(multiply(widen(load_part(gate + c, count)), r.value)).stored,\n"
        "                        multiply(widen(load_part(gate + c, count)), r.value)};",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "motion is measured one frame off",
        "csrc/cpu/isa/meter.h",
        "residual_of(frame - stride, place, n - stride * shape.places), shape.channels);",
        "residual_of(frame - stride + 1, place, n - (stride - 1) * shape.places), shape.channels);",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "the new residual is not kept",
        "csrc/cpu/isa/meter.h",
        "    store_part(token_ + c, r.stored, count);\n",
        "",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "the scale of a float8 token is not kept",
        "csrc/cpu/isa/meter.h",
        "    *scale_ = float8_scale(largest);\n",
        "",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "all sums go to the first row's video",
        "csrc/cpu/parallel.h",
        "? result.video_of_row[unit / units_per_row] : 0;",
        "? result.video_of_row[0] : 0;",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "the norm's bias is left out",
        "csrc/cpu/isa/norm.h",
        "    if (bias) value = value + widen(load_part(bias + c, count));\n",
        "",
        "cpu gated_residual_norm",
    ),
    Mutation(
        "eps stands outside of the root",
        "csrc/cpu/isa/norm.h",
        "1 / __builtin_sqrtf(variance + norm.eps)",
        "1 / (__builtin_sqrtf(variance) + norm.eps)",
        "cpu gated_residual_norm",
    ),
    Mutation(
        "the variance counts what lies past the last channel",
        "csrc/cpu/isa/norm.h",
        "c % lane_count != 0; ++c) row.values[c] = mean;",
        "c % lane_count != 0; ++c) row.values[c] = 0;",
        "cpu gated_residual_norm",
    ),
    Mutation(
        "rows swap their residuals",
        "csrc/cpu/isa/reuse_residual.h",
        "  const int64_t residual_row = row_of(p.residual.rows, unit.row);",
        "  const int64_t residual_row = row_of(p.residual.rows, p.rows - 1 - unit.row);",
        "cpu reuse_residual",
    ),
    Mutation(
        "a video that computes gets its residual too",
        "csrc/cpu/reuse_residual.cpp",
        "    if (reuse || p.out != p.x) chosen.reuse_residual(p, reuse, unit);",
        "    if (reuse || p.out != p.x) chosen.reuse_residual(p, true, unit);",
        "cpu reuse_residual",
    ),
    Mutation(
        "the stack's residual has the wrong sign",
        "csrc/cpu/isa/stack_residual_meter.h",
        "round<T>(widen(later) - widen(load_part(x_in + c, count)));",
        "round<T>(widen(load_part(x_in + c, count)) - widen(later));",
        "cpu stack_residual_meter",
    ),
    Mutation(
        "the last factor is left out",
        "csrc/cpu/isa/extrapolate_residual.h",
        "      for (int i = 1; i < p.factors; ++i)\n        sum",
        "      for (int i = 1; i + 1 < p.factors; ++i)\n        sum",
        "cpu extrapolate_residual",
    ),
    Mutation(
        "a distance that is no number is reused",
        "csrc/core/decide.h",
        "    state[state_nonfinite] = 1;\n    state[state_rate] = 1;",
        "    state[state_nonfinite] = 1;\n    state[state_rate] = rule.rates[0];",
        "cpu decide",
    ),
    # The layer.
    Mutation(
        "the metric site reports the sums of another step",
        "python/adacache/policies/adacache.py",
        "sums, self._state, step=step, site=site,",
        "sums, self._state, step=step - 1, site=site,",
        "layer",
    ),
]
