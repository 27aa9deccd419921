# SPDX-License-Identifier: Apache-2.0
"""Quality at equal cost: every caching method on one model, compared with "fewer steps".

    python benchmarks/methods.py digits --paths python/adacache/digits/paths.json

Each row is one method with one setting. Thresholds are tuned on calibration prompts until the mean number of
computed steps equals the budget; rows named "published" use the published setting. PSNR compares with the run
that computes every step, on the same prompt and noise. Each clip is generated separately through
`adacache.enable`. Each finished row is written to the JSON file; rows in the file are not run again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, quantiles, stdev
from typing import Any

import adacache
import numpy as np
import torch
from adacache.calibration import Subject, psnr
from adacache.calibration.clips import Clip, projected
from adacache.calibration.paths import minimax
from adacache.calibration.trajectory import trajectory
from adacache.calibration.windows import Windows
from adacache.commands.options import input_file, whole_number
from adacache.commands.table import print_table
from adacache.files import read_json, write_json
from adacache.plots import draw_curves
from adacache.policies import MagRatios, planned
from adacache.policies.adaptive_path import adaptive_path
from adacache.policies.presets import preset
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
SHARES = (1 / 2, 2 / 5, 1 / 3, 4 / 15, 1 / 5)
"""Computed steps over all steps, if no file of paths states the budgets."""
TUNING = 3
"""Number of clips for tuning a threshold."""
TOLERANCE = 0.012
"""Tuning ends at this distance between the mean share of computed steps and the budget's; the row states the
mean."""


@dataclass(frozen=True)
class Model:
    """The model and the prompts of a comparison.

    Attributes:
        subject: model and sampler.
        tests: (prompt, motion class, seed) of each clip.
        tuning: (prompt, seed) of the tuning clips, disjoint from `tests`.
        judge: (clips, prompts) -> additional figures.
    """

    subject: Subject
    tests: Sequence[tuple[Any, str, int]]
    tuning: Sequence[tuple[Any, int]]
    judge: Callable[[Tensor, Sequence[Any]], dict[str, float]]


@dataclass(frozen=True)
class Row:
    """One method with one setting. With policy None, the sampler runs `steps` steps without caching."""

    method: str
    setting: str
    policy: Callable[[], Any] | None = None
    steps: int | None = None
    tune: Callable[[float], Any] | None = None
    """Makes the policy of a threshold, which is tuned to `steps` computed steps."""

    @property
    def name(self) -> str:
        return f"{self.method} | {self.setting}"


def _load(name: str, path: Path) -> Any:
    """A module of examples/."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def digits(clips: int, num_steps: int) -> Model:
    """The shipped digit model with `clips` held-out prompts, balanced over motions and backgrounds."""
    from adacache.digits.captions import BACKGROUNDS, MOTIONS, held_out_prompts
    from adacache.digits.subject import subject

    evaluate = _load("evaluate", ROOT / "examples" / "digits" / "evaluate.py")
    found, prompts = subject(num_steps)
    cells = [(motion, ground) for motion in MOTIONS for ground in BACKGROUNDS]
    tests = []
    for motion, ground in cells:
        these = [p for p in held_out_prompts() if (p.motion, p.background) == (motion, ground)]
        tests += [(p, motion) for p in these[: max(1, clips // len(cells))]]
    reader = evaluate.Reader()

    def judge(video: Tensor, wanted: Sequence[Any]) -> dict[str, float]:
        report = reader.report(video, wanted)
        return {"digit accuracy": report.digit_accuracy, "speed correlation": report.speed_correlation}

    with_seeds = [(prompt, motion, 1000 + number) for number, (prompt, motion) in enumerate(tests)]
    return Model(found, with_seeds, [(p, 500 + number) for number, p in enumerate(prompts[-12:])], judge)


def scenes(kind: str, clips: int, num_steps: int) -> Model:
    """A model of examples/scenes."""
    sys.path.insert(0, str(ROOT / "examples"))
    module = importlib.import_module("scenes.subjects")
    return Model(*module.benchmark(kind, clips, num_steps))


MODELS: dict[str, Callable[[int, int], Model]] = {
    "digits": digits,
    "wan_euler": lambda clips, steps: scenes("wan_euler", clips, steps),
    "wan_unipc": lambda clips, steps: scenes("wan_unipc", clips, steps),
    "latte": lambda clips, steps: scenes("latte", clips, steps),
}
STEPS = {"digits": 30, "wan_euler": 50, "wan_unipc": 50, "latte": 50}


def rows(model: Model, paths: Path | None) -> Iterator[Row]:
    """All rows of a model's table."""
    n = model.subject.num_steps
    known = None if paths is None else {int(one) for one in read_json(paths, lambda v, _: v)["budgets"]}
    budgets = sorted(known or {max(2, round(n * share)) for share in SHARES}, reverse=True)
    for k in budgets:
        yield Row("fewer steps", str(k), steps=k)
    if paths is not None:
        for k in budgets:
            yield Row("planned path", str(k), lambda k=k: planned(paths, budget=k))
        for k in adaptive_budgets(paths):
            yield Row("adaptive path", f"mean {k}", lambda k=k: adaptive_path(paths, budget=k))
    for interval in (2, 3, 4, 5):
        yield Row("even reuse", f"every {interval}", lambda i=interval: adacache.Interval(interval=i))
        yield Row(
            "TaylorSeer, order 1", f"every {interval}", lambda i=interval: adacache.TaylorSeer(interval=i)
        )
        yield Row("FoCa", f"every {interval}", lambda i=interval: adacache.FoCa(interval=i))
    for growth in (0.75, 3.0):
        yield Row("Spectrum", f"published, growth {growth}", lambda g=growth: adacache.Spectrum(growth=g))
    lemica = _lemica(model, budgets)
    for k, computed in lemica.items():
        yield Row("LeMiCa-like", str(k), lambda c=computed: adacache.Replay(c))
    tuned_to = (budgets[0], budgets[len(budgets) // 2])
    for k in tuned_to:
        yield Row("AdaCache", f"scaled codebook, {k}", steps=k, tune=lambda s: _adacache(s, n))
        yield Row("TeaCache", f"tuned, {k}", steps=k, tune=lambda s: adacache.TeaCache(threshold=s))
        yield Row("FBCache", f"tuned, {k}", steps=k, tune=lambda s: adacache.FirstBlock(s))
        yield Row("DiCache", f"tuned, {k}", steps=k, tune=lambda s: adacache.DiCache(s))
        early = max(1, round(0.2 * n))
        yield Row("EasyCache", f"tuned, {k}", steps=k, tune=lambda s, e=early: adacache.EasyCache(s, first=e))
        yield Row("SeaCache", f"tuned, {k}", steps=k, tune=lambda s: adacache.SeaCache(s, most=5))
    ratios = _ratios(model)
    for k in tuned_to:
        yield Row(
            "MagCache", f"tuned, {k}", steps=k, tune=lambda s: adacache.MagCache(ratios, threshold=s, most=6)
        )
    yield Row("MagCache", "published", lambda: adacache.MagCache(ratios))
    yield Row("PAB", "published", lambda: _pab(model))
    yield Row("BWCache", "published", adacache.BWCache)


def adaptive_budgets(paths: Path) -> list[int]:
    """The mean budgets of a file of paths, if it was calibrated with --adaptive."""
    found = read_json(paths, lambda v, _: v).get("adaptive", {"prices": {}})
    return sorted((int(one) for one in found["prices"]), reverse=True)


def _adacache(scale: float, num_steps: int) -> Any:
    """The published fast codebook, with thresholds multiplied by a factor and rates for this schedule."""
    base = preset("open-sora/fast", 30)
    assert isinstance(base, adacache.AdaCache)
    rates = {t * scale: max(1, round(r * num_steps / 30)) for t, r in base.codebook.items()}
    return adacache.AdaCache(codebook=rates)


def _pab(model: Model) -> Any:
    from adacache.integrations.pipelines import transformers

    target = model.subject.model
    network = target if isinstance(target, torch.nn.Module) else next(iter(transformers(target).values()))
    known = adacache.adapters.registry.spec_for(network)[0].sites(network).output_parts
    return adacache.PAB({part: reuse for part, reuse in adacache.PAB.SLOW.items() if part in known})


def _ratios(model: Model) -> list[float]:
    traces = []
    for prompt, seed in model.tuning[:2]:
        handle = adacache.enable(model.subject.model, MagRatios(), num_steps=model.subject.num_steps)
        try:
            model.subject.generate(prompt, seed)
            traces.append(handle.trace)
        finally:
            adacache.disable(model.subject.model)
    return MagRatios.ratios(*traces)


def _lemica(model: Model, budgets: Sequence[int]) -> dict[int, list[int]]:
    """Paths that minimize the largest window error of reuse. Errors are computed from recorded outputs; the
    published method runs the model for each window."""
    n = model.subject.num_steps
    clips = [Clip(p, seed, trajectory(model.subject, p, seed)) for p, seed in model.tuning[:4]]
    windows = Windows(projected(clips), np.ones(n), n)
    cost = np.full((n + 1, n + 1), np.inf)
    for i in range(n):
        for j in range(i + 1, n + 1):
            cost[i, j] = np.linalg.norm(windows.terms(-1, i, j)[0], axis=1).mean()
    return {k: [step + 1 for step in minimax(cost, k)[0]] for k in budgets}


# Running.


def run_clip(model: Model, policy: Any, prompt: Any, seed: int) -> tuple[Tensor, float, float]:
    """Clip, computed steps and seconds."""
    subject = model.subject
    handle = adacache.enable(subject.model, policy, num_steps=subject.num_steps)
    try:
        began = time.perf_counter()
        clip = subject.generate(prompt, seed)
        seconds = time.perf_counter() - began
        trace = handle.trace
        return clip, float(sum(any(step) for step in trace.computed)), seconds
    finally:
        adacache.disable(subject.model)


def tuned(model: Model, make: Callable[[float], Any], target: float) -> float:
    """The threshold at which the tuning clips compute `target` steps on average."""

    def steps(threshold: float) -> float:
        policy = make(threshold)
        return fmean(run_clip(model, policy, p, seed)[1] for p, seed in model.tuning[:TUNING])

    low, high = 1e-3, 8.0  # logarithmic bisection; low thresholds compute more steps
    best, gap = high, math.inf
    for _ in range(9):
        middle = math.sqrt(low * high)
        found = steps(middle)
        if abs(found - target) < gap:
            best, gap = middle, abs(found - target)
        if gap <= TOLERANCE * model.subject.num_steps:
            break
        low, high = (middle, high) if found > target else (low, middle)
    return best


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def measure(model: Model, row: Row, full: Sequence[Tensor], full_flops: int) -> dict[str, Any]:
    """One row of the table."""
    subject, threshold = model.subject, None
    if row.tune is not None:
        assert row.steps is not None
        threshold = tuned(model, row.tune, row.steps)
    make = row.policy if row.tune is None else lambda: row.tune(threshold)  # type: ignore[misc]

    def run(prompt: Any, seed: int) -> tuple[Tensor, float, float]:
        if make is not None:
            return run_clip(model, make(), prompt, seed)
        assert subject.generate_with is not None
        assert row.steps is not None
        began = time.perf_counter()
        clip = subject.generate_with(prompt, seed, row.steps)
        return clip, float(row.steps), time.perf_counter() - began

    clips, steps, seconds = zip(*(run(prompt, seed) for prompt, _, seed in model.tests), strict=True)
    prompt, _, seed = model.tests[0]
    return {
        "method": row.method,
        "setting": row.setting,
        "threshold": threshold,
        "steps": fmean(steps),
        "computed share": fmean(steps) / subject.num_steps,
        # Counted on the first clip, and scaled where clips compute different numbers of steps.
        "FLOPs share": flops(lambda: run(prompt, seed)) / full_flops * fmean(steps) / steps[0],
        "seconds": sorted(seconds)[len(seconds) // 2],
        **figures(model, clips, full),
        **model.judge(torch.cat([clip.float().cpu() for clip in clips]), [p for p, _, _ in model.tests]),
    }


def figures(model: Model, clips: Sequence[Tensor], full: Sequence[Tensor]) -> dict[str, Any]:
    """PSNR and SSIM of clips."""
    peak = model.subject.peak or max(float(one.max() - one.min()) for one in full)
    psnrs = [psnr(a, b, peak) for a, b in zip(clips, full, strict=True)]
    errors = [float((a.double() - b.double()).square().mean()) for a, b in zip(clips, full, strict=True)]
    classes = sorted({motion for _, motion, _ in model.tests})
    by_class = {
        one: fmean(p for p, (_, motion, _) in zip(psnrs, model.tests, strict=True) if motion == one)
        for one in classes
    }
    return {
        "PSNR": fmean(psnrs),
        "PSNR standard error": stdev(psnrs) / math.sqrt(len(psnrs)) if len(psnrs) > 1 else 0.0,
        "PSNR worst class": min(by_class.values()),
        "PSNR worst clip": min(psnrs),
        "PSNR 10th percentile": quantiles(psnrs, n=10)[0] if len(psnrs) > 1 else psnrs[0],
        "PSNR of mean error": 10 * math.log10(peak**2 / fmean(errors)) if any(errors) else 120.0,
        "PSNR by class": by_class,
        "PSNR by clip": [round(one, 3) for one in psnrs],
        "SSIM": fmean(_ssim(a, b, peak) for a, b in zip(clips, full, strict=True)),
    }


def reference(model: Model, steps: int, full: Sequence[Tensor]) -> dict[str, Any]:
    """PSNR of the full clips against those of more steps. A gain far above it is smaller than the sampler's
    own error."""
    generate = model.subject.generate_with
    assert generate is not None
    finer = [generate(prompt, seed, steps) for prompt, _, seed in model.tests]
    return {"steps": steps, "PSNR": figures(model, full, finer)["PSNR"]}


def _ssim(a: Tensor, b: Tensor, peak: float) -> float:
    from torchmetrics.functional.image import structural_similarity_index_measure

    made, wanted = (x.float().cpu().movedim(2, 1).flatten(0, 1) for x in (a, b))
    found = structural_similarity_index_measure(made, wanted, data_range=peak)
    assert isinstance(found, Tensor)
    return float(found)


def table(results: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows, sorted by PSNR, best first."""
    headings = [
        "method",
        "setting",
        "steps",
        "FLOPs",
        "seconds",
        "PSNR dB",
        "worst class",
        "10th pct",
        "SSIM",
    ]
    ordered = sorted(results["rows"].values(), key=lambda row: -row["PSNR"])
    return headings, [
        [
            row["method"],
            row["setting"],
            f"{row['steps']:.1f}",
            f"{row['FLOPs share']:.0%}",
            f"{row['seconds']:.2f}",
            f"{row['PSNR']:.1f} ± {row['PSNR standard error']:.1f}",
            f"{row['PSNR worst class']:.1f}",
            f"{row['PSNR 10th percentile']:.1f}",
            f"{row['SSIM']:.4f}",
        ]
        for row in ordered
    ]


def curves(results: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Per method, (FLOPs share, PSNR)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in results["rows"].values():
        found.setdefault(row["method"], []).append((row["FLOPs share"], row["PSNR"]))
    return {method: sorted(points) for method, points in found.items()}


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--paths", type=input_file, help="file of planned paths from `adacache calibrate`")
    parser.add_argument("--steps", type=whole_number(2), help="denoising steps (default: 30 digits, else 50)")
    parser.add_argument("--clips", type=whole_number(1), default=36, help="test clips (default: %(default)s)")
    parser.add_argument("--only", nargs="+", help="methods to run, by the start of their names")
    parser.add_argument(
        "--reference",
        type=whole_number(2),
        help="also compare the full clips with those of this many steps: the error of the sampler itself",
    )
    parser.add_argument("--quick", action="store_true", help="9 clips, fewer steps and the planned path only")
    parser.add_argument(
        "--out", type=Path, help="JSON (default: benchmarks/results/methods_MODEL_STEPS.json)"
    )
    parser.add_argument("--plot", type=Path, help="image: PSNR against the share of FLOPs")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    steps = given.steps or STEPS[given.model]
    count = 9 if given.quick else given.clips
    only = ["fewer steps", "planned path"] if given.quick else given.only
    out = given.out or ROOT / "benchmarks" / "results" / f"methods_{given.model}_{steps}.json"
    model = MODELS[given.model](count, steps)
    results: dict[str, Any] = {"model": given.model, "steps": steps, "clips": len(model.tests), "rows": {}}
    if out.exists():
        kept = json.loads(out.read_text())
        if any(kept[key] != results[key] for key in ("model", "steps", "clips")):
            raise SystemExit(f"--out: {out} contains another run; remove it or choose another file")
        results = kept
    full = [model.subject.generate(prompt, seed) for prompt, _, seed in model.tests]
    prompt, _, seed = model.tests[0]
    full_flops = flops(lambda: model.subject.generate(prompt, seed))
    for row in rows(model, given.paths):
        if row.name in results["rows"] or (only and not row.method.startswith(tuple(only))):
            continue
        found = results["rows"][row.name] = measure(model, row, full, full_flops)
        print(f"{row.name}: {found['steps']:.1f} steps, {found['PSNR']:.2f} dB", file=sys.stderr, flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, results)
    if given.reference:
        results["reference"] = reference(model, given.reference, full)
        write_json(out, results)
    print_table(*table(results))
    if "reference" in results:
        print(
            f"All {steps} steps against {results['reference']['steps']} steps: "
            f"{results['reference']['PSNR']:.1f} dB"
        )
    if given.plot:
        draw_curves(curves(results), given.plot, "share of FLOPs", "PSNR in dB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
