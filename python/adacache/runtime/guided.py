# SPDX-License-Identifier: Apache-2.0
"""The guided output of a step: kept or forecast where a pipeline passes it to its scheduler."""

from __future__ import annotations

import torch
from torch import Tensor

from adacache.policies.base import Action, Keep
from adacache.runtime.meter import Meter
from adacache.runtime.request import Branch, Facts, Request
from adacache.runtime.store import as_tokens
from adacache.sites import GUIDED


def guided_output(request: Request, output: Tensor, stream: int = 0) -> Tensor:
    """The output with which the scheduler goes on: the given one, which is kept, or a forecast of it.

    Args:
        request: a request whose decider keeps `GUIDED`.
        output: the guided output [V, ...] of this step; at a step that the plan does not compute, it is made
            from kept outputs of the model and is replaced.
        stream: number of the output, where a pipeline denoises several latents at once.
    """
    key = f"guided {stream}"
    branch = request.guided.get(key)
    if branch is None:
        branch = request.guided[key] = Branch(-1 - stream)
    if branch.shape != output.shape:
        request.reshape(branch, Facts(tuple(output.shape), output.device))
    actions = request.actions(branch, GUIDED, GUIDED)
    keep: Keep = request.decider.keeps[GUIDED]
    site = branch.index, GUIDED
    with torch.inference_mode(False):
        if Action.COMPUTE not in actions:
            coefficients = request.coefficients(branch, GUIDED, actions)
            return request.store.output(
                site, output.dtype, coefficients=coefficients, video_of_row=branch.video_of_row
            )
        if GUIDED in request.decider.watches and stream == 0:
            Meter(request, branch, 1).residual(GUIDED, as_tokens(output.detach()), None)
        split = request.split(branch, actions, output.device)
        rows = split if split.mixed else None
        gaps = request.gaps(branch, GUIDED)
        value = output.detach()
        request.store.keep(site, value if rows is None else rows.take(value), keep, rows, gaps, value)
        request.note_kept(branch, GUIDED, actions, [site])
        if rows is None:
            return output
        coefficients = request.coefficients(branch, GUIDED, actions)
        whole = request.store.output(
            site, output.dtype, coefficients=coefficients, video_of_row=branch.video_of_row
        )
        return rows.put(whole.clone(), rows.take(value))
