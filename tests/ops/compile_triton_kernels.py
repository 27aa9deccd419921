# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel ahead of time, without a GPU, and prints the ptxas report as JSON.

python tests/ops/compile_triton_kernels.py [--full] [ARCHITECTURE ...]      e.g. 80 90 100 120

Default: each kernel in bfloat16 in one or two variants. --full: every dtype, metric and layout, for common
model widths.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adacache_kernels.columns import METRICS
from adacache_kernels.triton.decide import decide_kernel
from adacache_kernels.triton.extrapolate_residual import extrapolate_residual_kernel
from adacache_kernels.triton.extrapolate_residual_meter import extrapolate_residual_meter_kernel
from adacache_kernels.triton.gated_residual import gated_residual_kernel
from adacache_kernels.triton.launch import PER_FRAME, PER_TOKEN, SHARED, Tiling, tiling, whole_token_tiling
from adacache_kernels.triton.meter import GATED, PAIR, STACK, meter_kernel, warps_of
from adacache_kernels.triton.reuse_residual import reuse_residual_kernel
from adacache_kernels.triton.sums import combine_sums_kernel

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
#: 32-bit arguments. Strides are 64-bit.
COUNTS = ("rows", "frames", "places", "tokens", "channels", "x_total", "residual_total", "total")
COUNTS += ("num_videos", "blocks", "columns")
#: Pointers with a fixed dtype.
OTHER_POINTERS = {
    "partial": "*fp64",
    "sums": "*fp64",
    "state": "*fp64",
    "thresholds": "*fp64",
    "rates": "*fp64",
    "residual_scale": "*fp32",
    "norm_scale": "*fp32",
    "coefficients": "*fp32",
    "other_coefficients": "*fp32",
    "x_rows": "*i32",
    "residual_rows": "*i32",
    "video_of_row": "*i32",
    "step_of_video": "*i32",
    "num_steps_of_video": "*i32",
    "window_of_video": "*i32",
    "reuse": "*u8",
    "gate_table": "*fp32",
    "shift_table": "*fp32",
    "scale_table": "*fp32",
    "eps": "fp32",
}
#: Modulators, weight and bias in float32.
WIDE = dict.fromkeys(("gate", "shift", "scale", "weight", "bias"), "*fp32")
#: Pointers with the dtype of the stream.
POINTERS = (
    "x",
    "y",
    "gate",
    "shift",
    "scale",
    "weight",
    "bias",
    "residual",
    "computed",
)
POINTERS += ("out", "norm_out")


@dataclass
class Case:
    kernel: Any
    name: str
    dtype: str  # of the stream
    constants: dict[str, Any]  # None: an absent argument
    types: dict[str, Any] = field(default_factory=dict)  # override the types above
    warps: int = 4
    aligned: bool = True


@dataclass
class Compiled:
    kernel: str
    case: str
    architecture: int
    cubin_bytes: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    fused_multiply_adds: int  # in float32; they would skip a rounding of eager PyTorch
    flushes: int  # flush-to-zero instructions; widening of float8 needs subnormals
    layout_conversions: int  # 0: the same thread reads and writes an element
    barriers: int
    float32_values: int  # in the source of the kernel, without libdevice


def cases(full: bool) -> Iterator[Case]:
    dtypes = SIZES if full else {"bf16": 2}
    metrics = [((1,), False)]
    if full:
        metrics += [((1,), True), ((1, 2), True), (tuple(range(1, 9)), True)]
    for dtype, size in dtypes.items():
        for strides, squares in metrics[: 2 if dtype == "fp16" else None]:
            yield from meter_cases(dtype, size, strides, squares, full)
        yield from stream_cases(dtype, size, full)
    for squares in (False, True) if full else (False,):
        constants: dict[str, Any] = {"SQUARES": squares, "BY_VIDEO": True, "BLOCK": 1024}
        yield Case(combine_sums_kernel, f"squares={squares}", "fp64", constants)
    for metric, number in METRICS.items():
        for published in (True, False):
            yield decide_case(metric, number, published, by_video=False)
            yield decide_case(metric, number, published, by_video=True)


