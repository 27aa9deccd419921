"""What the Triton kernels load and store by token: rows picked by an index, modulators, float8 caches."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import PER_FRAME, PER_TOKEN
from .numeric import float8_of_float, float8_scales, float_of_float8, largest_magnitude, round_to

_PER_FRAME = tl.constexpr(PER_FRAME)
_PER_TOKEN = tl.constexpr(PER_TOKEN)


@triton.jit
def row_of(rows, row, total):
    """The row of a tensor with `total` rows that `rows` names for this row of the batch, -1 if none."""
    if rows is None:
        return row
    else:
        picked = tl.load(rows + row).to(tl.int64)
        return tl.where((picked >= 0) & (picked < total), picked, -1)


@triton.jit
def load_modulator(data, step, frame, token, channel, mask, PER: tl.constexpr):
    """A row's gate, shift or scale as float32, for each token and channel of `mask`."""
    # A shared one too is loaded in the tile's shape, so that each thread has the values it needs.
    at = tl.broadcast_to(channel, mask.shape)
    if PER == _PER_TOKEN:
        at = at + token * step
    elif PER == _PER_FRAME:
        data += frame * step
    return tl.load(data + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def gated(y, gate, dtype: tl.constexpr):
    """The residual gate*y, rounded as eager PyTorch rounds it before it adds."""
    if gate is None:
        return y
    else:
        return round_to(gate * y.to(tl.float32), dtype)


@triton.jit
def kept(stored, scale):
    """The values of a cache as float32; `scale` is that of its tokens in float8, None otherwise."""
    if scale is None:
        return stored.to(tl.float32)
    else:
        return float_of_float8(stored) * scale


@triton.jit
def store_float8(
    cache,
    at,
    scale,
    scale_at,
    residuals,  # whole tokens: a tuple of tiles, 0 outside the channels
    channel,
    channels,
    tokens_mask,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Keep a residual in float8, with one scale per token."""
    largest = tl.zeros(residuals[0].shape, dtype=tl.int32)
    for chunk in tl.static_range(len(residuals)):
        largest = largest_magnitude(largest, residuals[chunk].to(tl.float32))
    new_scale, inverse = float8_scales(tl.max(largest, 1)[:, None])
    tl.store(scale + scale_at, new_scale, mask=tokens_mask)
    for chunk in tl.static_range(len(residuals)):
        start = chunk * BLOCK_CHANNELS
        stored = float8_of_float(residuals[chunk].to(tl.float32) * inverse)
        tl.store(cache + at + start, stored, mask=tokens_mask & (channel + start < channels))
