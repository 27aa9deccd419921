"""Puts functions before the methods of one object, by giving it a subclass of its own class, and takes them
off.

Replacing `forward` on an instance is what offloading and other hook libraries do too, and they undo each
other's work; a subclass lies above all of them, whoever came first (as `torch.distributed.fully_shard` does
it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_BASE = "_adacache_base"


def interpose(thing: Any, **methods: Callable[..., Any]) -> None:
    """Replaces methods of one object; `methods[name]` takes (plain, thing, *args, **kwargs), where `plain` is
    the unbound method of its class."""
    base = type(thing)
    replaced = {name: _method(getattr(base, name), method) for name, method in methods.items()}
    own = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        _BASE: base,
    }
    _set_class(thing, type(base.__name__, (base,), replaced | own))


def restore(thing: Any) -> None:
    """Gives an object its class back.

    Raises:
        RuntimeError: its class was changed again since; that has to be undone first.
    """
    base = type(thing).__dict__.get(_BASE)
    if base is None:
        raise RuntimeError(
            f"model: the class of {type(thing).__name__} was changed after AdaCache was enabled; undo that "
            "first"
        )
    _set_class(thing, base)


def _set_class(thing: Any, kind: type) -> None:
    # What torch.compile wraps hands the setting of its own attributes on to the model.
    object.__setattr__(thing, "__class__", kind)


def plain_class(thing: Any) -> type:
    """The class of an object without what `interpose` put before it."""
    kind = type(thing)
    return kind.__dict__.get(_BASE, kind)


def _method(plain: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(plain, self, *args, **kwargs)

    method.__name__ = plain.__name__
    method.__doc__ = plain.__doc__
    # inspect.signature, which pipelines ask for argument names, then tells what the plain method takes.
    method.__wrapped__ = plain  # type: ignore[attr-defined]
    return method
