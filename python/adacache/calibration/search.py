# SPDX-License-Identifier: Apache-2.0
"""Searches a codebook: simulates candidates on recorded runs, runs the best one on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adacache.calibration.recording import Doubles, Record, Recording
from adacache.calibration.runs import PROBED, Subject, judge, probe, record
from adacache.checks import number, refuse, whole
from adacache.files import write_json
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
"""Candidate rates, from the smallest distance to the largest."""
SHAPES = (0.5, 1.0, 2.0)
"""Candidate exponents of the spacing of a ladder's thresholds."""
SCALES = np.geomspace(0.003, 10.0, 240)
"""Candidate largest thresholds."""


def candidates() -> list[tuple[Doubles, NDArray[np.int64]]]:
    """Candidate codebooks, grouped by length: thresholds and rates [codebooks, entries]."""
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
    """The candidate with the smallest loss among those that compute at most `share` of the steps, or with the
    fewest computed steps among those with a loss of at most `error`; the middle one of equal candidates.

    Raises:
        ValueError: neither or both are given, or no candidate reaches the goal.
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
    """A codebook with scaled thresholds that computes at least `share` of the steps, and as few more as
    possible; the one with the smallest loss of equal candidates."""
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
    """Searches a codebook and evaluates it on held-out prompts, next to a known codebook and the known one
    scaled to as many computed steps.

    Args:
        prompts, held_out: arguments of `subject.generate`; the codebook is chosen on the first.
        share: largest share of computed steps; error: largest predicted output error (`Recording.loss`);
            like: a preset or codebook whose share of computed steps is the limit. Exactly one of the three.
        seed: seed of the first prompt; the next ones count up.
        recorder: the policy that records the runs.
        probed: number of prompts with six extra runs, which estimate the sensitivity (`probe`).
        say: receives a line per result.

    Returns:
        The content of the file: `codebook`, `num_steps`, `metric_part`, and `held_out`, the `Outcome` of the
        codebook ("chosen"), the known one ("known") and the scaled one ("scaled") as dicts.

    Raises:
        ValueError: an argument is wrong (before any run), or no codebook reaches the goal.
    """
    if not prompts or not held_out:
        raise ValueError(f"prompts, held_out: expected some of each, got {len(prompts)}, {len(held_out)}")
    if sum(goal is not None for goal in (share, error, like)) != 1:
        raise ValueError(
            f"share, error, like: expected exactly one, got share={share}, error={error}, like={like}"
        )
    whole(0)(seed, "seed")
    whole(0)(probed, "probed")
    if share is not None:
        _check_share(share, subject.num_steps)
    if error is not None:
        number(above=0)(error, "error")
    recorder = Record() if recorder is None else recorder
    seeds = list(range(seed, seed + len(prompts) + len(held_out)))
    known = codebook_of("open-sora/fast" if like is None else like)
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
        real = replace(recorder.measured, codebook=policy.codebook)
        outcome = judge(subject, real, kept, held_out, seeds[len(prompts) :], outputs, known_even)
        found[name] = outcome
        say(
            f"{name}, on {len(held_out)} held-out prompts: {outcome.steps:.1f} computed steps "
            f"({outcome.predicted_steps:.1f} predicted), error {outcome.error:.4f} "
            f"({outcome.predicted_error:.4f} predicted); {outcome.even_error:.4f} evenly spaced"
        )
    return {
        "made_by": "adacache calibrate",
        "model": subject.name,
        "num_steps": subject.num_steps,
        "metric_block": recorder.metric_block,
        "metric_part": recorder.metric_part,
        "codebook": [[threshold, rate] for threshold, rate in chosen.codebook.items()],
        "prompts": len(prompts),
        "held_out": {name: vars(outcome) for name, outcome in found.items()},
    }


def _check_share(share: float, num_steps: int) -> None:
    """Raises ValueError if no candidate can compute so few steps, whatever the video."""
    number(above=0, most=1)(share, "share")
    still = np.zeros((1, num_steps, num_steps))
    longest = AdaCache(codebook={1.0: max(rate for ladder in LADDERS for rate in ladder)})
    fewest = int(Recording(still, still[:, 0], still).computed(longest).sum())
    if share * num_steps < fewest - 1e-9:
        refuse("share", f"at least {fewest} of {num_steps} steps ({fewest / num_steps:.3g})", share)


def write(path: str | Path, found: dict[str, Any]) -> None:
    """Writes a calibration as JSON, for `enable`."""
    write_json(path, found)


def codebook_of(like: AdaCache | str) -> AdaCache:
    """Settings, or those of a preset of AdaCache without its motion regularisation."""
    if isinstance(like, AdaCache):
        return like
    policy = preset(like, None)
    if not isinstance(policy, AdaCache):
        refuse("like", "settings or a preset of AdaCache", like)
    return AdaCache(codebook=policy.codebook)
