"""residual_meter: sums against float64, layouts, several videos, bad input; and the same bits as the fused
op."""

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
    random_tensor,
    same_bits,
    video_ids,
)

from adacache_kernels import gated_residual_meter, residual_meter


def run_and_check(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int = 0,
    layouts: tuple[str, str] = ("contiguous", "contiguous"),
    strides: tuple[int, ...] = (1,),
    metric: str = "l1",
    videos: list[int] | None = None,
    num_videos: int = 1,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = (shape.rows, shape.tokens, shape.channels)
    new, old = (
        Buffer(random_tensor(generator, *size, dtype=dtype, device=device), layout).tensor
        for layout in layouts
    )
    before = new.clone(), old.clone()
    sums = residual_meter(
        new,
        old,
        frames=shape.frames,
        strides=strides,
        video_of_row=None if videos is None else video_ids(videos, device),
        num_videos=num_videos,
        metric=metric,
    )
    exact, scale = exact_sums(new, old, shape.frames, strides, metric, videos, num_videos)
    check_sums(sums, exact, scale, shape.channels)
    assert same_bits(new, before[0])
    assert same_bits(old, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=str)
@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_sums(backend: str, device: torch.device, shape: Shape, dtype: torch.dtype, metric: str) -> None:
    run_and_check(shape, dtype, device, metric=metric)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", [(), (2, 1), (1, 2, 3, 4, 1, 2, 3, 4)], ids=str)
def test_layouts_and_strides(
    backend: str, device: torch.device, layout: str, strides: tuple[int, ...]
) -> None:
    shape = Shape(2, 5, 6, 40)
    run_and_check(shape, torch.float32, device, layouts=(layout, "contiguous"), strides=strides, seed=1)
    run_and_check(shape, torch.bfloat16, device, layouts=("contiguous", layout), strides=strides, seed=2)


@pytest.mark.parametrize("seed", range(8))
def test_random_cases(backend: str, device: torch.device, seed: int) -> None:
    pick = random.Random(100 + seed)
    shape = Shape(pick.randint(1, 4), pick.randint(1, 6), pick.randint(1, 9), pick.randint(1, 150))
    num_videos = pick.randint(1, 3)
    case: dict[str, Any] = {
        "layouts": (pick.choice(LAYOUTS), pick.choice(LAYOUTS)),
        "strides": tuple(stride for stride in (1, 2, 3) if stride < shape.frames and pick.random() < 0.6),
        "metric": pick.choice(["l1", "l2", "cosine"]),
        "videos": [pick.randrange(num_videos) for _ in range(shape.rows)],
        "num_videos": num_videos,
    }
    print(f"seed {seed}: {shape} {case}")
    run_and_check(shape, pick.choice(DTYPES), device, seed=seed, **case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_fused_op(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Both measure the rounded residual, so they see the same numbers."""
    generator = torch.Generator().manual_seed(3)
    x, y, old = (random_tensor(generator, 2, 12, 40, dtype=dtype, device=device) for _ in range(3))
    gate = random_tensor(generator, 2, 3, 40, dtype=dtype, device=device)
    residual = old.clone()
    options: dict[str, Any] = {"frames": 3, "strides": (1, 2), "metric": "l2"}
    _, fused = gated_residual_meter(x, y, gate, residual, **options)
    alone = residual_meter(residual, old, **options)
    torch.testing.assert_close(alone, fused, rtol=1e-6, atol=1e-5)


def test_same_input_gives_same_bits(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(4)
    interpreted = backend == "triton" and device.type == "cpu"
    places, channels = (5, 24) if interpreted else (101, 384)
    new, old = (
        random_tensor(generator, 2, 4 * places, channels, dtype=torch.float32, device=device)
        for _ in range(2)
    )
    threads = torch.get_num_threads()
    results = []
    try:
        # The reference sums with torch.sum, whose order may depend on the number of threads.
        for count in (threads, threads) if backend == "reference" else (threads, threads, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(residual_meter(new, old, frames=4, strides=(1, 2), metric="cosine"))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(sums, results[0]) for sums in results)


def test_non_finite_input(backend: str, device: torch.device) -> None:
    new, old = (torch.randn(2, 6, 8, device=device) for _ in range(2))
    new[0, 0, 0] = torch.nan
    sums = residual_meter(new, old, frames=3, video_of_row=video_ids([0, 1], device), num_videos=2)
    assert sums[0, [0, 2, 7, 8]].isnan().all()
    assert sums[1, [0, 1, 2, 7, 8]].isfinite().all()


@pytest.mark.parametrize("name", ["residual", "old"])
def test_requires_grad_is_refused(backend: str, device: torch.device, name: str) -> None:
    tensors = {key: torch.randn(1, 6, 8, device=device) for key in ("residual", "old")}
    tensors[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: requires grad"):
        residual_meter(**tensors, frames=3)


def bad_inputs() -> dict[str, tuple[str, dict[str, Any]]]:
    wide = torch.randn(2, 6, 16)
    return {
        "residual of two dimensions": ("residual", {"residual": torch.randn(6, 8)}),
        "residual of int32": ("residual", {"residual": torch.ones(2, 6, 8, dtype=torch.int32)}),
        "residual with channels apart": ("residual", {"residual": wide[:, :, ::2]}),
        "old of another shape": ("old", {"old": torch.randn(2, 6, 7)}),
        "old of another dtype": ("old", {"old": torch.randn(2, 6, 8).half()}),
        "old on another device": ("old", {"old": torch.randn(2, 6, 8, device="meta")}),
        "old with channels apart": ("old", {"old": wide[:, :, ::2]}),
        "frames that do not divide N": ("frames", {"frames": 5}),
        "stride as long as the video": ("strides", {"strides": (3,)}),
        "two videos without rows": ("video_of_row", {"num_videos": 2}),
        "video_of_row of float": ("video_of_row", {"video_of_row": torch.zeros(2)}),
        "metric unknown": ("metric", {"metric": 0}),
    }


@pytest.mark.parametrize("what", bad_inputs())
def test_bad_input_names_the_argument(backend: str, device: torch.device, what: str) -> None:
    with device:  # where the factory functions make their tensors
        name, changes = bad_inputs()[what]
        good = {"residual": torch.randn(2, 6, 8), "old": torch.randn(2, 6, 8), "frames": 3}
    call = good | changes
    with pytest.raises(ValueError, match=f"^{name}: "):
        residual_meter(**call)


def test_compile_without_graph_breaks(backend: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(5)
    new, old = (random_tensor(generator, 2, 12, 20, dtype=torch.float32, device=device) for _ in range(2))

    def meter(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return residual_meter(new, old, frames=3, strides=(1, 2), metric="l2") * 2

    given = torch.compile(meter, fullgraph=True, backend="aot_eager")(new, old)
    torch.testing.assert_close(given, meter(new, old), rtol=1e-12, atol=0)


def test_opcheck(backend: str, device: torch.device, op_namespace: str) -> None:
    new, old = torch.randn(2, 12, 20, device=device), torch.randn(2, 12, 20, device=device)
    op = getattr(torch.ops, op_namespace).residual_meter.default
    torch.library.opcheck(op, (new, old, video_ids([1, 0], device), 2, 3, [1, 2], 1))
    torch.library.opcheck(op, (new, old, None, 1, 3, [], 2))
