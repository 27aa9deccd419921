# SPDX-License-Identifier: Apache-2.0
"""Adds the residuals of a block on the ops."""

from __future__ import annotations

import torch
from torch import Tensor

import adacache_kernels
from adacache.fused.norms import ModelNorm, Norm, with_table
from adacache.models.modulation import gated

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Residuals:
    """`Add` without caching.

    Args:
        tier: see `fused.TIERS`.
    """

    def __init__(self, tier: str):
        self.close = tier == "close"

    def __call__(
        self,
        part: str,
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        norm: ModelNorm | None = None,
        norm_out: Tensor | None = None,
        gate_table: Tensor | None = None,
        rounding: str = "eager",
    ) -> tuple[Tensor, Tensor | None]:
        if not fits(x, y, gate, gate_table, rounding):
            x = added(x, residual(y, gate, gate_table), rounding)
            return x, None if norm is None else norm(x, norm_out)
        fused = self.fused(x, norm)
        if fused is not None:
            return fused.after(x, y, gate, norm_out, gate_table, rounding)
        x = adacache_kernels.gated_residual(x, y, gate, gate_table=gate_table, rounding=rounding)
        return x, None if norm is None else norm(x, norm_out)

    def norm(self, x: Tensor, norm: ModelNorm, out: Tensor | None = None) -> Tensor:
        fused = self.fused(x, norm) if fits(x, x, None) else None
        return norm(x, out) if fused is None else fused(x, out)

    def fused(self, x: Tensor, norm: ModelNorm | None) -> Norm | None:
        """The norm for the ops; None: the model's own module computes it."""
        return norm.fused(x) if self.close and norm is not None else None


def residual(y: Tensor, gate: Tensor | None, gate_table: Tensor | None = None) -> Tensor:
    """gate * y as the model forms it."""
    return y if gate is None else gated(y, with_table(gate, gate_table))


def watched(
    x: Tensor, y: Tensor, gate: Tensor | None, gate_table: Tensor | None, rounding: str
) -> tuple[Tensor, Tensor]:
    """x plus a residual as the model forms them, and the residual in the dtype in which it is measured."""
    formed = residual(y, gate, gate_table)
    return added(x, formed, rounding), formed.type_as(x) if rounding == "float32" else formed


def added(x: Tensor, formed: Tensor, rounding: str) -> Tensor:
    """x plus a residual as the model forms it."""
    if rounding == "float32":
        return (formed + x.float()).type_as(x)
    return formed + x  # in this order, the result is contiguous wherever y is


def fits(
    x: Tensor, y: Tensor, gate: Tensor | None, gate_table: Tensor | None = None, rounding: str = "eager"
) -> bool:
    """Whether the ops compute x + gate * y as the model does: dtypes, no gradients."""
    if x.ndim != 3 or x.dtype not in FLOATS or x.shape != y.shape or x.dtype != y.dtype:
        return False
    if x.stride(2) != 1 or y.stride(2) != 1 or not x.numel():
        return False
    if gate is not None and (gate.ndim != 3 or gate.stride(2) != 1):
        return False
    if gate is not None and gate.dtype != x.dtype and (rounding, gate.dtype) != ("float32", torch.float32):
        return False
    given = (x, y, gate, gate_table)
    return not (torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in given))
