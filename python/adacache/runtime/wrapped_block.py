"""A wrapped block: its arguments, its streams, and the children whose outputs are recorded or reused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adacache.adapters.spec import Arguments, BlockPlace, ModelSpec, argument_names
from adacache.interpose import STATE, interpose, restore

OWNER = f"{STATE}_owner"
"""Attribute of a wrapped module: what it belongs to."""


class WrappedBlock:
    """One block of a model without a fused program.

    Attributes:
        module: the block, as it is in its list.
        core: the block without what `torch.compile` wrapped around it.
        names: its arguments in order.
        streams: names of the arguments that it also returns, the video's tokens first.
    """

    def __init__(self, spec: ModelSpec, place: BlockPlace):
        self.position = place.position
        self.list = place.list
        self.module: Any = place.module
        self.core: Any = getattr(place.module, "_orig_mod", place.module)
        self.names = argument_names(place.module)
        self.streams = (self.names[0],) if spec.streams_by_shape else spec.streams
        self._by_shape = spec.streams_by_shape
        self._backwards = spec.reversed_streams
        self._returned = self.streams
        """The streams in the order of return."""
        self._returns_tuple = False
        self._children: dict[str, Any] = {}

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        return dict(zip(self.names, args, strict=False)) | dict(kwargs)

    def inputs(self, given: Arguments) -> list[Tensor]:
        """The streams among the arguments of a call."""
        found = (given.get(name) for name in self.streams)
        return [stream for stream in found if isinstance(stream, Tensor)]

    def outputs(self, returned: Any, given: Arguments) -> tuple[list[Tensor], list[Any]]:
        """The streams among what a call returned, and the other values.

        Raises:
            TypeError: the block returned no stream.
        """
        self._returns_tuple = not isinstance(returned, Tensor)
        values = list(returned) if isinstance(returned, tuple | list) else [returned]
        if self._backwards:
            values.reverse()
        if self._by_shape:
            self._recognize(values, given)
        count = 0
        while count < min(len(values), len(self._returned)) and isinstance(values[count], Tensor):
            count += 1
        if not count:
            raise TypeError(
                f"model: {type(self.module).__name__} returned {type(returned).__name__}, expected a tensor or "
                f"a tuple that {'ends' if self._backwards else 'begins'} with {list(self._returned)}"
            )
        by_name = dict(zip(self._returned, values[:count], strict=False))
        return [by_name[name] for name in self.streams if name in by_name], values[count:]

    def _recognize(self, values: Sequence[Any], given: Arguments) -> None:
        """Finds the streams: arguments with the shapes of the returned tensors."""
        left = {name: x.shape for name, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
        returned = []
        for value in values:
            shape = value.shape if isinstance(value, Tensor) else None
            name = next((name for name, other in left.items() if other == shape), None)
            if name is None:
                break
            del left[name]
            returned.append(name)
        self._returned = tuple(returned) or (self.names[0],)
        first = self.names[0] if self.names[0] in returned else self._returned[0]
        self.streams = (first, *(name for name in self._returned if name != first))

    def returned(self, outputs: Sequence[Tensor], rest: Sequence[Any] = ()) -> Any:
        """Streams and other values in the form in which the block returns them."""
        if not self._returns_tuple:
            return outputs[0]
        by_name = dict(zip(self.streams, outputs, strict=False))
        whole = (*(by_name[name] for name in self._returned if name in by_name), *rest)
        return whole[::-1] if self._backwards else whole

    def replace(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], values: Arguments
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with other values."""
        left = dict(values)
        positional = tuple(left.pop(name) for name in self.names[: len(args)])
        return positional, {name: left[name] for name in kwargs}

    def run_uncompiled(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs the block without compiled code, which may have inlined its children before they were wrapped."""
        return _call_uncompiled()(self.core, *args, **kwargs)

    def wrap_children(self, names: Iterable[str], owner: Any) -> None:
        """Wraps children, so that their calls reach the owner's `run_child`. LoRA may replace a child at any
        time, so this is done before each call that needs it."""
        for name in names:
            child = self.core.get_submodule(name)
            if self._children.get(name) is child:
                continue
            if name in self._children:
                _release(self._children[name])
            child.__dict__[OWNER] = self, name
            interpose(child, {"__call__": owner.run_child})
            self._children[name] = child

    def release_children(self) -> None:
        for child in self._children.values():
            _release(child)
        self._children.clear()


def _release(child: Any) -> None:
    child.__dict__.pop(OWNER, None)
    restore(child)


@functools.cache
def _call_uncompiled() -> Callable[..., Any]:
    """`nn.Module.__call__` that takes no compiled code."""
    return torch.compiler.disable(nn.Module._call_impl)
