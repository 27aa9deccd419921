# SPDX-License-Identifier: Apache-2.0
"""Unchecked row indices, as on a GPU: calls the Triton ops directly."""

from __future__ import annotations

import importlib

import pytest
import torch
from op_cases import random_tensor, same_bits, video_ids

from adacache_kernels import _backend

ROWS, TOKENS, CHANNELS = 3, 12, 24


@pytest.fixture
def device() -> torch.device:
    if _backend._missing("triton"):
        pytest.skip("the package triton is not installed")
    if not _backend._INTERPRETED and not torch.cuda.is_available():
        pytest.skip("requires a GPU or TRITON_INTERPRET=1")
    importlib.import_module("adacache_kernels.triton")
    return torch.device("cpu" if _backend._INTERPRETED else "cuda")


#: Arguments of a norm without modulation.
NO_NORM = (*[None] * 6, 1e-6)


class Tensors:
    def __init__(self, device: torch.device, float8: bool) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)
        self.x, self.y, self.gate = self.random(5), self.random(ROWS), self.random(ROWS, 1)
        self.out, self.norm_out = self.random(ROWS), self.random(ROWS)
        self.residual, self.scale = self.random(4), None
        if float8:
            self.residual = self.residual.to(torch.float8_e4m3fn)
            self.scale = torch.rand(4, TOKENS, generator=self.generator).to(device)
        self.before = self.residual.clone()
        self.videos = self.ids(0, 1, 2)

    def random(self, rows: int, tokens: int = TOKENS) -> torch.Tensor:
        size = (rows, tokens, CHANNELS)
        return random_tensor(self.generator, *size, dtype=torch.bfloat16, device=self.device)

    def ids(self, *ids: int) -> torch.Tensor:
        return video_ids(ids, self.device)

    def changed(self) -> list[int]:
        """The cache rows that were written."""
        now, before = self.residual.view(torch.uint8), self.before.view(torch.uint8)
        return [row for row in range(4) if not torch.equal(now[row], before[row])]


def missing(result: torch.Tensor, columns: slice = slice(None)) -> list[int]:
    """The rows that are all NaN; other rows must have no NaN."""
    rows = result.reshape(result.shape[0], -1)[:, columns].isnan()
    assert (rows.all(1) == rows.any(1)).all()
    return rows.all(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("float8", [False, True])
def test_meters(device: torch.device, float8: bool) -> None:
    tensors = Tensors(device, float8)
    ops, given = torch.ops.adacache_triton, tensors
    metering = (given.videos, ROWS, 3, [1, 2])
    cache = (given.residual, given.scale)
    rows = (given.ids(1, 9, -1), given.ids(3, 1, 2))
    sums = ops.gated_residual_norm_meter_out(
        given.x,
        given.y,
        given.gate,
        None,
        *cache,
        *NO_NORM,
        *rows,
        0,
        0,
        *metering,
        1,
        given.out,
        given.norm_out,
    )
    assert missing(given.out) == missing(given.norm_out) == missing(sums) == [1, 2]
    assert given.changed() == [3]

    rows = (given.ids(1, 2, 3), given.ids(4, 1, -(2**31)))
    sums = ops.gated_residual_meter_out(
        given.x, given.y, None, None, *cache, *rows, 0, *metering, 0, given.out
    )
    assert missing(given.out) == missing(sums, slice(3)) == [0, 2]
    assert given.changed() == [1, 3]

    x_in = given.random(4)
    before = x_in.clone()
    sums = ops.stack_residual_meter_out(given.y, x_in, *cache, given.ids(4, 0, -7), *metering, 0, x_in)
    assert missing(sums, slice(3)) == [0, 2]
    assert given.changed() == [0, 1, 3]
    assert same_bits(x_in[1:], before[1:])
    assert same_bits(x_in[0], given.y[1])


@pytest.mark.parametrize("float8", [False, True])
def test_ops_that_only_read_the_cache(device: torch.device, float8: bool) -> None:
    ops, given = torch.ops.adacache_triton, Tensors(device, float8)
    picked = (given.ids(0, 1, 2), given.ids(3, 7, 7))
    reuse = torch.tensor([True, True, False], device=device)
    ops.reuse_residual_out(given.x, given.residual, given.scale, *picked, given.videos, reuse, given.out)
    assert missing(given.out) == [1]  # the last row does not reuse
    assert same_bits(given.out[2], given.x[2])


def test_streams(device: torch.device) -> None:
    ops, given = torch.ops.adacache_triton, Tensors(device, False)
    rows = given.ids(0, 7, -2)
    ops.gated_residual_out(given.x, given.y, None, None, rows, 0, given.out)
    assert missing(given.out) == [1, 2]
    for norm_modulate_out in (ops.layer_norm_modulate_out, ops.rms_norm_modulate_out):
        given.norm_out.fill_(0)
        norm_modulate_out(given.x, *NO_NORM, rows, given.norm_out)
        assert missing(given.norm_out) == [1, 2]
    eight, scale = given.norm_out.to(torch.float8_e4m3fn), given.norm_out[:, :, :1].float()
    ops.norm_modulate_float8_out(given.x, *NO_NORM, rows, 0, eight, scale)
    assert missing(eight.float()) == missing(scale) == [1, 2]
    coefficients = torch.ones(2, 2, device=device)
    factors = [given.random(4), given.random(4)]
    videos = given.ids(0, 1, 2)  # 2 is out of range
    ops.extrapolate_residual_out(given.x, factors, coefficients, given.ids(0, 7, 2), None, videos, given.out)
    assert missing(given.out) == [1, 2]
    for rows, videos in ((given.ids(0, 7, 2), given.ids(0, 1, 1)), (given.ids(0, 1, 2), given.ids(0, 1, 2))):
        meter = (videos, 2, 2, (1,), 0)
        arguments = (given.x, factors, coefficients, coefficients * 2, None, rows, None, *meter, given.out)
        given.out.fill_(0)
        sums = ops.extrapolate_residual_meter_out(*arguments)
        assert missing(given.out) == [1 if rows[1] == 7 else 2]
        assert sums[1].isnan().all()
        assert bool(sums[0, :3].isfinite().all()) == (videos.max() < 2)
