# SPDX-License-Identifier: Apache-2.0
"""`adacache demo`: generates clips with and without caching, compares them, and writes a report.

The digit model generates each clip from the same noise without caching, with fewer steps, with AdaCache, and
with a planned path.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adacache_kernels
from adacache.api import disable, enable
from adacache.checks import whole
from adacache.commands.options import require_packages
from adacache.commands.report import (
    Clip,
    Study,
    method_table,
    motion_finding,
    motion_table,
    write_report,
    write_results,
)
from adacache.commands.table import print_table
from adacache.digits import FPS, FRAMES, PATHS, SIZE, encode, load, noise, parse, sampler, with_null
from adacache.files import check_writable
from adacache.models.rectified_flow import RectifiedFlow
from adacache.models.stdit3 import STDiT3
from adacache.policies import AdaCache, Named, Policy
from adacache.trace import Trace

PROMPTS = (
    "a 6 resting right over a plain background",
    "a 4 resting right over a noisy background",
    "a 2 drifting up over a plain background",
    "a 5 drifting right over a noisy background",
    "a 7 racing right over a plain background",
    "a 3 racing left over a noisy background",
)
"""From still to racing; held out from training and calibration."""

BASELINE, FAST, SLOW, REGULARISED = "no caching", "fast", "slow", "fast + MoReg"
PLANNED, FEWER = "planned 3x", "10 steps"
Method = Policy | Named | int | None
"""A policy, or a number of steps without caching; None: all steps without caching."""
METHODS: Mapping[str, Method] = {
    BASELINE: None,
    FEWER: 10,
    FAST: Named("digits/fast"),
    SLOW: Named("digits/slow"),
    REGULARISED: Named("digits/fast+moreg"),
    PLANNED: Named(PATHS, speedup=3),
}

SUBLAYERS = 4
"""Residuals that the published code caches per block pair: attention and cross-attention + MLP in each."""

REPORT, RESULTS = "report.html", "results.json"

_NEEDED = {"torchmetrics": "torchmetrics", "matplotlib": "matplotlib", "PIL": "pillow", "tqdm": "tqdm"}


def run(
    out_dir: str | Path = "adacache_demo",
    *,
    weights: str | Path | None = None,
    model: STDiT3 | None = None,
    prompts: Sequence[str] = PROMPTS,
    seeds_per_prompt: int = 2,
    methods: Mapping[str, Method] = METHODS,
    num_steps: int = 30,
    threads: int = 1,
) -> int:
    """Generates clips, prints two tables, and writes `out_dir`/report.html and results.json.

    Args:
        out_dir: output folder; created if missing.
        weights: weights of the digit model; None: the shipped ones.
        model: a loaded model instead of `weights`.
        prompts: sentences of the digit model's grammar, from still to racing.
        seeds_per_prompt: clips per prompt.
        methods: each method by display name. The first is the baseline.
        num_steps: denoising steps.
        threads: CPU threads. The network is small; with one thread, other programs disturb the times least.

    Returns:
        0.

    Raises:
        ImportError: a package of the extra `demo` is missing.
        OSError: the folder cannot be written, or the weights do not exist.
        ValueError: an argument is wrong, a prompt is not in the grammar, or the weights do not fit.
    """
    out = Path(out_dir)
    for name, count in {
        "seeds_per_prompt": seeds_per_prompt,
        "num_steps": num_steps,
        "threads": threads,
        "prompts": len(prompts),
        "methods": len(methods),
    }.items():
        whole(1)(count, name)
    require_packages("demo", _NEEDED)
    _create(out)
    model = load_model(weights) if model is None else model
    flow = sampler(num_steps)
    with _cpu_threads(threads):
        study = compare(model, flow, prompts, range(seeds_per_prompt), methods)
    print(f"\nMeans over {len(study.takes)} clips of {len(prompts)} prompts; seconds are medians.\n")
    print_table(*method_table(study))
    print()
    print_table(*motion_table(study))
    findings = [motion_finding(study, FAST, REGULARISED)] if {FAST, REGULARISED} <= set(study.methods) else []
    print("\n" + "\n".join(findings))
    print("\n" + "\n".join(f"{name}: {text}" for name, text in study.facts.items()))
    write_results(study, out / RESULTS)
    write_report(study, out / REPORT, findings)
    print(f"\nClips side by side, schedules, distance and motion: {out / REPORT}")
    return 0


def load_model(weights: str | Path | None = None) -> STDiT3:
    """The digit model without gradients.

    Raises:
        FileNotFoundError: the weights do not exist.
    """
    try:
        return load(weights).requires_grad_(False)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; the weights ship with the package: reinstall it, or train them with "
            "`python examples/digits/train.py`"
        ) from error


def compare(
    model: STDiT3,
    flow: RectifiedFlow,
    prompts: Sequence[str],
    seeds: Sequence[int],
    methods: Mapping[str, Method] = METHODS,
    progress: bool = True,
) -> Study:
    """Generates every prompt and seed with every method, one clip at a time.

    The methods alternate clip by clip, so that a drift of the machine's speed affects all alike. Each method
    generates one clip as warm-up.
    """
    policies = {
        name: method.policy(flow.num_steps) if isinstance(method, Named) else method
        for name, method in methods.items()
    }
    names = list(policies)
    baseline = names[0]
    study = Study(
        baseline=baseline,
        methods=names,
        num_steps=flow.num_steps,
        published_cache_bytes=published_cache_bytes(model),
        facts=_facts(model, flow),
        settings={name: describe(policy) for name, policy in policies.items()},
    )
    motions = {prompt: parse(prompt).motion for prompt in prompts}
    takes = [(prompt, seed) for prompt in prompts for seed in seeds]
    with _progress_bar(len(names) * (1 + len(takes)), progress) as bar:
        for name in names:
            bar.set_description(f"warm-up, {name}", refresh=False)
            generate(model, flow, prompts[0], 0, policies[name])
            bar.update()
        for turn, (prompt, seed) in enumerate(takes):
            made: dict[str, tuple[Tensor, float, Trace | None]] = {}
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                bar.set_description(f"{prompt}, {name}", refresh=False)
                made[name] = generate(model, flow, prompt, seed, policies[name])
                bar.update()
            reference = made[baseline][0]
            for name in names:
                video, seconds, trace = made[name]
                psnr, ssim = (None, None) if name == baseline else fidelity(video, reference)
                policy = policies[name]
                without = policy if isinstance(policy, int) else flow.num_steps
                computed = without if trace is None else len(trace.steps_of(0))
                study.clips.append(
                    Clip(prompt, motions[prompt], seed, name, video, seconds, computed, psnr, ssim, trace)
                )
    return study


def generate(
    model: STDiT3, flow: RectifiedFlow, prompt: str, seed: int, policy: Policy | int | None
) -> tuple[Tensor, float, Trace | None]:
    """One clip [T, H, W] float32 in 0 .. 1, the seconds of its denoising loop, and its trace if any."""
    y, z = with_null(model, encode([prompt])), noise([seed])
    handle = None
    if isinstance(policy, int):
        flow = replace(flow, num_steps=policy)
    elif policy is not None:
        handle = enable(model, policy, num_steps=flow.num_steps)
    try:
        start = time.perf_counter()
        z = flow.sample(model, z, y, fps=FPS, height=SIZE, width=SIZE)
        seconds = time.perf_counter() - start
    finally:
        if handle is not None:
            disable(model)
    return (z[0, 0].clamp(-1, 1) + 1) / 2, seconds, None if handle is None else handle.trace


def fidelity(video: Tensor, reference: Tensor) -> tuple[float, float]:
    """PSNR in dB (infinite for equal clips) and SSIM of clips [T, H, W] in 0 .. 1."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    psnr = peak_signal_noise_ratio(video, reference, data_range=1.0)
    ssim = structural_similarity_index_measure(video[:, None], reference[:, None], data_range=1.0)
    assert isinstance(ssim, Tensor)
    return float(psnr), float(ssim)


