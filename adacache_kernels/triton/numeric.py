"""Arithmetic that the Triton kernels share: rounding to the stored dtype exactly as eager PyTorch rounds, and
float8."""

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


# float8 e4m3 without infinities: 0x7f is its only NaN, 448 its largest number. In whole numbers, since Triton
# casts to float8 on sm_89 and later alone; csrc/core/numeric.h has the same arithmetic.


@triton.jit
def float_of_float8(bits):
    """Widen the bits (uint8) of float8 e4m3 to float32."""
    bits = bits.to(tl.uint32)
    magnitude = (bits & 0x7F) << 20
    # The exponent's bias differs by 120. Scaling by 2^120, and not adding to the exponent, is right for
    # subnormals too.
    scaled = magnitude.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0
    finite = scaled.to(tl.uint32, bitcast=True)
    special = tl.where(magnitude == 0x07F00000, magnitude | 0x7FC00000, finite)
    return (special | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def float8_of_float(value):
    """Round float32 to the nearest float8 e4m3, ties to even, and give its bits (uint8)."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + (((magnitude >> 20) & 1) + 0xC407FFFF)) >> 20
    # Adding 2^14 lets the float adder itself round to the spacing of float8's subnormals, 2^-9.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.uint32, bitcast=True) - 0x46800000
    finite = tl.where(magnitude < 0x3C800000, subnormal, normal)
    result = tl.where(magnitude > 0x43E80000, 0x7F, finite) | ((bits >> 24) & 0x80)
    return result.to(tl.uint8)


@triton.jit
def largest_magnitude(largest, value):
    """Of two, as the bits of their magnitude: integers, among which NaN is larger than every number."""
    return tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def float8_scales(largest_bits):
    """What a token's values in float8 are multiplied by when read, and before they are rounded.

    A token of (nearly) nothing has scale 1, since 448 / largest would overflow; one that holds NaN has scale
    NaN.
    """
    largest = largest_bits.to(tl.float32, bitcast=True)
    negligible = largest < 7.8886090522101181e-31  # 2^-100
    inverse = tl.div_rn(tl.full(largest.shape, 448.0, tl.float32), largest)
    return tl.where(negligible, 1.0, largest * (1 / 448)), tl.where(negligible, 1.0, inverse)
