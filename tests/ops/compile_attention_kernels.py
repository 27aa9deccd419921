# SPDX-License-Identifier: Apache-2.0
"""Compiles the attention kernels ahead of time, without a GPU, and prints the ptxas report as JSON.

python tests/ops/compile_attention_kernels.py [ARCHITECTURE ...]    e.g. 90 80; all cases for the first only
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adacache_kernels.triton.fused_qk_norm_rope import fused_qk_norm_rope_kernel, rows_per_program
from adacache_kernels.triton.heads import HALVES, INTERLEAVED, NONE, head_tiles
from adacache_kernels.triton.launch import NUM_WARPS
from adacache_kernels.triton.temporal_attention import blocks_of, temporal_attention_kernel

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
NUMBERS = {"frames": "i32", "places": "i32", "heads": "i32", "tokens": "i32", "eps": "fp32", "scale": "fp32"}
#: Multiples of 16 in every model, which allows 16-byte loads.
STRIDES = ("qkv_row", "qkv_token", "out_row", "out_token")


@dataclass
class Compiled:
    kernel: str
    case: str
    architecture: int
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core_products: int
    wide_loads: int  # of 16 bytes per thread
    instructions: int  # of PTX


def cases(brief: bool) -> Iterator[tuple[str, int, int, bool, int]]:
    """dtype, frames, dim, norm, rope"""
    yield "bf16", 15, 72, True, INTERLEAVED  # Open-Sora 1.2
    yield "fp16", 16, 72, False, NONE  # Latte
    yield "bf16", 64, 128, True, HALVES
    yield "fp32", 17, 72, True, INTERLEAVED
    if brief:
        return
    for frames, dim in ((16, 64), (16, 256), (32, 72), (32, 128), (64, 72), (64, 256)):
        yield "bf16", frames, dim, True, INTERLEAVED
    for frames, dim in ((15, 72), (64, 96)):
        yield "bf16", frames, dim, True, HALVES
    for frames, dim in ((15, 72), (64, 128), (64, 256)):
        yield "fp32", frames, dim, True, INTERLEAVED
    yield "fp32", 64, 256, True, HALVES


def kernels(brief: bool) -> Iterator[tuple[Any, str, str, dict[str, Any], int]]:
    """kernel, case, dtype, constexpr arguments, warps"""
    seen = set()
    for dtype, frames, dim, norm, rope in cases(brief):
        tiles = head_tiles(dim, rope, SIZES[dtype])
        shared: dict[str, Any] = {"DIM": dim, "NORM": norm, "ROPE": rope, "FIRST": tiles.first}
        shared |= {"SECOND": tiles.second, "SPLIT": tiles.split}
        blocks = blocks_of(frames, tiles, SIZES[dtype])
        case = f"{dtype} frames={frames} dim={dim} norm={norm} rope={rope}"
        constants = shared | {"BLOCK": blocks.frames, "WHOLE": blocks.whole}
        yield temporal_attention_kernel, case, dtype, constants, blocks.warps
        if (norm or rope) and (dtype, dim, rope) not in seen:
            seen.add((dtype, dim, rope))
            constants = shared | {"ROWS": rows_per_program(tiles.first, tiles.second)}
            yield fused_qk_norm_rope_kernel, case, dtype, constants, NUM_WARPS


def compile_kernel(
    kernel: Any, dtype: str, constants: dict[str, Any], warps: int, architecture: int
) -> tuple[Any, str]:
    """Returns the compiled kernel and the log of ptxas."""
    pointers = dict.fromkeys(("qkv", "q_weight", "k_weight", "out"), f"*{dtype}") | {
        "cos": "*fp32",
        "sin": "*fp32",
    }
    names = list(kernel.arg_names)
    types = {name: (pointers | NUMBERS).get(name, "i64") for name in names} | dict.fromkeys(
        constants, "constexpr"
    )
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): aligned for index, name in enumerate(names) if name in (*pointers, *STRIDES)},
    )
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True},
        )
    return compiled, log.getvalue()


def main() -> None:
    architectures = [int(argument) for argument in sys.argv[1:]] or [90, 80, 100, 120]
    triton.knobs.nvidia.dump_ptxas_log = True
    results = []
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        for architecture in architectures:
            for kernel, case, dtype, constants, warps in kernels(brief=architecture != architectures[0]):
                compiled, log = compile_kernel(kernel, dtype, constants, warps, architecture)
                registers = re.search(r"Used (\d+) registers", log)
                spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
                if registers is None or not spills:
                    raise SystemExit(f"no resource usage in the log of ptxas:\n{log}")
                ptx = compiled.asm["ptx"]
                results.append(
                    Compiled(
                        kernel.__name__,
                        case,
                        architecture,
                        warps,
                        int(registers[1]),
                        sum(int(stores) + int(loads) for stores, loads in spills),
                        compiled.metadata.shared,
                        len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
                        len(re.findall(r"\bld\.global\S*\.v4\.b32", ptx)),
                        len(re.findall(r"^\s+(?:@\S+ )?[a-z][\w.:]*\s.*;", ptx, re.MULTILINE)),
                    )
                )
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main()
