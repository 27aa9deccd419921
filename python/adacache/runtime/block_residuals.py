# SPDX-License-Identifier: Apache-2.0
"""Adds the residuals of a wrapped block that runs as a block program, and measures those that are watched."""

from __future__ import annotations

from torch import Tensor

from adacache.fused import ModelNorm
from adacache.fused.residuals import Residuals, fits, watched
from adacache.runtime.forward import Forward
from adacache.runtime.layout import to_measure, to_video
from adacache.sites import Site


class BlockResiduals(Residuals):
    """`Add` of one block in one forward call.

    Args:
        tier: see `fused.TIERS`.
        forward: the call.
        layout: of the block's tokens.
        watched: the watched sites of the block by sub-layer.
    """

    def __init__(self, tier: str, forward: Forward, layout: str, watched: dict[str, Site]):
        super().__init__(tier)
        self._forward = forward
        self._layout = layout
        self._watched = watched

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
        site = self._watched.pop(part, None)
        if site is None:
            return super().__call__(part, x, y, gate, norm, norm_out, gate_table, rounding)
        meter, rows = self._forward.meter, self._forward.rows
        x_seen, y_seen = self._seen(x), self._seen(y)
        gate_seen = None if gate is None else self._seen(gate)
        if fits(x, y, gate, gate_table, rounding) and meter.adds(site, y_seen, gate_seen, rows):
            fused = self.fused(x, norm)
            given = None if fused is None or norm_out is not None else fused.grouped(self._seen)
            x_seen, normed = meter.adding(
                site, x_seen, y_seen, gate_seen, given, rows, None, gate_table, rounding
            )
            x = self._back(x_seen, x)
            if normed is not None:
                return x, self._back(normed, x)
            if fused is not None:
                return x, fused(x, norm_out)
        else:
            x, seen = watched(x, y, gate, gate_table, rounding)
            meter.residual(site, to_measure(seen, self._layout, self._computing), rows)
        return x, None if norm is None else norm(x, norm_out)

    def check(self) -> None:
        """Raises RuntimeError if a watched residual was not added."""
        if self._watched:
            raise RuntimeError(f"the block program did not add {sorted(self._watched)}")

    @property
    def _computing(self) -> int:
        return len(self._forward.split.computing)

    def _seen(self, x: Tensor) -> Tensor:
        """Tokens or modulators as the meter takes them, see `to_measure`."""
        return x if self._layout == "temporal" else to_video(x, self._layout, self._computing)

    def _back(self, x: Tensor, like: Tensor) -> Tensor:
        return x.transpose(0, 1) if self._layout == "tokens first" else x.view(like.shape)
