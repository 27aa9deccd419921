"""Sums of watched residuals, passed to the decider. The only caller of the meter ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import adacache_kernels
from adacache.policies.base import Sums, Watch
from adacache.rows import Split
from adacache.runtime.request import Branch, Request
from adacache.sites import Site

Norm = tuple[Tensor, Tensor]
"""shift and scale of the modulated layer norm of the next sub-layer."""
Reduce = Callable[[Tensor], Tensor]
"""Sums of all ranks from those of one, where tokens are split over processes."""


class Meter:
    """Measures the watched residuals of one forward call.

    Args:
        request, branch: of the call.
        frames: latent frames of the tokens.
        reduce: see `Reduce`; None: all tokens are here.
    """

    def __init__(self, request: Request, branch: Branch, frames: int, reduce: Reduce | None = None):
        self.request = request
        self.branch = branch
        self.frames = frames
        self.reduce = reduce
        self.watches = request.decider.watches if branch.index == 0 else {}

    def residual(self, site: Site, residual: Tensor, split: Split | None, frames: int | None = None) -> None:
        """Measures a residual that is already formed, and keeps it.

        Args:
            residual: [b, N, C] of the rows that compute, or [b * n, ...] with each row's parts together.
            split: the rows that compute; None: all.
            frames: of the residual's layout; None: those of the tokens.
        """
        watch = self.watches[site]
        computing = len(self.branch.videos) if split is None else len(split.computing)
        frames = self.frames if frames is None else frames
        if residual.shape[1] % frames:
            frames = 1
        if residual.stride(-1) != 1:
            residual = residual.contiguous()
        per_row = residual.shape[0] // computing
        whole = (len(self.branch.videos) * per_row, *residual.shape[1:])
        kept = self.request.store.old_watched(site, residual, whole)
        old = kept if split is None else split.rows_of(kept)
        arguments = self._arguments(watch, split, frames, per_row)
        sums = adacache_kernels.residual_meter(residual, old, **arguments)
        self._observe(site, sums, arguments["strides"], frames, residual.numel() // computing)
        if watch.until is not None:
            self._refresh(watch.until, kept, residual)
        elif split is None and not residual.is_inference():
            self.request.store.swap_watched(site, residual)
        elif split is None:
            kept.copy_(residual)
        else:
            split.put(kept, residual)

    def _refresh(self, until: Site, kept: Tensor, residual: Tensor) -> None:
        """Keeps the residual of the videos that compute a site at this step; all rows were measured."""
        actions = self.request.actions(self.branch, until, until)
        split = self.request.split(self.branch, actions, residual.device)
        if split.mixed:
            split.put(kept, split.rows_of(residual))
        elif split.computing:
            kept.copy_(residual)

    def adding(
        self,
        site: Site,
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        norm: Norm | None,
        eps: float,
        split: Split | None,
        x_rows: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """x + gate * y and its modulated norm, with the residual measured and kept in the same pass.

        Args:
            x: [b, N, C], or the whole batch with x_rows.
            y, gate, norm: of the rows that compute; see `adacache_kernels.gated_residual_norm_meter`.
        """
        watch = self.watches[site]
        whole = (len(self.branch.videos), *y.shape[1:])
        old = self.request.store.old_watched(site, y, whole)
        arguments = self._arguments(watch, split, self.frames, 1)
        rows: dict[str, Any] = {"x_rows": x_rows, "residual_rows": None if split is None else split.index}
        normed: Tensor | None = None
        if norm is None:
            x, sums = adacache_kernels.gated_residual_meter(x, y, gate, old, **rows, **arguments)
        else:
            x, normed, sums = adacache_kernels.gated_residual_norm_meter(
                x, y, gate, old, norm[0], norm[1], eps=eps, **rows, **arguments
            )
        self._observe(site, sums, arguments["strides"], self.frames, y[0].numel())
        return x, normed

    def _arguments(self, watch: Watch, split: Split | None, frames: int, per_row: int) -> dict[str, Any]:
        video_of_row = self.branch.video_of_row
        if video_of_row is not None and split is not None:
            video_of_row = video_of_row.index_select(0, split.index)
        if video_of_row is not None and per_row > 1:
            video_of_row = video_of_row.repeat_interleave(per_row)
        return {
            "frames": frames,
            "strides": tuple(stride for stride in watch.strides if stride < frames),
            "video_of_row": video_of_row,
            "num_videos": self.request.decisions,
            "metric": watch.metric,
        }

    def _observe(self, site: Site, sums: Tensor, strides: tuple[int, ...], frames: int, per_row: int) -> None:
        request = self.request
        sums = sums if self.reduce is None else self.reduce(sums)
        rows = len(self.branch.videos)
        measured = Sums(sums, strides, frames, rows / request.decisions * per_row, rows)
        with torch.inference_mode(False):
            plan = request.decider.observe(request.current_step, site, measured)
        if plan is not None:
            request.plan = request.plan.revised(plan)
