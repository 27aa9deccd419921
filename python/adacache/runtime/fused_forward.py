# SPDX-License-Identifier: Apache-2.0
"""A forward call of a fused program."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

import adacache_kernels
from adacache.fused import Norm, Program
from adacache.models.modulation import gated
from adacache.policies.base import What
from adacache.rows import Split
from adacache.runtime.forward import Forward
from adacache.runtime.outputs import KeptOutput
from adacache.sites import MODULATED, TOKENS, Site


def run_program(forward: Forward, program: Program, model: Any, tokens: Tensor, context: Any) -> Tensor:
    """Runs the stack of a fused program; `tokens` [B, N, C] may be overwritten."""
    contexts: dict[int, Any] = {}
    ranges = [site for site in forward.meter.watches if site.part is None]
    starts: dict[Site, tuple[Split, Tensor]] = {}
    forward.meter.measure(TOKENS, lambda: tokens)
    forward.meter.measure(MODULATED, lambda: program.first_input(model, tokens, context))
    for segment in forward.call.segments:
        forward.enter(segment, [tokens])
        forward.order += range(segment.site.first, segment.site.last)
        if not forward.split.computing:
            tokens = forward.reused(out=None if starts else tokens)
            forward.due = False
            continue
        split, given, x = forward.rows, context, tokens
        rows = None if split is None else split.index
        if rows is not None:
            key = id(split)  # the call holds its splits
            given = contexts[key] = contexts.get(key) or program.rows(context, rows)
        for first, last in _pieces(segment.site, ranges):
            begun = [site for site in ranges if site.first == first]
            if begun:
                start = x if rows is None else x.index_select(0, rows)
                starts.update(dict.fromkeys(begun, (forward.split, start)))
            x = program.blocks(model, x, given, _Emit(forward, program, rows), rows, first, last)
            rows = None
            for site in [site for site in starts if site.last == last]:
                computing, start = starts.pop(site)
                if computing is forward.split:
                    output = forward.meter.watches[site].what is What.OUTPUT
                    forward.meter.residual(site, x.clone() if output else x - start, split)
        (tokens,) = forward.leave([x], in_place=not starts)
    if not forward.skipped:
        forward.branch.order = forward.order
    return tokens


def _pieces(segment: Site, ranges: Sequence[Site]) -> list[tuple[int, int]]:
    """A segment cut where watched ranges of blocks begin and end."""
    edges = {edge for site in ranges for edge in (site.first, site.last)}
    cuts = sorted({segment.first, segment.last} | {edge for edge in edges if segment.holds(edge)})
    return list(itertools.pairwise(cuts))


class _Emit:
    """`Emit` of one forward call.

    Args:
        rows: int32 [b], the rows of the first x; None: all.
    """

    def __init__(self, forward: Forward, program: Program, rows: Tensor | None):
        self._forward = forward
        self._rows = rows
        self._composites = {
            part: (name, parts) for name, parts in program.composites.items() for part in parts
        }
        self._summed: Tensor | None = None

    def __call__(
        self,
        position: int,
        part: str,
        x: Tensor,
        y: Callable[[], Tensor],
        gate: Tensor | None,
        norm: Norm | None,
    ) -> tuple[Tensor, Tensor | None]:
        forward, rows, self._rows = self._forward, self._rows, None
        kept = forward.kept_outputs.get((position, part))
        value = y() if kept is None else KeptOutput(forward, kept).run(y)
        composite, parts = self._composites.get(part, (part, (part,)))
        own, whole = Site(position, position + 1, part), Site(position, position + 1, composite)
        watches, stores = forward.meter.watches, forward.segment.by_sublayer
        if own in watches and not stores and forward.meter.adds(own, value, gate, forward.rows):
            return forward.meter.adding(own, x, value, gate, norm, forward.rows, rows)
        if not stores and not {own, whole} & watches.keys():
            if norm is None or rows is not None:
                x = adacache_kernels.gated_residual(x, value, gate, x_rows=rows)
                return x, None if norm is None else norm(x)
            return norm.after(x, value, gate)
        residual = value if gate is None else gated(value, gate)
        if own in watches:
            forward.meter.residual(own, residual, forward.rows)
        summed = residual if self._summed is None else self._summed + residual
        self._summed = None if part == parts[-1] else summed
        if part == parts[-1]:
            if whole in watches and whole != own:
                forward.meter.residual(whole, summed, forward.rows)
            if stores:
                forward.keep_part(position, composite, summed)
        x = (x if rows is None else x.index_select(0, rows)) + residual
        return x, None if norm is None else norm(x)