def meter_cases(dtype: str, size: int, strides: tuple[int, ...], squares: bool, full: bool) -> Iterator[Case]:
    measured = {"STRIDES": strides, "SQUARES": squares}
    name = f"{dtype} strides={strides} squares={squares}"
    tables = ("gate_table", "shift_table", "scale_table")
    plain = absent(*tables) | {"ROUNDS_ONCE": False, "RMS": False}
    wide = {"ROUNDS_ONCE": True, "RMS": True}  # and modulators in float32 with tables
    no_norm = absent("shift", "scale", "weight", "bias", "norm_out")
    no_cache = absent("residual_scale", "residual_rows", "x_rows")
    no_gate = absent("gate", "residual_rows") | no_norm
    float8 = {"residual": "*u8"}
    for fit in (True, False):
        tile = tiling(400, 1152, size, aligned=fit)
        blocks = meter_tile(tile, fit) | measured
        per = modulated(SHARED if fit else PER_TOKEN)
        sources = {"gated": (GATED, no_cache | no_norm), "stack": (STACK, no_cache | no_gate | absent("out"))}
        if fit:
            sources["pair"] = (PAIR, no_cache | no_gate | absent("x", "out"))
        for kind, (source, missing) in sources.items():
            constants = blocks | per | plain | {"SOURCE": source, "LATE": False} | missing
            yield Case(meter_kernel, f"{kind} {name} aligned={fit}", dtype, constants, aligned=fit)
    for channels in (1152, 1536, 3072, 5120, 8192) if full and strides == (1,) and not squares else (1152,):
        kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "norm": (no_cache | absent("weight", "bias"), {}),
            "float8": (no_norm | absent("x_rows", "residual_rows"), float8),
        }
        if channels == 1152:
            kinds["norm float8 rows"] = (absent(), float8)
        for fit in (True, False) if channels == 1152 else (True,):
            tile = whole_token_tiling(400, channels, size, aligned=fit)
            whole = meter_tile(tile, fit) | modulated(PER_FRAME) | {"SOURCE": GATED, "LATE": False} | measured
            for kind, (missing, types) in kinds.items():
                case = f"gated {name} {kind} C={channels} aligned={fit}"
                constants = whole | plain | missing
                yield Case(meter_kernel, case, dtype, constants, types, warps_of(tile), fit)
            if full or fit:
                case = f"gated {name} wide norm C={channels} aligned={fit}"
                constants = whole | wide | no_cache
                yield Case(meter_kernel, case, dtype, constants, WIDE, warps_of(tile), fit)
        tile = whole_token_tiling(400, channels, size, aligned=True)
        whole = meter_tile(tile, True) | modulated(PER_FRAME) | measured
        if full or dtype == "bf16":
            constants = whole | plain | {"SOURCE": STACK, "LATE": True} | no_gate
            case = f"stack {name} float8 rows in place C={channels}"
            yield Case(meter_kernel, case, dtype, constants, float8, tile.warps)


def stream_cases(dtype: str, size: int, full: bool) -> Iterator[Case]:
    tile = tiling(6000, 1152, size)
    blocks = tokens(tile)
    for cached in SIZES if full else (dtype,):
        missing = absent("residual_scale", "x_rows", "residual_rows")
        types: dict[str, Any] = {"residual": f"*{cached}"}
        constants = blocks | {"IN_PLACE": False} | missing
        yield Case(reuse_residual_kernel, f"{dtype} residual={cached}", dtype, constants, types)
    constants = blocks | {"IN_PLACE": False}
    yield Case(reuse_residual_kernel, f"{dtype} float8 rows", dtype, constants, {"residual": "*u8"})
    for factors in range(1, 5) if full else (3,):
        types = {"factors": (f"*{dtype}",) * factors}
        types |= {"factor_rows": ("i64",) * factors, "factor_tokens": ("i64",) * factors}
        yield Case(extrapolate_residual_kernel, f"{dtype} factors={factors}", dtype, dict(blocks), types)
        metered = block_sizes(tile) | {"STRIDES": (1, 2), "SQUARES": factors == 4, "VECTOR": tile.vector}
        for missing in absent("computed"), absent("other_coefficients"):
            name = f"{dtype} factors={factors} without {next(iter(missing))}"
            yield Case(extrapolate_residual_meter_kernel, name, dtype, metered | missing, types)
    no_norm = absent("shift", "scale", "weight", "bias", "norm_out", "norm_scale", "x_rows")
    plain = absent("gate_table", "shift_table", "scale_table") | {"ROUNDS_ONCE": False, "RMS": False}
    constants = blocks | {"CHUNKS": 1} | modulated(PER_FRAME) | no_norm
    yield Case(gated_residual_kernel, dtype, dtype, constants | plain)
    wide = constants | {"ROUNDS_ONCE": True, "RMS": False}
    yield Case(gated_residual_kernel, f"{dtype} wide", dtype, wide, WIDE)
    for channels in (1152, 1536, 3072, 5120, 8192) if full else (1152,):
        tile = whole_token_tiling(6000, channels, size, aligned=True)
        no_vectors = absent("weight", "bias")
        for scaled in (False, True):
            whole = tokens(tile) | {"CHUNKS": tile.chunks} | modulated(PER_FRAME)
            whole |= {} if scaled else absent("norm_scale")
            types = {"norm_out": "*u8"} if scaled else {}
            suffix = f"{' float8' if scaled else ''} C={channels}"
            for kind, missing in (("gated norm", absent("x_rows")), ("norm", absent("y", "gate", "out"))):
                constants = whole | plain | no_vectors | missing
                name = f"{dtype} {kind}{suffix}"
                yield Case(gated_residual_kernel, name, dtype, constants, types, warps=tile.warps)
            constants = whole | {"ROUNDS_ONCE": True, "RMS": True} | absent("x_rows")
            name = f"{dtype} wide gated norm{suffix}"
            yield Case(gated_residual_kernel, name, dtype, constants, WIDE | types, warps=tile.warps)


