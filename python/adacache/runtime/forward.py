# SPDX-License-Identifier: Apache-2.0
"""One forward call under way: its segments, and what they reuse and keep. Fused programs and wrapped blocks
run on it alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adacache.policies.base import Action, Keep, What
from adacache.rows import Split
from adacache.runtime.clock import Tick
from adacache.runtime.meter import Meter
from adacache.sites import MODEL, Site


@dataclass(frozen=True)
class Segment:
    """Consecutive blocks that compute, reuse or forecast together.

    Attributes:
        site: the blocks; the key of their kept residual.
        planned: the kept site that the plan names; None: the blocks are always computed.
        keep: how their residual is kept.
    """

    site: Site
    planned: Site | None = None
    keep: Keep | None = None

    @property
    def by_sublayer(self) -> bool:
        return self.keep is not None and self.keep.storage == "sublayer"


def segments(keeps: Mapping[Site, Keep], blocks: int, per_block: bool) -> list[Segment]:
    """Splits the stack into segments: each kept range (by block if it is stored so), and the blocks between.

    Args:
        per_block: store every range by block.

    Raises:
        ValueError: kept ranges overlap, or lie outside the stack.
    """
    found: list[Segment] = []
    position = 0
    for site in sorted(site for site, keep in keeps.items() if keep.what is What.RESIDUAL and site != MODEL):
        keep = keeps[site]
        if not position <= site.first < site.last <= blocks:
            raise ValueError(
                f"keeps: expected ranges of the {blocks} blocks that do not overlap, "
                f"got [{site.first}, {site.last}) after block {position}"
            )
        if site.first > position:
            found.append(Segment(Site(position, site.first)))
        if keep.storage == "block" or per_block:
            keep = replace(keep, storage="block")
            found += [Segment(Site(one, one + 1), site, keep) for one in range(site.first, site.last)]
        else:
            found.append(Segment(site, site, keep))
        position = site.last
    if position < blocks:
        found.append(Segment(Site(position, blocks)))
    return found


@dataclass(frozen=True)
class Call:
    """What a forward call runs with.

    Attributes:
        tick: its request and branch.
        segments: of the stack.
        batch, frames, device: of the tokens.
        always_compute: nothing is reused in this call.
    """

    tick: Tick
    segments: Sequence[Segment]
    batch: int
    frames: int
    device: torch.device
    always_compute: bool = False


class Forward:
    """The segments of one forward call; `segment` and what follows describe the one under way.

    Attributes:
        order: positions of the blocks that ran so far.
        split: rows of the segment that compute and reuse; `rows` is it if both are there, else None.
        before: the streams [B, N, C] before the segment.
        due: whether kept residuals have still to be added to the streams.
        works_between: whether the model turned out to modify tokens between its blocks.
        must_reuse: the inputs of the blocks were not computed, because all blocks are skipped.
    """

    def __init__(self, call: Call):
        self.call = call
        self.request = call.tick.request
        self.branch = call.tick.branch
        self.store = self.request.store
        self.meter = Meter(self.request, self.branch, call.frames)
        self.order: list[int] = []
        self.works_between = False
        self.must_reuse = False
        self.skipped = False
        self.segment = Segment(Site(0, 0))
        self.split = Split([], call.device)
        self.before: list[Tensor] = []
        self.due = False
        self._actions: list[Action] = []
        self._splits: dict[tuple[Action, ...], Split] = {}
        self.kept_outputs = {
            (site.first, site.part): site
            for site, keep in self.request.decider.keeps.items()
            if keep.what is What.OUTPUT
        }

    @property
    def rows(self) -> Split | None:
        return self.split if self.split.mixed else None

    def reuses_all(self) -> bool:
        """Whether one kept residual stands for the whole stack in this call, for all rows."""
        return len(self.call.segments) == 1 and Action.COMPUTE not in self.planned(self.call.segments[0])

    def enter(self, segment: Segment, streams: list[Tensor], apart: bool = True) -> None:
        """Begins a segment, with its streams [B, N, C]; `apart`: some rows may compute while others reuse."""
        actions = self.planned(segment)
        computing = actions.count(Action.COMPUTE)
        if computing < len(actions) and (not self._fits(segment, streams) or (computing and not apart)):
            actions = [Action.COMPUTE] * len(actions)
        if self.must_reuse and Action.COMPUTE in actions:
            raise RuntimeError("model: the shape of its tokens changed between two steps of one request")
        self.begin(segment, actions)
        self.before = streams

    def planned(self, segment: Segment) -> list[Action]:
        """Per decision, what the plan has this call do with a segment."""
        if segment.planned is None or self.call.always_compute:
            return [Action.COMPUTE] * self.request.decisions
        return self.request.actions(self.branch, segment.planned, segment.site)

    def begin(self, segment: Segment, actions: list[Action]) -> None:
        """Begins a segment with these actions."""
        key = tuple(actions)
        if key not in self._splits:
            self._splits[key] = self.request.split(self.branch, actions, self.call.device)
        self.segment = segment
        self.split, self._actions = self._splits[key], actions
        self.due = bool(self.split.reusing)
        self.skipped = self.skipped or self.due
        if segment.planned is not None:
            self.request.note_computed([action is Action.COMPUTE for action in actions])

    def fits_stream(self, stream: int, tokens: Tensor) -> bool:
        """Whether the kept residual of the stack's stream has as many rows and tokens."""
        kept = self.store.get((self.branch.index, self.call.segments[0].site, stream, ""))
        return kept is not None and kept.fits_tokens(tokens)

    def _fits(self, segment: Segment, streams: Sequence[Tensor]) -> bool:
        """Whether what is kept has the shape of the streams: a prompt may have another length."""
        if segment.by_sublayer:
            return True
        kept = [self.store.get((self.branch.index, segment.site, k, "")) for k in range(len(streams))]
        pairs = [(one, x) for one, x in zip(kept, streams, strict=True) if one is not None]
        return kept[0] is not None and all(one.fits(x) for one, x in pairs)

    def _key(self, stream: int = 0, part: str = "") -> Any:
        return self.branch.index, self.segment.site, stream, part

    def keeps_stream(self, stream: int) -> bool:
        """Whether a residual of the stream is kept: the segment's last block may not return it."""
        return self.store.get(self._key(stream, self._stored_parts()[0])) is not None

    def reused(self, stream: int = 0, out: Tensor | None = None) -> Tensor:
        """A stream after the segment's blocks, in the rows that reuse.

        Args:
            out: of the stream's shape; may be the stream before the segment.
        """
        x, coefficients = self.before[stream], self.coefficients
        for part in self._stored_parts():
            x = self.store.apply(
                self._key(stream, part),
                x,
                split=self.rows,
                coefficients=coefficients,
                video_of_row=self.branch.video_of_row,
                out=out,
            )
        return x

    @property
    def coefficients(self) -> Tensor | None:
        """Of the segment's forecast, see `Request.coefficients`."""
        return self.request.coefficients(self.branch, self.segment.planned, self._actions)

    def _stored_parts(self) -> list[str]:
        """Keys of what is kept of the segment: one for all blocks, or one per sub-layer in the order they
        run."""
        if not self.segment.by_sublayer:
            return [""]
        positions = range(self.segment.site.first, self.segment.site.last)
        return [f"{at}.{part}" for at in positions for part in self.request.sites.stored_parts(at)]

    def keep_part(self, position: int, part: str, residual: Tensor) -> None:
        """Keeps the residual of one sub-layer, of the rows that compute."""
        segment = self.segment
        assert segment.keep is not None
        gaps = self.request.gaps(self.branch, segment.site)
        key = self._key(0, f"{position}.{part}")
        self.store.keep(key, residual, segment.keep, self.rows, gaps, self.before[0])

    def leave(self, after: Sequence[Tensor], in_place: bool = False) -> list[Tensor]:
        """Ends a segment that computed: keeps its residual and returns whole streams.

        Args:
            after: the streams [b, N, C] of the rows that computed.
            in_place: whether the streams before the segment may be overwritten.
        """
        keep, rows = self.segment.keep, self.rows
        if keep is None:
            return list(after)
        # A forecast overwrites all rows, and the residual needs those that computed.
        in_place = in_place and Action.FORECAST not in self._actions
        gaps = self.request.gaps(self.branch, self.segment.site)
        whole = []
        for k, (x, out) in enumerate(zip(self.before, after, strict=False)):
            result = None if rows is None else self.reused(k, x if in_place else None)
            if keep.storage != "sublayer":
                self.store.keep_difference(self._key(k), out, x, keep, rows, gaps, out=result)
            elif rows is not None and result is not None:
                rows.put(result, out)
            whole.append(out if result is None else result)
        self.note_kept(len(whole))
        self.due = False
        return whole

    def note_kept(self, streams: int) -> None:
        """Notes that the segment's residual of so many streams is of this step where it was computed."""
        keys = [self._key(k) for k in range(streams)]
        for site in (self.segment.site, self.segment.planned):
            assert site is not None
            self.request.note_kept(self.branch, site, self._actions, keys)

    def finish(self) -> None:
        """Ends the call.

        Raises:
            RuntimeError: the model did not run the blocks that were expected.
        """
        if self.due:
            raise RuntimeError(
                "model: its forward ran other blocks than at the step whose residual it reuses"
            )
        if self.works_between:
            self.branch.forget()
            self.store.drop(self.branch.index)
