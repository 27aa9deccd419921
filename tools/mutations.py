# SPDX-License-Identifier: Apache-2.0
"""Faults for tools/mutation_check.py: a text of one file, its replacement, and the tests that must catch it.

To add a fault, choose the fastest selection that catches it, and run `python tools/mutation_check.py --only
NAME`. `make mutation` plants the faults in QUICK, which cover each kind of code and test."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Selection:
    """Tests that run once per fault. A fault is caught if they exit with status 1 or by a signal.
    library: the CPU library is built first. compile: commands that run first and must succeed."""

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


def interpreted(name: str) -> Selection:
    """Tests of one op on its Triton kernel, in the interpreter."""
    environment = {"TRITON_INTERPRET": "1", "ADACACHE_TEST_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}
    return Selection([pytest("-W", "ignore::RuntimeWarning", f"tests/ops/test_{name}.py")], environment)


def library(name: str) -> Selection:
    """Tests of one op on the CPU library."""
    return Selection([pytest(f"tests/ops/test_{name}.py", "-k", "cpu")], library=True)


def bodies(sanitize: str = "", cases: int = 12) -> Selection:
    """Tests of the CUDA bodies on the host, against plain loops."""
    folder = f"build/host{sanitize}"
    compile = ["make", "-s", "-j2", "-f", "tools/host_bodies.mk", f"OUT={folder}", f"SANITIZE={sanitize}"]
    compile.append("WERROR=")  # a planted fault may leave a variable unused
    run = [f"{folder}/kernels_on_host", "--cases", str(cases)]
    # Old ThreadSanitizers do not support the address randomization of new kernels.
    prefix = ["setarch", "-R"] if sanitize and shutil.which("setarch") else []
    return Selection([[*prefix, *run]], {"TSAN_OPTIONS": "exitcode=1"}, compile=[compile])


SELECTIONS = {
    "cpu gated_residual_meter": library("gated_residual_meter"),
    "cpu modulators": library("modulators"),
    "cpu gated_residual_norm": library("gated_residual_norm"),
    "cpu norm_float8": library("norm_float8"),
    "cpu reuse_residual": library("reuse_residual"),
    "cpu stack_residual_meter": library("stack_residual_meter"),
    "cpu extrapolate_residual": library("extrapolate_residual"),
    "cpu extrapolate_residual_meter": library("extrapolate_residual_meter"),
    "cpu temporal_attention": library("temporal_attention"),
    "cpu decide": library("decide"),
    "bodies": bodies(),
    "bodies, races": bodies("thread", 4),
    "triton gated_residual_meter": interpreted("gated_residual_meter"),
    "triton gated_residual_norm": interpreted("gated_residual_norm"),
    "triton modulators": interpreted("modulators"),
    "triton reuse_residual": interpreted("reuse_residual"),
    "triton temporal_attention": interpreted("temporal_attention"),
    "argument checks": Selection([pytest("tests/ops/test_every_op.py", "-k", "reference")]),
    "serving": Selection(
        [pytest("tests/serving/test_serving_engine.py", "-k", "single_runs or fills_the_calls")]
    ),
    "layer": Selection(
        [
            pytest(
                "tests/layer/test_adacache.py",
                "-k",
                "rule_written_out or any_order or decide_for_themselves or two_calls",
            )
        ]
    ),
}

MUTATIONS = [
    # The CPU library.
    Mutation(
        "out uses the strides of x",
        "csrc/cpu/isa/gated_residual.h",
        "        out(token_of<T>(p.out, p.out_strides, row, token)),",
        "        out(token_of<T>(p.out, p.x_strides, row, token)),",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "the last frame is skipped",
        "csrc/cpu/isa/meter.h",
        "  for (int64_t frame = 0; frame < shape.frames; ++frame) {",
        "  for (int64_t frame = 0; frame + 1 < shape.frames; ++frame) {",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "a single tail channel is skipped",
        "csrc/cpu/isa/tokens.h",
        "  if (channel < channels) body(channel, channels - channel);",
        "  if (channel + 1 < channels) body(channel, channels - channel);",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "x_rows is ignored",
        "csrc/cpu/isa/gated_residual_meter.h",
        "  const int64_t x_row = row_of(p.x_rows, unit.row);",
        "  const int64_t x_row = unit.row;",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "the gate is skipped after 16 channels",
        "csrc/cpu/isa/gated_residual.h",
        "    if (gate) r =",
        "    if (gate && c < lane_count) r =",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "every frame uses the gate of frame 0",
        "csrc/cpu/isa/tokens.h",
        "row * modulator.batch + frame * modulator.frame +",
        "row * modulator.batch + 0 * frame +",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "gate * y is not rounded before the sum",
        "csrc/cpu/isa/gated_residual.h",
        "round<T>(multiply(widen(load_part(gate + c, count)), r.value));",
        "RoundedLanes<T>{round<T>(multiply(widen(load_part(gate + c, count)), r.value)).stored,\n"
        "                        multiply(widen(load_part(gate + c, count)), r.value)};",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "motion uses the wrong frame",
        "csrc/cpu/isa/meter.h",
        "residual_of(frame - stride, place, n - stride * shape.places), shape.channels);",
        "residual_of(frame - stride + 1, place, n - (stride - 1) * shape.places), shape.channels);",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "the new residual is not stored",
        "csrc/cpu/isa/meter.h",
        "    store_part(token_ + c, r.stored, count);\n",
        "",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "the scale of a float8 token is not stored",
        "csrc/cpu/isa/meter.h",
        "    *scale_ = float8_scale(largest);\n",
        "",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "all sums are added to the video of row 0",
        "csrc/cpu/parallel.h",
        "? result.video_of_row[unit / units_per_row] : 0;",
        "? result.video_of_row[0] : 0;",
        "cpu gated_residual_meter",
    ),
    Mutation(
        "the bias of the norm is ignored",
        "csrc/cpu/isa/norm.h",
        "      if (bias) offset = factor * bias.load(c, count);\n",
        "",
        "cpu gated_residual_norm",
    ),
    Mutation(
        "the table of a modulator is ignored",
        "csrc/cpu/isa/tokens.h",
        "  return table ? ",
        "  return false && table ? ",
        "cpu modulators",
    ),
    Mutation(
        "the residual is rounded twice",
        "csrc/cpu/isa/gated_residual.h",
        "      if (rounds_once) added = multiply(widen(load_part(gate + c, count)), widen(stored));",
        "      if (rounds_once) added = r.value;",
        "cpu modulators",
    ),
    Mutation(
        "the rms norm subtracts the mean",
        "csrc/cpu/isa/norm.h",
        "norm_->kind == NormKind::layer",
        "norm_->kind <= NormKind::rms",
        "cpu modulators",
    ),
    Mutation(
        "eps is added after the square root",
        "csrc/cpu/isa/norm.h",
        "1 / __builtin_sqrtf(variance + norm_->eps)",
        "1 / (__builtin_sqrtf(variance) + norm_->eps)",
        "cpu gated_residual_norm",
    ),
    Mutation(
        "the variance includes the padding",
        "csrc/cpu/isa/norm.h",
        "c % lane_count != 0; ++c) values_[c] = mean;",
        "c % lane_count != 0; ++c) values_[c] = 0;",
        "cpu gated_residual_norm",
    ),
    Mutation(
        "a norm in float8 is rounded to the dtype of x first",
        "csrc/cpu/isa/norm.h",
        "store(values + c, modulated(c));",
        "store(values + c, round<T>(modulated(c)).value);",
        "cpu norm_float8",
    ),
    Mutation(
        "residual rows are reversed",
        "csrc/cpu/isa/reuse_residual.h",
        "  const int64_t residual_row = row_of(p.residual.rows, unit.row);",
        "  const int64_t residual_row = row_of(p.residual.rows, p.rows - 1 - unit.row);",
        "cpu reuse_residual",
    ),
    Mutation(
        "the residual is added to a computed video",
        "csrc/cpu/reuse_residual.cpp",
        "    if (reuse || p.out != p.x) chosen.reuse_residual(p, reuse, unit);",
        "    if (reuse || p.out != p.x) chosen.reuse_residual(p, true, unit);",
        "cpu reuse_residual",
    ),
    Mutation(
        "the stack residual has the wrong sign",
        "csrc/cpu/isa/stack_residual_meter.h",
        "round<T>(widen(later) - widen(load_part(x_in, c, count)));",
        "round<T>(widen(load_part(x_in, c, count)) - widen(later));",
        "cpu stack_residual_meter",
    ),
    Mutation(
        "the last factor is ignored",
        "csrc/cpu/isa/extrapolate_residual.h",
        "      for (int i = 1; i < p.factors; ++i)\n        sum",
        "      for (int i = 1; i + 1 < p.factors; ++i)\n        sum",
        "cpu extrapolate_residual",
    ),
    Mutation(
        "a forecast is measured against itself",
        "csrc/cpu/isa/extrapolate_residual_meter.h",
        "widen(load_part(computed, c, count)) : sum_with(other));",
        "widen(load_part(computed, c, count)) : sum_with(coefficient));",
        "cpu extrapolate_residual_meter",
    ),
    Mutation(
        "the second forecast uses the coefficients of the first video",
        "csrc/cuda/bodies/extrapolate_residual_meter.h",
        "coefficients + video_ * factors;",
        "coefficients;",
        "bodies",
    ),
    Mutation(
        "a non-finite distance does not force computation",
        "csrc/core/decide.h",
        "    state[state_nonfinite] = 1;\n    state[state_rate] = 1;",
        "    state[state_nonfinite] = 1;\n    state[state_rate] = schedule.rates[0];",
        "cpu decide",
    ),
    Mutation(
        "all videos use the codebook of the first",
        "csrc/core/decide.h",
        "  own.thresholds += video * schedules.thresholds_stride;\n",
        "",
        "cpu decide",
    ),
    Mutation(
        "attention ignores the key of the last frame",
        "csrc/cpu/isa/temporal_attention.h",
        "    softmax(scratch.scores, frames, p.scale, inverse_sums);",
        "    softmax(scratch.scores, frames - 1, p.scale, inverse_sums);",
        "cpu temporal_attention",
    ),
    # The bodies of the CUDA kernels.
    Mutation(
        "a segment starts at frame 0",
        "csrc/cuda/bodies/meter_walk.h",
        "sums.measure_motion(first + i, 0, r,",
        "sums.measure_motion(i, 0, r,",
        "bodies",
    ),
    Mutation(
        "the history of a segment is not computed",
        "csrc/cuda/bodies/meter_walk.h",
        "      sums.remember(0, source.residual_at(-before, 0, width));\n",
        "",
        "bodies",
    ),
    Mutation(
        "motion weights use the wrong stride",
        "csrc/cuda/bodies/block.h",
        "if (const int weight = motion_weight(frame, frames_, motion_.stride[i]))",
        "if (const int weight = motion_weight(frame, frames_, motion_.stride[0]))",
        "bodies",
    ),
    Mutation(
        "partial vectors are treated as whole",
        "csrc/cuda/bodies/token_walk.h",
        "body(0, offset, rest < width ? static_cast<int>(rest) : width);",
        "body(0, offset, width);",
        "bodies",
    ),
    Mutation(
        "the scale of a float8 token is not stored on CUDA",
        "csrc/cuda/bodies/token_walk.h",
        "  ADACACHE_HD void store_scale(float scale) const { *scale_.at(0) = scale; }",
        "  ADACACHE_HD void store_scale(float) const {}",
        "bodies",
    ),
    Mutation(
        "eps is added after the square root on CUDA",
        "csrc/cuda/bodies/token_walk.h",
        "reciprocal_root(squares * of_channels + norm.eps);",
        "reciprocal_root(squares * of_channels) + norm.eps;",
        "bodies",
    ),
    Mutation(
        "the table of a modulator is ignored on CUDA",
        "csrc/cuda/bodies/walk.h",
        "values[c] = add(more.get(c), values[c]);",
        "values[c] = add(0 * more.get(c), values[c]);",
        "bodies",
    ),
    Mutation(
        "the rms norm subtracts the mean on CUDA",
        "csrc/cuda/bodies/token_walk.h",
        "const float mean = rms ? 0.0f : total * of_channels;",
        "const float mean = total * of_channels;",
        "bodies",
    ),
    Mutation(
        "the residual is rounded twice on CUDA",
        "csrc/cuda/bodies/gated_residual.h",
        "if (rounds_once_) return added_once(loaded.x, loaded.gate, loaded.y);",
        "",
        "bodies",
    ),
    Mutation(
        "residual_rows is ignored on CUDA",
        "csrc/cuda/bodies/reuse_residual.h",
        "  const int64_t residual_row = row_of(p.residual.rows, of_row);",
        "  const int64_t residual_row = of_row;",
        "bodies",
    ),
    Mutation(
        "the sums of a video include all videos on CUDA",
        "csrc/cuda/bodies/block.h",
        "partial[i] = id[i] == video ? *from[i] : 0.0;",
        "partial[i] = id[i] >= 0 ? *from[i] : 0.0;",
        "bodies",
    ),
    Mutation(
        "no barrier before the reduction over warps",
        "csrc/cuda/bodies/block.h",
        "    block_.barrier();\n    const int column = block_.thread();",
        "    const int column = block_.thread();",
        "bodies, races",
    ),
    Mutation(
        "reductions are not double-buffered",
        "csrc/cuda/bodies/block.h",
        "    second_ = !second_;\n",
        "",
        "bodies, races",
    ),
    # The Triton kernels.
    Mutation(
        "gate * y is not rounded in Triton",
        "adacache_kernels/triton/tokens.py",
        "        return round_to(gate * y.to(tl.float32), dtype)",
        "        return gate * y.to(tl.float32)",
        "triton gated_residual_meter",
    ),
    Mutation(
        "the first motion pair is skipped in Triton",
        "adacache_kernels/triton/meter.py",
        "                paired = frame >= STRIDES[index]",
        "                paired = frame > STRIDES[index]",
        "triton gated_residual_meter",
    ),
    Mutation(
        "x_rows is ignored in Triton",
        "adacache_kernels/triton/meter.py",
        "        x += row_of_x * x_row",
        "        x += row * x_row",
        "triton gated_residual_meter",
    ),
    Mutation(
        "one token too many is written in Triton",
        "adacache_kernels/triton/meter.py",
        "    written = place < places",
        "    written = place <= places",
        "triton gated_residual_meter",
    ),
    Mutation(
        "the sums of a video include all videos in Triton",
        "adacache_kernels/triton/sums.py",
        "            mine = mine & (owner == video)",
        "            mine = mine & (owner >= 0)",
        "triton gated_residual_meter",
    ),
    Mutation(
        "the bias of the norm is ignored in Triton",
        "adacache_kernels/triton/norm.py",
        "            normed = normed + load_modulator(bias, None, 0, 0, token, here, mask, _SHARED)",
        "            normed = normed + 0",
        "triton gated_residual_norm",
    ),
    Mutation(
        "the residual is rounded twice in Triton",
        "adacache_kernels/triton/gated_residual.py",
        "                total = stream + product(ys[chunk], factor)",
        "                total = stream + gated(ys[chunk], factor, dtype).to(tl.float32)",
        "triton modulators",
    ),
    Mutation(
        "a computed row loses the sign of zeros in Triton",
        "adacache_kernels/triton/reuse_residual.py",
        "        total = tl.where(reuses | (exists == 0), total, stream)",
        "        total = tl.where(reuses | (exists == 0), total, total)",
        "triton reuse_residual",
    ),
    Mutation(
        "attention reads past the last frame in Triton",
        "adacache_kernels/triton/temporal_attention.py",
        "        known = first_key + tl.arange(0, BLOCK)[None, :] < frames",
        "        known = first_key + tl.arange(0, BLOCK)[None, :] <= frames",
        "triton temporal_attention",
    ),
    # Python.
    Mutation(
        "overlapping outputs are accepted",
        "adacache_kernels/_checks.py",
        "        others[name] = tensor\n",
        "",
        "argument checks",
    ),
    Mutation(
        "the decision uses the previous step",
        "python/adacache/policies/adacache.py",
        "site, sums, step=step.number)",
        "site, sums, step=step.number - 1)",
        "layer",
    ),
    Mutation(
        "the mask of reused videos is ignored",
        "python/adacache/runtime/store.py",
        "        reuse = None if split is None else split.reuse\n",
        "        reuse = None\n",
        "layer",
    ),
    Mutation(
        "kept rows are reversed in a mixed step",
        "python/adacache/runtime/store.py",
        "        return None if split is None else split.part_index(parts)\n",
        "        return None if split is None else split.part_index(parts).flip(0)\n",
        "layer",
    ),
    Mutation(
        "guidance branches share their residuals",
        "python/adacache/runtime/forward.py",
        "        return self.branch.index, self.segment.site, stream, part",
        "        return 0, self.segment.site, stream, part",
        "layer",
    ),
    Mutation(
        "rows of the pool are not cleared",
        "python/adacache/serving/pool.py",
        "            self.memory[row].zero_()",
        "            self.memory[row]",
        "serving",
    ),
    Mutation(
        "a video decides by the sums of another",
        "python/adacache/serving/batch.py",
        "values[video : video + 1] for video in videos",
        "values[:1] for video in videos",
        "serving",
    ),
    Mutation(
        "a slope counts a video's first feature",
        "python/adacache/serving/store.py",
        "            counts[row] = counts.get(row, 0) + 1",
        "            counts[row] = 2",
        "serving",
    ),
    Mutation(
        "videos that compute go first",
        "python/adacache/serving/engine.py",
        "return bool(known) and known[0] is False",
        "return bool(known) and known[0] is True",
        "serving",
    ),
]

QUICK = (
    "the last frame is skipped",
    "the gate is skipped after 16 channels",
    "all sums are added to the video of row 0",
    "the variance includes the padding",
    "residual rows are reversed",
    "the stack residual has the wrong sign",
    "a non-finite distance does not force computation",
    "a segment starts at frame 0",
    "partial vectors are treated as whole",
    "the sums of a video include all videos on CUDA",
    "no barrier before the reduction over warps",
    "one token too many is written in Triton",
    "the sums of a video include all videos in Triton",
    "a computed row loses the sign of zeros in Triton",
    "overlapping outputs are accepted",
    "the decision uses the previous step",
)
