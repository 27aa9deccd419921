# SPDX-License-Identifier: Apache-2.0
"""Cases for the attention ops: inputs, expected results in float64, and results of PyTorch in the same
dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
import pytest
import torch
from op_cases import Buffer, random_tensor

#: Channel pairs and layouts of the angle tables.
ROPES = ["none", "interleaved", "halves", "interleaved by token", "halves by token"]


@dataclass(frozen=True)
class Shape:
    rows: int
    frames: int
    places: int
    heads: int
    dim: int

    @property
    def tokens(self) -> int:
        return self.frames * self.places

    def __str__(self) -> str:
        return f"{self.rows}x({self.frames}*{self.places})x{self.heads}x{self.dim}"


#: Odd sizes, all sizes 1, common model widths, one frame more than a chunk, the limits.
SHAPES = [
    Shape(2, 5, 3, 2, 8),
    Shape(1, 15, 6, 3, 72),
    Shape(1, 16, 2, 2, 64),
    Shape(2, 17, 3, 1, 40),
    Shape(1, 33, 2, 2, 10),
    Shape(1, 64, 2, 1, 130),
    Shape(1, 1, 3, 2, 22),
    Shape(3, 2, 1, 1, 2),
    Shape(1, 3, 2, 2, 256),
]
ODD_SHAPES = [Shape(1, 4, 3, 2, 7), Shape(2, 3, 1, 1, 1), Shape(1, 18, 1, 2, 33)]
EMPTY_SHAPES = [Shape(0, 3, 4, 2, 8), Shape(2, 3, 0, 2, 8), Shape(2, 3, 4, 0, 8), Shape(2, 3, 4, 2, 0)]


def refuse_cuda(request: pytest.FixtureRequest) -> None:
    """Skips tests of the backend "cuda", which has no attention ops."""
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "cuda":
        pytest.skip("the CUDA library has no attention ops; they run in Triton")


@dataclass
class Inputs:
    """Arguments of both ops, and the buffer of qkv."""

    shape: Shape
    buffer: Buffer
    qkv: torch.Tensor
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    interleaved: bool

    @property
    def norm_and_rope(self) -> tuple[torch.Tensor | None, ...]:
        return self.q_weight, self.k_weight, self.cos, self.sin


def make_inputs(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    norm: bool = True,
    rope: str = "interleaved",
    layout: str = "contiguous",
    seed: int = 0,
    size: float = 1.0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    channels = 3 * shape.heads * shape.dim
    if channels:
        values = random_tensor(generator, shape.rows, shape.tokens, channels, dtype=torch.float64) * size
    else:
        values = torch.empty(shape.rows, shape.tokens, 0, dtype=torch.float64)
    buffer = Buffer(values.to(dtype).to(device), layout)
    weights: list[torch.Tensor | None] = [None, None]
    if norm:
        weights = [(1 + torch.randn(shape.dim, generator=generator) / 4).to(dtype).to(device) for _ in "qk"]
    cos = sin = None
    if rope != "none":
        length = shape.tokens if "by token" in rope else shape.frames
        angle = 3 * torch.randn(length, shape.dim // 2, generator=generator)
        cos, sin = angle.cos().to(device), angle.sin().to(device)
    qkv = (
        buffer.tensor.unflatten(2, (3, shape.heads, shape.dim))
        if channels
        else buffer.tensor.view(shape.rows, shape.tokens, 3, shape.heads, shape.dim)
    )
    return Inputs(shape, buffer, qkv, weights[0], weights[1], cos, sin, "halves" not in rope)


def exact_norm_and_rope(inputs: Inputs, eps: float = 1e-6) -> numpy.ndarray:
    """fused_qk_norm_rope in float64 NumPy: [B, N, 3, heads, dim]."""
    qkv = inputs.qkv.detach().cpu().double().numpy().copy()
    half = inputs.shape.dim // 2
    for index, weight in enumerate((inputs.q_weight, inputs.k_weight)):
        x = qkv[:, :, index]
        if weight is not None and x.size:
            x = x / numpy.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight.cpu().double().numpy()
        if inputs.cos is not None and inputs.sin is not None and half:
            repeats = inputs.shape.tokens // max(inputs.cos.shape[0], 1)
            c = inputs.cos.cpu().double().numpy().repeat(repeats, 0)[:, None]
            s = inputs.sin.cpu().double().numpy().repeat(repeats, 0)[:, None]
            a, b = (x[..., ::2], x[..., 1::2]) if inputs.interleaved else (x[..., :half], x[..., half:])
            turned = numpy.empty_like(x)
            first, second = a * c - b * s, a * s + b * c
            if inputs.interleaved:
                turned[..., ::2], turned[..., 1::2] = first, second
            else:
                turned[..., :half], turned[..., half:] = first, second
            x = turned
        qkv[:, :, index] = x
    return qkv


def exact_attention(inputs: Inputs, scale: float | None = None, eps: float = 1e-6) -> numpy.ndarray:
    """temporal_attention in float64 NumPy, per place and head: [B, N, heads * dim]."""
    shape = inputs.shape
    qkv = exact_norm_and_rope(inputs, eps)
    factor = 1 / math.sqrt(shape.dim) if scale is None else scale
    out = numpy.zeros((shape.rows, shape.tokens, shape.heads, shape.dim))
    for row in range(shape.rows):
        for place in range(shape.places):
            for head in range(shape.heads):
                q, k, v = qkv[row, place :: shape.places, :, head].transpose(1, 0, 2)
                scores = q @ k.T * factor
                weights = numpy.exp(scores - scores.max(-1, keepdims=True))
                out[row, place :: shape.places, head] = weights / weights.sum(-1, keepdims=True) @ v
    return out.reshape(shape.rows, shape.tokens, shape.heads * shape.dim)


def eager_norm_and_rope(inputs: Inputs, eps: float = 1e-6) -> torch.Tensor:
    """As in `adacache.models.stdit3`, in the dtype of the tensors."""
    qkv = inputs.qkv.clone()
    for index, weight in enumerate((inputs.q_weight, inputs.k_weight)):
        x = qkv[:, :, index]
        if weight is not None:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            x = weight * wide.to(x.dtype)
        if inputs.cos is not None and inputs.sin is not None and inputs.shape.dim:
            repeats = inputs.shape.tokens // max(inputs.cos.shape[0], 1)
            axis = -1 if inputs.interleaved else -2
            pairs = x.unflatten(-1, (-1, 2) if inputs.interleaved else (2, -1))
            a, b = pairs.unbind(axis)
            turned = torch.stack((-b, a), axis).flatten(-2)
            c, s = (
                torch.stack((table, table), axis).flatten(-2).repeat_interleave(repeats, 0)[:, None]
                for table in (inputs.cos, inputs.sin)
            )
            x = (x * c + turned * s).to(x.dtype)
        qkv[:, :, index] = x
    return qkv


def eager_attention(
    inputs: Inputs, scale: float | None = None, eps: float = 1e-6
) -> tuple[torch.Tensor, ...]:
    """With fused attention of PyTorch, and in separate operations; their errors differ."""
    shape = inputs.shape
    qkv = eager_norm_and_rope(inputs, eps).unflatten(1, (shape.frames, shape.places))
    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5)  # [B, places, heads, frames, dim] each
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    factor = max(shape.dim, 1) ** -0.5 if scale is None else scale
    stepwise = torch.softmax(q @ k.transpose(-1, -2) * factor, -1) @ v
    return tuple(
        y.permute(0, 3, 1, 2, 4).reshape(shape.rows, shape.tokens, shape.heads * shape.dim)
        for y in (fused, stepwise)
    )


def check_error(given: torch.Tensor, exact: numpy.ndarray, *eager: torch.Tensor, floor: float = 0.0) -> None:
    """The error against float64 is at most twice that of PyTorch in this dtype, plus one rounding and
    `floor`."""
    assert given.shape == exact.shape
    error = numpy.abs(given.detach().cpu().double().numpy() - exact).max()
    allowed = max(numpy.abs(plain.detach().cpu().double().numpy() - exact).max() for plain in eager)
    assert all(plain.dtype == given.dtype for plain in eager)
    rounding = torch.finfo(given.dtype).eps / 2 * numpy.abs(exact).max()
    assert error <= 2 * allowed + rounding + floor, (error, allowed, rounding, floor)
