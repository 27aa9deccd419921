"""Adapters: each knows one model class, its stack and sites, and how its forward runs with caching."""

from __future__ import annotations

from adacache.adapters.base import Adapter
from adacache.adapters.stdit3 import STDiT3Adapter

__all__ = ["Adapter", "adapter_for"]

ADAPTERS: tuple[Adapter, ...] = (STDiT3Adapter(),)


def adapter_for(model: object) -> Adapter:
    """The adapter that knows `model`.

    Raises:
        ValueError: none does.
    """
    for adapter in ADAPTERS:
        if adapter.matches(model):
            return adapter
    known = [adapter.model_class for adapter in ADAPTERS]
    raise ValueError(
        f"model: expected one of {known}, got {type(model).__module__}.{type(model).__qualname__}"
    )
