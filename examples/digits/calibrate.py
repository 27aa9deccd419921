# SPDX-License-Identifier: Apache-2.0
"""Searches the digit model's codebooks and motion regularisation: `python examples/digits/calibrate.py`.

Distances and motion of clips that compute every step are recorded once; schedules of any settings are then
simulated from them, and only the chosen settings are run. `--write` stores them for the presets "digits/...".
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adacache.calibration import Record, Recording, Subject, record, run
from adacache.calibration.search import codebook_of
from adacache.commands.demo import describe
from adacache.commands.options import real_number, whole_number
from adacache.digits import WEIGHTS, load, sampler
from adacache.digits.captions import MOTIONS, Prompt
from adacache.digits.subject import calibration_prompts, subject_of_model
from adacache.files import check_writable, write_json
from adacache.models.rectified_flow import RectifiedFlow
from adacache.policies import AdaCache, MotionRegularization
from adacache.policies.presets import DIGIT_CODEBOOKS
from torch import Tensor

POWERS = (0.25, 0.5, 1.0, 2.0)
"""Candidate powers of the motion factor."""
GRADIENT_WEIGHTS = (0.0, 10.0)
"""Candidate weights of its change: none, and the published one."""
WINDOW = (4, 26)
"""Steps in which motion counts, as published for 30 steps."""
MOVED = 1.0
"""Computed steps that a motion regularisation has to move from resting to racing clips."""
ALL_TOKENS = 1 << 30
"""The clips are small: every token is recorded."""
FACTORS = np.geomspace(0.02, 20.0, 1200)
"""Candidate factors of the published thresholds."""
SCALES = np.geomspace(1e-4, 10.0, 1000)
"""Candidate motion scales."""


@dataclass(frozen=True)
class Clips:
    """V clips that computed every step."""

    prompts: list[Prompt]
    seeds: list[int]
    outputs: list[Tensor]
    recording: Recording

    def steps(self, policy: AdaCache) -> float:
        """Mean computed steps of a policy, simulated."""
        return float(self.recording.computed(policy).sum(axis=1).mean())


@dataclass(frozen=True)
class ByMotion:
    """Results of real runs with a policy, by motion class."""

    steps: dict[str, float]
    psnr: dict[str, float]
    """Mean PSNR against the clips that computed every step, dB."""

    @property
    def mean_steps(self) -> float:
        return float(np.mean(list(self.steps.values())))

    @property
    def spread(self) -> float:
        """Computed steps of racing clips minus those of resting ones."""
        return self.steps["racing"] - self.steps["resting"]

    @property
    def mean_psnr(self) -> float:
        return float(np.mean(list(self.psnr.values())))

    def __str__(self) -> str:
        steps = ", ".join(f"{motion} {value:.1f}" for motion, value in self.steps.items())
        psnr = ", ".join(f"{motion} {value:.1f}" for motion, value in self.psnr.items())
        return f"{self.mean_steps:.2f} steps ({steps}), {self.mean_psnr:.2f} dB ({psnr})"


def record_clips(subject: Subject, prompts: list[Prompt], seeds: list[int]) -> Clips:
    """Generates clips with every step computed and records their residuals."""
    recording, outputs = record(subject, prompts, seeds, Record(tokens=ALL_TOKENS))
    return Clips(prompts, seeds, outputs, recording)


def measure(subject: Subject, clips: Clips, policy: AdaCache) -> ByMotion:
    """Generates the same clips with a policy."""
    steps: dict[str, list[float]] = {motion: [] for motion in MOTIONS}
    psnr: dict[str, list[float]] = {motion: [] for motion in MOTIONS}
    for prompt, seed, full in zip(clips.prompts, clips.seeds, clips.outputs, strict=True):
        output, computed = run(subject, policy, prompt, seed)
        steps[prompt.motion].append(computed)
        psnr[prompt.motion].append(float(10 * torch.log10(4 / (output - full).square().mean())))
    return ByMotion(*({m: float(np.mean(v)) for m, v in values.items()} for values in (steps, psnr)))


def fit_codebook(clips: Clips, published: dict[float, int], target: float) -> AdaCache:
    """The published codebook with thresholds scaled such that `target` steps are computed on average."""

    def policy(factor: float) -> AdaCache:
        return AdaCache(
            codebook={float(f"{threshold * factor:.3g}"): rate for threshold, rate in published.items()}
        )

    return _closest(policy, FACTORS, clips, target)


def fit_motion(clips: Clips, plain: AdaCache, power: float, gradient_weight: float) -> AdaCache:
    """Adds a motion regularisation to `plain`, with the scale that keeps the mean computed steps."""

    def policy(scale: float) -> AdaCache:
        motion = MotionRegularization(
            window=WINDOW, scale=float(f"{scale:.3g}"), power=power, gradient_weight=gradient_weight
        )
        return AdaCache(codebook=plain.codebook, motion=motion)

    return _closest(policy, SCALES, clips, clips.steps(plain))


def find_presets(
    subject: Subject, clips: Clips, fast: float, slow: float, say: Callable[[str], None] = print
) -> dict[str, tuple[AdaCache, ByMotion]]:
    """Policies by preset name, each with its results on the recorded clips.

    Codebooks are the published ones with scaled thresholds. Motion regularisations have the mean computed
    steps of `digits/fast`; only those that move a step from resting to racing clips qualify. The one with the
    best mean PSNR is chosen, first over the powers, then over the gradient weights.

    Args:
        fast, slow: target mean of computed steps.
        say: receives a line for each candidate.
    """

    def tried(name: str, policy: AdaCache) -> tuple[AdaCache, ByMotion]:
        results = measure(subject, clips, policy)
        say(f"{name}: {describe(policy)}\n  simulated {clips.steps(policy):.2f} steps, run {results}")
        return policy, results

    chosen = {}
    for name, target in (("fast", fast), ("slow", slow)):
        published = dict(codebook_of(f"open-sora/{name}").codebook)
        chosen[f"digits/{name}"] = tried(f"digits/{name}", fit_codebook(clips, published, target))
    plain_fast, plain_slow = chosen["digits/fast"][0], chosen["digits/slow"][0]

    name = "digits/fast+moreg"
    candidates = []
    for power in POWERS:
        candidates.append(tried(name, fit_motion(clips, plain_fast, power, GRADIENT_WEIGHTS[0])))
    fast_results = chosen["digits/fast"][1]
    power = _motion(_best(candidates, fast_results)[0]).power
    for weight in GRADIENT_WEIGHTS[1:]:
        candidates.append(tried(name, fit_motion(clips, plain_fast, power, weight)))
    chosen[name] = _best(candidates, fast_results)

    motion = _motion(chosen[name][0])
    name = "digits/slow+moreg"
    chosen[name] = tried(name, fit_motion(clips, plain_slow, motion.power, motion.gradient_weight))
    return chosen


def write_presets(
    path: str | Path,
    chosen: dict[str, tuple[AdaCache, ByMotion]],
    flow: RectifiedFlow,
    clips: Clips,
    weights: str | Path,
) -> None:
    """Writes the policies for the presets, with the clips and the sampler of the search."""
    content: dict[str, Any] = {
        "made_by": "python examples/digits/calibrate.py --write",
        "weights_sha256": hashlib.sha256(Path(weights).read_bytes()).hexdigest(),
        "num_steps": flow.num_steps,
        "sampler": asdict(flow),
        "clips": [[str(prompt), seed] for prompt, seed in zip(clips.prompts, clips.seeds, strict=True)],
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
    write_json(path, content)


def _closest(
    policy_of: Callable[[float], AdaCache], values: Iterable[float], clips: Clips, target: float
) -> AdaCache:
    """The policy whose simulated mean steps are closest to `target`; the middle one of equal candidates."""
    policies = [policy_of(float(value)) for value in values]
    misses = [abs(clips.steps(policy) - target) for policy in policies]
    best = [policy for policy, miss in zip(policies, misses, strict=True) if miss <= min(misses) + 1e-9]
    return best[len(best) // 2]


def _best(tried: list[tuple[AdaCache, ByMotion]], plain: ByMotion) -> tuple[AdaCache, ByMotion]:
    """The best mean PSNR among the candidates that move a step to racing clips; among all if none does."""
    moving = [pair for pair in tried if pair[1].spread - plain.spread >= MOVED]
    return max(moving or tried, key=lambda pair: pair[1].mean_psnr)


def _motion(policy: AdaCache) -> MotionRegularization:
    assert policy.motion is not None
    return policy.motion


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python examples/digits/calibrate.py", description=__doc__.partition(":")[0]
    )
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="exported weights (default: the shipped ones)"
    )
    steps = real_number(1, 30)
    parser.add_argument(
        "--fast", type=steps, default=11.0, help="mean computed steps of 30 (default: %(default)s)"
    )
    parser.add_argument(
        "--slow", type=steps, default=16.0, help="mean computed steps of 30 (default: %(default)s)"
    )
    parser.add_argument(
        "--prompts",
        type=whole_number(1),
        default=6,
        help="clips of each motion class (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="first seed of the clips (default: %(default)s)"
    )
    parser.add_argument("--write", action="store_true", help=f"write {DIGIT_CODEBOOKS}, for the presets")
    given = parser.parse_args(arguments)
    try:
        model = load(given.weights).requires_grad_(False)
        if given.write:
            check_writable(DIGIT_CODEBOOKS, "--write")
    except (OSError, ValueError) as error:
        parser.error(str(error))

    flow = sampler()
    subject = subject_of_model(model, flow)
    prompts = calibration_prompts(given.prompts)
    seeds = [given.seed + i for i in range(len(prompts))]
    print(
        f"{len(prompts)} clips of training prompts, {flow.num_steps} steps, guidance {flow.guidance_scale:g}",
        flush=True,
    )
    clips = record_clips(subject, prompts, seeds)
    chosen = find_presets(subject, clips, given.fast, given.slow, lambda line: print(line, flush=True))
    print()
    for name, (policy, results) in chosen.items():
        print(f"{name}: {results}\n  {describe(policy)}")
    if given.write:
        write_presets(DIGIT_CODEBOOKS, chosen, flow, clips, given.weights)
        print(f"written to {DIGIT_CODEBOOKS}")


if __name__ == "__main__":
    main()
