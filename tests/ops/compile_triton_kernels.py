"""Compiles every Triton kernel for GPUs that need not be there and prints what ptxas says of it, as JSON.

python tests/ops/compile_triton_kernels.py [ARCHITECTURE ...]      e.g. 80 90 100 120; the first with every
configuration
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adacache_kernels.columns import METRICS
from adacache_kernels.triton.decide import decide_kernel
from adacache_kernels.triton.gated_residual_meter import gated_residual_meter_kernel
from adacache_kernels.triton.launch import NUM_WARPS, Tiling, meter_tiling, tiling
from adacache_kernels.triton.residual_meter import residual_meter_kernel
from adacache_kernels.triton.reuse_residual import reuse_residual_kernel
from adacache_kernels.triton.sums import combine_sums_kernel

DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass
class Compiled:
    kernel: str
    case: str
    architecture: int
    cubin_bytes: int
    registers: int
    spill_bytes: int
    fused_multiply_adds: int  # float32 ones: they would skip a rounding that eager PyTorch makes
    layout_conversions: int  # 0: each element is read and written by one and the same thread
    barriers: int
    float32_values: int  # in the kernel as written; libdevice has its own


def cases(brief: bool) -> list[tuple[Any, str, dict[str, str], dict[str, Any], int, bool]]:
    """(kernel, name, types of the arguments, constexpr arguments, warps, whether everything is aligned)"""
    found: list[tuple[Any, str, dict[str, str], dict[str, Any], int, bool]] = []
    for dtype, size in DTYPES.items():
        tensors = dict.fromkeys(("x", "y", "gate", "residual", "out"), f"*{dtype}")
        for strides in ((1,),) if brief or dtype == "fp16" else ((1,), (1, 2), tuple(range(1, 9))):
            for squares in (False,) if brief else (False, True):
                measured = {"STRIDES": strides, "SQUARES": squares}
                name = f"{dtype} strides={strides} squares={squares}"
                for fit in (True, False):
                    rest = {"GATE_PER_FRAME": not fit, "BARRIER": not fit}
                    found.append(
                        (
                            gated_residual_meter_kernel,
                            f"{name} aligned={fit}",
                            tensors | {"partial": "*fp64"},
                            measured | rest | blocks(meter_tiling(400, 1152, strides, squares, size, fit)),
                            NUM_WARPS,
                            fit,
                        )
                    )
                if not squares and strides != (1,):
                    continue
                constants = measured | blocks(meter_tiling(400, 1152, strides, squares, size, True))
                types = {"residual": f"*{dtype}", "old_residual": f"*{dtype}", "partial": "*fp64"}
                found.append((residual_meter_kernel, name, types, constants, NUM_WARPS, True))
        for cached in (dtype,) if brief else DTYPES:
            tile = tiling(6000, 1152, 8)
            types = {
                "x": f"*{dtype}",
                "residual": f"*{cached}",
                "video_of_row": "*i32",
                "reuse": "*u8",
                "out": f"*{dtype}",
            }
            constants = {
                "SOME": True,
                "BY_VIDEO": True,
                "IN_PLACE": False,
                "BLOCK_TOKENS": tile.places,
                "BLOCK_CHANNELS": tile.channels,
            }
            found.append(
                (reuse_residual_kernel, f"{dtype} residual={cached}", types, constants, NUM_WARPS, True)
            )
    for squares in (False, True):
        types = {"partial": "*fp64", "video_of_row": "*i32", "sums": "*fp64"}
        constants = {"SQUARES": squares, "BY_VIDEO": True, "BLOCK": 1024}
        found.append((combine_sums_kernel, f"squares={squares}", types, constants, 4, True))
    for metric, number in METRICS.items():
        for published in (True, False):
            types = dict.fromkeys(("sums", "state", "thresholds", "rates"), "*fp64")
            constants = {
                "FIRST": False,
                "FORCED": False,
                "INSIDE": True,
                "STRIDES": (1, 2),
                "METRIC": number,
                "PUBLISHED": published,
                "ELEMENTS": 6912000.0,
                "SCALE": 0.385,
                "POWER": 8.0,
                "DIVISOR": 1.0,
                "GRADIENT_WEIGHT": 10.0,
                "BLOCK": 8,
            }
            found.append((decide_kernel, f"{metric} published={published}", types, constants, 1, True))
    return found


def blocks(tile: Tiling) -> dict[str, int]:
    return {"BLOCK_PLACES": tile.places, "BLOCK_CHANNELS": tile.channels}


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    aligned: bool,
    architecture: int,
) -> tuple[Any, str]:
    """Give the compiled kernel and the log of ptxas."""
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i64") for name in names}
    if kernel is decide_kernel:
        signature |= {name: "i32" for name, kind in signature.items() if kind == "i64"}
    fit = [["tt.divisibility", 16]] if aligned else []
    attributes = {(index,): fit for index, name in enumerate(names) if name not in constants}
    if kernel is decide_kernel:
        attributes = {}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": warps, "enable_fp_fusion": False},
        )
    return compiled, log.getvalue()


def main() -> None:
    architectures = [int(argument) for argument in sys.argv[1:]] or [90, 80, 100, 120]
    triton.knobs.nvidia.dump_ptxas_log = True
    results = []
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        for architecture in architectures:
            for kernel, case, types, constants, warps, aligned in cases(
                brief=architecture != architectures[0]
            ):
                compiled, log = compile_kernel(kernel, types, constants, warps, aligned, architecture)
                registers = re.search(r"Used (\d+) registers", log)
                spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
                if registers is None or not spills:
                    raise SystemExit(f"no resource figures in the log of ptxas:\n{log}")
                ptx = compiled.asm["ptx"]
                results.append(
                    Compiled(
                        kernel.__name__,
                        case,
                        architecture,
                        len(compiled.asm["cubin"]),
                        int(registers[1]),
                        sum(int(stores) + int(loads) for stores, loads in spills),
                        len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32", ptx)),
                        compiled.asm["ttgir"].count("ttg.convert_layout"),
                        len(re.findall(r"\bbar(?:rier)?\.sync", ptx)),
                        len(re.findall(r"\bf32\b", compiled.asm["ttir"])),
                    )
                )
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
