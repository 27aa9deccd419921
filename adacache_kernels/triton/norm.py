# SPDX-License-Identifier: Apache-2.0
"""Modulated norm of tokens whose channels are all in one program."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import SHARED
from .numeric import round_to
from .tokens import load_modulator, store_float8

_SHARED = tl.constexpr(SHARED)


@triton.jit
def store_norm(
    out,
    at,
    out_scale,  # None, or of the tokens of an output in float8
    out_scale_at,
    values,  # a tuple of float32 tiles, 0 outside the channels
    weight,
    bias,
    shift,
    scale,
    shift_table,
    scale_table,
    eps,
    shift_step,
    scale_step,
    frame,
    token,
    channel,
    channels,
    tokens_mask,
    exists,  # None, or whether the row index is in range; otherwise NaN is stored
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Store (norm(values) * weight + bias) * (1 + scale) + shift, in float32, rounded once."""
    count = tl.full([values[0].shape[0], 1], 0.0, tl.float32) + channels
    if RMS:
        mean = tl.zeros(count.shape, dtype=tl.float32)
    else:
        total = values[0]
        for chunk in tl.static_range(1, len(values)):
            total += values[chunk]
        mean = tl.div_rn(tl.sum(total, 1)[:, None], count)
    squares = tl.zeros(values[0].shape, dtype=tl.float32)
    for chunk in tl.static_range(len(values)):
        inside = channel + chunk * BLOCK_CHANNELS < channels
        difference = tl.where(inside, values[chunk] - mean, 0.0)
        squares += difference * difference
    variance = tl.div_rn(tl.sum(squares, 1)[:, None], count)
    deviation = tl.sqrt_rn(variance + eps)
    factor = tl.div_rn(tl.full(deviation.shape, 1.0, tl.float32), deviation)
    results = ()
    for chunk in tl.static_range(len(values)):
        start = chunk * BLOCK_CHANNELS
        here = channel + start
        mask = tokens_mask & (here < channels)
        normed = (values[chunk] - mean) * factor
        if weight is not None:
            normed = normed * load_modulator(weight, None, 0, 0, token, here, mask, _SHARED)
        if bias is not None:
            normed = normed + load_modulator(bias, None, 0, 0, token, here, mask, _SHARED)
        if scale is not None:
            normed = normed * (
                1.0 + load_modulator(scale, scale_table, scale_step, frame, token, here, mask, SCALE)
            )
        if shift is not None:
            normed = normed + load_modulator(shift, shift_table, shift_step, frame, token, here, mask, SHIFT)
        if exists is not None:
            normed = tl.where(exists, normed, float("nan"))
        if out_scale is None:
            tl.store(out + at + start, round_to(normed, out.dtype.element_ty), mask=mask)
        else:
            results = results + (tl.where(here < channels, normed, 0.0),)
    if out_scale is not None:
        store_float8(
            out, at, out_scale, out_scale_at, results, channel, channels, tokens_mask, BLOCK_CHANNELS
        )
