# SPDX-License-Identifier: Apache-2.0
"""Ranks that run one forward call together decide alike, and as one process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_processes import RankProcesses

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo"),
    pytest.mark.timeout(120),
]
CLOSE = {"rtol": 1e-3, "atol": 1e-5}
"""Of latents: the order of summation differs. A wrong residual differs by more than 1e-2."""


def check_decisions(outcomes: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """(one process, a rank) of each rank: the ranks decide alike bit for bit, and as one process does."""
    expected, first = outcomes[0]
    for _, found in outcomes:
        assert found["computed"] == expected["computed"]
        assert found["measurements"] == first["measurements"]
    for mine, theirs in zip(first["measurements"], expected["measurements"], strict=True):
        assert (mine["step"], mine["site"]) == (theirs["step"], theirs["site"])
        for name in ("distance", "factor"):
            numbers = zip(mine.get(name, ()), theirs.get(name, ()), strict=True)
            for found, one_process in [pair for pair in numbers if pair[1] is not None]:
                assert found == pytest.approx(one_process, rel=1e-3)


def check_not_trivial(computed: list[list[bool]]) -> None:
    steps = [any(step) for step in computed]
    assert 2 <= sum(steps) < len(steps)


@pytest.mark.parametrize(
    ("name", "how", "frames", "motion"),
    [
        ("wan", {"ulysses_degree": 2}, 4, False),
        ("wan", {"ring_degree": 2}, 3, True),
        ("chronoedit", {"ulysses_degree": 2}, 4, True),
        ("ltx", {"ulysses_degree": 2}, 4, False),
        ("ltx", {"ulysses_degree": 2, "ulysses_anything": True}, 3, True),
        ("stdit3", {"split": "frames"}, 4, False),
        ("stdit3", {"split": "frames"}, 4, True),
        ("stdit3", {"split": "positions"}, 4, True),
    ],
)
def test_a_split_model_decides_as_one_process(
    two_ranks: RankProcesses, name: str, how: dict[str, Any], frames: int, motion: bool
) -> None:
    outcomes = two_ranks.run("split_model", name=name, motion=motion, videos=2, frames=frames, how=how)
    check_decisions([(one["expected"], one["found"]) for one in outcomes])
    for one in outcomes:
        expected, found = one["expected"], one["found"]
        check_not_trivial(expected["computed"])
        torch.testing.assert_close(found["latents"], expected["latents"], **CLOSE)
        assert torch.equal(one["after"], one["before"])
        assert found["bytes"] * 2 == expected["bytes"]
    computed = sum(any(step) for step in outcomes[1]["found"]["computed"])
    traffic = outcomes[1]["found"]["traffic"]
    assert traffic["reductions"] == computed
    borders = computed if motion and how.get("split") != "positions" else 0
    assert traffic.get("borders", 0) == borders


@pytest.mark.parametrize(("split", "frames"), [("frames", 7), ("positions", 5)])
def test_four_ranks_with_different_parts(four_ranks: RankProcesses, split: str, frames: int) -> None:
    outcomes = four_ranks.run(
        "split_model", name="stdit3", motion=True, videos=1, frames=frames, how={"split": split}
    )
    check_decisions([(one["expected"], one["found"]) for one in outcomes])
    for one in outcomes:
        torch.testing.assert_close(one["found"]["latents"], one["expected"]["latents"], **CLOSE)


@pytest.mark.parametrize(
    ("name", "names", "how"),
    [
        ("stdit3", ["sublayer", "block"], {"split": "frames"}),
        (
            "wan",
            [
                "float8",
                "block",
                "DBCache",
                "DiCache",
                "FirstBlock",
                "BWCache",
                "TeaCache",
                "TaylorSeer",
                "EasyCache",
            ],
            {"ulysses_degree": 2},
        ),
    ],
)
def test_every_method_decides_as_one_process(
    two_ranks: RankProcesses, name: str, names: list[str], how: dict[str, Any]
) -> None:
    outcomes = two_ranks.run("methods", name=name, names=names, how=how)
    for method in names:
        check_decisions([one[method] for one in outcomes])
        for one in outcomes:
            expected, found = one[method]
            check_not_trivial(expected["computed"])
            tolerance = {"rtol": 0.05, "atol": 0.05} if method == "float8" else CLOSE
            torch.testing.assert_close(found["latents"], expected["latents"], **tolerance)


SIZES = [
    ("tokens", 4, 6, (1,)),  # ranks begin with frames
    ("tokens", 3, 6, (1, 2)),  # a frame is on two ranks
    ("tokens", 5, 3, (1, 3)),  # ranks have different numbers of tokens
    ("tokens", 7, 4, (6,)),  # the partners are on a rank farther away
    ("tokens", 2, 8, (1, 5)),  # a stride does not fit
    ("frames", 4, 3, (1, 3)),
    ("frames", 5, 3, (1, 3)),  # ranks have different numbers of frames
    ("positions", 3, 8, (1, 2)),
    ("positions", 3, 9, (1, 2)),
]


def check_sums(outcomes: list[dict[str, Any]]) -> None:
    for one in outcomes:
        expected, found = one["expected"], one["found"]
        assert torch.equal(found.values, outcomes[0]["found"].values)
        assert (found.strides, found.frames, found.elements, found.rows) == (
            expected.strides,
            expected.frames,
            expected.elements,
            expected.rows,
        )
        assert len(expected.strides) > 0
        assert not expected.values.isnan().any()
        torch.testing.assert_close(found.values, expected.values, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("split", "frames", "width", "strides"), SIZES)
def test_sums_are_those_of_one_process(
    two_ranks: RankProcesses, split: str, frames: int, width: int, strides: tuple[int, ...]
) -> None:
    check_sums(two_ranks.run("sums_of_ranks", split=split, frames=frames, width=width, strides=strides))


@pytest.mark.parametrize(("split", "frames", "width", "strides"), SIZES)
def test_sums_of_four_ranks(
    four_ranks: RankProcesses, split: str, frames: int, width: int, strides: tuple[int, ...]
) -> None:
    check_sums(four_ranks.run("sums_of_ranks", split=split, frames=frames, width=width, strides=strides))


def test_messages_and_bytes(two_ranks: RankProcesses) -> None:
    """Per decision one reduction of less than 100 bytes per video; frames next to another rank's once per
    computed step."""
    (first, second) = two_ranks.run("sums_of_ranks", split="frames", frames=4, width=5, strides=(1,))
    columns, videos, float64, float32 = len(first["names"]), 2, 8, 4
    assert columns * float64 < 100
    measured = {"reductions": 3, "reduced bytes": 3 * videos * columns * float64, "agreements": 1}
    assert first["traffic"] == {**measured, "borders": 0, "border bytes": 0}
    frame = videos * 5 * 3 * float32
    assert second["traffic"] == {**measured, "borders": 3, "border bytes": 3 * frame}
    (first, second) = two_ranks.run("sums_of_ranks", split="positions", frames=4, width=6, strides=(1,))
    assert first["traffic"] == second["traffic"] == measured


def test_rows_on_other_ranks_decide_as_one_batch(two_ranks: RankProcesses) -> None:
    outcomes = two_ranks.run("other_rows")
    check_decisions([(one["expected"], one["found"]) for one in outcomes])
    for one in outcomes:
        check_not_trivial(one["expected"]["computed"])
        torch.testing.assert_close(one["found"]["latents"], one["row"], **CLOSE)


@pytest.mark.parametrize("step", [1, 4])
def test_values_that_are_not_finite_on_one_rank(two_ranks: RankProcesses, step: int) -> None:
    """All ranks mark them, and compute the next step."""
    outcomes = two_ranks.run("other_rows", nan_at=step)
    first, second = (one["found"] for one in outcomes)
    assert first["computed"] == second["computed"]
    assert first["measurements"] == second["measurements"]
    marked = [one["step"] for one in first["measurements"] if one["nonfinite"] == [True]]
    computed = [number for number, videos in enumerate(first["computed"], 1) if any(videos)]
    spoiled = computed[step - 1]
    assert max(spoiled, 2) in marked
    assert spoiled + 1 in computed
    assert first["latents"].isfinite().all()
    assert not second["latents"].isfinite().all()


def test_guidance_branches_of_a_split_model(four_ranks: RankProcesses) -> None:
    outcomes = four_ranks.run("mesh_of_tokens_and_rows")
    check_decisions([(one["expected"], one["found"]) for one in outcomes])
    for one in outcomes:
        check_not_trivial(one["expected"]["computed"])
        torch.testing.assert_close(one["found"]["latents"], one["row"], **CLOSE)


@pytest.mark.parametrize("split", ["rows", "tokens"])
def test_weights_that_are_split_over_ranks(two_ranks: RankProcesses, split: str) -> None:
    outcomes = two_ranks.run("sharded_weights", split=split)
    check_decisions([(one["expected"], one["found"]) for one in outcomes])
    for one in outcomes:
        if split == "rows":
            assert "its weights are split over 2 ranks" in one["refused"]
        torch.testing.assert_close(one["found"]["latents"], one["row"], **CLOSE)


def test_a_pipeline_with_guidance_in_two_calls(two_ranks: RankProcesses) -> None:
    for one in two_ranks.run("pipeline"):
        check_not_trivial(one["expected"]["computed"])
        assert one["found"]["computed"] == one["expected"]["computed"]
        torch.testing.assert_close(one["found"]["latents"], one["expected"]["latents"], **CLOSE)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("gathers", "gathers tokens after the block blocks.3"),
        ("attention", "no attention processor of it supports context parallelism"),
        ("places", "finds its new tokens by their place"),
        ("another group", "expected the group that the model states (2 ranks, split 'tokens')"),
        ("kept", "MagRatios reads kept tensors"),
        ("filter", "SeaCache filters the latents"),
        ("type", "parallel: expected adacache.Parallel(group, split)"),
        ("two splits", "expected at most one split of the tokens"),
        ("split", "split: expected one of"),
        ("group", "group: expected a ProcessGroup"),
        ("memory", "not predicted where ranks split the tokens"),
        ("frames", "got 1 frames of 8"),
    ],
)
def test_what_cannot_work_is_refused(two_ranks: RankProcesses, case: str, expected: str) -> None:
    for found in two_ranks.run("refusals"):
        assert expected in found[case]


@pytest.mark.parametrize(
    ("differ", "expected"),
    [("batch", "decisions on all ranks, got [1, 2]"), ("settings", "settings"), ("steps", "num_steps")],
)
def test_ranks_with_different_calls(two_ranks: RankProcesses, differ: str, expected: str) -> None:
    for found in two_ranks.run("different_calls", differ=differ):
        assert f"parallel: expected the same {expected}" in found


def test_an_engine_refuses_split_models(two_ranks: RankProcesses) -> None:
    assert (
        two_ranks.run("engine") == ["model: it is split over processes, which an engine does not support"] * 2
    )


def test_models_that_are_split_later(two_ranks: RankProcesses) -> None:
    for found in two_ranks.run("split_later"):
        context, weights, again, sequence = found
        assert "changed after AdaCache was enabled" in context
        assert "its weights are split over 2 ranks" in weights
        assert "its weights are split over 2 ranks" in again
        assert "changed after AdaCache was enabled" in sequence


def test_ranks_with_all_tokens(two_ranks: RankProcesses) -> None:
    outcomes = two_ranks.run("same_tokens")
    check_decisions([(one["expected"], one["found"]) for one in outcomes])
    check_not_trivial(outcomes[0]["expected"]["computed"])


@pytest.mark.parametrize(("split", "dimension"), [("frames", 2), ("positions", 3)])
def test_latents_that_are_split_outside(two_ranks: RankProcesses, split: str, dimension: int) -> None:
    outcomes = two_ranks.run("split_outside", split=split, dimension=dimension)
    check_decisions([(one["expected"], one["found"]) for one in outcomes])
    for one in outcomes:
        check_not_trivial(one["expected"]["computed"])
        torch.testing.assert_close(one["found"]["latents"], one["own"], **CLOSE)


def test_a_warm_up_is_dropped_on_all_ranks(two_ranks: RankProcesses) -> None:
    outcomes = two_ranks.run("warm_up")
    check_decisions([(one["expected"], one["found"]) for one in outcomes])
    for one in outcomes:
        torch.testing.assert_close(one["found"]["latents"], one["expected"]["latents"], **CLOSE)


@pytest.mark.parametrize("case", ["ends_at", "stops_deciding"])
def test_a_rank_that_ends_ends_the_others(case: str) -> None:
    with RankProcesses(2) as ranks:
        (first, second) = ranks.outcomes(case, step=5)
    assert second == ("ended", None)
    kind, text = first
    assert kind == "error"
    if case == "stops_deciding":
        assert "parallel: a rank of the group has stopped" in text


def test_without_a_process_group() -> None:
    import adacache

    with pytest.raises(ValueError, match=r"torch\.distributed is not initialized"):
        adacache.Parallel(None)
