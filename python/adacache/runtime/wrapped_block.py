# SPDX-License-Identifier: Apache-2.0
"""A wrapped block: its arguments, its streams, and the children whose outputs are recorded or reused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adacache.adapters.spec import Arguments, BlockPlace, ModelSpec, argument_names
from adacache.fused import BlockProgram
from adacache.fused.forwards import refusal
from adacache.interpose import STATE, interpose, restore

OWNER = f"{STATE}_owner"
"""Attribute of a wrapped module: what it belongs to."""


class WrappedBlock:
    """One block of a model whose blocks are wrapped.

    Args:
        program: runs the block; None: its own forward does.

    Attributes:
        module: the block, as it is in its list.
        core: the block without what `torch.compile` wrapped around it.
        names: its arguments in order.
        streams: names of the arguments that it also returns, the video's tokens first.
    """

    def __init__(self, spec: ModelSpec, place: BlockPlace, program: BlockProgram | None = None):
        self.program = program
        self.position = place.position
        self.number = place.number
        self.list = place.list
        self.module: Any = place.module
        self.core: Any = getattr(place.module, "_orig_mod", place.module)
        self.names = argument_names(place.module)
        self.streams = (self.names[0],) if spec.streams_by_shape else spec.streams
        self._places = {name: place for place, name in enumerate(self.names)}
        self._by_shape = spec.streams_by_shape
        single = len(self.streams) == 1 and not self._by_shape
        self._place = self._places.get(self.streams[0], len(self.names)) if single else -1
        """Of the only stream among the arguments; -1: there are several."""
        self._backwards = spec.reversed_streams
        self._slots: list[str | None] = []
        """Per returned value, the stream that it is, if any."""
        self._returns_tuple = False
        self._children: dict[str, Any] = {}

    def refusal(self) -> str | None:
        """Why the block's program does not run it, as it is now; None: it does, or there is none."""
        return None if self.program is None else refusal(self.program, self.module)

    def runs_fused(self, given: Arguments) -> bool:
        """Whether the block's program runs a call with these arguments."""
        program = self.program
        return (
            program is not None and refusal(program, self.module) is None and program.takes(self.core, given)
        )

    def own_part(self, part: str) -> str:
        """The name that the block's program has for a sub-layer."""
        return part.removeprefix(f"{self.list.kind}_") if self.list.kind else part

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        return dict(zip(self.names, args, strict=False)) | dict(kwargs)

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The streams among the arguments of a call."""
        if 0 <= self._place < len(args):
            only = args[self._place]
            return [only] if isinstance(only, Tensor) else []
        found = []
        for name in self.streams:
            stream = kwargs.get(name)
            if stream is None and self._places.get(name, len(args)) < len(args):
                stream = args[self._places[name]]
            if isinstance(stream, Tensor):
                found.append(stream)
        return found

    def passes(self, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call gets x as its only stream and would return a tensor alone."""
        place = self._place
        if place < 0 or self._returns_tuple:
            return False
        return (args[place] if place < len(args) else kwargs.get(self.streams[0])) is x

    def outputs(
        self, returned: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Tensor], list[Any]]:
        """The streams among what a call returned, and all values with None in place of the streams.

        Raises:
            TypeError: the block returned no stream.
        """
        if isinstance(returned, Tensor) and not self._by_shape:
            self._returns_tuple = False
            return [returned], []
        self._returns_tuple = isinstance(returned, tuple | list)
        values = list(returned) if self._returns_tuple else [returned]
        if self._by_shape:
            self._slots = self._by_shapes(values, self.arguments(args, kwargs))
        else:
            self._slots = self._by_order(values)
        by_name = {name: value for name, value in zip(self._slots, values, strict=True) if name is not None}
        if self.streams[0] not in by_name:
            raise TypeError(
                f"model: {type(self.module).__name__} returned {type(returned).__name__}, expected a tensor "
                f"or a tuple that {'ends' if self._backwards else 'begins'} with {list(self.streams)}"
            )
        rest = [value if name is None else None for name, value in zip(self._slots, values, strict=True)]
        return [by_name[name] for name in self.streams if name in by_name], rest

    def _by_order(self, values: Sequence[Any]) -> list[str | None]:
        slots: list[str | None] = [None] * len(values)
        order = range(len(values))
        for name, slot in zip(self.streams, reversed(order) if self._backwards else order, strict=False):
            if not isinstance(values[slot], Tensor):
                break
            slots[slot] = name
        return slots

    def _by_shapes(self, values: Sequence[Any], given: Arguments) -> list[str | None]:
        """Recognizes streams: arguments with the shapes of returned tensors."""
        left = {name: x.shape for name, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
        slots: list[str | None] = []
        for value in values:
            names: list[str] = []
            if isinstance(value, Tensor):
                # A block may repeat a text per frame: then only the first dimension differs.
                names = [name for name, shape in left.items() if shape == value.shape]
                names += [
                    name for name, shape in left.items() if shape[1:] == value.shape[1:] and len(shape) > 2
                ]
            slots.append(names[0] if names else None)
            if names:
                del left[names[0]]
        found = [name for name in slots if name is not None]
        first = self.names[0] if self.names[0] in found else next(iter(found), self.names[0])
        self.streams = (first, *(name for name in found if name != first))
        return slots

    def returned(self, outputs: Sequence[Tensor], rest: Sequence[Any] = ()) -> Any:
        """Streams and other values in the form in which the block returns them."""
        if not self._returns_tuple:
            return outputs[0]
        by_name = dict(zip(self.streams, outputs, strict=False))
        others = rest or [None] * len(self._slots)
        return tuple(
            other if name is None else by_name[name] for name, other in zip(self._slots, others, strict=True)
        )

    def replace(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], values: Arguments
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with other values."""
        left = dict(values)
        positional = tuple(left.pop(name) for name in self.names[: len(args)])
        return positional, {name: left[name] for name in kwargs}

    def run_uncompiled(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs the block without compiled code, which may have inlined its children before they were
        wrapped."""
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
