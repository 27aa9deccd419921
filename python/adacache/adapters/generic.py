# SPDX-License-Identifier: Apache-2.0
"""Models without a declaration: block lists are found by structure, streams by their shapes, and whole blocks
are measured."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import nn

from adacache.adapters.spec import BlockList, ModelSpec, argument_names
from adacache.interpose import plain_class
from adacache.sites import BLOCK

TIMESTEPS = ("timestep", "timesteps", "t", "time", "sigma")
"""Names that forwards give to the timestep."""


def generic_spec(model: nn.Module) -> ModelSpec:
    """A declaration made for one model.

    Raises:
        ValueError: the model has no list of blocks, or its forward has no argument for the timestep.
    """
    kind: Any = plain_class(model)
    lists = tuple(BlockList(name) for name in block_lists(model))
    if not lists:
        raise ValueError(
            f"model: found no list of blocks in {kind.__module__}.{kind.__qualname__}: expected a "
            "torch.nn.ModuleList of at least two modules of one class"
        )
    return replace(spec_without_blocks(model), lists=lists, default_part=BLOCK, streams_by_shape=True)


def spec_without_blocks(model: nn.Module) -> ModelSpec:
    """A declaration of a model whose own call is the only thing that is wrapped.

    Raises:
        ValueError: its forward has no argument for the timestep.
    """
    kind: Any = plain_class(model)
    where = f"{kind.__module__}.{kind.__qualname__}"
    names = list(inspect.signature(kind.forward).parameters)[1:]
    timesteps = [name for name in names if name in TIMESTEPS]
    if not timesteps:
        raise ValueError(
            f"model: the forward of {where} takes {names}; expected one of {list(TIMESTEPS)} among them"
        )
    return ModelSpec(classes=(kind.__name__,), lists=(), latents=names[0], timestep=timesteps[0])


def block_lists(model: nn.Module) -> list[str]:
    """Names of the lists of blocks of a model, in the order of definition: lists of at least two modules of
    one class that have parameters and take at least two arguments; of several, those with the most parameters
    per block."""
    sizes: dict[str, int] = {}
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and _are_blocks(list(child)):
            sizes[name] = sum(p.numel() for p in child[0].parameters())
    return [name for name, size in sizes.items() if size * 4 >= max(sizes.values()) > 0]


def _are_blocks(modules: list[Any]) -> bool:
    kinds = {plain_class(getattr(one, "_orig_mod", one)) for one in modules}
    return len(kinds) == 1 and len(argument_names(modules[0])) > 1
