# SPDX-License-Identifier: Apache-2.0
"""Runs caching methods on a model's prompts, and the table, plot and page of what comes out."""

from __future__ import annotations

import ast
import base64
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import Tensor

from adacache import policies
from adacache.api import disable, enable
from adacache.calibration import Subject, psnr
from adacache.commands.report import Page, gif
from adacache.files import MEBIBYTE
from adacache.policies import Named

FEWER, FULL = "fewer steps", "all steps"
SIDE = 256
"""Clips are shown with at most this height, in screen pixels."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        name: the text.
        settings: a policy, or a preset or file by name; None: `steps` steps without caching.
        steps: None with settings.
    """

    name: str
    settings: Any = None
    steps: int | None = None

    def policy(self, num_steps: int) -> Any:
        """The policy for a number of steps; None: no caching."""
        return self.settings.policy(num_steps) if isinstance(self.settings, Named) else self.settings


@dataclass
class Outcome:
    """A method's clips; each list has one entry per prompt.

    Attributes:
        computed: steps in which the model, or at least one of its blocks, was computed.
        seconds: of the generation.
        psnr: in dB against the clip of all steps; inf if they are equal.
        cache_bytes: kept at the end, at most over the prompts.
    """

    method: Method
    computed: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    clips: list[Tensor] = field(default_factory=list)
    cache_bytes: int = 0


@dataclass
class Comparison:
    """All outcomes; the first is that of all steps."""

    subject: Subject
    prompts: list[str]
    seed: int
    outcomes: list[Outcome] = field(default_factory=list)


