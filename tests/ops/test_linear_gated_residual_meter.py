"""linear_gated_residual_meter: the fused kernel against float64 up to the rounding of y, and exactly from
there on; when it is fused; bad input."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from op_cases import (
    DTYPES,
    Shape,
    check_sums,
    exact_sums,
    gate_by_token,
    random_gate,
    random_tensor,
    same_bits,
    video_ids,
)

import adacache_kernels
from adacache_kernels import _backend, linear_gated_residual_meter
from adacache_kernels.ops import _fused_table

SHAPE = Shape(2, 3, 5, 48)
INNER = 40


@pytest.fixture
def triton_device() -> torch.device:
    """Where the fused kernel takes tensors."""
    if _backend._missing("triton"):
        pytest.skip("the package triton is not installed")
    if not _backend._INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    importlib.import_module("adacache_kernels.triton")
    return torch.device("cpu" if _backend._INTERPRETED else "cuda")


def make_call(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    inner: int = INNER,
    gate: str | None = "frame",
    bias: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return random_tensor(generator, *size, dtype=dtype, device=device)

    return {
        "a": random(shape.rows, shape.tokens, inner),
        "weight": random(shape.channels, inner),
        "bias": random(shape.channels) if bias else None,
        "x": random(shape.rows, shape.tokens, shape.channels),
        "gate": None if gate is None else random_gate(generator, shape, gate, dtype, device),
        "residual": random(shape.rows, shape.tokens, shape.channels),
    }


def check_fused(shape: Shape, call: dict[str, Any], **keywords: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the fused op and judge it."""
    x, residual, gate = call["x"], call["residual"], call["gate"]
    before = {name: tensor.clone() for name, tensor in call.items() if tensor is not None}
    strides, metric = keywords.setdefault("strides", (1,)), keywords.setdefault("metric", "l1")
    x_out, sums = linear_gated_residual_meter(**call, frames=shape.frames, fused=True, **keywords)

    rows = keywords.get("residual_rows")
    new = residual if rows is None else residual[rows.long()]
    old = before["residual"] if rows is None else before["residual"][rows.long()]
    y, accumulation = exact_linear(call)
    factor = torch.ones_like(y) if gate is None else gate_by_token(gate, shape).double().cpu()
    unit = torch.finfo(x.dtype).eps / 2
    # y and then r are rounded to the dtype.
    bound = abs(factor) * (accumulation + unit * (abs(y) + accumulation)) + unit * abs(factor * y) * 1.01
    bound += abs(factor) * torch.finfo(x.dtype).smallest_normal * unit * 2
    error = abs(new.cpu().double() - factor * y)
    assert (error <= bound).all(), (error / bound).max()

    picked = keywords.get("x_rows")
    stream = before["x"] if picked is None else before["x"][picked.long()]
    assert same_bits(x_out, stream + new)
    videos = keywords.get("video_of_row")
    exact, scale = exact_sums(
        new,
        old,
        shape.frames,
        strides,
        metric,
        None if videos is None else videos.tolist(),
        keywords.get("num_videos", 1),
    )
    check_sums(sums, exact, scale, max(1024, shape.channels))  # 64 terms in a thread
    for name in ("a", "weight", "bias", "gate"):
        assert call[name] is None or same_bits(call[name], before[name])
    return x_out, sums


