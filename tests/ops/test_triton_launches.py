# SPDX-License-Identifier: Apache-2.0
"""Launches of the Triton kernels, recorded instead of run, on CPU tensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter runs kernels instead of launching them", allow_module_level=True)

from triton.runtime.jit import JITFunction

from adacache_kernels import triton as kernels
from adacache_kernels.columns import METRICS, RULES

#: The limit of the second and third dimension of a grid.
MOST_BLOCKS = 65535
ROWS, TOKENS, CHANNELS = 70000, 2, 8
L1, PUBLISHED, PAPER = METRICS["l1"], RULES["published"], RULES["paper"]

#: Arguments of a norm without modulation.
NO_NORM = (*[None] * 6, 1e-6)

Launch = tuple[str, tuple[int, ...], dict[str, Any]]  # kernel, grid, constexpr arguments and options


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    recorded: list[Launch] = []

    def record(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        recorded.append((self.fn.__name__, grid, kwargs))

    monkeypatch.setattr(JITFunction, "run", record)
    return recorded


def stream() -> torch.Tensor:
    return torch.empty(1, TOKENS, CHANNELS).expand(ROWS, TOKENS, CHANNELS)


def eight() -> torch.Tensor:
    return stream().to(torch.float8_e4m3fn)


def heads() -> torch.Tensor:
    return torch.empty(1, TOKENS, 3, 2, CHANNELS).expand(ROWS, TOKENS, 3, 2, CHANNELS)


MANY_ROWS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "gated_residual_out": lambda op: op(stream(), stream(), None, None, None, 0, stream()),
    "gated_residual_meter_out": lambda op: op(
        stream(), stream(), None, None, stream(), None, None, None, 0, None, 1, TOKENS, (1,), L1, stream()
    ),
    "stack_residual_meter": lambda op: op(
        stream(), stream(), stream(), None, None, None, 1, TOKENS, (1,), L1
    ),
    "residual_meter": lambda op: op(stream(), stream(), None, 1, TOKENS, (1,), L1),
    "reuse_residual_out": lambda op: op(stream(), stream(), None, None, None, None, None, stream()),
    "extrapolate_residual_out": lambda op: op(
        stream(), [stream()], torch.empty(1, 1), None, None, None, stream()
    ),
    "extrapolate_residual_meter_out": lambda op: op(
        *(stream(), [stream()], torch.empty(1, 1), torch.empty(1, 1), None, None, None),
        *(None, 1, TOKENS, (1,), L1, stream()),
    ),
    "layer_norm_modulate_out": lambda op: op(stream(), *NO_NORM, None, stream()),
    "rms_norm_modulate_out": lambda op: op(stream(), *NO_NORM, None, stream()),
    "norm_modulate_float8_out": lambda op: op(stream(), *NO_NORM, None, 0, eight(), stream()[:, :, :1]),
    "gated_residual_norm_float8_out": lambda op: op(
        *(stream(), stream(), None, None, *NO_NORM, None, 0, 0, stream(), eight(), stream()[:, :, :1])
    ),
    "gated_residual_norm_out": lambda op: op(
        stream(), stream(), None, None, *NO_NORM, None, 0, 0, stream(), stream()
    ),
    "gated_residual_norm_meter_out": lambda op: op(
        *(stream(), stream(), None, None, stream(), None, *NO_NORM, None, None, 0, 0, None),
        *(1, TOKENS, (1,), L1, stream(), stream()),
    ),
    "fused_qk_norm_rope": lambda op: op(
        heads(), torch.empty(CHANNELS), torch.empty(CHANNELS), None, None, False, 1e-6
    ),
    "temporal_attention_out": lambda op: op(
        heads(), None, None, None, None, False, TOKENS, 1e-6, 1.0, torch.empty(ROWS, TOKENS, 2 * CHANNELS)
    ),
}


@pytest.mark.parametrize("op", MANY_ROWS)
def test_grid_supports_any_number_of_rows(launches: list[Launch], op: str) -> None:
    MANY_ROWS[op](kernels._LAUNCHERS[op])
    assert any(grid[0] >= ROWS for _, grid, _ in launches)
    for kernel, grid, _ in launches:
        assert all(blocks <= MOST_BLOCKS for blocks in grid[1:]), (kernel, grid)


@pytest.mark.parametrize("rule", [PUBLISHED, PAPER])
def test_decide_is_compiled_once_for_all_sizes(launches: list[Launch], rule: int) -> None:
    sums = torch.empty(1, 9, dtype=torch.float64)
    state = torch.empty(1, 11, dtype=torch.float64)
    table = torch.empty(3, dtype=torch.float64)
    for elements in (6912000.0, 62208000.0):
        kernels.decide(
            sums, state, table, table, *[None] * 3, 5, 30, 0, 15, (1,), L1, rule, elements, 4, 26, *[0.5] * 4
        )
    (_, _, first), (_, _, second) = launches
    assert first == second
