# SPDX-License-Identifier: Apache-2.0
"""Methods that `torch.compile` runs as they are, while it compiles the plain methods that they call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from adacache.fused.modules import fingerprint

NOT_COMPILED = (
    "AdaCache decides in Python which blocks run, so a model with this policy cannot be one graph "
    "(docs/compile.md); compile its blocks (model.compile_repeated_blocks(fullgraph=True) in diffusers, or "
    "block.compile() for each)"
)
Method = Callable[..., Any]


def apart(method: Method, traced: Method | None = None, traces: Callable[[], bool] = lambda: False) -> Method:
    """A wrapped method (plain, ...) that `torch.compile` does not compile, whereas it compiles `plain`.

    Args:
        method: called with (plain, *args, **kwargs).
        traced: what is compiled in its place.
        traces: whether it is, in the call under way. The graph breaks otherwise.
    """

    from torch._C._dynamo.eval_frame import get_eval_frame_callback

    is_compiling = torch.compiler.is_compiling

    def outside(plain: Method, *args: Any, **kwargs: Any) -> Any:
        callback = get_eval_frame_callback()  # what compiles the functions that are called now, if it is one
        if not callable(callback):
            return method(plain, *args, **kwargs)
        return alone(functools.partial(_compiled, callback, plain), *args, **kwargs)

    alone = torch.compiler.disable(method)
    broken = torch.compiler.disable(outside, recursive=False, reason=NOT_COMPILED)

    def run(plain: Method, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            if traced is not None and traces():
                return traced(plain, *args, **kwargs)
            return broken(plain, *args, **kwargs)
        callback = get_eval_frame_callback()
        return (outside if callable(callback) else method)(plain, *args, **kwargs)

    for function in (run, outside):
        skip_frames(function)
    torch.compiler.assume_constant_result(fingerprint)
    return run


def compiles_whole(plain: Method, model: Any) -> bool:
    """Whether plain(model, ...) runs compiled as a whole; `plain`: as a method of `apart` gets it."""
    if getattr(plain, "func", None) is _compiled or getattr(model, "_orig_mod", None) is not None:
        return True
    return model.__dict__.get("_compiled_call_impl") is not None


def skip_frames(function: Any) -> None:
    """`torch.compile` does not compile calls of the function that it does not trace, but what they call."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)


def _compiled(callback: Any, plain: Method, *args: Any, **kwargs: Any) -> Any:
    """Calls `plain` so that it is compiled."""
    from torch._C._dynamo import eval_frame

    before = eval_frame.set_eval_frame(callback)
    try:
        return plain(*args, **kwargs)
    finally:
        eval_frame.set_eval_frame(before)
