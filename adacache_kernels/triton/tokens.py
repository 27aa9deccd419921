# SPDX-License-Identifier: Apache-2.0
"""Loads and stores per token: row indices, modulators, float8 caches."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import PER_FRAME, PER_TOKEN
from .numeric import float8_of_float, float8_scales, float_of_float8, largest_magnitude, round_to

_PER_FRAME = tl.constexpr(PER_FRAME)
_PER_TOKEN = tl.constexpr(PER_TOKEN)


@triton.jit
def row_of(rows, row, total):
    """The row of a tensor with `total` rows for this row of the batch; -1 if the index is out of range."""
    if rows is None:
        return row
    else:
        picked = tl.load(rows + row).to(tl.int64)
        return tl.where((picked >= 0) & (picked < total), picked, -1)


@triton.jit
def load_modulator(data, table, step, frame, token, channel, mask, PER: tl.constexpr):
    """The gate, shift or scale of a row as float32, for each token and channel of `mask`. table: None, or
    [C], which is added."""
    # Also loaded in the shape of the tile if shared, so that it has the same thread layout.
    at = tl.broadcast_to(channel, mask.shape)
    if PER == _PER_TOKEN:
        at = at + token * step
    elif PER == _PER_FRAME:
        data += frame * step
    value = tl.load(data + at, mask=mask, other=0.0).to(tl.float32)
    if table is not None:
        value = tl.load(table + tl.broadcast_to(channel, mask.shape), mask=mask, other=0.0) + value
    return value


@triton.jit
def product(y, gate):
    """gate*y in float32; y without a gate."""
    if gate is None:
        return y.to(tl.float32)
    else:
        return gate * y.to(tl.float32)


@triton.jit
def gated(y, gate, dtype: tl.constexpr):
    """The residual gate*y, rounded like in eager PyTorch before the addition."""
    if gate is None:
        return y
    else:
        return round_to(gate * y.to(tl.float32), dtype)


@triton.jit
def kept(stored, scale):
    """Cached values as float32; scale: of the tokens of a float8 cache, otherwise None."""
    if scale is None:
        return stored.to(tl.float32)
    else:
        return float_of_float8(stored) * scale


@triton.jit
def store_float8(
    out,
    at,
    scale,
    scale_at,
    values,  # whole tokens: a tuple of tiles, 0 outside the channels
    channel,
    channels,
    tokens_mask,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Store values as float8, with one scale per token."""
    largest = tl.zeros(values[0].shape, dtype=tl.int32)
    for chunk in tl.static_range(len(values)):
        largest = largest_magnitude(largest, values[chunk].to(tl.float32))
    new_scale, inverse = float8_scales(tl.max(largest, 1)[:, None])
    tl.store(scale + scale_at, new_scale, mask=tokens_mask)
    for chunk in tl.static_range(len(values)):
        start = chunk * BLOCK_CHANNELS
        stored = float8_of_float(values[chunk].to(tl.float32) * inverse)
        tl.store(out + at + start, stored, mask=tokens_mask & (channel + start < channels))
