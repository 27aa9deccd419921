"""The kept output of a sub-layer: reused or forecast in place of running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adacache.policies.base import Action
from adacache.runtime.forward import Forward
from adacache.sites import Site


@dataclass(frozen=True)
class KeptOutput:
    """One sub-layer in one forward call. It runs if any video computes it."""

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
        actions = request.actions(branch, site, site)
        key = branch.index, site
        shapes = [value.shape if isinstance(value, Tensor) else None for value in inputs]
        known = request.output_forms.get(key)
        reusable = Action.COMPUTE not in actions and known is not None and known[0] == shapes
        if reusable and not forward.call.always_compute:
            assert known is not None
            coefficients = request.plan.coefficients[site] if Action.FORECAST in actions else None
            tensors = [
                forward.store.output((*key, k), coefficients=coefficients, video_of_row=branch.video_of_row)
                if kept
                else value
                for k, (kept, value) in enumerate(known[1])
            ]
            return tuple(tensors) if known[2] else tensors[0]
        output = compute()
        values = list(output) if isinstance(output, tuple) else [output]
        keep, gaps = request.decider.keeps[site], request.gaps(branch, site)
        form = []
        for k, value in enumerate(values):
            kept = isinstance(value, Tensor)
            if kept:
                forward.store.keep((*key, k), value, keep, None, gaps, value)
            form.append((kept, None if kept else value))
        request.output_forms[key] = shapes, form, isinstance(output, tuple)
        request.note_kept(branch, site, [Action.COMPUTE] * request.decisions)
        return output
