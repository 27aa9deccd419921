"""From a public function to the backend that runs it.

The convention of all backends: an op takes its schema's arguments by position, tensors that the caller gives
as outputs last. `torch.ops.adacache.<op>` allocates them, `<op>_out` writes those given and returns the sums
alone, if it is a meter. `torch.ops.adacache_triton` has the same ops, except that what could allocate outputs
is there as `<op>_out` alone: they are allocated here. `reference.<op>` takes the outputs as optional
arguments and always returns everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import reference
from .._arguments import cast_under_autocast, explain_refusal, refuse_grad
from .._backend import choose_backend
from ._fake import ARGUMENTS, SCHEMAS, fresh_outputs

_COMPILED = {
    name: getattr(torch.ops.adacache, name).default for name in SCHEMAS if hasattr(torch.ops.adacache, name)
}


def call(
    op: str,
    check: Callable[..., None],
    x: torch.Tensor,
    arguments: tuple[Any, ...],
    outputs: tuple[torch.Tensor, ...] = (),
) -> Any:
    """Run `op` where x lives: `check` and the backends take (*arguments, *outputs).

    Returns the outputs, given or new, and then the sums, if there are any: a tuple, or the one tensor alone.
    """
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        arguments = cast_under_autocast(x.dtype, ARGUMENTS[op], arguments)
    if torch.is_grad_enabled() and _require_grad((*outputs, *arguments)):
        refuse_grad((*ARGUMENTS[op], "out", "norm_out"), (*arguments, *outputs))
    backend = choose_backend(device_type, op)
    if backend == "cpu" or backend == "cuda":
        try:
            if not outputs:
                return _COMPILED[op](*arguments)
            return _results(outputs, _COMPILED[op + "_out"](*arguments, *outputs))
        except (RuntimeError, ValueError):  # which of the two depends on the version of torch
            explain_refusal(check, *arguments, *outputs)
            raise
    check(*arguments, *outputs)
    if backend == "triton":
        from .. import triton  # noqa: F401  (registers the ops)

        outputs = outputs or fresh_outputs(op, arguments)
        kernel = getattr(torch.ops.adacache_triton, op + "_out" if outputs else op)
        return _results(outputs, kernel(*arguments, *outputs))
    return getattr(reference, op)(*arguments, *outputs)


def _require_grad(arguments: Sequence[Any]) -> bool:
    """Whether autograd would have to follow the call. In every schema the tensors that it could follow come
    before the first number."""
    for argument in arguments:
        if argument is None:
            continue
        if isinstance(argument, torch.Tensor):
            if argument.requires_grad:
                return True
        elif isinstance(argument, list):
            if _require_grad(argument):
                return True
        else:
            break
    return False


def both_outputs(out: torch.Tensor | None, norm_out: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    if out is None and norm_out is None:
        return ()
    if out is None or norm_out is None:
        missing = "out" if out is None else "norm_out"
        raise ValueError(f"{missing}: expected out and norm_out together or neither, got None for it alone")
    return out, norm_out


def _results(outputs: tuple[torch.Tensor, ...], sums: torch.Tensor | None) -> Any:
    results = outputs if sums is None else (*outputs, sums)
    return results if len(results) > 1 else results[0] if results else None
