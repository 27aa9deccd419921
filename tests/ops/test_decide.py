# SPDX-License-Identifier: Apache-2.0
"""decide: every backend and `simulate.decide` against the rule in plain Python, over random sequences of
steps."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

import adacache_kernels
from adacache_kernels import decide, initial_state, simulate, state_columns, sum_columns

NAN = math.nan


def plain_decide(
    sums: list[float], state: dict[str, float], step: int, site: int, policy: dict[str, Any]
) -> None:
    """The rule for one video in plain Python."""
    total = dict(zip(sum_columns(policy["strides"]), sums, strict=True))
    num_steps, published = policy["num_steps"], policy["rule"] == "published"
    forced = step == 1 or step == num_steps - 1 or step == num_steps
    if not (forced or state["next_step"] == step or state["last_step"] == step):
        return
    if state["last_step"] != step:
        state["prev_rate"] = state["rate"] if published else step - state["last_step"]
        state["count"] = state["mean"] = state["nonfinite"] = 0
        state["last_step"] = step
    if step == 1:
        state["rate"], state["next_step"] = 1, 2
        return

    def divide(a: float, b: float) -> float:
        if b == 0:
            return NAN if a == 0 or math.isnan(a) else math.copysign(math.inf, a)
        return a / b

    def root(a: float) -> float:
        return math.sqrt(a) if a >= 0 else NAN

    if policy["metric"] == "l1":
        distance = divide(total["abs_diff"], total["abs_old"] if published else policy["elements"])
    elif policy["metric"] == "l2":
        distance = root(divide(total["sq_diff"], total["sq_old"] if published else policy["elements"]))
    else:
        distance = 1 - divide(total["dot"], root(total["sq_old"] * total["sq_new"]))
    motions = []
    for stride in policy["strides"]:
        if published:
            motions.append(divide(total[f"motion_diff_{stride}"], total[f"motion_sum_{stride}"]))
        else:
            pairs = policy["elements"] * (policy["frames"] - stride) / policy["frames"]
            motions.append(total[f"motion_diff_{stride}"] / pairs)
    motion = sum(motions) / len(motions) if motions else NAN

    gap = state["prev_rate"]
    mean = (distance / gap + state["count"] * state["mean"]) / (state["count"] + 1)
    first, last = policy["window"]
    regularised, inside = policy["scale"] > 0, first <= step <= last
    previous = state[f"previous_factor_{site}"]
    factor, now_previous = 1.0, previous
    if regularised and published:
        now_previous = (motion / policy["scale"]) ** policy["power"] / policy["divisor"] if inside else 1.0
        factor = now_previous + abs(policy["gradient_weight"] * (now_previous - previous) / gap)
    elif regularised and inside:
        gradient = 0.0 if math.isnan(previous) else policy["gradient_weight"] * (motion - previous) / gap
        factor, now_previous = (motion + gradient) / policy["scale"], motion
    score = mean * factor

    state["distance"], state["motion"] = distance, motion
    state["count"] += 1
    motion_counts = regularised and inside
    if math.isfinite(score) and math.isfinite(distance) and (math.isfinite(motion) or not motion_counts):
        state["mean"], state["factor"], state[f"previous_factor_{site}"] = mean, factor, now_previous
        state["rate"] = policy["codebook"][-1][1]
        for threshold, rate in policy["codebook"]:
            if score < threshold:
                state["rate"] = rate
                break
    else:
        state["mean"], state["factor"], state["nonfinite"], state["rate"] = NAN, 1.0, 1, 1
    state["next_step"] = step + state["rate"]


def random_policy(pick: random.Random, rule: str, metric: str) -> dict[str, Any]:
    frames = pick.choice([2, 5, 15])
    num_steps = pick.choice([4, 30, 100])
    entries = pick.choice([1, 2, 6])
    thresholds = sorted(pick.uniform(0.01, 1.0) for _ in range(entries))
    first = pick.randint(1, num_steps)
    return {
        "rule": rule,
        "metric": metric,
        "num_steps": num_steps,
        "codebook": [(threshold, float(pick.randint(1, 6))) for threshold in thresholds],
        "strides": tuple(stride for stride in (1, 2, 4) if stride < frames and pick.random() < 0.7),
        "frames": frames,
        "elements": float(frames * pick.choice([7.0, 24.0])),
        "window": (first, pick.randint(first, num_steps)),
        "scale": pick.choice([0.0, 0.385, 1.0]),
        "power": pick.choice([1.0, 2.0, 8.0, 0.5]),
        "divisor": pick.choice([1.0, 0.7]),
        "gradient_weight": pick.choice([0.0, 10.0]),
    }


def random_sums(pick: random.Random, policy: dict[str, Any]) -> list[float]:
    """Plausible sums: distances up to 2, motion up to 1; occasionally a non-finite value."""
    old, new = pick.uniform(1, 100), pick.uniform(1, 100)
    row = [pick.uniform(0, 1) * old, old, new, pick.uniform(0, 1) * old, old, new]
    row.append(pick.uniform(-1, 1) * math.sqrt(old * new))
    for _ in policy["strides"]:
        magnitude = pick.uniform(1, 100)
        row += [pick.uniform(0.2, 0.6) * magnitude, magnitude]
    if pick.random() < 0.05:
        row[pick.randrange(len(row))] = pick.choice([NAN, math.inf, 0.0])
    return row


def options(policy: dict[str, Any]) -> dict[str, Any]:
    names = (
        "num_steps",
        "frames",
        "strides",
        "metric",
        "rule",
        "elements",
        "window",
        "scale",
        "power",
        "divisor",
        "gradient_weight",
    )
    return {name: policy[name] for name in names}


def assert_states_agree(given: torch.Tensor, expected: list[dict[str, float]], sites: int, step: int) -> None:
    columns = state_columns(sites)
    for video, state in enumerate(expected):
        for column, value in zip(columns, given[video].tolist(), strict=True):
            agree = math.isclose(value, state[column], rel_tol=1e-12, abs_tol=1e-13)
            agree = agree or (math.isnan(value) and math.isnan(state[column]))
            assert agree, f"step {step}, video {video}, {column}: got {value}, expected {state[column]}"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
@pytest.mark.parametrize("rule", ["published", "paper"])
def test_random_requests(backend: str, device: torch.device, rule: str, metric: str, seed: int) -> None:
    interpreted = backend == "triton" and device.type == "cpu"
    judge_request(random.Random(f"{rule}{metric}{seed}"), rule, metric, device, 10 if interpreted else 100)


def judge_request(pick: random.Random, rule: str, metric: str, device: torch.device, longest: int) -> None:
    """A request with several videos, sites and skipped steps, on the backend and in plain Python."""
    policy = random_policy(pick, rule, metric)
    videos, sites = pick.choice([1, 2, 5]), pick.choice([1, 2])
    print(f"{videos} videos, {sites} sites, {policy}")
    thresholds, rates = (
        torch.tensor(column, dtype=torch.float64, device=device)
        for column in zip(*policy["codebook"], strict=True)
    )
    state = initial_state(videos, sites, rule=rule, device=device)
    expected = [dict(zip(state_columns(sites), row, strict=True)) for row in state.tolist()]
    for step in range(1, min(policy["num_steps"], longest) + 1):
        for site in range(sites):
            rows = [random_sums(pick, policy) for _ in range(videos)]
            sums = torch.tensor(rows, dtype=torch.float64, device=device)
            decide(sums, state, step=step, thresholds=thresholds, rates=rates, site=site, **options(policy))
            for row, video in zip(rows, expected, strict=True):
                plain_decide(row, video, step, site, policy)
            assert_states_agree(state, expected, sites, step)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("metric", ["l1", "l2"])
@pytest.mark.parametrize("rule", ["published", "paper"])
def test_videos_at_other_steps(backend: str, device: torch.device, rule: str, metric: str, seed: int) -> None:
    assert judge_videos(random.Random(f"videos {rule}{metric}{seed}"), rule, metric, device, 8) > 0


def judge_videos(pick: random.Random, rule: str, metric: str, device: torch.device, calls: int) -> int:
    """Requests with their own steps, schedules and codebooks in one call, against a call per video: equal
    bits. What all videos share is given once. Returns the number of decisions."""
    first = random_policy(pick, rule, metric)
    policies = [first]
    for _ in range(pick.choice([0, 1, 4])):
        own = random_policy(pick, rule, metric)
        policies.append(first | {name: own[name] for name in ("num_steps", "codebook", "window")})
    if pick.random() < 0.3:  # one codebook for all
        policies = [policy | {"codebook": first["codebook"]} for policy in policies]
    print(policies)
    videos = len(policies)
    steps = [pick.choice([1, max(1, policy["num_steps"] - 4)]) for policy in policies]
    decided = 0
    together = initial_state(videos, 2, rule=rule, device=device)
    apart = [together[video : video + 1].clone() for video in range(videos)]
    for _ in range(calls):
        site = pick.randrange(2)
        rows = [random_sums(pick, policy) for policy in policies]
        sums = torch.tensor(rows, dtype=torch.float64, device=device)
        for video, policy in enumerate(policies):
            given = options(policy) | codebooks([policy], device) | {"step": steps[video], "site": site}
            decide(sums[video : video + 1], apart[video], **given)
        common = {"thresholds", "rates"} if first["codebook"] == policies[-1]["codebook"] else set()
        given = options(first) | codebooks(policies[:1] if common else policies, device)
        shared = codebooks(policies[:1], device)
        given |= {name: shared[name] for name in common}
        for name, values in (
            ("step", steps),
            ("num_steps", [policy["num_steps"] for policy in policies]),
            ("window", [policy["window"] for policy in policies]),
        ):
            if any(value != values[0] for value in values) or pick.random() < 0.5:
                given[name] = torch.tensor(values, dtype=torch.int32, device=device)
            else:
                given[name] = values[0]
        decide(sums, together, site=site, **given)
        assert torch.equal(together.nan_to_num(-5), torch.cat(apart).nan_to_num(-5)), steps
        columns = dict(zip(state_columns(2), together.T.tolist(), strict=True))
        decided += sum(
            step > 1 and last == step for step, last in zip(steps, columns["last_step"], strict=True)
        )
        # The same step again, the step after it, or the next computed step.
        steps = [
            min(int(pick.choice([step, step + 1, due, due])), policy["num_steps"])
            for step, due, policy in zip(steps, columns["next_step"], policies, strict=True)
        ]
        steps = [max(step, 1) for step in steps]
    return decided


def codebooks(policies: list[dict[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
    """[entries] of one policy, or [num_videos, entries], padded with the last entry."""
    longest = max(len(policy["codebook"]) for policy in policies)
    padded = [
        policy["codebook"] + [policy["codebook"][-1]] * (longest - len(policy["codebook"]))
        for policy in policies
    ]
    both = torch.tensor(padded, dtype=torch.float64, device=device).unbind(2)
    thresholds, rates = (column[0] if len(policies) == 1 else column.contiguous() for column in both)
    return {"thresholds": thresholds.contiguous(), "rates": rates.contiguous()}


@pytest.mark.parametrize("rule", ["published", "paper"])
def test_initial_state(rule: str) -> None:
    state = initial_state(3, 2, rule=rule)
    row = [0.0, 1.0, 1.0, 1.0, 0.0, 0.0, NAN, NAN, 1.0, 0.0] + [1.0 if rule == "published" else NAN] * 2
    expected = torch.tensor([row] * 3, dtype=torch.float64)
    assert torch.equal(state.nan_to_num(-5), expected.nan_to_num(-5))
    assert state.is_contiguous()
    assert len(state_columns(2)) == state.shape[1]


def test_factor_is_unchanged_without_motion_regularization(backend: str, device: torch.device) -> None:
    """With strides motion is always measured for the trace; it affects the rate only if scale > 0."""
    state = initial_state(1, device=device)
    sums = torch.tensor([[1.0, 10, 10, NAN, NAN, NAN, NAN, 3, 6]], dtype=torch.float64, device=device)
    codebook = {
        "thresholds": torch.tensor([0.08, 1.0], dtype=torch.float64, device=device),
        "rates": torch.tensor([6.0, 2.0], dtype=torch.float64, device=device),
    }
    for step in (1, 2):
        decide(sums, state, step=step, num_steps=30, frames=4, window=(1, 30), **codebook)
    row = dict(zip(state_columns(), state[0].tolist(), strict=True))
    assert row["rate"] == 2
    assert row["next_step"] == 4
    assert (row["distance"], row["motion"], row["factor"]) == (pytest.approx(0.1), 0.5, 1.0)


def test_nan_forces_compute_and_is_flagged(backend: str, device: torch.device) -> None:
    state = initial_state(2, device=device)
    good = [1.0, 10, 10, NAN, NAN, NAN, NAN, 3, 6]
    bad = [NAN, 10, NAN, NAN, NAN, NAN, NAN, NAN, NAN]
    sums = torch.tensor([good, bad], dtype=torch.float64, device=device)
    codebook = {
        "thresholds": torch.tensor([1.0], dtype=torch.float64, device=device),
        "rates": torch.tensor([5.0], dtype=torch.float64, device=device),
    }
    for step in (1, 2):
        decide(sums, state, step=step, num_steps=30, frames=4, **codebook)
    # A further site of the same step does not change the decision.
    decide(sums[[0, 0]], state, step=2, num_steps=30, frames=4, **codebook)
    rows = [dict(zip(state_columns(), row, strict=True)) for row in state.tolist()]
    assert (rows[0]["rate"], rows[0]["nonfinite"], rows[0]["next_step"]) == (5, 0, 7)
    assert (rows[1]["rate"], rows[1]["nonfinite"], rows[1]["next_step"]) == (1, 1, 3)


@pytest.mark.parametrize("by_video", [False, True])
def test_infinite_motion_forces_compute_with_a_negative_power(
    backend: str, device: torch.device, by_video: bool
) -> None:
    """The factor is 0, so the score is finite."""
    state = initial_state(2, device=device)
    finite = [1.0, 10, 10, NAN, NAN, NAN, NAN, 3, 6]
    infinite = [1.0, 10, 10, NAN, NAN, NAN, NAN, 3, 0]
    sums = torch.tensor([finite, infinite], dtype=torch.float64, device=device)
    rule = {
        "thresholds": torch.tensor([1e9], dtype=torch.float64, device=device),
        "rates": torch.tensor([5.0], dtype=torch.float64, device=device),
        "strides": (1,),
        "scale": 1.0,
        "power": -1.0,
        "window": (1, 30),
    }
    for step in (1, 2):
        asked = torch.full((2,), step, dtype=torch.int32, device=device) if by_video else step
        decide(sums, state, step=asked, num_steps=30, frames=4, **rule)
    rows = [dict(zip(state_columns(), row, strict=True)) for row in state.tolist()]
    assert [(row["rate"], row["nonfinite"]) for row in rows] == [(5, 0), (1, 1)]
    assert math.isinf(rows[1]["motion"])


def bad_inputs() -> dict[str, tuple[str, dict[str, Any]]]:
    wide = torch.ones(2, 20, dtype=torch.float64)
    return {
        "sums of other columns": ("sums", {"sums": torch.ones(2, 8, dtype=torch.float64)}),
        "sums of float32": ("sums", {"sums": torch.ones(2, 9)}),
        "sums not contiguous": ("sums", {"sums": wide[:, :9]}),
        "sums of other videos": ("state|sums", {"sums": torch.ones(3, 9, dtype=torch.float64)}),
        "state too narrow": ("state", {"state": torch.ones(2, 10, dtype=torch.float64)}),
        "state of float32": ("state", {"state": torch.ones(2, 11)}),
        "state on another device": (
            "state",
            {"state": torch.ones(2, 11, dtype=torch.float64, device="meta")},
        ),
        "no thresholds": ("thresholds", {"thresholds": torch.ones(0, dtype=torch.float64)}),
        "thresholds of float32": ("thresholds", {"thresholds": torch.ones(2)}),
        "rates of another length": ("rates", {"rates": torch.ones(3, dtype=torch.float64)}),
        "rates of int64": ("rates", {"rates": torch.ones(2, dtype=torch.int64)}),
        "step 0": ("step", {"step": 0}),
        "step past the end": ("step", {"step": 31}),
        "no steps": ("num_steps", {"num_steps": 0}),
        "site out of range": ("site", {"site": 1}),
        "stride equal to frames": ("strides", {"strides": (4,)}),
        "step of int64": ("step", {"step": torch.tensor([2, 2])}),
        "step of three videos": ("step", {"step": int32([2, 2, 2])}),
        "step 31 of a video": ("step", {"step": int32([2, 31])}),
        "step past the end of a video": ("step", {"step": 5, "num_steps": int32([8, 4])}),
        "no steps of a video": ("num_steps", {"num_steps": int32([30, 0])}),
        "num_steps of two dimensions": ("num_steps", {"num_steps": int32([[30], [30]])}),
        "num_steps on another device": ("num_steps", {"num_steps": int32([30, 30]).to("meta")}),
        "window of one edge": ("window", {"window": int32([[1], [1]])}),
        "window not contiguous": ("window", {"window": int32([[1, 4], [1, 4]]).T}),
        "thresholds of three videos": ("thresholds", {"thresholds": torch.ones(3, 2, dtype=torch.float64)}),
        "rates for all of thresholds per video": (
            "rates",
            {"thresholds": torch.ones(2, 2, dtype=torch.float64)},
        ),
        "unknown metric": ("metric", {"metric": "l0"}),
        "unknown rule": ("rule", {"rule": "ours"}),
        "paper without elements": ("elements", {"rule": "paper"}),
    }


def int32(values: list[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


#: Per video: step, num_steps and window.
BY_VIDEO: dict[str, Any] = {"step": [2, 5], "num_steps": [30, 6], "window": [[1, 30], [2, 4]]}


def good_call() -> dict[str, Any]:
    return {
        "sums": torch.ones(2, 9, dtype=torch.float64),
        "state": initial_state(2),
        "thresholds": torch.tensor([0.1, 1.0], dtype=torch.float64),
        "rates": torch.tensor([2.0, 1.0], dtype=torch.float64),
        "step": 2,
        "num_steps": 30,
        "frames": 4,
    }


@pytest.mark.parametrize("what", bad_inputs(), ids=lambda what: what.replace(" ", "_"))
def test_bad_input_names_the_argument(backend: str, device: torch.device, what: str) -> None:
    with device:  # the default device of factory functions
        name, changes = bad_inputs()[what]
        call = good_call() | changes
    if name in ("step", "num_steps") and "of a video" in what and device.type != "cpu":
        return decide(**call)  # values on CUDA are not checked
    with pytest.raises(ValueError, match=f"^({name}): "):
        decide(**call)


def test_requires_grad_is_refused(backend: str, device: torch.device) -> None:
    with device:
        call = good_call()
    call["sums"].requires_grad_()
    with pytest.raises(ValueError, match=r"^sums: requires grad"):
        decide(**call)


def test_no_videos(backend: str, device: torch.device) -> None:
    with device:
        call = good_call()
    call |= {"sums": call["sums"][:0], "state": initial_state(0, device=device)}
    decide(**call)


@pytest.mark.parametrize("by_video", [False, True])
def test_compile_without_graph_breaks(backend: str, device: torch.device, by_video: bool) -> None:
    with device:
        call = good_call()
        call |= {name: int32(values) for name, values in BY_VIDEO.items() if by_video}
    state = call.pop("state")

    def step(state: torch.Tensor) -> torch.Tensor:
        decide(state=state, **call)
        return state * 1

    expected = state.clone()
    step(expected)
    given = state.clone()
    torch.compile(step, fullgraph=True, backend="aot_eager")(given)
    assert torch.equal(given.nan_to_num(-5), expected.nan_to_num(-5))
    assert not torch.equal(given, state)


@pytest.mark.parametrize("by_video", [False, True])
def test_opcheck(backend: str, device: torch.device, op_namespace: str, by_video: bool) -> None:
    with device:
        call = good_call()
    arguments = [call[name] for name in ("sums", "state", "thresholds", "rates")]
    arguments += (
        [of_video.to(device) for of_video in map(int32, BY_VIDEO.values())] if by_video else [None] * 3
    )
    arguments += [2, 30, 0, 4, [1], 0, 0, 1.0, 1, 30, 0.385, 8.0, 1.0, 10.0]
    torch.library.opcheck(getattr(torch.ops, op_namespace).decide.default, tuple(arguments))


@pytest.mark.parametrize("rule", ["published", "paper"])
@pytest.mark.parametrize("seed", range(10))
def test_numpy_and_op_agree(rule: str, seed: int) -> None:
    """`simulate.decide` and the compiled op are bit-identical. Both are compared with plain Python."""
    pick = random.Random(1000 + seed)
    policy = random_policy(pick, rule, pick.choice(["l1", "l2", "cosine"]))
    print(f"seed {seed}: {policy}")
    thresholds, rates = (list(column) for column in zip(*policy["codebook"], strict=True))
    state = simulate.initial_state(2, 2, rule=rule)
    of_op = torch.from_numpy(state.copy())
    assert torch.equal(of_op.nan_to_num(-5), initial_state(2, 2, rule=rule).nan_to_num(-5))
    expected = [dict(zip(state_columns(2), row, strict=True)) for row in state.tolist()]
    for step in range(1, policy["num_steps"] + 1):
        for site in (0, 1):
            rows = [random_sums(pick, policy) for _ in range(2)]
            simulate.decide(
                rows, state, step=step, thresholds=thresholds, rates=rates, site=site, **options(policy)
            )
            with adacache_kernels.use_backend("cpu"):
                decide(
                    torch.tensor(rows, dtype=torch.float64),
                    of_op,
                    step=step,
                    thresholds=torch.tensor(thresholds, dtype=torch.float64),
                    rates=torch.tensor(rates, dtype=torch.float64),
                    site=site,
                    **options(policy),
                )
            for row, video in zip(rows, expected, strict=True):
                plain_decide(row, video, step, site, policy)
            assert torch.equal(torch.from_numpy(state).nan_to_num(-5), of_op.nan_to_num(-5))
            assert_states_agree(of_op, expected, 2, step)


@pytest.mark.parametrize("rule", ["published", "paper"])
def test_numpy_decides_per_video(rule: str) -> None:
    """`simulate.decide` with arrays over videos is bit-identical to a call per video."""
    pick = random.Random(f"numpy {rule}")
    policies = [random_policy(pick, rule, "l2") for _ in range(3)]
    policies = [
        policies[0] | {name: own[name] for name in ("num_steps", "codebook", "window")} for own in policies
    ]
    books = {name: tensor.numpy() for name, tensor in codebooks(policies, torch.device("cpu")).items()}
    state = simulate.initial_state(3, 1, rule=rule)
    apart = [state[video : video + 1].copy() for video in range(3)]
    for start in range(1, 4):
        steps = [start, start + 1, start]
        rows = [random_sums(pick, policy) for policy in policies]
        for video, policy in enumerate(policies):
            thresholds, rates = (list(column) for column in zip(*policy["codebook"], strict=True))
            own = options(policy) | {"thresholds": thresholds, "rates": rates, "step": steps[video]}
            simulate.decide([rows[video]], apart[video], **own)
        own = {name: [policy[name] for policy in policies] for name in ("num_steps", "window")}
        simulate.decide(rows, state, **(options(policies[0]) | books | own | {"step": steps}))
        assert torch.equal(
            torch.from_numpy(state).nan_to_num(-5),
            torch.cat([torch.from_numpy(row) for row in apart]).nan_to_num(-5),
        )
