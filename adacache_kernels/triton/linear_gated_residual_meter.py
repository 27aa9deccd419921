"""y = a @ weight.T + bias as the first half of gated_residual_meter: y never goes to memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..columns import METRICS
from .launch import SHARED, modulator, on_device
from .numeric import INTERPRETED, round_to
from .sums import add_sums, combine_sums, measure, measure_motion, no_sums, store_sums
from .tokens import gated, load_modulator, row_of

_SHARED = tl.constexpr(SHARED)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def linear_gated_residual_meter_kernel(
    a,
    weight,
    bias,
    x,
    gate,
    residual,
    x_rows,
    residual_rows,
    out,
    partial,  # [columns, rows, blocks] float64
    rows,
    frames,
    places,
    channels,
    inner,
    x_total,
    residual_total,
    a_row,
    a_token,
    weight_row,
    x_row,
    x_token,
    gate_row,
    gate_step,
    residual_row,
    residual_token,
    out_row,
    out_token,
    STRIDES: tl.constexpr,
    SQUARES: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PLACE_BLOCKS_TOGETHER: tl.constexpr,
    VECTOR: tl.constexpr,
    PASSES: tl.constexpr,  # times that the program's threads go over a tile
):
    # A program takes tile after tile. It stays on a tile's places and channels for all frames, so that the
    # frames of a motion pair meet in its registers.
    dtype: tl.constexpr = out.dtype.element_ty
    HALF: tl.constexpr = BLOCK_CHANNELS // 2
    INDEXED: tl.constexpr = x_rows is not None or residual_rows is not None
    place_blocks = tl.cdiv(places, BLOCK_PLACES)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    blocks = place_blocks * channel_blocks
    for tile in range(tl.program_id(0), rows * blocks, tl.num_programs(0)):
        row = (tile // blocks).to(tl.int64)
        block = tile % blocks
        # Tiles that run at the same time share rows of a and of weight in L2.
        together = PLACE_BLOCKS_TOGETHER * channel_blocks
        first = block // together * PLACE_BLOCKS_TOGETHER
        size = tl.minimum(place_blocks - first, PLACE_BLOCKS_TOGETHER)
        place_block = first + block % together % size
        channel_block = block % together // size
        place = (place_block * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)).to(tl.int64)[:, None]
        channel = channel_block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
        channel_of_half = channel_block * BLOCK_CHANNELS + tl.arange(0, HALF)[None, :]
        inside = channel < channels
        row_of_x = row_of(x_rows, row, x_total)
        row_of_residual = row_of(residual_rows, row, residual_total)
        exists = (row_of_x >= 0) & (row_of_residual >= 0)
        present = place < places
        if INDEXED:
            # A limit: the interpreter cannot broadcast a scalar mask.
            present = place < tl.where(exists, places, 0)

        step = tl.full([], places, tl.int64)
        k = tl.arange(0, BLOCK_INNER)
        weight_at = channel.to(tl.int64) * weight_row + k[:, None]
        row_gate = gate
        if gate is not None:
            row_gate = gate + row * gate_row
        sums = no_sums(BLOCK_PLACES, HALF, STRIDES, SQUARES, VECTOR, PASSES)

        for frame in range(frames):
            token = place + frame * step
            a_at = row * a_row + token * a_token + k[None, :]
            total = tl.zeros([BLOCK_PLACES, BLOCK_CHANNELS], dtype=tl.float32)
            for start in range(0, inner, BLOCK_INNER):
                left = inner - start
                a_tile = tl.load(a + a_at + start, mask=(place < places) & (k[None, :] < left), other=0.0)
                weight_tile = tl.load(
                    weight + weight_at + start, mask=inside & (k[:, None] < left), other=0.0
                )
                if _INTERPRETED:  # whose products take bfloat16 for integers
                    a_tile, weight_tile = a_tile.to(tl.float32), weight_tile.to(tl.float32)
                total = tl.dot(a_tile, weight_tile, total, input_precision="ieee")

            # Half after half: a whole tile of everything would not fit into registers.
            halves = tl.split(tl.permute(tl.reshape(total, [BLOCK_PLACES, 2, HALF]), (0, 2, 1)))
            for number in tl.static_range(2):
                here = channel_of_half + number * HALF
                mask = present & (here < channels)
                y = halves[number]
                if bias is not None:
                    # Nothing beyond the mask, where it would be measured.
                    y += load_modulator(bias, 0, 0, token, here, mask, _SHARED)
                y = round_to(y, dtype)
                factor = None
                if gate is not None:
                    factor = load_modulator(row_gate, gate_step, frame, token, here, mask, GATE)
                rounded = gated(y, factor, dtype)
                new = rounded.to(tl.float32)
                residual_at = residual + row_of_residual * residual_row + token * residual_token + here
                old = tl.load(residual_at, mask=mask, other=0.0).to(tl.float32)
                x_at = x + row_of_x * x_row + token * x_token + here
                given = tl.load(x_at, mask=mask, other=0.0).to(tl.float32) + new
                if INDEXED:
                    given = tl.where(exists, given, float("nan"))
                measured = measure(new, old, SQUARES, VECTOR, PASSES)
                for index in tl.static_range(len(STRIDES)):
                    paired = frame >= STRIDES[index]
                    # What this program has written there (a barrier has passed since): registers are scarce
                    # beside a product, and this read is small against those of a and weight.
                    earlier = tl.load(
                        residual_at - STRIDES[index] * (step * residual_token), mask=mask & paired, other=0.0
                    )
                    measured = measured + measure_motion(new, earlier.to(tl.float32), paired, VECTOR, PASSES)
                sums = add_sums(sums, measured)
                # No thread may write what another has still to read.
                tl.debug_barrier()
                tl.store(residual_at, rounded, mask=mask)
                tl.store(
                    out + row * out_row + token * out_token + here,
                    round_to(given, dtype),
                    mask=(place < places) & (here < channels),
                )
            if len(STRIDES) > 0:
                tl.debug_barrier()
        store_sums(partial, sums, exists, row, rows, block, blocks, SQUARES)


@dataclass(frozen=True)
class ProductTiling:
    constants: dict[str, int]
    warps: int


def product_tiling(element_size: int) -> ProductTiling:
    # float32 has no tensor cores here (they would round to 10 bits): its tiles are those of plain arithmetic.
    places, channels, inner, warps = (128, 128, 64, 8) if element_size == 2 else (64, 64, 32, 4)
    vector = 16 // element_size
    constants = {
        "BLOCK_PLACES": places,
        "BLOCK_CHANNELS": channels,
        "BLOCK_INNER": inner,
        "PLACE_BLOCKS_TOGETHER": 8,
        "VECTOR": vector,
        "PASSES": places * (channels // 2) // (vector * 32 * warps),
    }
    return ProductTiling(constants, warps)


def linear_gated_residual_meter(
    a: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launch; returns the sums."""
    rows, tokens, channels = out.shape
    places = tokens // frames
    squares = metric != METRICS["l1"]
    gates = modulator(gate, frames, tokens)
    tile = product_tiling(x.element_size())
    place_blocks = triton.cdiv(places, tile.constants["BLOCK_PLACES"])
    channel_blocks = triton.cdiv(channels, tile.constants["BLOCK_CHANNELS"])
    blocks = place_blocks * channel_blocks if out.numel() else 0
    partial = torch.empty((7 + 2 * len(strides), rows, blocks), dtype=torch.float64, device=x.device)
    with on_device(x):
        if blocks:
            programs = 3 if INTERPRETED else torch.cuda.get_device_properties(x.device).multi_processor_count
            linear_gated_residual_meter_kernel[(min(programs, rows * blocks),)](
                a,
                weight,
                bias,
                x,
                gate,
                residual,
                x_rows,
                residual_rows,
                out,
                partial,
                rows,
                frames,
                places,
                channels,
                a.shape[2],
                x.shape[0],
                residual.shape[0],
                a.stride(0),
                a.stride(1),
                weight.stride(0),
                x.stride(0),
                x.stride(1),
                gates.row,
                gates.step,
                residual.stride(0),
                residual.stride(1),
                out.stride(0),
                out.stride(1),
                STRIDES=tuple(strides),
                SQUARES=squares,
                GATE=gates.per,
                **tile.constants,
                num_warps=tile.warps,
                num_stages=3,
                enable_fp_fusion=False,  # eager PyTorch rounds gate*y before it adds
            )
        return combine_sums(partial, video_of_row, num_videos, squares=squares)
