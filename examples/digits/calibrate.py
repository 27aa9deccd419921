"""Finds the digit model's codebooks and motion regularisation: `python examples/digits/calibrate.py --write`.

Distances and motion of clips that compute every step are recorded once; schedules for any settings are then
simulated from them, and only the settings chosen are run. `--write` puts them where the presets "digits/..."
read them.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adacache.api import disable, enable
from adacache.calibration import Record
from adacache.calibration import Recording as ResidualRecording
from adacache.commands.demo import describe
from adacache.digits import WEIGHTS, load, sampler
from adacache.digits.captions import MOTIONS, Prompt
from adacache.digits.subject import calibration_prompts, sample
from adacache.models.rectified_flow import RectifiedFlow
from adacache.models.stdit3 import STDiT3
from adacache.policies import AdaCache, MotionRegularization, preset
from adacache.policies.presets import DIGIT_CODEBOOKS
from numpy.typing import NDArray
from torch import Tensor

POWERS = (0.25, 0.5, 1.0, 2.0)
"""Powers of the motion factor that are tried."""
GRADIENT_WEIGHTS = (0.0, 10.0)
"""Weights of its change that are tried: none, and the published one."""
WINDOW = (4, 26)
"""Steps in which motion counts, as published for 30 steps."""
MOVED = 1.0
"""Computed steps that a motion regularisation must move from resting to racing clips to be taken."""
ALL_TOKENS = 1 << 30
"""The clips are small: nothing is left out of their recordings."""
FACTORS = np.geomspace(0.02, 20.0, 1200)
"""Multiples of the published thresholds that are tried."""
SCALES = np.geomspace(1e-4, 10.0, 1000)
"""Motion scales that are tried."""


@dataclass(frozen=True)
class Recording:
    """What the metric site saw of V clips while all of N steps were computed."""

    prompts: list[Prompt]
    seeds: list[int]
    video: Tensor
    """[V, 1, T, 32, 32] float32 in -1 .. 1."""
    seen: ResidualRecording

    def simulate(self, policy: AdaCache) -> NDArray[np.int64]:
        """Steps that each clip would compute, [V], were the residuals those of the recording."""
        steps: NDArray[np.int64] = self.seen.computed(policy).sum(axis=1)
        return steps


@dataclass(frozen=True)
class Outcome:
    """What settings gave on the recorded clips in real runs, by motion class."""

    steps: dict[str, float]
    psnr: dict[str, float]
    """Mean PSNR against every step computed, dB."""

    @property
    def mean_steps(self) -> float:
        return float(np.mean(list(self.steps.values())))

    @property
    def spread(self) -> float:
        """Computed steps that racing clips get more than resting ones."""
        return self.steps["racing"] - self.steps["resting"]

    @property
    def mean_psnr(self) -> float:
        return float(np.mean(list(self.psnr.values())))

    def __str__(self) -> str:
        steps = ", ".join(f"{motion} {value:.1f}" for motion, value in self.steps.items())
        psnr = ", ".join(f"{motion} {value:.1f}" for motion, value in self.psnr.items())
        return f"{self.mean_steps:.2f} steps ({steps}), {self.mean_psnr:.2f} dB ({psnr})"


def record(
    model: STDiT3, flow: RectifiedFlow, prompts: Sequence[Prompt], seeds: Sequence[int], batch: int = 9
) -> Recording:
    """Generates clips with every step computed, and compares the residuals where AdaCache measures them."""
    videos, policy = [], Record(tokens=ALL_TOKENS)
    for first in range(0, len(prompts), batch):
        part = slice(first, first + batch)
        enable(model, policy, num_steps=flow.num_steps)
        try:
            videos.append(sample(model, flow, prompts[part], seeds[part]))
        finally:
            disable(model)
    seen = functools.reduce(operator.add, (schedule.recording() for schedule in policy.deciders))
    return Recording(list(prompts), list(seeds), torch.cat(videos), seen)


def measure(
    model: STDiT3, flow: RectifiedFlow, recording: Recording, policy: AdaCache, batch: int = 9
) -> Outcome:
    """Runs settings on the recorded clips."""
    steps: list[int] = []
    videos = []
    for first in range(0, len(recording.prompts), batch):
        part = slice(first, first + batch)
        handle = enable(model, policy, num_steps=flow.num_steps)
        try:
            videos.append(sample(model, flow, recording.prompts[part], recording.seeds[part]))
        finally:
            disable(model)
        steps += [len(handle.trace.steps_of(video)) for video in range(handle.trace.num_videos)]
    error = (torch.cat(videos) - recording.video).square().mean((1, 2, 3, 4))
    psnr = (10 * torch.log10(4 / error)).tolist()
    of_class = {m: [i for i, p in enumerate(recording.prompts) if p.motion == m] for m in MOTIONS}
    return Outcome(
        {m: float(np.mean([steps[i] for i in index])) for m, index in of_class.items()},
        {m: float(np.mean([psnr[i] for i in index])) for m, index in of_class.items()},
    )


def fit_codebook(recording: Recording, published: dict[float, int], target: float) -> AdaCache:
    """The published codebook, thresholds multiplied so that on average `target` steps are computed."""

    def policy(factor: float) -> AdaCache:
        return AdaCache(
            codebook={float(f"{threshold * factor:.3g}"): rate for threshold, rate in published.items()}
        )

    return _closest(policy, FACTORS, recording, target)


def fit_motion(recording: Recording, plain: AdaCache, power: float, gradient_weight: float) -> AdaCache:
    """Motion regularisation whose scale leaves the simulated mean of computed steps at that of `plain`."""

    def policy(scale: float) -> AdaCache:
        motion = MotionRegularization(
            window=WINDOW, scale=float(f"{scale:.3g}"), power=power, gradient_weight=gradient_weight
        )
        return AdaCache(codebook=plain.codebook, motion=motion)

    return _closest(policy, SCALES, recording, float(recording.simulate(plain).mean()))


def calibrate(
    model: STDiT3,
    flow: RectifiedFlow,
    recording: Recording,
    fast: float,
    slow: float,
    say: Callable[[str], None] = print,
) -> dict[str, tuple[AdaCache, Outcome]]:
    """Settings by preset name, each with what it gave on the recorded clips.

    Codebooks are the published ones with their thresholds multiplied. Of the motion regularisations that cost
    what `digits/fast` costs, those count that move a step from resting to racing clips, as they should;
    the one with the best mean PSNR is taken, first over the powers, then over the gradient weights.

    Args:
        fast, slow: mean computed steps to aim at.
        say: takes a line for everything that is tried.
    """

    def tried(name: str, policy: AdaCache) -> tuple[AdaCache, Outcome]:
        outcome = measure(model, flow, recording, policy)
        simulated = recording.simulate(policy).mean()
        say(f"{name}: {describe(policy)}\n  simulated {simulated:.2f} steps, run {outcome}")
        return policy, outcome

    chosen = {}
    for name, target in (("fast", fast), ("slow", slow)):
        published = dict(preset(f"open-sora/{name}", 30).codebook)
        chosen[f"digits/{name}"] = tried(f"digits/{name}", fit_codebook(recording, published, target))
    plain_fast, plain_slow = chosen["digits/fast"][0], chosen["digits/slow"][0]

    name = "digits/fast+moreg"
    candidates = []
    for power in POWERS:
        candidates.append(tried(name, fit_motion(recording, plain_fast, power, GRADIENT_WEIGHTS[0])))
    fast_outcome = chosen["digits/fast"][1]
    power = _motion(_best(candidates, fast_outcome)[0]).power
    for weight in GRADIENT_WEIGHTS[1:]:
        candidates.append(tried(name, fit_motion(recording, plain_fast, power, weight)))
    chosen[name] = _best(candidates, fast_outcome)

    motion = _motion(chosen[name][0])
    name = "digits/slow+moreg"
    chosen[name] = tried(name, fit_motion(recording, plain_slow, motion.power, motion.gradient_weight))
    return chosen


def write(
    path: str | Path,
    chosen: dict[str, tuple[AdaCache, Outcome]],
    flow: RectifiedFlow,
    recording: Recording,
    weights: str | Path,
) -> None:
    """Writes the settings where the presets read them, with what they were found on."""
    content: dict[str, Any] = {
        "made_by": "python examples/digits/calibrate.py --write",
        "weights_sha256": hashlib.sha256(Path(weights).read_bytes()).hexdigest(),
        "num_steps": flow.num_steps,
        "sampler": asdict(flow),
        "clips": [
            [str(prompt), seed] for prompt, seed in zip(recording.prompts, recording.seeds, strict=True)
        ],
        "presets": {},
    }
    for name in ("digits/fast", "digits/slow"):
        policy, regularised = chosen[name][0], chosen[f"{name}+moreg"][0]
        content["presets"][name] = {
            "codebook": [[threshold, rate] for threshold, rate in policy.codebook.items()],
            "motion": asdict(_motion(regularised)),
            "measured": asdict(chosen[name][1]),
            "measured_with_motion": asdict(chosen[f"{name}+moreg"][1]),
        }
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def _closest(
    policy_of: Callable[[float], AdaCache], values: Iterable[float], recording: Recording, target: float
) -> AdaCache:
    """The policy whose simulated mean of computed steps is closest to `target`; the middle one of several."""
    policies = [policy_of(float(value)) for value in values]
    misses = [abs(float(recording.simulate(policy).mean()) - target) for policy in policies]
    best = [policy for policy, miss in zip(policies, misses, strict=True) if miss <= min(misses) + 1e-9]
    return best[len(best) // 2]


def _best(tried: list[tuple[AdaCache, Outcome]], plain: Outcome) -> tuple[AdaCache, Outcome]:
    """The best mean PSNR among those that move a step to racing clips; among all if none does."""
    moving = [pair for pair in tried if pair[1].spread - plain.spread >= MOVED]
    return max(moving or tried, key=lambda pair: pair[1].mean_psnr)


def _motion(policy: AdaCache) -> MotionRegularization:
    assert policy.motion is not None
    return policy.motion


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python examples/digits/calibrate.py", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="exported weights (default: the shipped ones)"
    )
    parser.add_argument(
        "--fast", type=float, default=11.0, help="mean computed steps of 30 (default: %(default)s)"
    )
    parser.add_argument(
        "--slow", type=float, default=16.0, help="mean computed steps of 30 (default: %(default)s)"
    )
    parser.add_argument(
        "--prompts", type=int, default=6, help="clips of each motion class (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="first seed of the clips (default: %(default)s)")
    parser.add_argument(
        "--write", action="store_true", help=f"write them to {DIGIT_CODEBOOKS.name} of the policies"
    )
    given = parser.parse_args(arguments)
    try:
        model = load(given.weights).requires_grad_(False)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if given.prompts < 1:
        parser.error(f"--prompts: expected at least 1, got {given.prompts}")

    flow = sampler()
    prompts = calibration_prompts(given.prompts)
    seeds = [given.seed + i for i in range(len(prompts))]
    print(
        f"{len(prompts)} clips of training prompts, {flow.num_steps} steps, guidance {flow.guidance_scale:g}",
        flush=True,
    )
    recording = record(model, flow, prompts, seeds)
    chosen = calibrate(model, flow, recording, given.fast, given.slow, lambda line: print(line, flush=True))
    print()
    for name, (policy, outcome) in chosen.items():
        print(f"{name}: {outcome}\n  {describe(policy)}")
    if given.write:
        write(DIGIT_CODEBOOKS, chosen, flow, recording, given.weights)
        print(f"written to {DIGIT_CODEBOOKS}")


if __name__ == "__main__":
    main()
