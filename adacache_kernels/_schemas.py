# SPDX-License-Identifier: Apache-2.0
"""The table of ops. Registration in C++ (the build embeds the schemas) and Triton, fake kernels, argument
checks and the list of ops are derived from it.

Imports no other module of the package, because the build runs it as a script."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import NamedTuple


class Op(NamedTuple):
    """outputs: further arguments of the variant `<name>_out`; out_results: its results."""

    arguments: str
    results: str
    outputs: str = ""
    out_results: str = "()"


# Arguments shared by several ops.
_METER = "Tensor? video_of_row, int num_videos, int frames, int[] strides, int metric"
_NORM = (
    "Tensor? shift, Tensor? scale, Tensor? shift_table, Tensor? scale_table, Tensor? weight, Tensor? bias, "
    "float eps"
)
_CACHE = "Tensor(a!) residual, Tensor(b!)? residual_scale"
_GATED = "Tensor x, Tensor y, Tensor? gate, Tensor? gate_table"
_ROWS = "Tensor? x_rows, Tensor? residual_rows"
_HEADS = "Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, bool interleaved"

OPS = {
    "gated_residual": Op(f"{_GATED}, Tensor? x_rows, int rounding", "Tensor", "Tensor(a!) out"),
    "gated_residual_meter": Op(
        f"{_GATED}, {_CACHE}, {_ROWS}, int rounding, {_METER}",
        "(Tensor, Tensor)",
        "Tensor(c!) out",
        "Tensor",
    ),
    # `out` is an optional copy of x_out.
    "stack_residual_meter": Op(
        f"Tensor x_out, Tensor x_in, {_CACHE}, Tensor? rows, {_METER}", "Tensor", "Tensor(c!) out", "Tensor"
    ),
    "residual_meter": Op(f"Tensor residual, Tensor old, {_METER}", "Tensor"),
    "reuse_residual": Op(
        f"Tensor x, Tensor residual, Tensor? residual_scale, {_ROWS}, Tensor? video_of_row, Tensor? reuse",
        "Tensor",
        "Tensor(a!) out",
    ),
    "extrapolate_residual": Op(
        f"Tensor x, Tensor[] factors, Tensor coefficients, {_ROWS}, Tensor? video_of_row",
        "Tensor",
        "Tensor(a!) out",
    ),
    "extrapolate_residual_meter": Op(
        "Tensor x, Tensor[] factors, Tensor coefficients, Tensor? other_coefficients, Tensor? computed, "
        f"{_ROWS}, {_METER}",
        "(Tensor, Tensor)",
        "Tensor(a!) out",
        "Tensor",
    ),
    "layer_norm_modulate": Op(f"Tensor x, {_NORM}, Tensor? x_rows", "Tensor", "Tensor(a!) out"),
    "rms_norm_modulate": Op(f"Tensor x, {_NORM}, Tensor? x_rows", "Tensor", "Tensor(a!) out"),
    "norm_modulate_float8": Op(
        f"Tensor x, {_NORM}, Tensor? x_rows, int norm",
        "(Tensor, Tensor)",
        "Tensor(a!) norm_out, Tensor(b!) norm_scale",
    ),
    "gated_residual_norm": Op(
        f"{_GATED}, {_NORM}, Tensor? x_rows, int rounding, int norm",
        "(Tensor, Tensor)",
        "Tensor(a!) out, Tensor(b!) norm_out",
    ),
    "gated_residual_norm_float8": Op(
        f"{_GATED}, {_NORM}, Tensor? x_rows, int rounding, int norm",
        "(Tensor, Tensor, Tensor)",
        "Tensor(a!) out, Tensor(b!) norm_out, Tensor(c!) norm_scale",
    ),
    "gated_residual_norm_meter": Op(
        f"{_GATED}, {_CACHE}, {_NORM}, {_ROWS}, int rounding, int norm, {_METER}",
        "(Tensor, Tensor, Tensor)",
        "Tensor(c!) out, Tensor(d!) norm_out",
        "Tensor",
    ),
    "decide": Op(
        "Tensor sums, Tensor(a!) state, Tensor thresholds, Tensor rates, Tensor? step_of_video, "
        "Tensor? num_steps_of_video, Tensor? window_of_video, int step, int num_steps, int site, int frames, "
        "int[] strides, int metric, int rule, float elements, int first_step, int last_step, float scale, "
        "float power, float divisor, float gradient_weight",
        "()",
    ),
    "fused_qk_norm_rope": Op(f"Tensor(a!) qkv, {_HEADS}, float eps", "()"),
    "temporal_attention": Op(
        f"Tensor qkv, {_HEADS}, int frames, float eps, float scale", "Tensor", "Tensor(a!) out"
    ),
}

#: The schemas of each op and its `_out` variant.
SCHEMAS = {
    name: schema
    for op, row in OPS.items()
    for name, schema in (
        (op, f"({row.arguments}) -> {row.results}"),
        (f"{op}_out", f"({row.arguments}, {row.outputs}) -> {row.out_results}" if row.outputs else ""),
    )
    if schema
}


#: A library contains this text, followed by the digest of the schemas that it was built from.
MARKER = "adacache-schemas:"


def digest() -> str:
    """Return a digest of all schemas. A library of another digest expects other arguments."""
    text = "\n".join(name + schema for name, schema in sorted(SCHEMAS.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def header() -> str:
    """Return the C++ header of the op libraries."""
    lines = "".join(f'    "{name}{schema}",\n' for name, schema in SCHEMAS.items())
    return f"""#pragma once

inline constexpr const char* adacache_schemas[] = {{
{lines}}};

// Exported, so that the linker keeps it. Python finds the text in the file before it loads the library.
#define ADACACHE_SCHEMAS_DIGEST                           \\
  extern "C" __attribute__((visibility("default"), used)) \\
  const char adacache_schemas_digest[] = "{MARKER}{digest()}"
"""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(header())
