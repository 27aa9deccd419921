# SPDX-License-Identifier: Apache-2.0
"""The kept output of a sub-layer or of the model: reused or forecast in place of computing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adacache.policies.base import Action
from adacache.runtime.forward import Forward
from adacache.sites import Site


@dataclass(frozen=True)
class _Form:
    """What a module took and returned when its output was kept.

    Attributes:
        shapes: of its arguments.
        dtypes: of the tensors that it returned.
        rebuild: makes what it returned from its tensors.
    """

    shapes: list[torch.Size | None]
    dtypes: list[torch.dtype]
    rebuild: Callable[[Sequence[Tensor]], Any]


def flatten(output: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors in an output (in tuples, lists and mappings), and a function that makes it from others."""
    if isinstance(output, Tensor):
        return [output], lambda tensors: tensors[0]
    if isinstance(output, Mapping):
        names, parts = list(output), [flatten(value) for value in output.values()]
    elif isinstance(output, tuple | list):
        names, parts = [], [flatten(value) for value in output]
    else:
        return [], lambda tensors: output

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        values, start = [], 0
        for found, make in parts:
            values.append(make(tensors[start : start + len(found)]))
            start += len(found)
        kind: Any = type(output)
        if names:
            return kind(**dict(zip(names, values, strict=True)))
        return kind(*values) if hasattr(output, "_fields") else kind(values)

    return [tensor for found, _ in parts for tensor in found], rebuild


@dataclass(frozen=True)
class KeptOutput:
    """One module in one forward call. It runs if any video computes it, or if the segment is mixed.

    Attributes:
        base: is subtracted from the tensor that is kept, and added when this is reused; None: nothing is.
    """

    forward: Forward
    site: Site
    base: Tensor | None = None

    def run(self, compute: Callable[[], Any], inputs: Sequence[Any] = ()) -> Any:
        """The output: kept, forecast, or computed and kept.

        Args:
            compute: runs the module; returns a tensor, or tuples, lists and mappings of tensors.
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
        tensors, rebuild = flatten(output)
        keep, gaps = request.decider.keeps[site], request.gaps(branch, site)
        if self.base is not None and [value.shape for value in tensors] != [self.base.shape]:
            raise ValueError(
                f"model: expected one output of the latents' shape {list(self.base.shape)}, whose residual "
                f"is kept, got {[list(value.shape) for value in tensors]}"
            )
        for k, value in enumerate(tensors):
            kept = value if self.base is None else value - self.base
            forward.store.keep((*key, k), kept, keep, None, gaps, value)
        request.output_forms[key] = _Form(shapes, [value.dtype for value in tensors], rebuild)
        keys = [(*key, k) for k in range(len(tensors))]
        request.note_kept(branch, site, [Action.COMPUTE] * request.decisions, keys)
        return output

    def _intact(self, form: _Form) -> bool:
        branch, store = self.forward.branch.index, self.forward.store
        return all(store.intact((branch, self.site, k)) for k in range(len(form.dtypes)))

    def _reused(self, form: _Form, actions: Sequence[Action]) -> Any:
        forward, branch = self.forward, self.forward.branch
        coefficients = forward.request.coefficients(branch, self.site, actions)
        values = [
            forward.store.output(
                (branch.index, self.site, k),
                dtype,
                coefficients=coefficients,
                video_of_row=branch.video_of_row,
            )
            for k, dtype in enumerate(form.dtypes)
        ]
        if self.base is not None:
            values = [value + self.base.to(value.dtype) for value in values]
        return form.rebuild(values)
