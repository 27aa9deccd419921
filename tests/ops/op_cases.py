# SPDX-License-Identifier: Apache-2.0
"""Tensors for the op tests: shapes, memory layouts, guard elements, and expected sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SENTINEL = 777.0


@dataclass(frozen=True)
class Shape:
    rows: int
    frames: int
    places: int
    channels: int

    @property
    def tokens(self) -> int:
        return self.frames * self.places

    def __str__(self) -> str:
        return f"{self.rows}x({self.frames}*{self.places})x{self.channels}"


#: Odd sizes, all sizes 1, a common model width, more frames than one float32 run, a row longer than one tile.
SHAPES = [
    Shape(2, 4, 9, 37),
    Shape(1, 2, 1, 1),
    Shape(3, 5, 7, 64),
    Shape(1, 3, 5, 1152),
    Shape(2, 35, 3, 20),
    Shape(1, 2, 70, 130),
]
EMPTY_SHAPES = [Shape(0, 3, 4, 8), Shape(2, 3, 0, 8), Shape(2, 3, 4, 0)]

#: Memory layouts of a [B, N, C] tensor. Inputs may also be expanded over rows or tokens.
LAYOUTS = ["contiguous", "channel_slice", "unaligned", "token_slice", "rows_inside"]
READ_LAYOUTS = [*LAYOUTS, "shared_rows", "shared_tokens"]


class Buffer:
    """A tensor with this layout inside a larger one, whose other elements must not change."""

    def __init__(self, values: torch.Tensor, layout: str) -> None:
        rows, tokens, channels = values.shape
        size = {
            "contiguous": (rows, tokens, channels),
            "channel_slice": (rows, tokens, channels + 24),  # like a fused projection; aligned
            "unaligned": (rows, tokens, channels + 3),
            "token_slice": (rows, 2 * tokens + 1, channels),
            "rows_inside": (tokens, rows, channels),  # [N, B, C] in memory
            "shared_rows": (min(rows, 1), tokens, channels),
            "shared_tokens": (rows, min(tokens, 1), channels),
        }[layout]
        self.memory = torch.full(size, SENTINEL, device=values.device).to(values.dtype)
        self.tensor = self._view(self.memory, layout, tokens, channels)
        if layout.startswith("shared"):
            self.tensor.copy_(values[: size[0], : size[1]])
            self.tensor = self.memory.expand(values.shape)
        else:
            self.tensor.copy_(values)
        self._layout = layout

    @staticmethod
    def _view(memory: torch.Tensor, layout: str, tokens: int, channels: int) -> torch.Tensor:
        if layout == "channel_slice":
            return memory[:, :, 8 : 8 + channels]
        if layout == "unaligned":
            return memory[:, :, 1 : 1 + channels]
        if layout == "token_slice":
            return memory[:, 1 : 2 * tokens + 1 : 2]
        return memory.transpose(0, 1) if layout == "rows_inside" else memory

    def check_surroundings(self) -> None:
        """No element around the tensor was written."""
        if self._layout not in ("channel_slice", "unaligned", "token_slice"):
            return
        _, tokens, channels = self.tensor.shape
        around = _bits(self.memory).clone()
        sentinel = _bits(torch.full((1,), SENTINEL, device=around.device).to(self.memory.dtype))
        self._view(around, self._layout, tokens, channels).copy_(sentinel)
        assert (around == sentinel).all()


def random_tensor(
    generator: torch.Generator, *size: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Normal values times a scale that varies over channels, to detect misplaced elements."""
    values = torch.randn(*size, generator=generator, dtype=torch.float64)
    return (values * torch.linspace(0.5, 1.5, size[-1], dtype=torch.float64)).to(dtype).to(device)


def random_gate(
    generator: torch.Generator, shape: Shape, kind: str, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """A gate per row, per frame, per token, or expanded over rows or tokens (stride 0)."""
    sizes = {
        "row": (shape.rows, 1),
        "frame": (shape.rows, shape.frames),
        "token": (shape.rows, shape.tokens),
        "shared": (1, 1),
        "row_expanded": (shape.rows, 1),
    }
    rows, groups = sizes[kind]
    gate = random_tensor(generator, rows, groups, shape.channels, dtype=dtype, device=device)
    if kind == "shared":
        return gate.expand(shape.rows, 1, shape.channels)
    if kind == "row_expanded":
        return gate.expand(shape.rows, shape.tokens, shape.channels)
    return gate


def gate_by_token(gate: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The gate expanded to one value per token."""
    if gate.shape[1] == 1 or gate.shape[1] == shape.tokens:
        return gate.expand(shape.rows, shape.tokens, shape.channels)
    return gate.repeat_interleave(shape.places, 1)


def exact_sums(
    new: torch.Tensor,
    old: torch.Tensor,
    frames: int,
    strides: Sequence[int],
    metric: str,
    videos: Sequence[int] | None = None,
    num_videos: int = 1,
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The sums in float64 by NumPy, and the sums of magnitudes (the scale of rounding errors)."""
    after, before = (tensor.detach().cpu().double().numpy() for tensor in (new, old))
    rows = after.shape[0]
    by_frame = after.reshape(rows, frames, after.shape[1] // frames, after.shape[2])
    columns = [abs(after - before), abs(before), abs(after)]
    columns += [(after - before) ** 2, before**2, after**2, after * before]
    for stride in strides:
        later, earlier = by_frame[:, stride:], by_frame[:, :-stride]
        columns += [abs(later - earlier), abs(later) + abs(earlier)]
    columns = [column.reshape(rows, column.size // max(rows, 1)) for column in columns]
    by_row = numpy.stack([column.sum(1) for column in columns], 1)
    scale_by_row = numpy.stack([abs(column).sum(1) for column in columns], 1)
    owner = numpy.asarray(videos if videos is not None else [0] * rows, dtype=int)
    sums = numpy.stack([by_row[owner == video].sum(0) for video in range(num_videos)])
    scale = numpy.stack([scale_by_row[owner == video].sum(0) for video in range(num_videos)])
    if metric == "l1":
        sums[:, 3:7] = numpy.nan
    return sums, scale


def check_sums(sums: torch.Tensor, exact: numpy.ndarray, scale: numpy.ndarray, channels: int) -> None:
    """Compares with float64 sums; non-finite values must be at the same places.

    Every term is rounded to float32 once or twice and then summed in float32 runs: C / 16 terms on the CPU,
    up to 32 terms per thread on a GPU. Each addition has an error of at most half an ulp.
    """
    run = max(32, -(-channels // 16)) + 2
    assert sums.dtype == torch.float64
    assert sums.is_contiguous()
    given = sums.cpu().numpy()
    assert given.shape == exact.shape
    finite = numpy.isfinite(exact)
    assert (numpy.isfinite(given) == finite).all(), (given, exact)
    error = abs(given[finite] - exact[finite])
    bound = run * 2.0**-24 * scale[finite] + 1e-36  # smaller squares underflow in float32
    assert (error <= bound).all(), (error / numpy.maximum(scale[finite], 1e-300)).max()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit-identical, including NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()]
    return tensor.contiguous().view(kind)


def video_ids(ids: Sequence[int], device: torch.device | str | None = None) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int32, device=device)