def exact_linear(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """y in float64, and how far float32 accumulation may be off in whatever order."""
    a, weight = call["a"].double().cpu(), call["weight"].double().cpu()
    y, magnitude = a @ weight.T, abs(a) @ abs(weight).T
    if call["bias"] is not None:
        y, magnitude = y + call["bias"].double().cpu(), magnitude + abs(call["bias"].double().cpu())
    return y, (a.shape[2] + 2) * 2.0**-24 * magnitude


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused(triton_device: torch.device, dtype: torch.dtype) -> None:
    check_fused(SHAPE, make_call(SHAPE, dtype, triton_device))


@pytest.mark.parametrize("gate", [None, "row", "token", "shared"])
def test_gates(triton_device: torch.device, gate: str | None) -> None:
    """Without a bias too, and with more places than a tile's: what lies beyond the last is not measured."""
    shape = Shape(1, 2, 67, 16) if gate is None else SHAPE
    call = make_call(shape, torch.float32, triton_device, gate=gate, bias=gate != "row", seed=1)
    check_fused(shape, call, metric="l2")


@pytest.mark.parametrize("strides", [(), (2,), (1, 3, 2)], ids=str)
def test_strides(triton_device: torch.device, strides: tuple[int, ...]) -> None:
    shape = Shape(1, 4, 6, 33)
    call = make_call(shape, torch.bfloat16, triton_device, inner=17, seed=2)
    check_fused(shape, call, strides=strides, metric="cosine")


def test_several_tiles_and_steps_of_the_product(triton_device: torch.device) -> None:
    shape = Shape(2, 2, 140, 200)
    call = make_call(shape, torch.float16, triton_device, inner=130, seed=3)
    check_fused(shape, call, video_of_row=video_ids([1, 0], triton_device), num_videos=2)


@pytest.mark.parametrize("out", ["given", "x"])
def test_outputs(triton_device: torch.device, out: str) -> None:
    call = make_call(SHAPE, torch.float32, triton_device, seed=4)
    target = call["x"] if out == "x" else torch.full_like(call["x"], torch.nan)
    x_out, _ = check_fused(SHAPE, call, out=target)
    assert x_out is target


def test_picked_rows(triton_device: torch.device) -> None:
    call = make_call(SHAPE, torch.bfloat16, triton_device, seed=5)
    spare = make_call(Shape(5, 3, 5, 48), torch.bfloat16, triton_device, seed=6)
    call |= {"x": spare["x"], "residual": spare["residual"]}
    others = spare["residual"][[0, 2, 4]].clone()
    check_fused(
        SHAPE,
        call,
        x_rows=video_ids([4, 4], triton_device),
        residual_rows=video_ids([3, 1], triton_device),
    )
    assert same_bits(spare["residual"][[0, 2, 4]], others)


def test_same_input_gives_same_bits(triton_device: torch.device) -> None:
    results = []
    for _ in range(2):
        call = make_call(SHAPE, torch.bfloat16, triton_device, seed=7)
        results.append(linear_gated_residual_meter(**call, frames=3, metric="l2", fused=True))
    assert same_bits(results[0][0], results[1][0])
    assert same_bits(results[0][1], results[1][1])


def test_empty(triton_device: torch.device) -> None:
    shape = Shape(2, 3, 0, 48)
    check_fused(shape, make_call(shape, torch.float32, triton_device))


@pytest.mark.parametrize("fused", [True, None])
def test_compile_without_graph_breaks(triton_device: torch.device, fused: bool | None) -> None:
    call = make_call(SHAPE, torch.float32, triton_device, seed=9)
    kept = call["residual"].clone()

    def step(**tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x_out, sums = linear_gated_residual_meter(**tensors, frames=3, metric="l2", fused=fused)
        return x_out * 2, sums

    given = torch.compile(step, fullgraph=True, backend="aot_eager")(**call)
    expected = step(**(call | {"residual": kept}))
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(call["residual"], kept, rtol=1e-6, atol=1e-6)


def test_opcheck(triton_device: torch.device) -> None:
    call = make_call(SHAPE, torch.bfloat16, triton_device, seed=10)
    metering = (None, 1, 3, [1, 2], adacache_kernels.METRICS["l2"])  # nothing is NaN
    arguments = (*call.values(), None, None, *metering, torch.empty_like(call["x"]))
    torch.library.opcheck(torch.ops.adacache_triton.linear_gated_residual_meter_out.default, arguments)


@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize("float8", [False, True])
def test_not_fused_it_is_the_linear_layer_and_the_meter(
    backend: str, device: torch.device, fused: bool | None, float8: bool
) -> None:
    call = make_call(SHAPE, torch.bfloat16, device, seed=8)
    keywords: dict[str, Any] = {"frames": 3, "metric": "l2"}
    kept = [call["residual"].clone() for _ in range(2)]
    scales = [torch.ones(SHAPE.rows, SHAPE.tokens, device=device) for _ in range(2)]
    if float8:
        kept = [tensor.to(torch.float8_e4m3fn) for tensor in kept]
    given = [{"residual_scale": scale} if float8 else {} for scale in scales]
    one = linear_gated_residual_meter(**(call | {"residual": kept[0]}), **keywords, **given[0], fused=fused)
    y = torch.nn.functional.linear(call["a"], call["weight"], call["bias"])
    other = adacache_kernels.gated_residual_meter(call["x"], y, call["gate"], kept[1], **keywords, **given[1])
    assert same_bits(one[0], other[0])
    if backend != "reference":  # whose sums may depend on where its float64 copies lie
        assert same_bits(one[1], other[1])
    assert torch.equal(kept[0].view(torch.uint8), kept[1].view(torch.uint8))
    assert same_bits(scales[0], scales[1])


def test_the_table_decides(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(SHAPE, torch.bfloat16, triton_device)
    size = _fused_table.size_class(INNER, 48, 10)
    assert size == "K40 C48 S16"
    given = (call["a"], call["weight"], 3)
    assert not _fused_table.fused_is_faster(*given)
    by_size = {size: 1.2}
    name = _fused_table._device_name(triton_device)
    monkeypatch.setitem(_fused_table._MEASURED, name, {"bfloat16": by_size})
    assert _fused_table.fused_is_faster(*given)
    assert not _fused_table.fused_is_faster(call["a"].float(), *given[1:])
    assert not _fused_table.fused_is_faster(call["a"][:1], *given[1:])

    ran = []
    original = torch.ops.adacache_triton.linear_gated_residual_meter_out
    monkeypatch.setattr(
        torch.ops.adacache_triton,
        "linear_gated_residual_meter_out",
        lambda *arguments: ran.append(True) or original(*arguments),
    )
    linear_gated_residual_meter(**call, frames=3)
    assert ran == [True]
    linear_gated_residual_meter(**call, frames=3, fused=False)
    scale = torch.ones(SHAPE.rows, SHAPE.tokens, device=triton_device)
    float8 = call | {"residual": call["residual"].to(torch.float8_e4m3fn)}
    linear_gated_residual_meter(**float8, residual_scale=scale, frames=3)
    by_size[size] = 0.9
    linear_gated_residual_meter(**call, frames=3)
    assert ran == [True]


def test_the_table_as_shipped_holds_ratios() -> None:
    for device, by_dtype in _fused_table._MEASURED.items():
        assert isinstance(device, str)
        for dtype, by_size in by_dtype.items():
            assert isinstance(getattr(torch, dtype), torch.dtype)
            assert all(0.1 < ratio < 10 for ratio in by_size.values())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("name", "spoilt"),
    [
        ("a", torch.ones(2, 15)),
        ("weight", torch.ones(48, INNER + 1)),
        ("bias", torch.ones(47)),
        ("weight", torch.ones(48)),
    ],
    ids=["a", "weight_inner", "bias", "weight_dims"],
)
def test_bad_input_names_the_argument(
    triton_device: torch.device, fused: bool, name: str, spoilt: torch.Tensor
) -> None:
    call = make_call(SHAPE, torch.float32, triton_device) | {name: spoilt.to(triton_device)}
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        linear_gated_residual_meter(**call, frames=3, fused=fused)


def test_fused_takes_no_float8_and_one_dtype(triton_device: torch.device) -> None:
    call = make_call(SHAPE, torch.bfloat16, triton_device)
    scale = torch.ones(SHAPE.rows, SHAPE.tokens, device=triton_device)
    float8 = call | {"residual": call["residual"].to(torch.float8_e4m3fn)}
    with pytest.raises(ValueError, match=r"^residual_scale: expected None for the fused op"):
        linear_gated_residual_meter(**float8, residual_scale=scale, frames=3, fused=True)
    with pytest.raises(ValueError, match=r"^weight: expected dtype torch\.bfloat16"):
        linear_gated_residual_meter(**(call | {"weight": call["weight"].float()}), frames=3, fused=True)


def test_fused_where_triton_cannot_run() -> None:
    device = torch.device("meta" if _backend._INTERPRETED else "cpu")
    call = make_call(SHAPE, torch.float32, device)
    with pytest.raises(RuntimeError, match=r"^fused: the fused op is a Triton kernel, which cannot run here"):
        linear_gated_residual_meter(**call, frames=3, fused=True)
