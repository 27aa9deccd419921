"""gated_residual_meter: bits of x_out and residual against eager PyTorch, sums against float64, layouts,
aliasing, bad input."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from op_cases import (
    DTYPES,
    EMPTY_SHAPES,
    LAYOUTS,
    SHAPES,
    Buffer,
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
from adacache_kernels import gated_residual_meter

GATES = ["row", "frame", "token", "shared", "row_expanded"]


def run_and_check(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int = 0,
    gate_kind: str = "frame",
    layouts: tuple[str, str, str, str] = ("contiguous",) * 4,
    strides: tuple[int, ...] = (1,),
    metric: str = "l1",
    videos: list[int] | None = None,
    num_videos: int = 1,
    out: str = "fresh",
) -> None:
    """Run the op once and check everything that it gives or could have touched."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.rows, shape.tokens, shape.channels)
    x, y, residual, given_out = (
        Buffer(random_tensor(generator, *size, dtype=dtype, device=device), layout) for layout in layouts
    )
    gate = random_gate(generator, shape, gate_kind, dtype, device)
    old, x_before, y_before = residual.tensor.clone(), x.tensor.clone(), y.tensor.clone()
    new = gate_by_token(gate, shape) * y.tensor
    expected = x.tensor + new
    given_out.tensor.fill_(torch.nan)

    target = {"fresh": None, "given": given_out.tensor, "x": x.tensor}[out]
    x_out, sums = gated_residual_meter(
        x.tensor,
        y.tensor,
        gate,
        residual.tensor,
        frames=shape.frames,
        strides=strides,
        video_of_row=None if videos is None else video_ids(videos, device),
        num_videos=num_videos,
        metric=metric,
        out=target,
    )
    assert same_bits(x_out, expected)
    assert same_bits(residual.tensor, new)
    assert same_bits(y.tensor, y_before)
    if out != "x":
        assert same_bits(x.tensor, x_before)
    if target is not None:
        assert x_out is target
    exact, scale = exact_sums(new, old, shape.frames, strides, metric, videos, num_videos)
    check_sums(sums, exact, scale, shape.channels)
    for buffer in (x, y, residual, given_out):
        buffer.check_surroundings()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("metric", ["l1", "l2"])
def test_bits_and_sums(
    backend: str, device: torch.device, shape: Shape, dtype: torch.dtype, metric: str
) -> None:
    run_and_check(shape, dtype, device, metric=metric)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate_kind", GATES)
@pytest.mark.parametrize("shape", [Shape(2, 4, 9, 37), Shape(2, 3, 1, 16), Shape(2, 1, 6, 16)], ids=str)
def test_gates(backend: str, device: torch.device, dtype: torch.dtype, gate_kind: str, shape: Shape) -> None:
    strides = (1,) if shape.frames > 1 else ()
    run_and_check(shape, dtype, device, gate_kind=gate_kind, strides=strides, seed=1)


