# SPDX-License-Identifier: Apache-2.0
"""STDiT3, whose own blocks are written on the fused ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from adacache.fused.norms import Norm
from adacache.fused.program import Emit
from adacache.models.stdit3 import (
    NORM_EPS,
    AddResidual,
    Conditioning,
    Modulation,
    STDiT3,
    norm_modulate,
)
from adacache.sites import BlockSites


@dataclass
class STDiT3Context:
    """What the blocks take besides the tokens; captions are embedded when the first block needs them."""

    model: STDiT3
    conditioning: Conditioning
    y: Tensor
    mask: Tensor | Sequence[int] | None
    _embedded: Conditioning | None = field(default=None, repr=False)

    def embedded(self) -> Conditioning:
        if self._embedded is None:
            self._embedded = self.model.with_captions(self.conditioning, self.y, self.mask)
        return self._embedded


class STDiT3Program:
    """See `Program`."""

    method = "run_stack"
    storage: tuple[str, ...] = ("stack", "block", "sublayer")
    composites: Mapping[str, tuple[str, ...]] = {"cross_attention_mlp": ("cross_attention", "mlp")}

    def block_sites(self, number: int, kind: str) -> BlockSites:
        parts = (f"{kind}_attention", "cross_attention", "mlp")
        return BlockSites(number, kind, parts, parts)

    def enter(
        self,
        model: STDiT3,
        tokens: Tensor,
        conditioning: Conditioning,
        y: Tensor,
        mask: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, STDiT3Context]:
        return tokens, STDiT3Context(model, conditioning, y, mask)

    def frames(self, context: STDiT3Context) -> int:
        return context.conditioning.frames

    def rows(self, context: STDiT3Context, index: Tensor) -> STDiT3Context:
        embedded = context.embedded().rows(index)
        return STDiT3Context(context.model, embedded, context.y, context.mask, embedded)

    def first_input(self, model: STDiT3, tokens: Tensor, context: STDiT3Context) -> Tensor:
        block, _ = next(model.stack(context.conditioning))
        return norm_modulate(tokens, block.modulation(context.conditioning).attention_norm)

    def blocks(
        self,
        model: STDiT3,
        tokens: Tensor,
        context: STDiT3Context,
        emit: Emit,
        rows: Tensor | None,
        first: int,
        last: int,
    ) -> Tensor:
        def add_at(position: int) -> AddResidual:
            def add(
                part: str,
                x: Tensor,
                y: Callable[[], Tensor],
                gate: Tensor | None,
                norm: Modulation | None,
            ) -> tuple[Tensor, Tensor | None]:
                given = None if norm is None else Norm(*norm, eps=NORM_EPS)
                return emit(position, part, x, y, gate, given)

            return add

        return model.run_blocks(tokens, context.embedded(), add_at, rows, first, last)
