# SPDX-License-Identifier: Apache-2.0
"""The blocks of a model on fused ops, without caching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from adacache.adapters.spec import ModelSpec
from adacache.fused.residuals import Residuals
from adacache.interpose import interpose, restore
from adacache.runtime.wrapped_block import OWNER, WrappedBlock


class Accelerated:
    """A model whose blocks run on the fused ops. Made by `adacache.accelerate`.

    Attributes:
        model: the model.
        enabled: whether it still runs so.
    """

    users = 0
    """Enabled pipelines that cache in the model."""

    def __init__(self, model: Any, spec: ModelSpec, tier: str):
        self.model = model
        self.tier = tier
        self.enabled = True
        self._add = Residuals(tier)
        self._blocks = [WrappedBlock(spec, place, spec.block_program) for place in spec.places(model)]
        for block in self._blocks:
            block.module.__dict__[OWNER] = block
            interpose(block.module, {"__call__": self._run_block})

    def describe(self) -> dict[str, Any]:
        """The class, and how its blocks run, see `Handle.describe`."""
        return {"model": type(self.model).__name__, **how_blocks_run(self._blocks, self.tier)}

    def uninstall(self) -> None:
        self.enabled = False
        for block in self._blocks:
            block.module.__dict__.pop(OWNER, None)
            restore(block.module)

    def _run_block(self, plain: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
        """A block's `__call__`. torch.compile traces the plain block, which it fuses itself."""
        if torch.compiler.is_compiling() or OWNER not in module.__dict__:
            return plain(module, *args, **kwargs)
        block: WrappedBlock = module.__dict__[OWNER]
        given = block.arguments(args, kwargs)
        if block.program is None or not block.runs_fused(given):
            return plain(module, *args, **kwargs)
        return block.program.run(block.core, given, self._add)


def how_blocks_run(blocks: Sequence[WrappedBlock], tier: str | None) -> dict[str, Any]:
    """How wrapped blocks run now.

    Returns:
        runs: "fused blocks" if any does; tier: of those; fused_blocks: their number; not_fused: blocks by the
        reason why their program does not run them.
    """
    refused: dict[str, list[str]] = {}
    fused = 0
    for block in blocks:
        reason = block.refusal()
        if reason is not None:
            refused.setdefault(reason, []).append(f"{block.list.label}[{block.number}]")
        elif block.program is not None:
            fused += 1
    if not fused:
        return {"runs": "wrapped blocks", "tier": None, "fused_blocks": 0, "not_fused": refused}
    return {"runs": "fused blocks", "tier": tier, "fused_blocks": fused, "not_fused": refused}
