# SPDX-License-Identifier: Apache-2.0
"""A forward call of a model whose blocks are wrapped.

Blocks that compute run unchanged. In a segment that reuses, blocks return their input, and the last one adds
the kept residual. Where only some rows of the batch compute, they are gathered before the segment's first
block and scattered after its last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from adacache.adapters.spec import Arguments, GatedResidual, ModelSpec
from adacache.interpose import plain_class
from adacache.policies.base import What
from adacache.rows import Split
from adacache.runtime.block_residuals import BlockResiduals
from adacache.runtime.forward import Call, Forward, Segment
from adacache.runtime.layout import from_video, to_measure, to_video
from adacache.runtime.outputs import KeptOutput
from adacache.runtime.wrapped_block import WrappedBlock
from adacache.sites import MODULATED, TOKENS, Site


class WrappedForward(Forward):
    """One forward call under way.

    Args:
        owner: the runner.
        spec: of the model.
        call: what it runs with.
        tier: of block programs, see `fused.TIERS`.

    Attributes:
        spared: whether the model was called with the spec's `reuse_arguments`.
        unknown_output: class of a block that returns a tensor which is none of its arguments, so that it
            cannot be skipped.
    """

    def __init__(self, owner: object, spec: ModelSpec, call: Call, tier: str = "exact"):
        super().__init__(call)
        self.owner = owner
        self._tier = tier
        self._spec = spec
        self.spared = False
        self.unknown_output: str | None = None
        self._block: WrappedBlock | None = None
        self._chained: set[int] = set()
        self._after: list[Tensor] = []
        """The streams as the last block returned them."""
        self._shown: list[Tensor] = []
        """What the model gets in place of gathered rows."""
        self._entered = 0
        """Position of the first block of a segment in which every row reuses."""
        self._last = -1
        """Position of the segment's last block, if kept residuals have to be added there."""
        self._held: list[Tensor] | None = None
        """The gathered rows after the last block."""
        self._starts: dict[Site, tuple[Split, str, Tensor]] = {}
        """Where watched ranges of blocks began: the rows, the layout and the tokens."""
        self._children: _Children | None = None
        self._stop_at: str | None = None
        """The child at whose call the block under way ends."""
        watched = {at for site in self.meter.watches for at in range(site.first, site.last)}
        self._concerned = watched | {position for position, _ in self.kept_outputs}
        """Positions of the blocks in which something is watched or whose outputs are kept."""

    def run_block(self, block: WrappedBlock, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a block returns in this call."""
        position = block.position
        if self._entered < position < self._last and block.passes(self._after[0], args, kwargs):
            return self._after[0]
        streams = block.inputs(args, kwargs)
        if not streams:
            raise TypeError(
                f"model: {plain_class(block.module).__name__} was called without {block.streams[0]!r}"
            )
        if not self.order and self.meter.signals:
            self._measure_signals(block, args, kwargs, streams[0])
        site = self.segment.site
        entering = not site.first <= position < site.last
        if self._after and streams[0] is self._after[0]:
            self._chained.add(position)
        elif self._after and not entering and self.segment.keep is not None and not self._spec.alternating:
            self._found_between()
        if entering:
            self._begin_segment(block, streams)
        self._block = block
        self.order.append(position)
        if not self.split.computing:
            return self._skip(block, streams)
        needed = self.due or block.program is not None or position in self._concerned
        if not needed:
            returned = plain(block.module, *args, **kwargs)
            self._after, rest = block.outputs(returned, args, kwargs)
            self._check_rest(block, rest)
            return returned
        given = block.arguments(args, kwargs)
        if self.due:
            return self._run_mixed(block, plain, args, kwargs, given, streams)
        self._after, rest = self._compute(block, plain, args, kwargs, given)
        self._check_rest(block, rest)
        return block.returned(self._after, rest)

    def _check_rest(self, block: WrappedBlock, rest: list[Any]) -> None:
        """Notes a tensor that a block returned and that is no stream."""
        if rest and self._spec.streams_by_shape and any(isinstance(value, Tensor) for value in rest):
            self.unknown_output = plain_class(block.module).__name__

    def _measure_signals(self, block: WrappedBlock, args: Any, kwargs: Any, tokens: Tensor) -> None:
        """Measures what the first block and its first sub-layer take."""

        def modulated() -> Tensor:
            return to_measure(self._first_input(block, args, kwargs), block.list.layout, self.call.batch)

        self.meter.measure(TOKENS, lambda: to_measure(tokens, block.list.layout, self.call.batch))
        self.meter.measure(MODULATED, modulated)

    def _first_input(self, block: WrappedBlock, args: Any, kwargs: Any) -> Tensor:
        """Runs a block up to its first sub-layer; returns the first tensor that this takes."""
        name = next(iter(block.list.outputs.values()), None)
        if name is None:
            raise ValueError(
                f"model: {plain_class(block.module).__name__} has no declared sub-layer, so its modulated "
                "input cannot be measured"
            )
        block.wrap_children([name], self.owner)
        self._stop_at = name
        try:
            block.run_uncompiled(args, kwargs)
        except _Reached as reached:
            return reached.value
        finally:
            self._stop_at = None
        raise RuntimeError(f"model: {plain_class(block.module).__name__} did not run its {name!r}")

    def _begin_segment(self, block: WrappedBlock, streams: list[Tensor]) -> None:
        self._close()
        segment = next(one for one in self.call.segments if one.site.holds(block.position))
        layout = block.list.layout
        # Rows of an unknown layout cannot be told apart: all compute, or all reuse.
        self.meter.apart = not self._spec.streams_by_shape or streams[0].shape[0] == self.call.batch
        self.enter(segment, [to_video(x, layout, self.call.batch) for x in streams], self.meter.apart)
        self._shown, self._held = streams, None
        self._last = self._end(segment) if self.due else -1
        self._entered = self._last if self.split.computing else block.position

    def _found_between(self) -> None:
        """The model modifies tokens between two blocks, so the residuals of blocks do not add up."""
        if self.split.reusing:
            raise RuntimeError("model: its forward changed between two steps of one request")
        self.works_between = True

    def _skip(self, block: WrappedBlock, streams: list[Tensor]) -> Any:
        """A block of a segment in which every row reuses."""
        self._after = streams
        if block.position == self._last:
            layout, frames = block.list.layout, self.call.frames
            self._after = [
                from_video(self.reused(k), layout, frames) if self.keeps_stream(k) else x
                for k, x in enumerate(streams)
            ]
            self.due = False
        return block.returned(self._after)

    def _run_mixed(
        self,
        block: WrappedBlock,
        plain: Callable[..., Any],
        args: Any,
        kwargs: Any,
        given: Arguments,
        streams: list[Tensor],
    ) -> Any:
        """A block of which some rows compute."""
        layout, split, batch = block.list.layout, self.split, self.call.batch
        if self._held is not None and streams[0] is not self._shown[0]:
            raise RuntimeError("model: its forward changed between two steps of one request")
        held = self._held if self._held is not None else [self._take(layout, x) for x in streams]
        sizes = {batch, streams[0].shape[0]} if layout in ("spatial", "temporal") else {batch}
        rows = dict(zip((name for name in block.streams if name in given), held, strict=False))
        rows |= {
            name: self._spec.rows_of(name, value, split, given, sizes)
            for name, value in given.items()
            if name not in rows
        }
        args, kwargs = block.replace(args, kwargs, rows)
        outputs, rest = self._compute(block, plain, args, kwargs, rows)
        if block.position == self._last:
            whole = self.leave([to_video(x, layout, len(split.computing)) for x in outputs])
            self._after = [from_video(x, layout, self.call.frames) for x in whole]
        elif self._next(block.position) in self.branch.chained:
            self._held = outputs
            self._after = self._shown[: len(outputs)]
        else:
            self._after = [self._put(layout, x.clone(), y) for x, y in zip(streams, outputs, strict=False)]
        return block.returned(self._after, rest)

    def _take(self, layout: str, x: Tensor) -> Tensor:
        """The rows that compute of tokens in a block's layout."""
        if layout == "tokens first":
            return self.split.rows_of(x.transpose(0, 1)).transpose(0, 1)
        return self.split.rows_of(x)

    def _put(self, layout: str, into: Tensor, value: Tensor) -> Tensor:
        if layout == "tokens first":
            self.split.put(into.transpose(0, 1), value.transpose(0, 1))
            return into
        return self.split.put(into, value)

    def _end(self, segment: Segment) -> int:
        """Position of the last block of a segment that runs in this call."""
        order = self.branch.order or []
        ran = [position for position in order if segment.site.holds(position)]
        if self.spared:
            blocks = self.request.sites.blocks
            ran = [position for position in ran if blocks[position].kind == self._spec.applies]
        return ran[-1] if ran else -1

    def _next(self, position: int) -> int:
        order = self.branch.order or []
        following = order[order.index(position) + 1 :] if position in order else []
        return following[0] if following else -1

    def _close(self) -> None:
        """Ends the segment under way if it computed all rows; others end at their last block."""
        if self._block is None or self.split.reusing or self.works_between:
            return
        layout, batch = self._block.list.layout, self.call.batch
        after = [to_video(x, layout, batch) for x in self._after]
        if self.segment.keep is not None and after[0].shape != self.before[0].shape:
            self.works_between = True
            return
        self.leave(after)

    def finish(self) -> None:
        if not self.order:
            lists = [one.name for one in self._spec.lists]
            raise RuntimeError(f"model: its forward ran no block of {lists}")
        self._close()
        if not self.skipped:
            self.branch.order, self.branch.chained = self.order, self._chained
        super().finish()

    def _compute(
        self,
        block: WrappedBlock,
        plain: Callable[..., Any],
        args: Any,
        kwargs: Any,
        given: Arguments,
    ) -> tuple[list[Tensor], list[Any]]:
        """Runs a block and measures what is watched in it; returns its streams and its other values.

        Args:
            given: the arguments by name.
        """
        fused = block.runs_fused(given)
        if block.position not in self._concerned:
            returned = self._run_fused(block, given, []) if fused else plain(block.module, *args, **kwargs)
            return block.outputs(returned, args, kwargs)
        position, x, layout = block.position, given[block.streams[0]], block.list.layout
        ranges = [site for site in self.meter.watches if site.part is None]
        self._starts |= {site: (self.split, layout, x) for site in ranges if site.first == position}
        watched = [
            (site, residual)
            for site in self.meter.watches
            if site.first == position
            and (residual := self._spec.gated_residual(site.part, block.list.label)) is not None
        ]
        outputs = {
            child: self.kept_outputs[position, part]
            for part, child in block.list.outputs.items()
            if (position, part) in self.kept_outputs
        }
        if fused and outputs:
            # The program calls the block's children, which keep or reuse their outputs.
            with self._children_of(block, [], outputs, given):
                returned = self._run_fused(block, given, watched)
        elif fused:
            returned = self._run_fused(block, given, watched)
        elif watched or outputs:
            with self._children_of(block, watched, outputs, given):
                returned = block.run_uncompiled(args, kwargs)
        else:
            returned = plain(block.module, *args, **kwargs)
        streams, rest = block.outputs(returned, args, kwargs)
        for site in [site for site in self._starts if site.last == position + 1]:
            self._measure_range(site, streams[0], layout)
        return streams, rest

    def _measure_range(self, site: Site, after: Tensor, layout: str) -> None:
        split, layout_before, before = self._starts.pop(site)
        if split is not self.split:
            return  # other rows computed the range's first block
        if layout_before != layout:
            computing = len(split.computing)
            before, after = to_video(before, layout_before, computing), to_video(after, layout, computing)
            layout = "video"
        output = self.meter.watches[site].what is What.OUTPUT
        self._measure(site, after.clone() if output else after - before, layout)

    def _measure(self, site: Site, residual: Tensor, layout: str) -> None:
        computing = len(self.split.computing)
        self.meter.residual(site, to_measure(residual, layout, computing), self.rows)

    def _run_fused(
        self, block: WrappedBlock, given: Arguments, watched: list[tuple[Site, GatedResidual]]
    ) -> Any:
        """Runs a block as its program."""
        assert block.program is not None
        sites = {block.own_part(residual.part): site for site, residual in watched}
        add = BlockResiduals(self._tier, self, block.list.layout, sites)
        returned = block.program.run(block.core, given, add)
        add.check()
        return returned

    @contextmanager
    def _children_of(
        self,
        block: WrappedBlock,
        watched: list[tuple[Site, GatedResidual]],
        outputs: dict[str, Site],
        given: Arguments,
    ) -> Iterator[None]:
        """Children of a block that runs inside are recorded or reused."""
        recorded = dict.fromkeys(child for _, residual in watched for child in residual.children)
        block.wrap_children([*recorded, *outputs], self.owner)

        def measure(site: Site, residual: GatedResidual, seen: dict[str, Any]) -> None:
            self._measure(site, residual.residual(block.core, seen, given), block.list.layout)

        self._children = children = _Children(self, block, watched, outputs, measure)
        try:
            yield
        finally:
            self._children = None
        children.check()

    def run_child(
        self, block: WrappedBlock, name: str, plain: Callable[..., Any], child: Any, args: Any, kwargs: Any
    ) -> Any:
        """What a wrapped child of a block returns in this call."""
        if name == self._stop_at:
            raise _Reached(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
        if self._children is None or self._children.block is not block:
            return plain(child, *args, **kwargs)
        return self._children.run(name, plain, child, args, kwargs)


class _Reached(BaseException):
    """Ends a block at one of its children; no `Exception`, so that a model does not handle it."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value


class _Children:
    """The children of the block under way."""

    def __init__(
        self,
        forward: WrappedForward,
        block: WrappedBlock,
        watched: list[tuple[Site, GatedResidual]],
        outputs: dict[str, Site],
        measure: Callable[[Site, GatedResidual, dict[str, Any]], None],
    ):
        self.block = block
        self._forward = forward
        self._waiting = watched
        self._outputs = outputs
        self._measure = measure
        self._seen: dict[str, Any] = {}

    def run(self, name: str, plain: Callable[..., Any], child: Any, args: Any, kwargs: Any) -> Any:
        if name in self._outputs:
            kept = KeptOutput(self._forward, self._outputs[name])
            output = kept.run(lambda: plain(child, *args, **kwargs), [*args, *kwargs.values()])
        else:
            output = plain(child, *args, **kwargs)
        self._seen[name] = output
        ready = [one for one in self._waiting if set(one[1].children) <= set(self._seen)]
        self._waiting = [one for one in self._waiting if one not in ready]
        for site, residual in ready:
            self._measure(site, residual, self._seen)
        return output

    def check(self) -> None:
        """Raises RuntimeError if a residual could not be measured."""
        for _, residual in self._waiting:
            missing = [name for name in residual.children if name not in self._seen]
            raise RuntimeError(
                f"metric_part: {plain_class(self.block.module).__name__} did not run its {missing}, so "
                f'{residual.part!r} cannot be measured; metric_part="block" works for all blocks'
            )
