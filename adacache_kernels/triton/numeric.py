"""Arithmetic that the Triton kernels share: rounding to the stored dtype, exactly as eager PyTorch rounds."""

from __future__ import annotations

import triton
import triton.language as tl

#: Whether kernels run in Triton's NumPy interpreter (TRITON_INTERPRET=1), on CPU tensors.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Round float32 to the nearest number of `dtype`, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # The interpreter cuts bits off where the hardware rounds.
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(dtype)
