# SPDX-License-Identifier: Apache-2.0
"""A forward call of a model that `torch.compile` runs as one graph.

The plan is made before the graph runs. The graph adds kept residuals in place of the blocks, or hands out the
streams around the blocks and the watched residuals, which are kept and measured after it. Where some rows of
a batch compute and others reuse, all are computed, so that no shape changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import adacache_kernels
from adacache.adapters.spec import Arguments, ModelSpec
from adacache.fused import ModelNorm, Norm, Program
from adacache.fused.residuals import Residuals, watched
from adacache.models.modulation import gated
from adacache.policies.base import Action, What
from adacache.runtime.forward import Call, Forward
from adacache.runtime.layout import from_video, to_measure, to_video
from adacache.runtime.store import Kept, add_kept
from adacache.runtime.wrapped_block import WrappedBlock
from adacache.sites import LATENTS, Site


def refusal(call: Call, spec: ModelSpec, blocks: Sequence[WrappedBlock]) -> str | None:
    """Why a call cannot be one graph; None: it can.

    Args:
        blocks: those of the model that are wrapped.
    """
    decider = call.tick.request.decider
    if spec.streams_by_shape:
        return "the model is not declared"
    if len(call.segments) > 1 or call.segments[0].by_sublayer:
        return "the policy keeps more than one residual of the stack"
    if any(keep.what is What.OUTPUT for keep in decider.keeps.values()):
        return "the policy keeps outputs of sub-layers"
    if any(signal.part != LATENTS.part for signal in decider.signals):
        return "the policy decides by what the model computes before its blocks"
    for site in decider.watches:
        if site.last - site.first > 1 or site.view:
            return "the policy watches several blocks"
        if spec.program is not None:
            if site.part is None or site.part in spec.program.composites:
                return "the policy watches several sub-layers as one"
        elif site.part is not None:
            block = blocks[site.first]
            if block.program is None or block.refusal() is not None:
                return "the watched block has no block program"
    return None


@dataclass
class Graph:
    """What a graph reads and writes. Everything but tensors is guarded by `torch.compile`.

    Attributes:
        blocks, batch, frames: number of blocks; rows and latent frames of the tokens.
        tier: of block programs.
        skips: no row computes.
        kept: per stream, the residual that is added where rows reuse; empty: none reuses.
        reuse: bool [B], the rows that reuse; None: all, or none.
        coefficients, video_of_row: of a forecast; None: the residual is reused.
        watched: the watched sub-layers of blocks by position; "" is the whole block.
        before, after: the streams [B, N, C] around the blocks.
        residuals: position, sub-layer and residual.
    """

    blocks: int
    batch: int
    frames: int
    tier: str
    skips: bool = False
    kept: list[Kept | None] = field(default_factory=list)
    reuse: Tensor | None = None
    coefficients: Tensor | None = None
    video_of_row: Tensor | None = None
    watched: dict[int, tuple[str, ...]] = field(default_factory=dict)
    before: list[Tensor] = field(default_factory=list)
    after: list[Tensor] = field(default_factory=list)
    residuals: list[tuple[int, str, Tensor]] = field(default_factory=list)

    def run_block(
        self, block: WrappedBlock, plain: Callable[..., Any], module: Any, args: Any, kwargs: Any
    ) -> Any:
        """What a wrapped block returns."""
        layout, last = block.list.layout, block.position == self.blocks - 1
        streams = block.inputs(args, kwargs)
        x = streams[0]
        if block.position == 0:
            self._begin([to_video(x, layout, self.batch) for x in streams])
        if self.skips:
            if last:
                streams = [from_video(x, layout, self.frames) for x in self._reused()]
            return block.returned(streams)
        parts = self.watched.get(block.position, ())
        if parts and parts != ("",):
            given = block.arguments(args, kwargs)
            assert block.program is not None
            returned = block.program.run(block.core, given, _WatchedResiduals(self, block, parts))
        else:
            returned = plain(module, *args, **kwargs)
        streams, rest = block.outputs(returned, args, kwargs)
        if "" in parts:
            self.residuals.append((block.position, "", to_measure(streams[0] - x, layout, self.batch)))
        if last:
            whole = self._end([to_video(x, layout, self.batch) for x in streams])
            if self.reuse is not None:
                streams = [from_video(x, layout, self.frames) for x in whole]
                return block.returned(streams, rest)
        return returned

    def run_stack(self, program: Program, model: Any, tokens: Tensor, context: Any) -> Tensor:
        """The stack of a fused program."""
        self.frames = program.frames(context)
        self._begin([tokens])
        if self.skips:
            return self._reused()[0]
        return self._end([program.blocks(model, tokens, context, _Emit(self), None, 0, self.blocks)])[0]

    def _begin(self, streams: list[Tensor]) -> None:
        self.before.clear()
        self.before.extend(streams)

    def _end(self, streams: list[Tensor]) -> list[Tensor]:
        """Whole streams after the blocks have computed all rows."""
        self.after.clear()
        self.after.extend(streams)
        if self.reuse is None:
            return streams
        mask = self.reuse
        return [
            torch.where(mask.view(-1, *[1] * (x.ndim - 1)), old, x)
            for old, x in zip(self._added(), streams, strict=False)
        ]

    def _reused(self) -> list[Tensor]:
        whole = self._added()
        self.before.clear()  # nothing is kept: the graph need not return it
        return whole

    def _added(self) -> list[Tensor]:
        """The streams before the blocks plus what is kept of them."""
        return [
            x if kept is None else add_kept(kept, x, None, self.coefficients, self.video_of_row)
            for kept, x in zip(self.kept, self.before, strict=False)
        ]


class _WatchedResiduals(Residuals):
    """`Add` of a block in a graph."""

    def __init__(self, graph: Graph, block: WrappedBlock, parts: tuple[str, ...]):
        super().__init__(graph.tier)
        self._graph = graph
        self._position = block.position
        self._layout = block.list.layout
        self._parts = {block.own_part(part): part for part in parts}

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
        if part not in self._parts:
            return super().__call__(part, x, y, gate, norm, norm_out, gate_table, rounding)
        x, seen = watched(x, y, gate, gate_table, rounding)
        seen = to_measure(seen, self._layout, self._graph.batch)
        self._graph.residuals.append((self._position, self._parts[part], seen))
        return x, None if norm is None else norm(x, norm_out)


class _Emit:
    """`Emit` in a graph."""

    def __init__(self, graph: Graph):
        self._graph = graph

    def __call__(
        self,
        position: int,
        part: str,
        x: Tensor,
        y: Callable[[], Tensor],
        gate: Tensor | None,
        norm: Norm | None,
    ) -> tuple[Tensor, Tensor | None]:
        value = y()
        if part in self._graph.watched.get(position, ()):
            residual = value if gate is None else gated(value, gate)
            self._graph.residuals.append((position, part, residual))
            x = x + residual
        elif norm is not None:
            return norm.after(x, value, gate)
        else:
            x = adacache_kernels.gated_residual(x, value, gate)
        return x, None if norm is None else norm(x)


class OneGraphForward(Forward):
    """A call that runs as one graph.

    Args:
        blocks: of the model.
        tier: of block programs.
        given: the arguments of the model's call.

    Attributes:
        graph: what it reads and writes.
    """

    def __init__(self, call: Call, spec: ModelSpec, blocks: int, tier: str, given: Arguments):
        super().__init__(call)
        self._inputs = [
            (x.shape, x.dtype) if isinstance(x, Tensor) else None for x in tree_leaves(dict(given))
        ]
        self.graph = Graph(blocks, call.batch, call.frames, tier)
        for site in self.request.decider.watches:
            parts = self.graph.watched.get(site.first, ())
            self.graph.watched[site.first] = (*parts, site.part or "")
        self._streams = len(spec.streams)

    def prepare(self) -> None:
        """Sets what the graph does. Called after the inputs of the step were measured."""
        (segment,), graph = self.call.segments, self.graph
        actions = self.planned(segment)
        if self.branch.inputs != self._inputs:  # another prompt may have another length: nothing kept fits
            actions = [Action.COMPUTE] * len(actions)
        self.begin(segment, actions)
        self.due = False
        graph.skips = not self.split.computing
        if self.split.reusing:
            graph.kept = [self.store.get(self._key(k)) for k in range(self._streams)]
            graph.coefficients, graph.video_of_row = self.coefficients, self.branch.video_of_row
            if graph.coefficients is None:
                graph.video_of_row = None
        if self.rows is not None:
            graph.reuse = self.split.reuse

    def finish(self) -> None:
        """Keeps and measures what the graph handed out.

        Raises:
            RuntimeError: the model did not run its last block.
        """
        graph = self.graph
        self.meter.frames = self.branch.frames = graph.frames
        if not graph.skips:
            if not graph.after:
                raise RuntimeError("model: its forward did not run all of its blocks")
            for position, part, residual in graph.residuals:
                site = Site(position, position + 1, part or None)
                if site in self.meter.watches:
                    self._measure(site, residual)
            self._keep()
            self.branch.order = list(range(graph.blocks))
            self.branch.inputs = self._inputs
        super().finish()

    def _measure(self, site: Site, residual: Tensor) -> None:
        if self.rows is not None:
            residual = self.rows.rows_of(residual)
        elif residual.is_cuda:
            residual = residual.clone()  # the next replay of a CUDA graph overwrites it
        self.meter.residual(site, residual, self.rows)

    def _keep(self) -> None:
        keep, rows = self.segment.keep, self.rows
        if keep is None:
            return
        gaps = self.request.gaps(self.branch, self.segment.site)
        for k, (before, after) in enumerate(zip(self.graph.before, self.graph.after, strict=False)):
            computed = after if rows is None else rows.rows_of(after)
            self.store.keep_difference(self._key(k), computed, before, keep, rows, gaps)
        self.note_kept(len(self.graph.after))
