# SPDX-License-Identifier: Apache-2.0
"""Modulated norms between the sub-layers of a block: as the model computes them, and as the ops take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import adacache_kernels
from adacache.interpose import is_interposed, plain_class


@dataclass(frozen=True)
class Norm:
    """layer_norm(x) * (1 + scale) + shift as the ops take it: [B, 1|T|N, C] each, weight and bias [C]."""

    shift: Tensor | None
    scale: Tensor | None
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        return adacache_kernels.layer_norm_modulate(
            x, self.shift, self.scale, weight=self.weight, bias=self.bias, eps=self.eps, out=out
        )

    def after(
        self, x: Tensor, y: Tensor, gate: Tensor | None, norm_out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x + gate * y and its norm, in one pass."""
        return adacache_kernels.gated_residual_norm(
            x,
            y,
            gate,
            self.shift,
            self.scale,
            weight=self.weight,
            bias=self.bias,
            eps=self.eps,
            out=None if norm_out is None else torch.empty_like(y, memory_format=torch.contiguous_format),
            norm_out=norm_out,
        )

    def grouped(self, regroup: Callable[[Tensor], Tensor]) -> Norm:
        """The norm with its modulators in another layout."""
        shift, scale = (None if value is None else regroup(value) for value in (self.shift, self.scale))
        return Norm(shift, scale, self.eps, self.weight, self.bias)


@dataclass(frozen=True)
class ModelNorm:
    """A norm module of the model and its modulation, each [B, 1|T|N, C] for x [B, N, C]."""

    module: nn.Module
    shift: Tensor
    scale: Tensor

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Bit-identical to the model's own module(x) * (1 + scale) + shift.

        Args:
            out: of x's shape, for the result.
        """
        normed: Tensor = self.module(x)
        groups = self.shift.shape[1]
        shape = normed.shape
        shift, scale = self.shift, 1 + self.scale
        if groups not in (1, shape[1]):
            normed = normed.unflatten(1, (groups, -1))
            shift, scale = shift.unsqueeze(2), scale.unsqueeze(2)
        if _needs_gradients(normed, scale, shift):
            normed = normed * scale + shift
        elif out is not None and out.dtype == normed.dtype == scale.dtype == shift.dtype:
            return torch.mul(normed, scale, out=out.view(normed.shape)).add_(shift).view(shape)
        elif normed.dtype == scale.dtype == shift.dtype and _is_plain(self.module):
            normed = normed.mul_(scale).add_(shift)
        else:
            normed = normed * scale + shift
        normed = normed.view(shape)
        return normed if out is None else out.copy_(normed)

    def fused(self, x: Tensor) -> Norm | None:
        """The same for the ops; None: they cannot compute it."""
        module = self.module
        if not _is_plain(module) or _needs_gradients(x, self.shift, self.scale):
            return None
        assert isinstance(module, nn.LayerNorm)
        given = [self.shift, self.scale, *(t for t in (module.weight, module.bias) if t is not None)]
        if module.normalized_shape != x.shape[-1:] or any(value.dtype != x.dtype for value in given):
            return None
        return Norm(self.shift, self.scale, module.eps, module.weight, module.bias)


def hooked(module: Any) -> str | None:
    """Why code other than the class's own forward runs when a module is called; None if it does not."""
    attributes = module.__dict__
    if "forward" in attributes:
        return "its forward is replaced"
    if attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]:
        return "it has hooks"
    if torch.nn.modules.module._has_any_global_hook():
        return "hooks for all modules are set"
    return None


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is an unchanged `nn.LayerNorm`, so that its output belongs to the caller alone."""
    plain = plain_class(module) is nn.LayerNorm and not is_interposed(module)
    return plain and hooked(module) is None


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
