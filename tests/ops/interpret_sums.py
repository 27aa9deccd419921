# SPDX-License-Identifier: Apache-2.0
"""Runs combine_sums of the Triton kernels in the interpreter (TRITON_INTERPRET=1) on random partial sums.

Exits with 1 on a wrong sum, and on a load from a column that is not measured, which is uninitialized.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

from adacache_kernels.columns import METRICS
from adacache_kernels.triton.sums import combine_sums

#: (rows, blocks per row, videos); videos 0: no video_of_row.
CASES = [(2, 3000, 0), (3, 1, 0), (0, 5, 2), (4, 0, 2), (5000, 1, 3), (5000, 2, 0), (7, 300, 2)]
UNMEASURED = slice(3, 7)


def main() -> int:
    generator = torch.Generator().manual_seed(0)
    read: list[np.ndarray] = []
    load = InterpreterBuilder.create_masked_load

    def recorded(self, ptrs, mask, *others):  # type: ignore[no-untyped-def]
        read.append(np.atleast_1d(ptrs.data)[np.atleast_1d(mask.data)])
        return load(self, ptrs, mask, *others)

    InterpreterBuilder.create_masked_load = recorded
    faults = []
    for rows, blocks, videos in CASES:
        for metric in METRICS:
            squares = metric != "l1"
            partial = torch.randn(9, rows, blocks, dtype=torch.float64, generator=generator)
            owners = torch.randint(max(videos, 1), (rows,), dtype=torch.int32, generator=generator)
            for wrong in (False, True) if videos and rows else (False,):
                if wrong:
                    owners[-1] = videos
                read.clear()
                sums = combine_sums(partial, owners if videos else None, max(videos, 1), squares=squares)
                expected = torch.zeros_like(sums)
                expected.index_add_(0, owners.clamp(max=max(videos, 1) - 1).long(), partial.sum(2).T)
                if not squares:
                    expected[:, UNMEASURED] = torch.nan
                if wrong:
                    expected[:] = torch.nan
                name = f"rows={rows} blocks={blocks} videos={videos} metric={metric} wrong={wrong}"
                if not torch.allclose(sums, expected, rtol=1e-12, atol=1e-10, equal_nan=True):
                    faults.append(f"{name}: got {sums}, expected {expected}")
                first, last = (partial.data_ptr() + c * rows * blocks * 8 for c in (3, 7))
                loads = np.concatenate(read) if read else np.empty(0, np.uint64)
                if not squares and ((loads >= first) & (loads < last)).any():
                    faults.append(f"{name}: loads a column that is not measured")
    print("\n".join(faults) or f"{len(CASES)} shapes of partial sums passed")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
