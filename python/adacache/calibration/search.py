"""Finds a codebook: simulates candidates on recorded runs, and judges the best one on held-out prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adacache.calibration.recording import Doubles, Record, Recording
from adacache.calibration.runs import PROBED, Subject, judge, probe, record
from adacache.policies import AdaCache, preset

LADDERS: tuple[tuple[int, ...], ...] = (
    (6, 5, 4, 3, 2, 1),
    (10, 8, 6, 4, 3, 2, 1),
    (8, 6, 4, 2, 1),
    (5, 3, 2, 1),
    (4, 3, 2, 1),
    (4, 2, 1),
    (3, 2, 1),
    (2, 1),
    (12, 9, 6, 4, 2),
    (6, 4, 2),
    (4, 3, 2),
    (3, 2),
    (8, 5, 3),
    (6, 4, 3),
    (5, 4, 3),
    (4, 3),
    (8, 6, 4),
    (6, 4),
    (5, 4),
    (8, 6),
    *((rate,) for rate in (2, 3, 4, 5, 6, 8)),
)
"""Rates that are tried, from the smallest distance to the greatest."""
SHAPES = (0.5, 1.0, 2.0)
"""Powers of the even spacing of a ladder's thresholds that are tried."""
SCALES = np.geomspace(0.003, 10.0, 240)
"""Greatest thresholds that are tried."""


def candidates() -> list[tuple[Doubles, NDArray[np.int64]]]:
    """Codebooks by length: thresholds and rates [codebooks, entries]."""
    found = []
    for ladder in LADDERS:
        entries = len(ladder)
        thresholds = []
        for shape in SHAPES if entries > 1 else SHAPES[:1]:
            spacing = (np.arange(1, entries) / max(1, entries - 1)) ** shape
            thresholds += [[*(float(f"{s * scale:.3g}") for s in spacing), 1e9] for scale in SCALES]
            if entries == 1:
                thresholds = thresholds[:1]
        rows = np.unique(np.array(thresholds), axis=0)
        rows = rows[(np.diff(rows, axis=1) > 0).all(axis=1)]
        found.append((rows, np.broadcast_to(np.array(ladder), rows.shape).copy()))
    return found


