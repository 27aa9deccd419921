# SPDX-License-Identifier: Apache-2.0
"""Invalid arguments of every op, independent of their role: wrong types, tensors that are not dense, autograd
in reverse and forward mode. The arguments are read from the schemas."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_calls import copied, good_call, parameters
from op_cases import same_bits
from torch.autograd import forward_ad

import adacache_kernels
from adacache_kernels import OPS
from adacache_kernels._fakes import ARGUMENTS

#: Per schema type: values of another type, or out of range.
WRONG: dict[str, tuple[Any, ...]] = {
    "Tensor": (None, 2.5, [0.7], [1]),
    "Optional[Tensor]": (2.5, [0.7], [1]),
    "List[Tensor]": (None, 2.5, [1.0], torch.ones(2, 2, 6, 8)),
    "int": (None, "1", 1.5, [1], 2**70),
    "List[int]": (None, 1, "12", (1.5,), ("1",), (2**70,)),
    "float": (None, "1", [1.0]),
    "bool": (None, 2, "yes"),
}
#: Arguments with other types in the public functions.
CONVERTED = {"metric", "rule", "first_step", "last_step", "rounding", "norm"}
CONVERTED |= {"step_of_video", "num_steps_of_video", "window_of_video"}
CASES = [
    pytest.param(op, name, value, id=f"{op}-{name}-{value!r:.8}".replace("tensor([", "tensor"))
    for op in OPS
    for name, kind, _ in ARGUMENTS[op]
    for value in WRONG[kind]
    if name not in CONVERTED and not (op == "temporal_attention" and name == "scale" and value is None)
]


def any_call(op: str, device: torch.device) -> dict[str, Any]:
    """A valid call of any op."""
    if op == "decide":
        codebook = torch.tensor([1.0], dtype=torch.float64, device=device)
        return {
            "sums": torch.ones(2, 9, dtype=torch.float64, device=device),
            "state": adacache_kernels.initial_state(2, device=device),
            "thresholds": codebook,
            "rates": codebook.clone(),
            "step": 2,
            "num_steps": 30,
            "frames": 3,
        }
    if "qkv" not in parameters(op):
        return good_call(op, device)
    call = {"qkv": torch.ones(1, 6, 3, 2, 4, device=device)}
    call |= dict.fromkeys(("q_weight", "k_weight"), torch.ones(4, device=device))
    call |= dict.fromkeys(("cos", "sin"), torch.ones(3, 2, device=device))
    return call | ({"frames": 3} if op == "temporal_attention" else {})


def run(op: str, call: dict[str, Any]) -> Any:
    return getattr(adacache_kernels, op)(**call)


def tensors_of(call: dict[str, Any]) -> list[str]:
    return [name for name, value in call.items() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(("op", "name", "value"), CASES)
@pytest.mark.sampled(4)
def test_a_value_of_another_type(backend: str, device: torch.device, op: str, name: str, value: Any) -> None:
    call = any_call(op, device)
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*, got [^ ]"):
        run(op, call | {name: value})


@pytest.mark.parametrize("op", OPS)
def test_a_tensor_without_dimensions(backend: str, device: torch.device, op: str) -> None:
    call = any_call(op, device)
    for name, kind, _ in ARGUMENTS[op]:
        if "Optional[Tensor]" in kind or kind == "Tensor":
            dtype = call[name].dtype if isinstance(call.get(name), torch.Tensor) else torch.int32
            # residual_scale is only checked with a float8 residual.
            float8 = (
                {"residual": call["residual"].to(torch.float8_e4m3fn)} if name == "residual_scale" else {}
            )
            tensor = torch.zeros((), dtype=torch.float32 if float8 else dtype, device=device)
            name = name.removesuffix("_of_video")
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                run(op, call | float8 | {name: tensor})


def test_numpy_numbers_are_numbers(backend: str, device: torch.device) -> None:
    import numpy

    call = any_call("gated_residual_norm_meter", device)
    given = run("gated_residual_norm_meter", copied(call))
    numbers = {"frames": numpy.int64(3), "num_videos": numpy.int32(2), "eps": numpy.float32(1e-6)}
    again = run("gated_residual_norm_meter", copied(call) | numbers | {"strides": list(numpy.arange(1, 3))})
    assert all(same_bits(one, two) for one, two in zip(given, again, strict=True))


@pytest.mark.parametrize("num_videos", [-1, 0, 65537, 2**36, 2**63 - 1])
@pytest.mark.parametrize("op", [op for op in OPS if "num_videos" in parameters(op)])
def test_num_videos_has_a_range(backend: str, device: torch.device, op: str, num_videos: int) -> None:
    with pytest.raises(ValueError, match=rf"^num_videos: expected 1 to 65536, got {num_videos}$"):
        run(op, any_call(op, device) | {"num_videos": num_videos})


@pytest.mark.parametrize("op", OPS)
def test_a_tensor_that_is_not_dense(backend: str, device: torch.device, op: str) -> None:
    call = any_call(op, device)
    for name in tensors_of(call):
        if not call[name].is_floating_point():
            continue
        for what, tensor in (
            ("a nested one", torch.nested.as_nested_tensor([call[name][0]] * 2)),
            ("a nested one", torch.nested.as_nested_tensor([torch.ones(2, 3)] * 2, layout=torch.jagged)),
            ("torch.sparse_coo", call[name].to_sparse()),
        ):
            with pytest.raises(ValueError, match=f"^{name}: expected a dense tensor, got {what}"):
                run(op, call | {name: tensor})


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(backend: str, device: torch.device, op: str) -> None:
    """Also under no_grad, which does not disable forward mode."""
    call = any_call(op, device)
    with forward_ad.dual_level():
        run(op, copied(call))  # no tangents
        for name in tensors_of(call):
            if call[name].is_floating_point():
                dual = forward_ad.make_dual(call[name], torch.ones_like(call[name]))
                for mode in (torch.enable_grad, torch.no_grad):
                    with mode(), pytest.raises(ValueError, match=f"^{name}: has a tangent"):
                        run(op, call | {name: dual})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("transform", [torch.func.jvp, torch.func.grad, torch.func.jacfwd])
def test_function_transforms_are_refused(
    backend: str, device: torch.device, op: str, transform: Callable[..., Any]
) -> None:
    call = any_call(op, device)
    first = next(iter(inspect.signature(getattr(adacache_kernels, op)).parameters))
    x = call.pop(first)

    def function(x: torch.Tensor) -> Any:
        results = run(op, {first: x, **call})
        return results[0].sum() if isinstance(results, tuple) else x.sum()

    with pytest.raises(ValueError, match=f"^{first}: (has a tangent|requires grad)"):
        transform(function, (x,), (torch.ones_like(x),)) if transform is torch.func.jvp else transform(
            function
        )(x)


def test_decide_refuses_a_state_that_shares_memory(backend: str, device: torch.device) -> None:
    call = any_call("decide", device)
    memory = torch.ones(64, dtype=torch.float64, device=device)
    state = memory[: call["state"].numel()].view(call["state"].shape).copy_(call["state"])
    for name in ("sums", "thresholds", "rates"):
        shared = memory[20 : 20 + call[name].numel()].view(call[name].shape)
        with pytest.raises(ValueError, match=f"^state: expected separate memory.*{name}"):
            run("decide", call | {"state": state, name: shared})
    apart = {name: memory[30 + 10 * i : 31 + 10 * i] for i, name in enumerate(("thresholds", "rates"))}
    run("decide", call | {"state": state} | apart)
    rows = torch.ones(1, 11, dtype=torch.float64, device=device).expand(2, 11)
    with pytest.raises(ValueError, match=r"^state: "):
        run("decide", call | {"state": rows})


@pytest.mark.parametrize("window", [None, 3, (1,), (1, 2, 3), ("1", 2), (1, 2.5)])
def test_decide_names_a_wrong_window(backend: str, device: torch.device, window: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^(window|first_step|last_step): expected"):
        run("decide", any_call("decide", device) | {"window": window})
