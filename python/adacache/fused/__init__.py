"""Blocks written on the fused ops, one file per model family."""

from adacache.fused.program import Emit, Norm, Program

__all__ = ["Emit", "Norm", "Program"]