def method_of(text: str, option: str = "--methods") -> Method:
    """Parses a method such as "TaylorSeer(interval=3)", "open-sora/fast" or "paths.json(budget=10)".

    Args:
        option: name of the option that gave it.

    Raises:
        ValueError: it is none, or its arguments do not fit.
    """
    name, bracket, rest = text.strip().partition("(")
    classes = {
        one: getattr(policies, one)
        for one in sorted(policies.__all__)
        if hasattr(getattr(policies, one), "start") and one != "Policy"
    }
    is_file = name.endswith(".json")
    if name in classes or is_file or name in policies.preset_names():
        try:
            given = _arguments(f"f({rest}") if bracket else {}
            if name in classes:
                return Method(text, classes[name](**given))
            settings = Named(Path(name) if is_file else name, **given)
            settings.policy(None)
            return Method(text, settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{option}: {text}: {error}") from error
    raise ValueError(
        f"{option}: expected a class ({', '.join(classes)}), a preset (adacache.preset_names()) or a .json "
        f"file, got {text!r}"
    )


def _arguments(call: str) -> dict[str, Any]:
    """The keyword arguments of a call whose values are literals."""
    try:
        tree = ast.parse(call, mode="eval").body
        if not isinstance(tree, ast.Call) or tree.args or any(one.arg is None for one in tree.keywords):
            raise ValueError
        return {str(one.arg): ast.literal_eval(one.value) for one in tree.keywords}
    except (ValueError, SyntaxError) as error:
        raise ValueError("expected arguments such as (interval=3, order=1)") from error


def compare(
    subject: Subject,
    prompts: Sequence[Any],
    methods: Sequence[Method],
    *,
    seed: int = 0,
    say: Say = lambda line: None,
) -> Comparison:
    """Generates every prompt with all steps, with every method, and with as few steps as each computes.

    Args:
        prompts: at least one.
        methods: with settings; sampling with fewer steps is added if the subject can do it.
        seed: of the first prompt; the next ones count up.
        say: gets lines of progress.

    Raises:
        ValueError: a method does not fit the model or the schedule.
    """
    found = Comparison(subject, [str(prompt) for prompt in prompts], seed)
    full = Outcome(Method(FULL, steps=subject.num_steps))
    found.outcomes.append(full)
    _generate(subject, prompts, seed, full, full, say)
    for method in methods:
        outcome = Outcome(method)
        found.outcomes.append(outcome)
        _generate(subject, prompts, seed, outcome, full, say)
    if subject.generate_with is not None:
        counts = {max(1, round(fmean(one.computed))) for one in found.outcomes[1:]} - {subject.num_steps}
        for count in sorted(counts, reverse=True):
            outcome = Outcome(Method(FEWER, steps=count))
            found.outcomes.append(outcome)
            _generate(subject, prompts, seed, outcome, full, say)
    return found


def _generate(
    subject: Subject, prompts: Sequence[Any], seed: int, outcome: Outcome, full: Outcome, say: Say
) -> None:
    for number, prompt in enumerate(prompts):
        clip, computed, seconds, kept = _one(subject, outcome.method, prompt, seed + number)
        reference = full.clips[number] if outcome is not full else clip
        equal = torch.equal(clip, reference)
        outcome.clips.append(clip)
        outcome.computed.append(computed)
        outcome.seconds.append(seconds)
        outcome.psnr.append(math.inf if equal else psnr(clip, reference, _peak(subject, full)))
        outcome.cache_bytes = max(outcome.cache_bytes, kept)
        say(
            f"{outcome.method.name}, prompt {number + 1} of {len(prompts)}: {computed:g} of "
            f"{subject.num_steps} steps, {seconds:.1f} s"
            + ("" if outcome is full else f", {_decibel(outcome.psnr[-1])} dB")
        )


def _one(subject: Subject, method: Method, prompt: Any, seed: int) -> tuple[Tensor, float, float, int]:
    """Clip, computed steps, seconds and cached bytes of one generation."""
    if method.steps is not None:
        began = time.perf_counter()
        if method.steps == subject.num_steps:
            clip = subject.generate(prompt, seed)
        else:
            assert subject.generate_with is not None
            clip = subject.generate_with(prompt, seed, method.steps)
        return clip.detach().cpu(), float(method.steps), time.perf_counter() - began, 0
    handle = enable(subject.model, method.policy(subject.num_steps), num_steps=subject.num_steps)
    try:
        began = time.perf_counter()
        clip = subject.generate(prompt, seed)
        seconds = time.perf_counter() - began
        trace = handle.trace
        computed = sum(sum(step) / len(step) for step in trace.computed)
        return clip.detach().cpu(), computed, seconds, trace.cache_bytes
    finally:
        disable(subject.model)


def _peak(subject: Subject, full: Outcome) -> float:
    return subject.peak or max(float(clip.max() - clip.min()) for clip in full.clips)


def _decibel(value: float) -> str:
    return "same" if math.isinf(value) else f"{value:.1f}"


def _mean(values: Sequence[float]) -> str:
    if any(map(math.isinf, values)):
        return "same"
    return f"{fmean(values):.1f}" + (
        f" ± {stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
    )


def table(found: Comparison) -> tuple[list[str], list[list[Any]]]:
    """Headings and one row per method, the best PSNR first."""
    headings = ["method", "computed steps", "seconds", "speedup", "PSNR dB", "worst", "cache MiB"]
    whole_time = median(found.outcomes[0].seconds)
    rows = []
    for one in sorted(found.outcomes, key=lambda one: -fmean(one.psnr)):
        rows.append(
            [
                one.method.name,
                f"{fmean(one.computed):.1f} of {found.subject.num_steps}",
                f"{median(one.seconds):.2f}",
                f"{whole_time / median(one.seconds):.2f}x",
                _mean(one.psnr),
                _decibel(min(one.psnr)),
                f"{one.cache_bytes / MEBIBYTE:.1f}",
            ]
        )
    return headings, rows


def curves(found: Comparison) -> dict[str, list[tuple[float, float]]]:
    """Per method, (mean computed steps, mean PSNR) of its settings."""
    points: dict[str, list[tuple[float, float]]] = {}
    for one in found.outcomes[1:]:
        if not any(map(math.isinf, one.psnr)):
            name = one.method.name.partition("(")[0]
            points.setdefault(name, []).append((fmean(one.computed), fmean(one.psnr)))
    return {name: sorted(some) for name, some in sorted(points.items(), key=lambda item: item[0] != FEWER)}


def values(found: Comparison) -> dict[str, Any]:
    """The results as JSON."""

    def settings_of(method: Method) -> Any:
        policy = method.policy(found.subject.num_steps)
        return None if policy is None else policy.describe()

    return {
        "subject": found.subject.name,
        "num_steps": found.subject.num_steps,
        "prompts": found.prompts,
        "seed": found.seed,
        "methods": [
            {
                "method": one.method.name,
                "settings": settings_of(one.method),
                "steps": one.method.steps,
                "computed": one.computed,
                "seconds": one.seconds,
                # JSON has no infinity.
                "psnr": [None if math.isinf(value) else value for value in one.psnr],
                "cache_bytes": one.cache_bytes,
            }
            for one in found.outcomes
        ],
    }


def write_page(found: Comparison, path: Path, plot: Path, fps: float) -> None:
    """Writes one self-contained HTML file: table, plot, clips side by side."""
    page = Page(f"Caching methods on {found.subject.name}")
    page.text(
        f"{len(found.prompts)} prompts, each generated from the same noise with {found.subject.num_steps} "
        "steps, with each method, and with fewer steps. PSNR compares with the clip of all steps: mean over "
        "the prompts ± standard error, and the worst. Seconds: median."
    )
    page.table(*table(found))
    image = base64.b64encode(plot.read_bytes()).decode()
    page.add(f'<img class=plot alt="PSNR against computed steps" src="data:image/png;base64,{image}">')
    page.heading("Clips")
    pixels = found.subject.peak is not None
    shown = [[frames(one.clips[number]) for one in found.outcomes] for number in range(len(found.prompts))]
    if not pixels or any(clip is None for clips in shown for clip in clips):
        page.text("The model's outputs are latents, which cannot be shown.")
    else:
        for number, (prompt, clips) in enumerate(zip(found.prompts, shown, strict=True)):
            page.add(f"<p>{escape(prompt)} <span class=note>seed {found.seed + number}</span></p>")
            cells = []
            for one, clip in zip(found.outcomes, clips, strict=True):
                assert clip is not None
                sized = _sized(clip)
                data = base64.b64encode(gif([sized], scale=1, milliseconds=1000 / fps)).decode()
                below = f"{escape(one.method.name)}<br>{one.computed[number]:g} steps"
                if one is not found.outcomes[0]:
                    unit = "" if math.isinf(one.psnr[number]) else " dB"
                    below += f", {_decibel(one.psnr[number])}{unit}"
                cells.append(
                    f'<figure style="width:{sized.shape[2]}px"><img class=clip '
                    f'alt="{escape(prompt)}: {escape(one.method.name)}" '
                    f'src="data:image/gif;base64,{data}"><figcaption class=note>{below}</figcaption></figure>'
                )
            page.add(f'<div class="wide row">{"".join(cells)}</div>')
    page.write(path)


def frames(clip: Tensor) -> Tensor | None:
    """A clip as [T, H, W] or [T, H, W, 3] in 0 .. 1; None if it is not one of pixels.

    Args:
        clip: [1, C, T, H, W] or, if that has not 1 or 3 channels, [1, T, C, H, W]; in 0 .. 1 or -1 .. 1.
    """
    if clip.ndim != 5 or len(clip) != 1:
        return None
    one = clip[0].float()
    if one.shape[0] in (1, 3):
        one = one.movedim(0, -1)
    elif one.shape[1] in (1, 3):
        one = one.movedim(1, -1)
    else:
        return None
    if float(one.min()) < -0.01:
        one = (one + 1) / 2
    return (one[..., 0] if one.shape[-1] == 1 else one).clamp(0, 1)


def _sized(clip: Tensor) -> Tensor:
    """A clip [T, H, W] or [T, H, W, 3] of about `SIDE` rows: pixels repeated or averaged."""
    rows = clip.shape[1]
    if rows <= SIDE:
        times = max(1, SIDE // rows // 2)
        return clip.repeat_interleave(times, 1).repeat_interleave(times, 2)
    planes = clip[:, None] if clip.ndim == 3 else clip.movedim(-1, 1)
    width = round(clip.shape[2] * SIDE / rows)
    small = torch.nn.functional.interpolate(planes, size=(SIDE, width), mode="area")
    return small[:, 0] if clip.ndim == 3 else small.movedim(1, -1)
