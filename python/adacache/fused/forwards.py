# SPDX-License-Identifier: Apache-2.0
"""Which blocks a program can run: their forward must be the one that the program was written from."""

from __future__ import annotations

from typing import Any

from adacache.fused.modules import fingerprint, hooked
from adacache.fused.program import BlockProgram
from adacache.interpose import plain_class


def refusal(program: BlockProgram, block: Any) -> str | None:
    """Why a block runs as the model's own code and not as a program; None: the program runs it."""
    if hasattr(block, "_orig_mod") or block.__dict__.get("_compiled_call_impl") is not None:
        return "it is compiled"
    reason = hooked(block)
    if reason is not None:
        return reason
    kind: Any = plain_class(block)
    if fingerprint(kind.forward) not in program.forwards:
        return "its class has an unknown forward"
    return program.refuses(block)