def describe(policy: Policy | int | None) -> str:
    """The settings of a policy as text."""
    if policy is None:
        return "every step computed"
    if isinstance(policy, int):
        return f"{policy} steps, every one computed"
    if not isinstance(policy, AdaCache):
        return str(policy.describe())
    text = "codebook " + ", ".join(f"{threshold:g}: {rate}" for threshold, rate in policy.codebook.items())
    if policy.motion is not None:
        motion = policy.motion
        text += (
            f"; motion: steps {motion.window[0]} to {motion.window[1]}, scale {motion.scale:g}, "
            f"power {motion.power:g}, gradient weight {motion.gradient_weight:g}"
        )
    return text


def published_cache_bytes(model: STDiT3) -> int:
    """Bytes that the published code caches for one clip with guidance: a residual per sub-layer and row."""
    _, height, width = model.config.patch_size
    elements = 2 * FRAMES * (SIZE // height) * (SIZE // width) * model.config.hidden_size
    return SUBLAYERS * model.config.depth * elements * next(model.parameters()).element_size()


def _create(out: Path) -> None:
    """Creates the folder and checks that it can be written, before the work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"out: cannot create the folder {out}: {error.strerror or error}") from error
    for name in (REPORT, RESULTS):
        check_writable(out / name, "out")


@contextmanager
def _cpu_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress_bar(total: int, shown: bool) -> Iterator[Any]:
    from tqdm import tqdm

    # In a log every update is a new line, so updates are rare there.
    every = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, unit="clip", disable=not shown, mininterval=every, dynamic_ncols=True) as bar:
        yield bar


def _facts(model: STDiT3, flow: RectifiedFlow) -> dict[str, str]:
    choices = adacache_kernels.backend_report()
    used = {choice.backend for choice in choices if choice.device == "cpu"}
    config = model.config
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    return {
        "model": f"STDiT3, {config.depth} block pairs of width {config.hidden_size}, "
        f"{parameters:.2f} million parameters, clips of 16 frames, 32x32",
        "sampler": f"rectified flow, {flow.num_steps} steps, guidance {flow.guidance_scale:g} in one batch",
        "timing": "wall-clock time of the denoising loop, methods alternating in one process, "
        f"CPU threads: {torch.get_num_threads()}",
        "backend": ", ".join(sorted(used)),
        "versions": f"adacache-kernels {_version('adacache-kernels')}, torch {torch.__version__}, "
        f"Python {platform.python_version()} on {platform.machine()}",
    }


def _version(package: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