@pytest.mark.parametrize("strides", [(), (1,), (2,), (1, 2, 4), (4, 1), (1, 2, 3, 4, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("gate_kind", ["row", "token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(
    backend: str, device: torch.device, strides: tuple[int, ...], gate_kind: str, dtype: torch.dtype
) -> None:
    run_and_check(
        Shape(2, 5, 7, 24), dtype, device, strides=strides, gate_kind=gate_kind, metric="cosine", seed=2
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out", ["fresh", "given", "x"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(backend: str, device: torch.device, layout: str, out: str, dtype: torch.dtype) -> None:
    run_and_check(Shape(2, 3, 5, 40), dtype, device, layouts=(layout,) * 4, out=out, strides=(1, 2), seed=3)


@pytest.mark.parametrize("seed", range(12))
def test_random_cases(backend: str, device: torch.device, seed: int) -> None:
    pick = random.Random(seed)
    shape = Shape(pick.randint(1, 4), pick.randint(1, 6), pick.randint(1, 9), pick.randint(1, 150))
    num_videos = pick.randint(1, 3)
    case: dict[str, Any] = {
        "gate_kind": pick.choice(GATES),
        "layouts": tuple(pick.choice(LAYOUTS) for _ in range(4)),
        "strides": tuple(stride for stride in (1, 2, 3) if stride < shape.frames and pick.random() < 0.6),
        "metric": pick.choice(["l1", "l2", "cosine"]),
        "out": pick.choice(["fresh", "given", "x"]),
        "videos": [pick.randrange(num_videos) for _ in range(shape.rows)],
        "num_videos": num_videos,
    }
    dtype = pick.choice(DTYPES)
    print(f"seed {seed}: {shape} {dtype} {case}")
    run_and_check(shape, dtype, device, seed=seed, **case)


@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("out", ["fresh", "given", "x"])
def test_empty(backend: str, device: torch.device, shape: Shape, out: str) -> None:
    run_and_check(shape, torch.float32, device, out=out, gate_kind="row")


@pytest.mark.parametrize("metric", ["l1", "cosine"])
def test_videos_of_uneven_size(backend: str, device: torch.device, metric: str) -> None:
    """Video 1 has three rows, video 3 one, the others none."""
    run_and_check(Shape(4, 3, 5, 33), torch.float32, device, videos=[1, 3, 1, 1], num_videos=5, metric=metric)


def test_rows_of_a_video_need_not_be_neighbours(backend: str, device: torch.device) -> None:
    run_and_check(Shape(4, 2, 3, 16), torch.bfloat16, device, videos=[0, 1, 0, 1], num_videos=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_input_gives_same_bits(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    interpreted = backend == "triton" and device.type == "cpu"
    shape = Shape(2, 4, 7, 48) if interpreted else Shape(2, 4, 101, 384)
    size = (shape.rows, shape.tokens, shape.channels)
    x, y, old = (random_tensor(generator, *size, dtype=dtype, device=device) for _ in range(3))
    gate = random_gate(generator, shape, "frame", dtype, device)
    ids = video_ids([1, 0], device)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (threads, threads) if interpreted else (threads, threads, 1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(
                gated_residual_meter(
                    x,
                    y,
                    gate,
                    old.clone(),
                    frames=4,
                    strides=(1, 3),
                    video_of_row=ids,
                    num_videos=2,
                    metric="l2",
                )
            )
    finally:
        torch.set_num_threads(threads)
    for x_out, sums in results[1:]:
        assert same_bits(x_out, results[0][0])
        # The reference sums with torch.sum, whose order may depend on the number of threads.
        if backend != "reference":
            assert same_bits(sums, results[0][1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["y", "old"])
def test_non_finite_input_reaches_the_sums_of_its_video_alone(
    backend: str, device: torch.device, value: float, where: str
) -> None:
    generator = torch.Generator().manual_seed(6)
    x, y, old = (random_tensor(generator, 2, 12, 20, dtype=torch.float32, device=device) for _ in range(3))
    gate = torch.ones(2, 1, 20, device=device)
    (y if where == "y" else old)[1, 7, 3] = value
    _, sums = gated_residual_meter(
        x, y, gate, old, frames=3, video_of_row=video_ids([0, 1], device), num_videos=2, metric="l2"
    )
    columns = adacache_kernels.sum_columns((1,))
    assert sums[0].isfinite().all()
    touched = {"abs_diff", "sq_diff", "dot"}
    touched |= (
        {"abs_new", "sq_new", "motion_diff_1", "motion_sum_1"} if where == "y" else {"abs_old", "sq_old"}
    )
    for column, total in zip(columns, sums[1].tolist(), strict=True):
        assert torch.isfinite(torch.tensor(total)).item() == (column not in touched), column


def test_autocast_casts_to_the_dtype_of_x(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    x, old = (random_tensor(generator, 1, 6, 16, dtype=torch.float32, device=device) for _ in range(2))
    y = random_tensor(generator, 1, 6, 16, dtype=torch.bfloat16, device=device)
    gate = random_tensor(generator, 1, 1, 16, dtype=torch.float16, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        x_out, _ = gated_residual_meter(x, y, gate, old, frames=3)
    assert same_bits(x_out, x + gate.float() * y.float())
    with pytest.raises(ValueError, match="y: expected dtype"):
        gated_residual_meter(x, y, gate.float(), old, frames=3)


@pytest.mark.parametrize("name", ["x", "y", "gate", "residual", "out"])
def test_requires_grad_is_refused(backend: str, device: torch.device, name: str) -> None:
    tensors = {key: torch.randn(1, 6, 8, device=device) for key in ("x", "y", "gate", "residual", "out")}
    tensors[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: requires grad"):
        gated_residual_meter(**tensors, frames=3)
    with torch.no_grad():
        gated_residual_meter(**tensors, frames=3)


def bad_inputs() -> dict[str, tuple[str, dict[str, Any]]]:
    """What is wrong: (argument that the error must name, changes to a good call)."""
    wide = torch.randn(2, 6, 16)
    return {
        "x of two dimensions": ("x", {"x": torch.randn(6, 8)}),
        "x of float64": ("x", {"x": torch.randn(2, 6, 8).double()}),
        "x with channels apart": ("x", {"x": wide[:, :, ::2]}),
        "y of another shape": ("y", {"y": torch.randn(2, 5, 8)}),
        "y of another dtype": ("y", {"y": torch.randn(2, 6, 8).bfloat16()}),
        "y on another device": ("y", {"y": torch.randn(2, 6, 8, device="meta")}),
        "y with channels apart": ("y", {"y": wide[:, :, ::2]}),
        "gate of two dimensions": ("gate", {"gate": torch.randn(2, 8)}),
        "gate for four frames": ("gate", {"gate": torch.randn(2, 4, 8)}),
        "gate for one row": ("gate", {"gate": torch.randn(1, 3, 8)}),
        "gate of other channels": ("gate", {"gate": torch.randn(2, 3, 1)}),
        "gate of another dtype": ("gate", {"gate": torch.randn(2, 1, 8).half()}),
        "gate on another device": ("gate", {"gate": torch.randn(2, 1, 8, device="meta")}),
        "gate with channels apart": ("gate", {"gate": torch.randn(2, 8, 3).transpose(1, 2)}),
        "gate expanded to channels": ("gate", {"gate": torch.randn(2, 1, 1).expand(2, 1, 8)}),
        "residual of another shape": ("residual", {"residual": torch.randn(2, 6, 9)}),
        "residual of another dtype": ("residual", {"residual": torch.randn(2, 6, 8).half()}),
        "residual on another device": ("residual", {"residual": torch.randn(2, 6, 8, device="meta")}),
        "residual expanded": ("residual", {"residual": torch.randn(1, 6, 8).expand(2, 6, 8)}),
        "residual with channels apart": ("residual", {"residual": wide[:, :, ::2]}),
        "out of another shape": ("out", {"out": torch.randn(2, 6, 4)}),
        "out of another dtype": ("out", {"out": torch.randn(2, 6, 8).half()}),
        "out expanded": ("out", {"out": torch.randn(2, 1, 8).expand(2, 6, 8)}),
        "out on another device": ("out", {"out": torch.randn(2, 6, 8, device="meta")}),
        "no frames": ("frames", {"frames": 0}),
        "frames that do not divide N": ("frames", {"frames": 4}),
        "stride of no frame": ("strides", {"strides": (0,)}),
        "stride as long as the video": ("strides", {"strides": (1, 3)}),
        "nine strides": ("strides", {"strides": (1,) * 9}),
        "no video": ("num_videos", {"num_videos": 0}),
        "two videos without rows": ("video_of_row", {"num_videos": 2}),
        "video_of_row too short": ("video_of_row", {"video_of_row": video_ids([0])}),
        "video_of_row of int64": ("video_of_row", {"video_of_row": torch.tensor([0, 0])}),
        "video_of_row on another device": ("video_of_row", {"video_of_row": video_ids([0, 0], "meta")}),
        "video_of_row with gaps": ("video_of_row", {"video_of_row": video_ids([0, 0, 0, 0])[::2]}),
        "metric unknown": ("metric", {"metric": "l3"}),
    }


@pytest.mark.parametrize("what", bad_inputs())
def test_bad_input_names_the_argument(backend: str, device: torch.device, what: str) -> None:
    with device:  # where the factory functions make their tensors
        name, changes = bad_inputs()[what]
    good = {
        "x": torch.randn(2, 6, 8, device=device),
        "y": torch.randn(2, 6, 8, device=device),
        "gate": torch.randn(2, 3, 8, device=device),
        "residual": torch.randn(2, 6, 8, device=device),
    }
    call: dict[str, Any] = good | {"frames": 3} | changes
    residual_before = call["residual"].clone()
    with pytest.raises(ValueError, match=f"^{name}: "):
        gated_residual_meter(**call)
    if call["residual"].device.type != "meta":
        assert same_bits(call["residual"], residual_before)
    gated_residual_meter(**good, frames=3)  # still usable


@pytest.mark.parametrize("ids", [[0, 2], [-1, 0]])
def test_video_ids_out_of_range(backend: str, device: torch.device, ids: list[int]) -> None:
    x, y, residual = (torch.randn(2, 6, 8, device=device) for _ in range(3))
    gate = torch.randn(2, 1, 8, device=device)
    owner = video_ids(ids, device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"^video_of_row: .*got (2|-1)"):
            gated_residual_meter(x, y, gate, residual, frames=3, video_of_row=owner, num_videos=2)
    else:
        _, sums = gated_residual_meter(x, y, gate, residual, frames=3, video_of_row=owner, num_videos=2)
        assert sums.isnan().all()


@pytest.mark.parametrize("other", ["x", "y", "gate", "out"])
def test_written_memory_must_not_be_shared(backend: str, device: torch.device, other: str) -> None:
    tensors = {name: torch.randn(2, 6, 8, device=device) for name in ("x", "y", "gate", "residual", "out")}
    tensors[other] = tensors["residual"]
    with pytest.raises(ValueError, match=r"^(residual|out): "):
        gated_residual_meter(**tensors, frames=3)


def test_out_may_be_x_and_not_a_part_of_it(backend: str, device: torch.device) -> None:
    memory = torch.randn(1, 9, 8, device=device)
    x, out = memory[:, :6], memory[:, 1:7]
    y, gate, residual = (torch.randn(1, 6, 8, device=device) for _ in range(3))
    with pytest.raises(ValueError, match=r"^out: "):
        gated_residual_meter(x, y, gate, residual, frames=3, out=out)
    gated_residual_meter(x, y, gate, residual, frames=3, out=memory[:, :6])


def test_interleaved_halves_of_one_tensor_are_told_apart(backend: str, device: torch.device) -> None:
    """x, y, residual and out may be slices of one wide tensor, as fused projections give them."""
    generator = torch.Generator().manual_seed(8)
    wide = random_tensor(generator, 2, 6, 64, dtype=torch.float32, device=device)
    x, y, residual, out = wide.chunk(4, dim=-1)
    gate = random_tensor(generator, 2, 3, 16, dtype=torch.float32, device=device)
    new = gate.repeat_interleave(2, 1) * y
    expected = x + new
    gated_residual_meter(x, y, gate, residual, frames=3, out=out)
    assert same_bits(residual, new)
    assert same_bits(out, expected)


def test_compile_without_graph_breaks(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(9)
    x, y, old = (random_tensor(generator, 2, 12, 20, dtype=torch.float32, device=device) for _ in range(3))
    gate = random_tensor(generator, 2, 3, 20, dtype=torch.float32, device=device)
    ids = video_ids([1, 0], device)

    def block(
        x: torch.Tensor, y: torch.Tensor, residual: torch.Tensor, out: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        first, sums = gated_residual_meter(
            x, y * 2, gate, residual, frames=3, video_of_row=ids, num_videos=2, strides=(1, 2)
        )
        second, again = gated_residual_meter(first + 1, y, gate, residual, frames=3, metric="l2", out=out)
        return second, sums, again

    expected_residual, given_residual = old.clone(), old.clone()
    expected = block(x, y, expected_residual, torch.empty_like(x))
    out = torch.full_like(x, torch.nan)
    given = torch.compile(block, fullgraph=True, backend="aot_eager")(x, y, given_residual, out)
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0, equal_nan=True)
    assert same_bits(given_residual, expected_residual)
    assert same_bits(out, expected[0])


def test_opcheck(backend: str, device: torch.device, op_namespace: str) -> None:
    generator = torch.Generator().manual_seed(10)
    for layout in ("contiguous", "channel_slice", "rows_inside"):
        x, y, old, out = (
            Buffer(random_tensor(generator, 2, 12, 20, dtype=torch.float32, device=device), layout).tensor
            for _ in range(4)
        )
        gate = random_tensor(generator, 2, 3, 20, dtype=torch.float32, device=device)
        arguments = (x, y, gate, old, video_ids([1, 0], device), 2, 3, [1, 2], 1)
        ops = getattr(torch.ops, op_namespace)
        torch.library.opcheck(ops.gated_residual_meter_out.default, (*arguments, out))
        if op_namespace == "adacache":
            torch.library.opcheck(ops.gated_residual_meter.default, arguments)