def choose(recording: Recording, *, share: float | None = None, error: float | None = None) -> AdaCache:
    """The candidate of the least loss among those that compute at most `share` of the steps, or the one of
    the fewest computed steps among those whose loss is at most `error`; of equal ones, that in the middle.

    Raises:
        ValueError: not one of the two is given, or no candidate reaches it.
    """
    if (share is None) == (error is None):
        raise ValueError(f"share: expected either share or error, got share={share}, error={error}")
    books, shares, losses = [], [], []
    for thresholds, rates in candidates():
        computed = recording.computed_by(thresholds, rates)
        books += list(zip(thresholds, rates, strict=True))
        shares.append(computed.mean(axis=(1, 2)))
        losses.append(recording.loss(computed))
    kept, loss = np.concatenate(shares), np.concatenate(losses)
    if share is not None:
        first, second, wanted = loss, kept, kept <= share + 1e-9
    else:
        assert error is not None
        first, second, wanted = kept, loss, loss <= error + 1e-12
    if not wanted.any():
        goal = f"share={share}" if share is not None else f"error={error}"
        name = goal.partition("=")[0]
        raise ValueError(f"{name}: no codebook reaches {goal} of {recording.num_steps} steps")
    order = [int(i) for i in np.lexsort((second, first)) if wanted[i]]
    best = order[0]
    equal = [i for i in order if np.allclose((first[i], second[i]), (first[best], second[best]), rtol=1e-9)]
    chosen_thresholds, chosen_rates = books[sorted(equal)[len(equal) // 2]]
    pairs = zip(chosen_thresholds, chosen_rates, strict=True)
    return AdaCache(codebook={float(threshold): int(rate) for threshold, rate in pairs})


def scale(recording: Recording, known: AdaCache, share: float) -> AdaCache:
    """A codebook with its thresholds multiplied, such that it computes at least `share` of the steps and as
    few more as can be; of equal ones, that of the least loss."""
    thresholds, rates = np.array(list(known.codebook)), np.array(list(known.codebook.values()))
    books = np.outer(np.geomspace(100, 0.001, 600), thresholds)
    computed = recording.computed_by(books, np.broadcast_to(rates, books.shape).copy())
    shares = computed.mean(axis=(1, 2))
    enough = shares >= share - 1e-9
    order = np.lexsort((recording.loss(computed), np.where(enough, shares, 2.0)))
    best = books[order[0]]
    return AdaCache(codebook={float(f"{t:.3g}"): int(rate) for t, rate in zip(best, rates, strict=True)})


def calibrate(
    subject: Subject,
    prompts: Sequence[Any],
    held_out: Sequence[Any],
    *,
    share: float | None = None,
    error: float | None = None,
    like: str | AdaCache | None = None,
    seed: int = 0,
    recorder: Record | None = None,
    probed: int = PROBED,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Finds a codebook, and judges it and a known one on held-out prompts, this also with its thresholds
    multiplied such that it computes as many steps on these.

    Args:
        prompts, held_out: whatever `subject.generate` takes; the codebook is chosen on the first.
        share: of the steps that is to be computed at most; error: what the output may be off by, as predicted
            (see `Recording.loss`); or like: a codebook whose share is to be kept. One of the three.
        seed: of the first prompt's noise; the next ones count on.
        recorder: how the runs are recorded.
        probed: prompts with which it is found out where reusing harms the output most (`probe`), six runs
            each.
        say: takes a line for everything that was found.

    Returns:
        What `write` writes: `codebook`, `num_steps`, `metric_part`, and `held_out`, the `Outcome` of the
        codebook ("chosen"), of the known one ("known") and of this with other thresholds ("scaled") as dicts.

    Raises:
        ValueError: too few prompts, or no codebook does what is asked.
    """
    if not prompts or not held_out:
        raise ValueError(
            f"prompts: expected some to choose on and some held out, got {len(prompts)}, {len(held_out)}"
        )
    recorder = Record() if recorder is None else recorder
    seeds = list(range(seed, seed + len(prompts) + len(held_out)))
    known = AdaCache(codebook=preset("open-sora/fast", 30).codebook)
    if isinstance(like, AdaCache):
        known = like
    elif like is not None:
        known = AdaCache(codebook=preset(like, None).codebook)
    recording, full = record(subject, prompts, seeds[: len(prompts)], recorder)
    recording = probe(subject, prompts[:probed], seeds[:probed], full[:probed], recording)
    if like is not None:
        share = float(recording.computed(known).mean())
    chosen = choose(recording, share=share, error=error)
    say(f"{len(prompts)} full runs of {subject.num_steps} steps; chosen: {dict(chosen.codebook)}")

    kept, outputs = record(subject, held_out, seeds[len(prompts) :], recorder)
    kept = replace(kept, sensitivity=recording.sensitivity)
    found, known_even = {}, dict[tuple[int, int], float]()
    scaled = scale(kept, known, float(kept.computed(chosen).mean()))
    for name, policy in (("chosen", chosen), ("known", known), ("scaled", scaled)):
        real = AdaCache(codebook=policy.codebook, metric_part=recorder.metric_part)
        outcome = judge(subject, real, kept, held_out, seeds[len(prompts) :], outputs, known_even)
        found[name] = outcome
        say(
            f"{name}, on {len(held_out)} held-out prompts: {outcome.steps:.1f} computed steps "
            f"({outcome.predicted_steps:.1f} predicted), error {outcome.error:.4f} "
            f"({outcome.predicted_error:.4f} predicted); {outcome.even_error:.4f} at even distances"
        )
    return {
        "made_by": "adacache calibrate",
        "model": subject.name,
        "num_steps": subject.num_steps,
        "metric_part": recorder.metric_part,
        "codebook": [[threshold, rate] for threshold, rate in chosen.codebook.items()],
        "prompts": len(prompts),
        "held_out": {name: vars(outcome) for name, outcome in found.items()},
    }


def write(path: str | Path, found: dict[str, Any]) -> None:
    """Writes a calibration as the JSON that `enable` takes by path."""
    Path(path).write_text(json.dumps(found, indent=1) + "\n")
