"""Adapters: each knows one model class, its stack and sites, and how its forward runs with caching."""

from __future__ import annotations

import warnings

from torch import nn

from adacache.adapters.allegro import AllegroAdapter, SanaVideoAdapter
from adacache.adapters.base import Adapter
from adacache.adapters.blocks import BlockAdapter, Pass
from adacache.adapters.cogvideox import CogVideoXAdapter, EasyAnimateAdapter
from adacache.adapters.cosmos import CosmosAdapter
from adacache.adapters.generic import GenericAdapter
from adacache.adapters.hunyuan_video import FramepackAdapter, HunyuanVideo15Adapter, HunyuanVideoAdapter
from adacache.adapters.kandinsky import Kandinsky5Adapter
from adacache.adapters.latte import LatteAdapter, LatteOfOneListAdapter
from adacache.adapters.ltx import LTX2VideoAdapter, LTXVideoAdapter
from adacache.adapters.mochi import MochiAdapter
from adacache.adapters.open_sora import OpenSoraAdapter
from adacache.adapters.open_sora_plan import OpenSoraPlan12Adapter, OpenSoraPlan13Adapter
from adacache.adapters.stdit3 import STDiT3Adapter
from adacache.adapters.vchitect import VchitectAdapter
from adacache.adapters.wan import ControlledWanAdapter, HeliosAdapter, WanAdapter

__all__ = ["Adapter", "BlockAdapter", "GenericAdapter", "Pass", "adapter_for", "known_models"]

ADAPTERS: tuple[Adapter | BlockAdapter, ...] = (
    STDiT3Adapter(),
    OpenSoraAdapter(),
    OpenSoraPlan13Adapter(),
    OpenSoraPlan12Adapter(),
    LatteAdapter(),
    LatteOfOneListAdapter(),
    CogVideoXAdapter(),
    EasyAnimateAdapter(),
    HunyuanVideoAdapter(),
    HunyuanVideo15Adapter(),
    FramepackAdapter(),
    WanAdapter(),
    ControlledWanAdapter(),
    HeliosAdapter(),
    LTXVideoAdapter(),
    LTX2VideoAdapter(),
    MochiAdapter(),
    AllegroAdapter(),
    SanaVideoAdapter(),
    CosmosAdapter(),
    Kandinsky5Adapter(),
    VchitectAdapter(),
)


def known_models() -> list[str]:
    """Classes that an adapter knows; others are enabled if their block lists can be found."""
    return [adapter.model_class for adapter in ADAPTERS]


def adapter_for(model: object) -> Adapter | BlockAdapter:
    """The adapter that knows `model`, or one made for it from its block lists (with a warning).

    Raises:
        ValueError: it has none.
    """
    for adapter in ADAPTERS:
        if adapter.matches(model):
            return adapter
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module or a pipeline, got {type(model).__qualname__}")
    generic = GenericAdapter(model)
    warnings.warn(
        f"AdaCache: no adapter knows {type(model).__name__}; its blocks were found by structure in "
        f"{[one.name for one in generic.lists]}, and the residual of the middle block is measured",
        stacklevel=4,
    )
    return generic
