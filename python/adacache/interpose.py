# SPDX-License-Identifier: Apache-2.0
"""Wraps methods of single objects by assigning a subclass of their own class.

A replaced instance `forward` is undone by offloading and other hook libraries, which replace it too. A
subclass composes with all of them in any order (`torch.distributed.fully_shard` does the same). All objects
of one class
with the same wrapped methods share one subclass, which compares equal to the original class: lookups in
registries keyed by class succeed. Copies and pickles of a wrapped object are plain.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Mapping
from typing import Any

_METHODS = "_adacache_methods"
_BASE = "_adacache_base"
_NEW_OF_CLASS = getattr(copyreg, "__newobj__")  # noqa: B009
_NEW = getattr(copyreg, "_reconstructor")  # noqa: B009
STATE = "_adacache"
"""Prefix of the attributes that wrapping leaves on an object; copies do not get them."""


def interpose(thing: Any, methods: Mapping[str, Callable[..., Any]], *, copies: bool = False) -> None:
    """Wraps methods of one object.

    Args:
        methods: methods[name] is called with (plain, thing, *args, **kwargs), where `plain` is the unbound
            method of the object's class.
        copies: copies of the object are wrapped too; the methods must then be functions.
    """
    thing.__dict__[_METHODS] = methods
    base: Any = type(thing)
    if not _wraps(base, methods):
        # OptimizedModule forwards attribute assignment to the model that it compiled.
        object.__setattr__(thing, "__class__", _subclass(base, tuple(sorted(methods)), copies))


def restore(thing: Any) -> bool:
    """Unwraps an object. False if its class was changed since: then the wrapped methods only call the plain
    ones, but the subclass stays."""
    thing.__dict__.pop(_METHODS, None)
    base = type(thing).__dict__.get(_BASE)
    if base is not None:
        object.__setattr__(thing, "__class__", base)
    return not any(_BASE in kind.__dict__ for kind in type(thing).__mro__)


def is_interposed(thing: Any) -> bool:
    """Whether methods of the object are wrapped now."""
    return _METHODS in thing.__dict__


def plain_class(thing: Any) -> type:
    """The class of an object, without the subclass of `interpose`."""
    kind = type(thing)
    return kind.__dict__.get(_BASE, kind)


def _wraps(kind: type, methods: Mapping[str, Any]) -> bool:
    """Whether a class has a subclass of `interpose` with these methods among its bases, or is one."""
    return any(
        _BASE in one.__dict__ and all(name in one.__dict__ for name in methods) for one in kind.__mro__
    )


@functools.cache
def _subclass(base: type, names: tuple[str, ...], copies: bool) -> type:
    body: dict[str, Any] = {name: _method(name, getattr(base, name)) for name in names}
    body |= {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__setattr__": _setattr(base, copies),
        _BASE: base,
    }
    if not copies:
        body["__reduce_ex__"] = _reduce
    return _transparent(type(base))(base.__name__, (base,), body)


@functools.cache
def _transparent(metaclass: type) -> type:
    """A metaclass whose classes compare equal to the class that they wrap."""

    def equal(kind: Any, other: Any) -> Any:
        return other is kind or other is kind.__dict__.get(_BASE)

    def hashed(kind: Any) -> int:
        return hash(kind.__dict__[_BASE]) if _BASE in kind.__dict__ else type.__hash__(kind)

    return type(metaclass.__name__, (metaclass,), {"__eq__": equal, "__hash__": hashed})


def _method(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)  # inspect.signature then shows the plain arguments, which pipelines read
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = self.__dict__.get(_METHODS, {}).get(name)
        if found is None:
            return plain(self, *args, **kwargs)
        return found(plain, self, *args, **kwargs)

    return method


def _setattr(base: Any, copies: bool) -> Callable[..., None]:
    """Wraps a class that another library assigns. `fully_shard` caches its classes by module class. Ours
    compares equal to the plain class, so it may assign one that was made from the plain class."""

    def assign(self: Any, name: str, value: Any) -> None:
        if name == "__class__":
            methods = self.__dict__.get(_METHODS)
            if methods is not None and not _wraps(value, methods):
                value = _subclass(value, tuple(sorted(methods)), copies)
        base.__setattr__(self, name, value)

    return assign


def _reduce(self: Any, protocol: Any) -> Any:
    """`__reduce_ex__` of a wrapped object: copies and pickles have the plain class and no AdaCache state."""
    own: Any = next(kind for kind in type(self).__mro__ if _BASE in kind.__dict__)
    create, arguments, *rest = super(own, self).__reduce_ex__(protocol)
    wrapped, plain = type(self), plain_class(self)
    if create is _NEW_OF_CLASS and arguments == (wrapped,):
        # pickle refuses __newobj__ with a class that is not the object's own.
        create, arguments = _NEW, (plain, object, None)
    else:
        arguments = tuple(plain if argument is wrapped else argument for argument in arguments)
    if rest and isinstance(rest[0], dict):
        rest[0] = {key: value for key, value in rest[0].items() if not key.startswith(STATE)}
    return create, arguments, *rest
