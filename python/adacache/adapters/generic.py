"""Models that no adapter knows: their block lists are found by structure, and whole blocks are measured."""

from __future__ import annotations

import inspect

from torch import nn

from adacache.adapters.blocks import BlockAdapter, BlockList
from adacache.interpose import plain_class


class GenericAdapter(BlockAdapter):
    """An adapter made for one model.

    Raises:
        ValueError: the model has no list of blocks, or its forward takes nothing that could be the latents
            and the timestep.
    """

    default_part = "block"
    video_last = None

    def __init__(self, model: nn.Module):
        self.classes = (plain_class(model).__name__,)
        self.lists = tuple(BlockList(name) for name in block_lists(model))
        where = f"{plain_class(model).__module__}.{plain_class(model).__qualname__}"
        if not self.lists:
            raise ValueError(
                f"model: found no list of blocks in {where}: expected a torch.nn.ModuleList of at least two "
                "modules of one class"
            )
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        timesteps = [name for name in names if name in ("timestep", "timesteps", "t", "time", "sigma")]
        if not names or not timesteps:
            raise ValueError(
                f"model: the forward of {where} takes {names}, none of which is called timestep or t"
            )
        self.latents, self.timestep = names[0], timesteps[0]
        block = getattr(model, self.lists[0].name)[0]
        arguments = list(inspect.signature(block.forward).parameters)
        second = [name for name in arguments[1:] if "hidden_states" in name][:1]
        self.streams = (arguments[0], *second)


def block_lists(model: nn.Module) -> list[str]:
    """Names of the lists of blocks of a model, in the order they were defined: lists of at least two modules
    of one class that hold parameters of their own; of several, those with the most parameters a block."""
    sizes = {}
    for name, child in model.named_children():
        if (
            isinstance(child, nn.ModuleList)
            and len(child) > 1
            and len({plain_class(one) for one in child}) == 1
        ):
            sizes[name] = sum(p.numel() for p in child[0].parameters())
    return [name for name, size in sizes.items() if size * 4 >= max(sizes.values()) > 0]
