# SPDX-License-Identifier: Apache-2.0
"""Blocks written on the fused ops, one file per model family."""

from adacache.fused.norms import ModelNorm, Norm
from adacache.fused.program import TIERS, Add, BlockProgram, Emit, Program

__all__ = ["TIERS", "Add", "BlockProgram", "Emit", "ModelNorm", "Norm", "Program"]
