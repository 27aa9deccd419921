"""The former name of `adacache_kernels.simulate`."""

from .simulate import decide, initial_state, simulate

__all__ = ["decide", "initial_state", "simulate"]
