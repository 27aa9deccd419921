# SPDX-License-Identifier: Apache-2.0
"""Fused programs: a model's blocks written on the ops of `adacache_kernels`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from adacache.fused.norms import ModelNorm, Norm
from adacache.sites import BlockSites

TIERS = ("exact", "close")
"""How a block program computes norms: as the model does, bit-identical; or in float32, rounded once."""


class Add(Protocol):
    """Adds the residuals of one block. The only contact of a block program with caching."""

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
        """x + gate * y and its norm, which the next sub-layer takes.

        Args:
            part: "attention", "cross_attention" or "mlp"; streams that are not watched have other names.
            x, y: the stream and the output of the sub-layer, in the layout of the block's tokens.
            gate: of the shapes of `adacache_kernels.gated_residual`; None for 1.
            norm: of the next sub-layer; None: it needs none.
            norm_out: of x's shape, for the norm.
            gate_table: float32 [1, 1, C], added to the gate in float32.
            rounding: see `adacache_kernels.gated_residual`. "float32": the model forms gate * y and the sum
                in float32, and the gate may be in float32.
        """

    def norm(self, x: Tensor, norm: ModelNorm, out: Tensor | None = None) -> Tensor:
        """A norm that no `add` returns: of the block's input, or of a sub-layer's output.

        Args:
            out: of x's shape, for the result.
        """


class BlockProgram(Protocol):
    """The forward of a block class on fused ops. Stateless; the model's own forward calls the blocks."""

    parts: tuple[str, ...]
    """The sub-layers whose residuals it adds."""
    forwards: frozenset[str]
    """`fingerprint`s of the forwards that the program computes."""

    def refuses(self, block: Any) -> str | None:
        """Why a block with such a forward cannot run, as its settings are now; None: it can."""

    def takes(self, block: Any, given: Mapping[str, Any]) -> bool:
        """Whether a call with these arguments can run."""

    def run(self, block: Any, given: Mapping[str, Any], add: Add) -> Any:
        """What the block's forward returns."""


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
    """The blocks of a model class on fused ops, run by a method of the model. Stateless."""

    method: str
    """The model's method that runs all blocks, whose calls the runtime replaces."""
    storage: tuple[str, ...]
    """Ways to store residuals, see `ModelSites`."""
    composites: Mapping[str, tuple[str, ...]]
    """Sub-layers that can be watched as one, see `ModelSites`."""

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
