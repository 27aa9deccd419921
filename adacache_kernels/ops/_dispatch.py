# SPDX-License-Identifier: Apache-2.0
"""Dispatches public functions to backends.

All backends take the arguments of the schema by position, followed by given outputs.
`torch.ops.adacache.<op>` allocates outputs; `<op>_out` writes to given ones, and returns only the sums if it
is a meter. `torch.ops.adacache_triton` has only `<op>_out` for ops with outputs, which are allocated here.
`reference.<op>` takes the arguments of a meter and of a norm grouped, outputs as optional arguments, and
returns all results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import reference
from .._backend import choose_backend
from .._checks import cast_under_autocast, check, forward_ad_is_on, refuse_grad, require_tensor
from .._fakes import NAMES, OUTPUTS, fresh_outputs
from .._schemas import OPS, SCHEMAS

_COMPILED = {
    name: getattr(torch.ops.adacache, name).default for name in SCHEMAS if hasattr(torch.ops.adacache, name)
}


#: Per op, the indices of gate, shift and scale. These may be [B, G, 1, C].
_MODULATORS = {
    op: tuple(index for index, name in enumerate(names) if name in ("gate", "shift", "scale"))
    for op, names in NAMES.items()
    if op in OPS and "x" in names
}


def call(op: str, *arguments: Any, **given: Any) -> Any:
    """Run `op` on the device of its first argument. given: its outputs by name, or None.

    Returns the outputs, given or allocated, then the sums of a meter; a single result is not a tuple.
    """
    first = arguments[0]
    if not isinstance(first, torch.Tensor):
        require_tensor(NAMES[op][0], first)
    outputs = _given_outputs(given)
    device_type = first.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        arguments = cast_under_autocast(first.dtype, NAMES[op], arguments)
    if forward_ad_is_on() or (torch.is_grad_enabled() and _require_grad((*outputs, *arguments))):
        refuse_grad((*NAMES[op], *OUTPUTS[op]), (*arguments, *outputs))
    backend = choose_backend(device_type, op)
    if backend == "cpu" or backend == "cuda":
        try:
            if not outputs:
                return _COMPILED[op](*arguments)
            return _results(outputs, _COMPILED[op + "_out"](*arguments, *outputs))
        except Exception:  # type and message depend on the torch version
            _explain_refusal(op, arguments, outputs)
            raise
    arguments = _three_dimensional(op, arguments)
    check(op, arguments, outputs)
    if backend == "triton":
        from .. import triton  # noqa: F401  (registers the ops)

        outputs = outputs or fresh_outputs(op, arguments)
        kernel = getattr(torch.ops.adacache_triton, op + "_out" if outputs else op)
        return _results(outputs, kernel(*arguments, *outputs))
    return getattr(reference, op)(*_grouped(op, arguments), *outputs)


def _explain_refusal(op: str, arguments: tuple[Any, ...], outputs: Sequence[torch.Tensor]) -> None:
    """Raise the error of the Python checks after a compiled op raised. Returns if they find none."""
    try:
        check(op, _three_dimensional(op, arguments), outputs)
    except (TypeError, ValueError) as refusal:
        raise refusal from None


def _three_dimensional(op: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with modulators [B, G, 1, C] as [B, G, C]. The compiled ops accept both."""
    for index in _MODULATORS.get(op, ()):
        modulator = arguments[index]
        if isinstance(modulator, torch.Tensor) and modulator.dim() == 4 and modulator.shape[2] == 1:
            arguments = (*arguments[:index], modulator.squeeze(2), *arguments[index + 1 :])
    return arguments


def _require_grad(arguments: Sequence[Any]) -> bool:
    """Whether an argument requires grad. In every schema, differentiable tensors precede the first number."""
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


def _given_outputs(given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The outputs in the order of the schema, or none."""
    present = [name for name, output in given.items() if output is not None]
    if not present:
        return ()
    for name, output in given.items():
        if output is None:
            every = ", ".join(given)
            raise ValueError(
                f"{name}: expected a tensor with {present[0]}, got None; pass all of {every}, or none"
            )
    return tuple(given.values())


def _grouped(op: str, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments with those of a norm and of a meter grouped, for the reference."""
    grouped = tuple(arguments)
    for group in (reference.Meter, reference.Norm):  # last group first, so that indices stay valid
        if group._fields[0] in NAMES[op] and group._fields[-1] in NAMES[op]:
            start = NAMES[op].index(group._fields[0])
            end = start + len(group._fields)
            grouped = (*grouped[:start], group(*grouped[start:end]), *grouped[end:])
    return grouped


def _results(outputs: tuple[torch.Tensor, ...], sums: torch.Tensor | None) -> Any:
    results = outputs if sums is None else (*outputs, sums)
    return results if len(results) > 1 else results[0] if results else None
