# SPDX-License-Identifier: Apache-2.0
"""Modulated norms between the sub-layers of a block: as the model computes them, and as the ops take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import adacache_kernels
from adacache.fused.modules import fingerprint, hooked
from adacache.interpose import is_interposed, plain_class

LAYER_NORM_FORWARDS = frozenset({"2f6e2d66f327ebd1"})  # FP32LayerNorm of diffusers 0.42.1
RMS_NORM_FORWARDS = frozenset({"417c791c8e152fcb"})  # RMSNorm of diffusers 0.42.1


@dataclass(frozen=True)
class Norm:
    """norm(x) * (1 + scale) + shift as the ops take it: [B, 1|T|N, C] each, weight and bias [C].

    Attributes:
        shift_table, scale_table: [1, 1, C], added to shift and scale.
        kind: "layer" or "rms".
    """

    shift: Tensor | None
    scale: Tensor | None
    eps: float
    weight: Tensor | None = None
    bias: Tensor | None = None
    shift_table: Tensor | None = None
    scale_table: Tensor | None = None
    kind: str = "layer"

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        rms = self.kind == "rms"
        op = adacache_kernels.rms_norm_modulate if rms else adacache_kernels.layer_norm_modulate
        return op(
            x,
            self.shift,
            self.scale,
            shift_table=self.shift_table,
            scale_table=self.scale_table,
            weight=self.weight,
            bias=self.bias,
            eps=self.eps,
            out=out,
        )

    def after(
        self,
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        norm_out: Tensor | None = None,
        gate_table: Tensor | None = None,
        rounding: str = "eager",
    ) -> tuple[Tensor, Tensor]:
        """x + gate * y and its norm, in one pass; see `adacache_kernels.gated_residual_norm`."""
        return adacache_kernels.gated_residual_norm(
            x,
            y,
            gate,
            self.shift,
            self.scale,
            gate_table=gate_table,
            rounding=rounding,
            **self.rest(),
            out=None if norm_out is None else torch.empty_like(y, memory_format=torch.contiguous_format),
            norm_out=norm_out,
        )

    def rest(self) -> dict[str, Any]:
        """The norm without shift and scale, as arguments of an op that adds a residual too."""
        return {
            "shift_table": self.shift_table,
            "scale_table": self.scale_table,
            "weight": self.weight,
            "bias": self.bias,
            "eps": self.eps,
            "norm": self.kind,
        }

    def grouped(self, regroup: Callable[[Tensor], Tensor]) -> Norm:
        """The norm with its modulators in another layout."""
        shift, scale = (None if value is None else regroup(value) for value in (self.shift, self.scale))
        return replace(self, shift=shift, scale=scale)


@dataclass(frozen=True)
class ModelNorm:
    """A norm module of the model and its modulation, each [B, 1|T|N, C] for x [B, N, C]; None: it has none.

    Attributes:
        shift, scale: None: 0.
        gain: takes the place of 1 + scale.
        shift_table, scale_table: [1, 1, C], added to shift and scale in float32.
        float32: the model computes the norm of x.float() and casts the result to x's dtype.
    """

    module: nn.Module
    shift: Tensor | None = None
    scale: Tensor | None = None
    shift_table: Tensor | None = None
    scale_table: Tensor | None = None
    float32: bool = False
    gain: Tensor | None = None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Bit-identical to the model's own module(x) * (1 + scale) + shift, or module(x) * gain.

        Args:
            out: of x's shape, for the result.
        """
        if not self.float32:
            return self._computed(x, out)
        normed = self._computed(x.float(), None).type_as(x)
        return normed if out is None else out.copy_(normed)

    def _computed(self, x: Tensor, out: Tensor | None) -> Tensor:
        normed: Tensor = self.module(x)
        gain = self.gain if self.scale is None else 1 + with_table(self.scale, self.scale_table)
        if gain is None:
            return normed if out is None else out.copy_(normed)
        values = [gain] if self.shift is None else [gain, with_table(self.shift, self.shift_table)]
        groups, shape = gain.shape[1], normed.shape
        if groups not in (1, shape[1]):
            normed = normed.unflatten(1, (groups, -1))
            values = [value.unsqueeze(2) for value in values]
        one_dtype = all(value.dtype == normed.dtype for value in values)
        in_place = one_dtype and not _needs_gradients(normed, *values)
        into = out if in_place and out is not None and out.dtype == normed.dtype else None
        if into is not None:
            result = torch.mul(normed, values[0], out=into.view(normed.shape))
        elif in_place and _kind(self.module) is not None:
            result = normed.mul_(values[0])
        else:
            result = normed * values[0]
        for shift in values[1:]:
            result = result.add_(shift) if in_place else result + shift
        result = result.view(shape)
        return result if out is None or into is not None else out.copy_(result)

    def fused(self, x: Tensor) -> Norm | None:
        """The same for the ops; None: they cannot compute it."""
        module: Any = self.module
        kind = _kind(module)
        if kind is None:
            return None
        weight, bias, shift = module.weight, module.bias, self.shift
        scale = self.scale if self.gain is None else self.gain.float() - 1
        given = [value for value in (shift, self.scale, self.gain, weight, bias) if value is not None]
        shape = module.normalized_shape if kind == "layer" else module.dim
        dtypes = (x.dtype, torch.float32) if self.float32 else (x.dtype,)
        # An RMS norm without weights takes any number of channels.
        if (kind == "layer" or weight is not None) and tuple(shape) != x.shape[-1:]:
            return None
        if any(value.dtype not in dtypes for value in given):
            return None
        tables = [value for value in (self.shift_table, self.scale_table) if value is not None]
        if _needs_gradients(x, *given, *tables):
            return None
        return Norm(shift, scale, module.eps, weight, bias, self.shift_table, self.scale_table, kind)


def with_table(values: Tensor, table: Tensor | None) -> Tensor:
    """A modulator, with the table that is added to it in float32."""
    return values if table is None else table + values.float()


def _kind(module: Any) -> str | None:
    """Which norm of the ops an unchanged norm module is. Its output then belongs to the caller alone."""
    if is_interposed(module) or hooked(module) is not None:
        return None
    kind: Any = plain_class(module)
    if kind is nn.LayerNorm:
        return "layer"
    code = fingerprint(kind.forward)
    return "layer" if code in LAYER_NORM_FORWARDS else "rms" if code in RMS_NORM_FORWARDS else None


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
