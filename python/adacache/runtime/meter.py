# SPDX-License-Identifier: Apache-2.0
"""Sums of watched residuals, passed to the decider. The only caller of the meter ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import adacache_kernels
from adacache.fused import Norm
from adacache.policies.base import Sums, Watch
from adacache.rows import Split
from adacache.runtime.ranks import Share
from adacache.runtime.request import Branch, Request
from adacache.runtime.store import as_tokens
from adacache.sites import Site


class Meter:
    """Measures the watched residuals of one forward call.

    Args:
        request, branch: of the call.
        frames: latent frames of the tokens.
    """

    def __init__(self, request: Request, branch: Branch, frames: int):
        self.request = request
        self.branch = branch
        self.frames = branch.frames = frames
        self.ranks = request.ranks
        self.apart = True
        """Whether the rows of residuals are known to be those of the batch."""
        self.watches = request.decider.watches
        self.signals = request.decider.signals
        self._first_only = branch.index > 0
        """The call is one of a further branch: what it measures is only kept, and only in the first step."""
        if self._first_only and not (request.may_restart and request.step == 1):
            self.watches = {}

    def measure(self, signal: Site, value: Callable[[], Tensor]) -> None:
        """Measures an input of this step for each signal of its kind.

        Args:
            value: returns [B, ...], or [B * n, N, C] with each row's parts together.
        """
        sites = [site for site in self.signals if site.part == signal.part]
        if sites and self.branch.index == 0:
            found = value().detach()
            for site in sites:
                self._signal(site, found)

    def _signal(self, site: Site, value: Tensor) -> None:
        watch = self.signals[site]
        if watch.transform is not None:
            value = watch.transform(value)
        value = as_tokens(value)
        kept = self.request.store.old_watched(site, value, value.shape)
        self._observe(site, self.sums(site, value, kept))
        if watch.until is not None:
            self._refresh(watch.until, site, value)
        else:
            self.request.store.copy_watched(site, value)

    def residual(self, site: Site, residual: Tensor, split: Split | None) -> None:
        """Measures a residual that is already formed, and keeps it.

        Args:
            residual: [b, N, C] of the rows that compute, or [b * n, ...] with each row's parts together.
            split: the rows that compute; None: all.
        """
        if residual.stride(-1) != 1:
            residual = residual.contiguous()
        if self._first_only:
            self.request.store.note_first(self.branch.index, site, residual)
            return
        watch, rows = self.watches[site], len(self.branch.videos)
        computing = rows if split is None else len(split.computing)
        whole = (residual.shape[0] * rows // computing, *residual.shape[1:])
        store = self.request.store
        old = store.watched_of(store.old_watched(site, residual, whole, watch.age), split, residual)
        self._observe(site, self.sums(site, residual, old, split))
        if watch.until is not None:
            self._refresh(watch.until, site, residual)
        else:
            store.write_watched(site, residual, split)

    def sums(self, site: Site, residual: Tensor, old: Tensor, split: Split | None = None) -> Sums:
        """The sums of a residual against an old one of the same shape."""
        computing = len(self.branch.videos) if split is None else len(split.computing)
        frames = 1 if residual.shape[1] % self.frames else self.frames
        apart = self.apart and residual.shape[0] % computing == 0
        per_row = residual.shape[0] // computing if apart else None
        share = self._share(site, residual, computing)
        arguments = self._arguments(site, split, frames, per_row)
        strides: tuple[int, ...] = arguments["strides"]
        if share is not None and share.counts:
            strides = self._strides(site, share.frames)
            arguments |= {"frames": 1, "strides": ()}
        values = adacache_kernels.residual_meter(residual, old, **arguments)
        if share is not None and share.counts and strides:
            values = torch.cat([values, self._motion(residual, strides, share, arguments)], 1)
        if not apart:  # rows cannot be told apart: one measurement for all videos
            values = values.expand(self.request.decisions, -1).contiguous()
        return self._sums(values, strides, frames, residual.numel() // computing, share)

    def _share(self, site: Site, residual: Tensor, computing: int) -> Share | None:
        """What all ranks have of a measured residual [b * n, N, C]; None: there is one rank, or the call is
        not measured."""
        if self.ranks is None or self._first_only:
            return None
        shares = self.branch.shares
        if site not in shares:
            rows = len(self.branch.videos)
            parts = residual.shape[0] // computing or 1
            whole = residual[:1].expand(rows * parts, -1, -1)
            request = self.request
            shares[site] = self.ranks.share(whole, rows, self.frames, request.alike())
        return shares[site]

    def _motion(
        self, residual: Tensor, strides: Sequence[int], share: Share, arguments: Mapping[str, Any]
    ) -> Tensor:
        """The motion sums of this rank's tokens, whose partners may be tokens of other ranks."""
        assert self.ranks is not None
        border = self.ranks.before(residual, share, max(strides) * share.width)
        tokens = torch.cat([border, residual], 1) if border.shape[1] else residual
        given = {name: arguments[name] for name in ("video_of_row", "num_videos")}
        columns = []
        for stride in strides:
            reach = stride * share.width
            start = max(border.shape[1], reach)  # tokens before have no partner, or are another rank's
            later = tokens[:, start:]
            earlier = tokens[:, start - reach :][:, : later.shape[1]]
            sums = adacache_kernels.residual_meter(later, earlier, frames=1, strides=(), metric="l1", **given)
            columns += [sums[:, 0], sums[:, 1] + sums[:, 2]]
        return torch.stack(columns, 1)

    def _refresh(self, until: Site, site: Site, residual: Tensor) -> None:
        """Keeps what was measured of the videos that compute a site at this step; all rows were measured."""
        actions = self.request.actions(self.branch, until, until)
        split = self.request.split(self.branch, actions, residual.device)
        if split.computing:
            self.request.store.copy_watched(site, residual, split if split.mixed else None)

    def adds(self, site: Site, y: Tensor, gate: Tensor | None, split: Split | None) -> bool:
        """Whether `adding` can measure a site: its residual [b * n, N, C] is compared with the one measured
        before, and frames are whole."""
        computing = len(self.branch.videos) if split is None else len(split.computing)
        if y.shape[0] > computing and not self.request.store.has_part_rows:
            return False
        watch = self.watches.get(site)
        if watch is not None and (watch.until is not None or watch.age > 1):
            return False
        if self._spans_ranks and watch is not None and watch.strides and watch.motion_decides:
            return False  # the op would measure the motion of this rank's tokens alone
        groups = (1, self.frames, y.shape[1])
        return not y.shape[1] % self.frames and (gate is None or gate.shape[1] in groups)

    def adding(
        self,
        site: Site,
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        norm: Norm | None,
        split: Split | None,
        x_rows: Tensor | None,
        gate_table: Tensor | None = None,
        rounding: str = "eager",
    ) -> tuple[Tensor, Tensor | None]:
        """x + gate * y and its modulated norm, with the residual measured and kept in the same pass.

        Args:
            x: [b, N, C], or the whole batch with x_rows; or [b * n, N, C] with each row's parts together.
            y, gate, norm, gate_table, rounding: of the rows that compute; see
                `adacache_kernels.gated_residual_norm_meter`.
        """
        store, batch = self.request.store, len(self.branch.videos)
        computing = batch if split is None else len(split.computing)
        per_row = y.shape[0] // computing
        whole = (batch * per_row, *y.shape[1:])
        old = torch.zeros_like(y) if self._first_only else store.old_watched(site, y, whole)
        arguments = self._arguments(site, split, self.frames, per_row)
        kept_rows = None if self._first_only else store.watched_rows(split, per_row)
        how: dict[str, Any] = {
            "x_rows": x_rows,
            "residual_rows": kept_rows,
            "gate_table": gate_table,
            "rounding": rounding,
        }
        normed: Tensor | None = None
        if norm is None:
            x, sums = adacache_kernels.gated_residual_meter(x, y, gate, old, **how, **arguments)
        else:
            x, normed, sums = adacache_kernels.gated_residual_norm_meter(
                x, y, gate, old, norm.shift, norm.scale, **norm.rest(), **how, **arguments
            )
        if self._first_only:
            store.note_first(self.branch.index, site, old)
        else:
            share = self._share(site, y, computing)
            sizes = self.frames, y.numel() // computing
            self._observe(site, self._sums(sums, arguments["strides"], *sizes, share))
        return x, normed

    def _arguments(self, site: Site, split: Split | None, frames: int, per_row: int | None) -> dict[str, Any]:
        """Arguments of the meter ops. `per_row`: first dimension of a residual per row of the batch; None:
        all rows are measured as one video."""
        watch = self._watch(site)
        video_of_row = self.branch.video_of_row if per_row is not None else None
        if video_of_row is not None and split is not None:
            video_of_row = video_of_row.index_select(0, split.index)
        if video_of_row is not None and per_row is not None and per_row > 1:
            video_of_row = video_of_row.repeat_interleave(per_row)
        return {
            "frames": frames,
            "strides": self._strides(site, frames),
            "video_of_row": video_of_row,
            "num_videos": 1 if per_row is None else self.request.decisions,
            "metric": watch.metric,
        }

    def _watch(self, site: Site) -> Watch:
        return self.watches[site] if site in self.watches else self.signals[site]

    def _strides(self, site: Site, frames: int) -> tuple[int, ...]:
        """The strides to measure: those that fit into this number of frames."""
        watch = self._watch(site)
        if self._spans_ranks and not watch.motion_decides:
            return ()
        return tuple(stride for stride in watch.strides if stride < frames)

    @property
    def _spans_ranks(self) -> bool:
        """Whether neighbouring frames may be on different ranks."""
        return self.ranks is not None and self.ranks.consecutive

    def _sums(
        self, values: Tensor, strides: tuple[int, ...], frames: int, per_row: int, share: Share | None
    ) -> Sums:
        """The sums of all ranks. The only place where ranks add what they measured."""
        rows = len(self.branch.videos)
        if share is not None:
            assert self.ranks is not None
            values = self.ranks.total(values)
            rows, frames, per_row = share.rows, share.frames, share.elements
        return Sums(values, strides, frames, rows / self.request.decisions * per_row, rows)

    def _observe(self, site: Site, sums: Sums) -> None:
        request = self.request
        with torch.inference_mode(False):
            plan = request.decider.observe(request.current_step, site, sums)
        if plan is not None:
            request.plan = request.plan.revised(plan)
