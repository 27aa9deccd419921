# SPDX-License-Identifier: Apache-2.0
"""Common tests of all ops on [B, N, C]: invalid input, determinism, torch.compile, opcheck, autocast,
autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_calls import (
    CHANNELS,
    INDICES,
    ROWS,
    TOKEN_OPS,
    TOKENS,
    bad_calls,
    by_schema,
    copied,
    good_call,
    lead,
    outputs_of,
    parameters,
    run,
    written,
)
from op_cases import Buffer, same_bits, video_ids

from adacache_kernels import _checks
from adacache_kernels._fakes import NAMES
from adacache_kernels._schemas import SCHEMAS

BAD_CALLS = [(op, what) for op in TOKEN_OPS for what in bad_calls(op)]
VARIANTS = [
    pytest.param(op, float8, outputs, id="-".join([op] + ["float8"] * float8 + ["outputs"] * outputs))
    for op in TOKEN_OPS
    for float8 in (False, True)
    for outputs in (False, True)
    if (not float8 or "residual_scale" in parameters(op)) and (not outputs or outputs_of(op))
]


@pytest.mark.parametrize(("op", "what"), BAD_CALLS, ids=lambda value: value)
def test_bad_input_names_the_argument(backend: str, device: torch.device, op: str, what: str) -> None:
    with device:  # the default device of factory functions
        name, changes = bad_calls(op)[what]
    call = good_call(op, device)
    before = copied(call)
    with pytest.raises((ValueError, TypeError), match=f"^{name}: ") as refusal:
        run(op, call | changes)
    assert not str(refusal.value).endswith("got "), refusal.value
    for name in written(op):
        if name in call:
            assert same_bits(call[name], before[name])


@pytest.mark.parametrize(("op", "float8", "outputs"), VARIANTS)
def test_requires_grad_is_refused(
    backend: str, device: torch.device, op: str, float8: bool, outputs: bool
) -> None:
    call = good_call(op, device, float8=float8, outputs=outputs, tables=outputs)
    floating = [
        name
        for name, value in call.items()
        if isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bfloat16)
    ]
    for name in floating:
        with pytest.raises(ValueError, match=f"^{name}: requires grad"):
            run(op, call | {name: call[name].clone().requires_grad_()})
    with torch.no_grad():
        run(op, call | {name: call[name].clone().requires_grad_() for name in floating})
    if op.startswith("extrapolate_residual"):
        with pytest.raises(ValueError, match=r"^factors: requires grad"):
            run(op, call | {"factors": [factor.clone().requires_grad_() for factor in call["factors"]]})


OUT_OF_RANGE = [
    pytest.param(op, name, ids, id=f"{op}-{name}-{ids}")
    for op in TOKEN_OPS
    for name in INDICES
    if name in parameters(op)
    for ids in ([0, 2], [-1, 1], [2**31 - 1, 0])
]


@pytest.mark.parametrize(("op", "name", "ids"), OUT_OF_RANGE)
@pytest.mark.parametrize("float8", [False, True])
def test_row_indices_out_of_range(
    backend: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    name: str,
    ids: list[int],
    float8: bool,
) -> None:
    """Raises on the CPU. Unchecked: NaN for the row and its video, and the cache is not written."""
    float8 &= "residual_scale" in parameters(op)
    call = good_call(op, device, float8=float8) | {name: video_ids(ids, device)}
    if "reuse" in call:
        call["reuse"] = torch.tensor([True, True], device=device)
    before = copied(call)
    wrong, right = (0, 1) if ids[1] in range(ROWS) else (1, 0)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=rf"^{name}: .*got {ids[wrong]}"):
            run(op, call)
        for tensor in written(op):
            assert tensor not in call or same_bits(call[tensor], before[tensor])
    if backend == "cpu":
        return
    monkeypatch.setattr(_checks, "_values_are_readable", lambda rows: False)
    for result in run(op, call):
        bad, good = (wrong, right) if result.dim() == 3 else call["video_of_row"][[wrong, right]]
        assert result[bad].float().isnan().all()
        assert result[good].float().isfinite().all()
    row = wrong if name == "x_rows" else 1 - ids[right]  # the cache row that must not be written
    for tensor in written(op):
        assert tensor not in call or same_bits(call[tensor][row], before[tensor][row])


@pytest.mark.parametrize("op", TOKEN_OPS)
def test_written_rows_must_be_distinct(backend: str, device: torch.device, op: str) -> None:
    for name in ("residual_rows", "rows"):
        if name in parameters(op) and device.type == "cpu":
            call = good_call(op, device) | {name: video_ids([1, 1], device)}
            if "residual" not in written(op):
                run(op, call)
                continue
            with pytest.raises(ValueError, match=f"^{name}: .*1"):
                run(op, call)
    if "x_rows" in parameters(op):
        run(op, good_call(op, device) | {"x_rows": video_ids([1, 1], device)})


@pytest.mark.parametrize("op", [op for op in TOKEN_OPS if "video_of_row" in parameters(op)])
@pytest.mark.parametrize("ids", [[0, 2], [-1, 0]], ids=str)
def test_video_ids_out_of_range(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, op: str, ids: list[int]
) -> None:
    """Raises on the CPU. Unchecked: NaN."""
    call = good_call(op, device) | {"video_of_row": video_ids(ids, device)}
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"^video_of_row: .*got (2|-1)"):
            run(op, call)
    if backend == "cpu":
        return
    monkeypatch.setattr(_checks, "_values_are_readable", lambda rows: False)
    *_, last = run(op, call)
    if "meter" in op:
        assert last.isnan().all()
    else:
        wrong = 0 if ids[0] < 0 else 1
        assert last[wrong].isnan().all()
        assert last[1 - wrong].isfinite().all()


@pytest.mark.parametrize(("op", "float8", "outputs"), VARIANTS)
def test_written_memory_must_not_be_shared(
    backend: str, device: torch.device, op: str, float8: bool, outputs: bool
) -> None:
    call = good_call(op, device, float8=float8, outputs=outputs, tables=outputs)
    tensors = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    for name in written(op):
        for other, tensor in tensors.items():
            if name not in call or other == name or (name == "out" and other in ("x", "x_in")):
                continue
            # Views of one buffer with their own shapes and dtypes.
            one, two = call[name], tensor
            memory = torch.zeros(4096, dtype=torch.uint8, device=device)
            views = {
                key: memory[: value.numel() * value.element_size()].view(value.dtype).view(value.shape)
                for key, value in ((name, one), (other, two))
            }
            if other == "video_of_row":
                views[other].copy_(two)
            with pytest.raises(ValueError, match=f"^({name}|{other}): "):
                run(op, call | views)


@pytest.mark.parametrize("op", [op for op in TOKEN_OPS if "out" in parameters(op)])
def test_out_may_equal_x_but_not_overlap_it(backend: str, device: torch.device, op: str) -> None:
    call = good_call(op, device, outputs=True)
    name = "x_in" if "x_in" in parameters(op) else "x"
    memory = torch.randn(ROWS, TOKENS + 3, CHANNELS, device=device)
    call[name] = memory[:, :TOKENS]
    with pytest.raises(ValueError, match=r"^out: "):
        run(op, call | {"out": memory[:, 1 : TOKENS + 1]})
    if "x_rows" in parameters(op):
        with pytest.raises(ValueError, match=r"^out: "):
            run(op, call | {"out": call["x"], "x_rows": video_ids([1, 0], device)})
    expected = run(op, copied(call))[0] if name == "x" else call["x_out"].clone()
    run(op, call | {"out": memory[:, :TOKENS]})
    assert same_bits(memory[:, :TOKENS], expected)


@pytest.mark.parametrize("op", TOKEN_OPS)
def test_interleaved_slices_do_not_overlap(backend: str, device: torch.device, op: str) -> None:
    """Slices of fused projections."""
    call = good_call(op, device, outputs=True)
    names = [name for name, value in call.items() if isinstance(value, torch.Tensor) and value.dim() == 3]
    names = [name for name in names if call[name].shape[1:] == (TOKENS, CHANNELS)]
    names = [name for name in names if call[name].dtype == torch.float32]
    expected = run(op, copied(call))
    slices = torch.empty(ROWS, TOKENS, len(names) * CHANNELS, device=device).chunk(len(names), dim=-1)
    for name, part in zip(names, slices, strict=True):
        call[name] = part.copy_(call[name])
    for one, other in zip(run(op, call), expected, strict=True):
        torch.testing.assert_close(one.float(), other.float(), equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("op", "float8", "outputs"), VARIANTS)
def test_deterministic(backend: str, device: torch.device, op: str, float8: bool, outputs: bool) -> None:
    """For repeated runs and any thread count."""
    generator = torch.Generator().manual_seed(4)
    interpreted = backend == "triton" and device.type == "cpu"
    repeats = (1, 1, 1) if interpreted else (1, 67, 33)
    call = good_call(op, device, float8=float8, outputs=outputs, tables=outputs)
    for name, value in call.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "coefficients":
            by_token = value.dim() == 3 and value.shape[1] == TOKENS
            times = repeats if by_token else (1, 1, 33)
            if name == "norm_scale":
                times = (*repeats[:2], 1)
            if value.dim() < 3:
                times = repeats[:2] if name == "residual_scale" else repeats[2:]
            larger = value.float().repeat(times)
            noise = torch.rand(larger.shape, generator=generator).to(device)
            call[name] = (larger * noise).to(value.dtype)
    if "factors" in call:
        call["factors"] = [factor.repeat(repeats) for factor in call["factors"]]
    if interpreted:
        call = good_call(op, device, float8=float8, outputs=outputs, tables=outputs)
    threads = torch.get_num_threads()
    results = []
    try:
        # The reference uses torch.sum, whose order may depend on the thread count.
        for count in (threads, threads) if backend == "reference" else (threads, threads, 1, 2, 3):
            torch.set_num_threads(count)
            mine = copied(call)
            results.append([*run(op, mine), *(mine[name] for name in written(op) if name in mine)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(same_bits(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("op", [op for op in TOKEN_OPS if {"y", "shift"} & set(parameters(op))])
def test_autocast_casts_to_the_dtype_of_x(backend: str, device: torch.device, op: str) -> None:
    call = good_call(op, device)
    cast = {"y", "gate", "shift", "scale", "weight", "bias"} & set(call)
    lower = {name: call[name].to(torch.bfloat16) for name in cast}
    expected = run(op, copied(call) | {name: value.float() for name, value in lower.items()})
    mine = copied(call) | lower
    with torch.autocast(device.type, dtype=torch.bfloat16):
        given = run(op, mine)
    assert all(same_bits(one, two) for one, two in zip(given, expected, strict=True))
    with pytest.raises(ValueError, match=r"^(y|gate|shift|scale|weight|bias): expected .*dtype|^y: expected"):
        run(op, copied(call) | lower)


@pytest.mark.parametrize("op", [op for op in TOKEN_OPS if {"gate", "shift"} & set(parameters(op))])
def test_autocast_keeps_modulators_in_float32(backend: str, device: torch.device, op: str) -> None:
    call = good_call(op, device)
    modulators = {"gate", "shift", "scale", "weight", "bias"} & set(call)
    for name, value in call.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in modulators:
            call[name] = value.bfloat16()
    mine = copied(call)
    expected = run(op, call)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        given = run(op, mine)
    assert all(same_bits(one, two) for one, two in zip(given, expected, strict=True))


@pytest.mark.parametrize("op", [op for op in TOKEN_OPS if {"gate", "shift"} & set(parameters(op))])
def test_modulators_with_a_dimension_of_places(backend: str, device: torch.device, op: str) -> None:
    call = good_call(op, device)
    mine = copied(call)
    for name in {"gate", "shift", "scale"} & set(call):
        mine[name] = mine[name].unsqueeze(2)
    expected, given = run(op, call), run(op, mine)
    assert all(same_bits(one, two) for one, two in zip(given, expected, strict=True))
    for name in {"gate", "shift", "scale"} & set(call):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            run(op, call | {name: call[name].unsqueeze(2).repeat(1, 1, 2, 1)})
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            run(op, call | {name: call[name].unsqueeze(3)})


@pytest.mark.parametrize(("op", "float8", "outputs"), VARIANTS)
@pytest.mark.sampled(2)
def test_compile_without_graph_breaks(
    backend: str, device: torch.device, op: str, float8: bool, outputs: bool
) -> None:
    call = good_call(op, device, float8=float8, outputs=outputs, tables=outputs)

    def step(call: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        first = run(op, call | {lead(op): call[lead(op)] * 2})
        second = run(op, call)
        return tuple(result.float() * 2 for result in (*first, *second))

    torch.compiler.reset()  # avoids the recompile limit
    expected_call, given_call = copied(call), copied(call)
    expected = step(expected_call)
    given = torch.compile(step, fullgraph=True, backend="aot_eager")(given_call)
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)
    for name in written(op):
        if name in call:
            one, other = given_call[name], expected_call[name]
            torch.testing.assert_close(one.float(), other.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("op", "float8", "outputs"), VARIANTS)
@pytest.mark.sampled(2)
def test_opcheck(
    backend: str, device: torch.device, op_namespace: str, op: str, float8: bool, outputs: bool
) -> None:
    name = f"{op}_out" if outputs else op
    allocates = not outputs and f"{op}_out" in SCHEMAS and op != "stack_residual_meter"
    if op_namespace == "adacache_triton" and allocates:
        return  # Triton ops do not allocate outputs
    operator = getattr(getattr(torch.ops, op_namespace), name).default
    interpreted = backend == "triton" and device.type == "cpu"
    for layout in ("channel_slice",) if interpreted else ("contiguous", "channel_slice", "rows_inside"):
        call = good_call(op, device, float8=float8, outputs=outputs, tables=outputs)
        for key, value in call.items():
            if isinstance(value, torch.Tensor) and value.dim() == 3:
                call[key] = Buffer(value, layout).tensor
        if "x_rows" in parameters(op) and layout == "contiguous":
            call["x_rows"] = video_ids([1, 0], device)
        checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        # test_schema compares written tensors, which PyTorch does not support for float8.
        checks += () if float8 or "norm_scale" in outputs_of(op) else ("test_schema",)
        arguments = tuple(by_schema(op, call, NAMES[name]))
        torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("op", TOKEN_OPS)
def test_meta_tensors_run_the_reference(backend: str, op: str) -> None:
    call = good_call(op, torch.device("meta"))
    for result in run(op, call):
        assert result.device.type == "meta"