def decide_case(metric: str, number: int, published: bool, by_video: bool) -> Case:
    of_video = ("step_of_video", "num_steps_of_video", "window_of_video")
    constants: dict[str, Any] = {} if by_video else absent(*of_video)
    constants |= {
        "BY_VIDEO": by_video,
        "FIRST": False,
        "FORCED": False,
        "INSIDE": not by_video,
        "STRIDES": (1, 2),
        "METRIC": number,
        "PUBLISHED": published,
        "SCALE": 0.385,
        "POWER": 8.0,
        "DIVISOR": 1.0,
        "GRADIENT_WEIGHT": 10.0,
        "BLOCK": 8,
    }
    name = f"{metric} published={published} by_video={by_video}"
    return Case(decide_kernel, name, "fp64", constants, warps=1, aligned=False)


def absent(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names)


def modulated(per: int) -> dict[str, int]:
    return {"GATE": per, "SHIFT": per, "SCALE": per}


def block_sizes(tile: Tiling) -> dict[str, int]:
    return {"BLOCK_PLACES": tile.places, "BLOCK_CHANNELS": tile.channels}


def meter_tile(tile: Tiling, fit: bool) -> dict[str, Any]:
    return block_sizes(tile) | {"CHUNKS": tile.chunks, "VECTOR": tile.vector, "BARRIER": not fit}


def tokens(tile: Tiling) -> dict[str, int]:
    return {"BLOCK_TOKENS": tile.places, "BLOCK_CHANNELS": tile.channels}


def compile_case(case: Case, architecture: int) -> Compiled:
    names = list(case.kernel.arg_names)
    integer = "i32" if case.kernel is decide_kernel else "i64"
    types: dict[str, Any] = dict.fromkeys(names, integer) | dict.fromkeys(COUNTS, "i32")
    types |= (
        {"elements_bits": "i64"} | dict.fromkeys(POINTERS, f"*{case.dtype}") | OTHER_POINTERS | case.types
    )
    signature = {name: "constexpr" if name in case.constants else types[name] for name in names}
    divisible = [["tt.divisibility", 16]] if case.aligned else []
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(names):
        if isinstance(signature[name], tuple):
            attributes |= {(index, inner): divisible for inner in range(len(signature[name]))}
        elif signature[name] not in ("constexpr", "fp32"):
            attributes[(index,)] = divisible
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in case.constants.items() if name in names},
        attrs=attributes,
    )
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": case.warps, "enable_fp_fusion": False},
        )
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    if registers is None or not spills:
        raise SystemExit(f"no resource usage in the log of ptxas:\n{log.getvalue()}")
    ptx = compiled.asm["ptx"]
    return Compiled(
        case.kernel.__name__,
        case.name,
        architecture,
        len(compiled.asm["cubin"]),
        int(registers[1]),
        sum(int(stores) + int(loads) for stores, loads in spills),
        compiled.metadata.shared,
        len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32", ptx)),
        len(re.findall(r"\.ftz\b", ptx)),
        compiled.asm["ttgir"].count("ttg.convert_layout"),
        len(re.findall(r"\bbar(?:rier)?\.sync", ptx)),
        len(re.findall(r"\bf32\b", compiled.asm["ttir"])),
    )


def compile_one(number: tuple[bool, int, int]) -> Compiled:
    full, index, architecture = number
    triton.knobs.nvidia.dump_ptxas_log = True
    return compile_case(list(cases(full))[index], architecture)


def main() -> None:
    full = "--full" in sys.argv
    architectures = [int(argument) for argument in sys.argv[1:] if argument != "--full"] or [90, 80, 100, 120]
    jobs = [
        (full, index, architecture)
        for architecture in architectures
        for index in range(len(list(cases(full))))
    ]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("spawn").Pool(min(8, os.cpu_count() or 1)) as pool:
            results = pool.map(compile_one, jobs, chunksize=1)
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
