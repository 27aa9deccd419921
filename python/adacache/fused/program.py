"""Fused programs: a model's blocks written on the ops of `adacache_kernels`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from adacache.sites import BlockSites

Norm = tuple[Tensor, Tensor]
"""shift and scale of a modulated layer norm."""


class Emit(Protocol):
    """Adds the residual of a sub-layer. The only contact of a program with caching."""

    def __call__(
        self,
        position: int,
        part: str,
        x: Tensor,
        y: Callable[[], Tensor],
        gate: Tensor | None,
        norm: Norm | None,
    ) -> tuple[Tensor, Tensor | None]:
        """x + gate * y() and its modulated layer norm, which the next sub-layer takes.

        Args:
            position: of the block.
            part: the sub-layer.
            x: the stream [b, N, C].
            y: runs the sub-layer; not called where its output is reused.
            gate: None for 1.
            norm: of the next sub-layer; None: it needs none.
        """


class Program(Protocol):
    """The blocks of a model class on fused ops. Stateless."""

    method: str
    """The model's method that runs all blocks, whose calls the runtime replaces."""
    storage: tuple[str, ...]
    """Ways to store residuals, see `ModelSites`."""
    composites: Mapping[str, tuple[str, ...]]
    """Sub-layers that can be watched as one, see `ModelSites`."""
    eps: float
    """Of the layer norms that `Emit` takes."""

    def block_sites(self, number: int, kind: str) -> BlockSites:
        """The sites of one block."""

    def enter(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """The tokens [B, N, C] and the context from the arguments of `method`."""

    def frames(self, context: Any) -> int:
        """Latent frames of the tokens."""

    def rows(self, context: Any, index: Tensor) -> Any:
        """The context of some rows, index int32 [b]."""

    def first_input(self, model: Any, tokens: Tensor, context: Any) -> Tensor:
        """What the first sub-layer of the first block takes: the modulated norm of the tokens."""

    def blocks(
        self, model: Any, tokens: Tensor, context: Any, emit: Emit, rows: Tensor | None, first: int, last: int
    ) -> Tensor:
        """Runs the blocks [first, last).

        Args:
            tokens: [B, N, C].
            context: of the rows that run.
            rows: int32 [b], the rows of tokens that run: the first `emit` of the call gathers them. None:
                all.

        Returns:
            [b, N, C].
        """
