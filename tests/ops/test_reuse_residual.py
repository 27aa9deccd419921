"""reuse_residual: bits against eager PyTorch for every pair of dtypes, which rows reuse, layouts, bad
input."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from op_cases import DTYPES, EMPTY_SHAPES, LAYOUTS, SHAPES, Buffer, Shape, random_tensor, same_bits, video_ids

from adacache_kernels import reuse_residual


def run_and_check(
    shape: Shape,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int = 0,
    layouts: tuple[str, str, str] = ("contiguous",) * 3,
    videos: list[int] | None = None,
    reuse: list[bool] | None = None,
    out: str = "fresh",
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = (shape.rows, shape.tokens, shape.channels)
    x = Buffer(random_tensor(generator, *size, dtype=dtype, device=device), layouts[0])
    residual = Buffer(random_tensor(generator, *size, dtype=residual_dtype, device=device), layouts[1])
    given_out = Buffer(torch.full(size, torch.nan, dtype=dtype, device=device), layouts[2])
    if x.tensor.numel():
        x.tensor[0, 0, 0] = -0.0  # kept by rows that do not reuse
    before, cached = x.tensor.clone(), residual.tensor.clone()

    total = (before + cached).to(dtype)
    if reuse is not None:
        owner = videos if videos is not None else (range(shape.rows) if len(reuse) > 1 else [0] * shape.rows)
        row_reuses = torch.tensor([reuse[video] for video in owner], dtype=torch.bool, device=device)
        total = torch.where(row_reuses[:, None, None], total, before)

    target = {"fresh": None, "given": given_out.tensor, "x": x.tensor}[out]
    x_out = reuse_residual(
        x.tensor,
        residual.tensor,
        video_of_row=None if videos is None else video_ids(videos, device),
        reuse=None if reuse is None else torch.tensor(reuse, device=device),
        out=target,
    )
    assert same_bits(x_out, total)
    assert same_bits(residual.tensor, cached)
    if target is not None:
        assert x_out is target
    if out != "x":
        assert same_bits(x.tensor, before)
    for buffer in (x, residual, given_out):
        buffer.check_surroundings()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + EMPTY_SHAPES, ids=str)
def test_bits(
    backend: str, device: torch.device, shape: Shape, dtype: torch.dtype, residual_dtype: torch.dtype
) -> None:
    run_and_check(shape, dtype, residual_dtype, device)


@pytest.mark.parametrize("out", ["fresh", "given", "x"])
@pytest.mark.parametrize(
    ("videos", "reuse"),
    [
        (None, [True]),
        (None, [False]),
        (None, [True, False, True, False]),
        ([0, 1, 0, 1], [False, True]),
        ([2, 0, 2, 2], [True, True, False]),
        ([1, 1, 0, 0], None),
    ],
    ids=str,
)
def test_which_rows_reuse(
    backend: str, device: torch.device, videos: list[int] | None, reuse: list[bool] | None, out: str
) -> None:
    for dtype, residual_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        run_and_check(
            Shape(4, 2, 5, 33), dtype, residual_dtype, device, videos=videos, reuse=reuse, out=out, seed=1
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out", ["fresh", "given", "x"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(backend: str, device: torch.device, layout: str, out: str, dtype: torch.dtype) -> None:
    run_and_check(
        Shape(2, 3, 5, 40), dtype, dtype, device, layouts=(layout,) * 3, out=out, reuse=[True, False]
    )


@pytest.mark.parametrize("seed", range(8))
def test_random_cases(backend: str, device: torch.device, seed: int) -> None:
    pick = random.Random(200 + seed)
    shape = Shape(pick.randint(1, 4), pick.randint(1, 3), pick.randint(1, 30), pick.randint(1, 300))
    num_videos = pick.randint(1, 3)
    case: dict[str, Any] = {
        "layouts": tuple(pick.choice(LAYOUTS) for _ in range(3)),
        "videos": [pick.randrange(num_videos) for _ in range(shape.rows)],
        "reuse": [pick.random() < 0.5 for _ in range(num_videos)],
        "out": pick.choice(["fresh", "given", "x"]),
    }
    print(f"seed {seed}: {shape} {case}")
    run_and_check(shape, pick.choice(DTYPES), pick.choice(DTYPES), device, seed=seed, **case)


def test_not_a_number_stays_where_it_is(backend: str, device: torch.device) -> None:
    """A residual that is not finite does not touch the rows that do not reuse it."""
    x = torch.randn(2, 3, 8, device=device)
    residual = torch.full_like(x, torch.nan)
    x_out = reuse_residual(x, residual, reuse=torch.tensor([False, True], device=device))
    assert same_bits(x_out[0], x[0])
    assert x_out[1].isnan().all()


@pytest.mark.parametrize("name", ["x", "residual", "out"])
def test_requires_grad_is_refused(backend: str, device: torch.device, name: str) -> None:
    tensors = {key: torch.randn(1, 6, 8, device=device) for key in ("x", "residual", "out")}
    tensors[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: requires grad"):
        reuse_residual(**tensors)


def bad_inputs() -> dict[str, tuple[str, dict[str, Any]]]:
    wide = torch.randn(2, 6, 16)
    yes = torch.tensor([True, True])
    return {
        "x of two dimensions": ("x", {"x": torch.randn(6, 8)}),
        "x of float64": ("x", {"x": torch.randn(2, 6, 8).double()}),
        "x with channels apart": ("x", {"x": wide[:, :, ::2]}),
        "residual of another shape": ("residual", {"residual": torch.randn(2, 5, 8)}),
        "residual of float64": ("residual", {"residual": torch.randn(2, 6, 8).double()}),
        "residual on another device": ("residual", {"residual": torch.randn(2, 6, 8, device="meta")}),
        "residual with channels apart": ("residual", {"residual": wide[:, :, ::2]}),
        "out of another dtype": ("out", {"out": torch.randn(2, 6, 8).half()}),
        "out expanded": ("out", {"out": torch.randn(1, 6, 8).expand(2, 6, 8)}),
        "reuse of float": ("reuse", {"reuse": torch.ones(2)}),
        "reuse of two dimensions": ("reuse", {"reuse": yes[None]}),
        "reuse for three videos": ("reuse", {"reuse": torch.tensor([True, True, False])}),
        "reuse on another device": ("reuse", {"reuse": yes.to("meta")}),
        "reuse with gaps": ("reuse", {"reuse": torch.tensor([True] * 4)[::2]}),
        "video_of_row too long": (
            "video_of_row",
            {"video_of_row": video_ids([0, 1, 1]), "reuse": yes},
        ),
        "video_of_row of int64": ("video_of_row", {"video_of_row": torch.tensor([0, 1]), "reuse": yes}),
    }


@pytest.mark.parametrize("what", bad_inputs())
def test_bad_input_names_the_argument(backend: str, device: torch.device, what: str) -> None:
    with device:  # where the factory functions make their tensors
        name, changes = bad_inputs()[what]
        good: dict[str, Any] = {"x": torch.randn(2, 6, 8), "residual": torch.randn(2, 6, 8)}
    call = good | changes
    with pytest.raises(ValueError, match=f"^{name}: "):
        reuse_residual(**call)


def test_video_ids_out_of_range(backend: str, device: torch.device) -> None:
    x, residual = torch.randn(2, 6, 8, device=device), torch.randn(2, 6, 8, device=device)
    call: dict[str, Any] = {
        "video_of_row": video_ids([0, 2], device),
        "reuse": torch.tensor([True, True], device=device),
    }
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"^video_of_row: .*got 2"):
            reuse_residual(x, residual, **call)
    else:
        x_out = reuse_residual(x, residual, **call)
        assert same_bits(x_out[0], (x + residual)[0])
        assert x_out[1].isnan().all()


def test_out_must_not_share_memory(backend: str, device: torch.device) -> None:
    memory = torch.randn(1, 9, 8, device=device)
    residual = torch.randn(1, 6, 8, device=device)
    with pytest.raises(ValueError, match=r"^out: "):
        reuse_residual(memory[:, :6], residual, out=memory[:, 1:7])
    with pytest.raises(ValueError, match=r"^out: "):
        reuse_residual(memory[:, :6], residual, out=residual)


def test_compile_without_graph_breaks(backend: str, device: torch.device) -> None:
    x, residual = torch.randn(2, 6, 20, device=device), torch.randn(2, 6, 20, device=device)
    reuse = torch.tensor([True, False], device=device)

    def step(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        first = reuse_residual(x * 2, residual, reuse=reuse)
        return reuse_residual(first, residual, out=out)

    out = torch.full_like(x, torch.nan)
    given = torch.compile(step, fullgraph=True, backend="aot_eager")(x, out)
    assert same_bits(given, step(x, torch.empty_like(x)))
    assert same_bits(out, given)


def test_opcheck(backend: str, device: torch.device, op_namespace: str) -> None:
    ops = getattr(torch.ops, op_namespace)
    for layout in ("contiguous", "channel_slice", "rows_inside"):
        x, residual, out = (Buffer(torch.randn(2, 6, 20, device=device), layout).tensor for _ in range(3))
        arguments = (x, residual, video_ids([1, 0], device), torch.tensor([True, False], device=device))
        torch.library.opcheck(ops.reuse_residual_out.default, (*arguments, out))
        if op_namespace == "adacache":
            torch.library.opcheck(ops.reuse_residual.default, arguments)
