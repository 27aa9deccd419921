# SPDX-License-Identifier: Apache-2.0
"""Shared arithmetic of the Triton kernels: rounding like eager PyTorch, and float8."""

from __future__ import annotations

import triton
import triton.language as tl

#: Whether kernels run in the Triton interpreter (TRITON_INTERPRET=1), on CPU tensors.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """Round float32 to `dtype`, to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # The interpreter truncates instead of rounding.
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(dtype)


# float8 e4m3fn: no infinities, 0x7f is NaN, the largest finite value is 448. Integer arithmetic as in
# csrc/core/numeric.h, because Triton casts to float8 only on sm_89 and later.


@triton.jit
def float_of_float8(bits):
    """Widen the bits (uint8) of float8 e4m3 to float32."""
    bits = bits.to(tl.uint32)
    magnitude = (bits & 0x7F) << 20
    # The exponent bias differs by 120. Multiplying by 2^120 is also correct for subnormals.
    scaled = magnitude.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0
    finite = scaled.to(tl.uint32, bitcast=True)
    special = tl.where(magnitude == 0x07F00000, magnitude | 0x7FC00000, finite)
    return (special | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def float8_of_float(value):
    """Round float32 to float8 e4m3, to nearest even. Returns the bits (uint8)."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + (((magnitude >> 20) & 1) + 0xC407FFFF)) >> 20
    # Adding 2^14 rounds to the spacing of float8 subnormals, 2^-9.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.uint32, bitcast=True) - 0x46800000
    finite = tl.where(magnitude < 0x3C800000, subnormal, normal)
    result = tl.where(magnitude > 0x43E80000, 0x7F, finite) | ((bits >> 24) & 0x80)
    return result.to(tl.uint8)


@triton.jit
def largest_magnitude(largest, value):
    """The maximum of magnitudes as integer bits, where NaN orders above all numbers."""
    return tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def float8_scales(largest_bits):
    """The scale of a token, and the factor of its values before rounding to float8.

    Below the threshold the scale is 1, because 448 / largest would overflow. A token with a NaN has scale
    NaN.
    """
    largest = largest_bits.to(tl.float32, bitcast=True)
    negligible = largest < 7.8886090522101181e-31  # 2^-100
    inverse = tl.div_rn(tl.full(largest.shape, 448.0, tl.float32), largest)
    return tl.where(negligible, 1.0, largest * (1 / 448)), tl.where(negligible, 1.0, inverse)
