# SPDX-License-Identifier: Apache-2.0
"""Models with `enable_parallelism(config=ContextParallelConfig(...))` of diffusers, or `fully_shard`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from adacache.models.sequence_parallel import SequenceParallel
from adacache.runtime.ranks import Parallel
from adacache.runtime.runner import Entry

_HOOKS = "_diffusers_hook"
_SPLIT, _GATHER = "ContextParallelSplitHook", "ContextParallelGatherHook"


def declared(model: Any) -> Parallel | None:
    """How a model states that ranks share its calls, by diffusers' `enable_parallelism` or `STDiT3.sequence`;
    None: it does not.

    Raises:
        ValueError: its attention does not take part.
    """
    sequence = getattr(model, "sequence", None)
    if isinstance(sequence, SequenceParallel):
        return Parallel(sequence.group, sequence.split)
    config = getattr(model, "_parallel_config", None)
    context = getattr(config, "context_parallel_config", None)
    if context is not None:
        processors = [getattr(module, "processor", None) for module in model.modules()]
        if all(getattr(processor, "_parallel_config", None) is None for processor in processors):
            raise ValueError(
                "model: no attention processor of it supports context parallelism, so each rank would attend "
                "to its own tokens alone"
            )
        return Parallel(context._flattened_mesh, "tokens")
    tensor = getattr(config, "tensor_parallel_config", None)
    return None if tensor is None else Parallel(tensor._mesh, "none")


def sharded_over(model: nn.Module) -> int:
    """Ranks that `torch.distributed.fsdp.fully_shard` splits the weights of a model over; 1: none."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return 1
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    meshes = [parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)]
    if not meshes and any(isinstance(module, FSDPModule) for module in model.modules()):
        return dist.get_world_size()  # a forward is under way, with gathered weights
    return max((mesh.size() for mesh in meshes), default=1)


class MovedSplits:
    """diffusers splits tokens in a hook inside the forward of a block. A skipped block does not run it, so it
    runs before the block instead.

    Args:
        blocks: the wrapped blocks.

    Attributes:
        entries: per block, what splits its arguments.

    Raises:
        ValueError: a hook gathers tokens after a block, which may be skipped.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]):
        self.entries: dict[nn.Module, Entry] = {}
        self._moved: list[Any] = []
        for name, block in blocks.items():
            for hook in _hooks(block):
                if type(hook).__name__ == _GATHER:
                    raise ValueError(
                        f"model: its context-parallel plan gathers tokens after the block {name}, which may "
                        "be skipped; gather them after the last block, at the norm or the projection"
                    )
                if any(one.split_output for one in _inputs(hook)):
                    raise ValueError(
                        f"model: its context-parallel plan splits the output of the block {name}, which may "
                        "be skipped; split the input of the first block"
                    )
        for block in blocks.values():
            splits = [hook for hook in _hooks(block) if type(hook).__name__ == _SPLIT]
            if splits:
                self.entries[block] = _chained([hook.pre_forward for hook in reversed(splits)])
                for hook in splits:
                    hook.fn_ref.pre_forward = _unchanged
                self._moved += splits

    def restore(self) -> None:
        """Moves the hooks back."""
        for hook in self._moved:
            if hook.fn_ref.pre_forward is _unchanged:
                hook.fn_ref.pre_forward = hook.pre_forward
        self._moved.clear()
        self.entries.clear()


def _hooks(module: nn.Module) -> list[Any]:
    registry = getattr(module, _HOOKS, None)
    return [] if registry is None else list(registry.hooks.values())


def _inputs(hook: Any) -> list[Any]:
    if type(hook).__name__ != _SPLIT:
        return []
    found: list[Any] = []
    for one in hook.metadata.values():
        found += one if isinstance(one, tuple | list) else [one]
    return found


def _chained(functions: list[Entry]) -> Entry:
    def entry(block: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for function in functions:
            args, kwargs = function(block, *args, **kwargs)
        return args, kwargs

    return entry


def _unchanged(block: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs
