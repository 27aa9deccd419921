"""The kept output of a sub-layer: reused or forecast in place of running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adacache.policies.base import Action
from adacache.runtime.forward import Forward
from adacache.sites import Site


@dataclass(frozen=True)
class _Form:
    """What a sub-layer took and returned when its output was kept.

    Attributes:
        shapes: of its arguments.
        values: what it returned; in place of each tensor, its dtype.
        is_tuple: whether it returned a tuple.
    """

    shapes: list[torch.Size | None]
    values: list[Any]
    is_tuple: bool


@dataclass(frozen=True)
class KeptOutput:
    """One sub-layer in one forward call. It runs if any video computes it, or if the segment is mixed."""

    forward: Forward
    site: Site

    def run(self, compute: Callable[[], Any], inputs: Sequence[Any] = ()) -> Any:
        """The output: kept, forecast, or computed and kept.

        Args:
            compute: runs the sub-layer; returns a tensor, or a tuple with tensors in it.
            inputs: its arguments; an output is reused for inputs of the same shapes only.
        """
        forward, site = self.forward, self.site
        request, branch = forward.request, forward.branch
        key = branch.index, site
        if forward.rows is not None:
            request.output_forms.pop(key, None)
            return compute()
        actions = request.actions(branch, site, site)
        shapes = [value.shape if isinstance(value, Tensor) else None for value in inputs]
        form: _Form | None = request.output_forms.get(key)
        skip = Action.COMPUTE not in actions and not forward.call.always_compute
        if skip and form is not None and form.shapes == shapes and self._intact(form):
            return self._reused(form, actions)
        output = compute()
        values = list(output) if isinstance(output, tuple) else [output]
        keep, gaps = request.decider.keeps[site], request.gaps(branch, site)
        for k, value in enumerate(values):
            if isinstance(value, Tensor):
                forward.store.keep((*key, k), value, keep, None, gaps, value)
        kept = [value.dtype if isinstance(value, Tensor) else value for value in values]
        request.output_forms[key] = _Form(shapes, kept, isinstance(output, tuple))
        request.note_kept(branch, site, [Action.COMPUTE] * request.decisions)
        return output

    def _intact(self, form: _Form) -> bool:
        branch, store = self.forward.branch.index, self.forward.store
        return all(
            store.intact((branch, self.site, k))
            for k, value in enumerate(form.values)
            if isinstance(value, torch.dtype)
        )

    def _reused(self, form: _Form, actions: Sequence[Action]) -> Any:
        forward, branch = self.forward, self.forward.branch
        coefficients = forward.request.coefficients(branch, self.site, actions)
        values = [
            forward.store.output(
                (branch.index, self.site, k),
                value,
                coefficients=coefficients,
                video_of_row=branch.video_of_row,
            )
            if isinstance(value, torch.dtype)
            else value
            for k, value in enumerate(form.values)
        ]
        return tuple(values) if form.is_tuple else values[0]
