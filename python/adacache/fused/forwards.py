# SPDX-License-Identifier: Apache-2.0
"""Which blocks a program can run: their forward must be the one that the program was written from."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any

from adacache.fused.modules import fingerprint, hooked
from adacache.fused.program import BlockProgram
from adacache.interpose import is_interposed, plain_class

UNKNOWN_NORMS = "its norms are not the known ones"


def refusal(program: BlockProgram, block: Any) -> str | None:
    """Why a block runs as the model's own code and not as a program; None: the program runs it."""
    if hasattr(block, "_orig_mod") or block.__dict__.get("_compiled_call_impl") is not None:
        return "it is compiled"
    reason = hooked(block)
    if reason is not None:
        return reason
    if forward_of(block) not in program.forwards:
        return "its class has an unknown forward"
    return program.refuses(block)


def runs(module: Any, forwards: AbstractSet[str]) -> bool:
    """Whether a call of a module runs one of these forwards and no other code."""
    return not (hooked(module) or is_interposed(module)) and forward_of(module) in forwards


def forward_of(module: Any) -> str:
    """The `fingerprint` of the forward of a module's class."""
    kind: Any = plain_class(module)
    return fingerprint(kind.forward)
