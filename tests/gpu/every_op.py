# SPDX-License-Identifier: Apache-2.0
"""Runs every op once per dtype on small odd shapes and checks the results on the host. Short enough for
compute-sanitizer.

python tests/gpu/every_op.py --backend cuda|triton|cpu|reference      (or under compute-sanitizer)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from cases import CASES, Shape, copy_inputs, make_inputs
from check import expect, has_backend, judge

import adacache_kernels as ak
from adacache_kernels import _backend

#: A width of a model; a width that is no multiple of the vector width; more frames than one float32 run.
SHAPES = [Shape(2, 4, 9, 144), Shape(1, 3, 5, 70), Shape(2, 18, 2, 20)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="cuda")
    backend = parser.parse_args().backend
    on_cpu = backend in ("cpu", "reference") or (backend == "triton" and _backend._INTERPRETED)
    device = torch.device("cpu" if on_cpu else "cuda")
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    # Triton compiles each dtype separately; float16 and bfloat16 take the same code paths.
    dtypes = [dtype for dtype in DTYPES if backend != "triton" or dtype != torch.float16]
    faults, count = [], 0
    for case in CASES:
        if case.channels or not has_backend(case.op, backend):
            continue
        for shape in SHAPES:
            for dtype in dtypes:
                if "qkv" in case.inputs and shape.head_dim % 2:
                    continue
                # Inputs are created on the host, so that only the op runs on the GPU.
                values = make_inputs(case, shape, dtype, torch.device("cpu"))
                expected = expect(case, values)
                with ak.use_backend(backend):
                    results = case.call(ak, copy_inputs(values, device=device), {})
                given = [result.cpu() for result in results]
                for index, kind in enumerate(case.checks):
                    if fault := judge(kind, given[index], expected, index):
                        faults.append(f"{case.name}, {shape}, {dtype}: output {index}: {fault}")
                count += 1
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{count} runs of the ops on {backend}, {len(faults)} faults")
    return 1 if faults or not count else 0


if __name__ == "__main__":
    sys.exit(main())
