# SPDX-License-Identifier: Apache-2.0
"""The statistics of a user study: sign test and confidence interval per pair of methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from adacache.checks import anything, array, fields, number, text, whole
from adacache.files import read_json

FORMAT = 1
CHOICES = ("left", "right", "same")
CONFIDENCE = 0.95

Results = dict[str, dict[str, Any]]
"""The content of result files by path."""


@dataclass(frozen=True)
class Votes:
    """The votes on two methods.

    Attributes:
        first, second: the methods.
        wins: votes for `first`; losses: votes for `second`; same: votes for neither.
        participants: numbers of participants with more votes for `first`, and for `second`.
        seconds: median time of a vote.
    """

    first: str
    second: str
    wins: int
    losses: int
    same: int
    participants: tuple[int, int]
    seconds: float

    @property
    def share(self) -> float:
        """Of the votes for one of both, those for `first`; NaN without votes."""
        return self.wins / (self.wins + self.losses) if self.wins + self.losses else math.nan


def read_results(paths: Sequence[str | Path]) -> Results:
    """The content of result files of one study.

    Raises:
        ValueError: a file is not one, is of another study, or is given twice; names the file.
        OSError: a file cannot be read.
    """
    results: Results = {}
    seen: dict[tuple[Any, ...], str] = {}
    for path in map(str, paths):
        values = read_json(path, _RESULTS)
        first, known = next(iter(results.items()), (path, values))
        if values["study"] != known["study"]:
            raise ValueError(f"{path}: expected results of the same study as {first}")
        session = values["order"], values["started"]
        if session in seen:
            raise ValueError(f"{path}: has the same answers as {seen[session]}")
        seen[session] = path
        results[path] = values
    return results


def count_votes(results: Results) -> list[Votes]:
    """The votes per pair of methods, without attention checks."""
    pairs = sorted({_methods(answer) for _, answer in _answers(results)})
    found = []
    for first, second in pairs:
        per_file = [_balance(values["answers"], first, second) for values in results.values()]
        times = [answer["seconds"] for _, answer in _answers(results) if _methods(answer) == (first, second)]
        wins, losses, same = (sum(counts[i] for counts in per_file) for i in range(3))
        participants = (
            sum(won > lost for won, lost, _ in per_file),
            sum(won < lost for won, lost, _ in per_file),
        )
        found.append(Votes(first, second, wins, losses, same, participants, median(times)))
    return found


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p value of the sign test: how likely votes at least this uneven are if each vote is a
    coin toss; 1 without votes."""
    total, fewer = wins + losses, min(wins, losses)
    tail = term = 1  # sum of binomial coefficients
    for k in range(fewer):
        term = term * (total - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**total)


def interval(wins: int, losses: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Confidence interval of the share of wins (Clopper and Pearson 1934), exact like the sign test."""
    total, alpha = wins + losses, (1 - confidence) / 2
    low = 0.0 if wins == 0 else _root(lambda p: 1 - _below(wins - 1, total, p) - alpha)
    high = 1.0 if losses == 0 else _root(lambda p: alpha - _below(wins, total, p))
    return low, high


def pair_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one per pair of methods."""
    header = [
        "methods",
        "votes",
        "prefer first",
        "share",
        "95 % interval",
        "p",
        "same",
        "participants",
        "seconds",
    ]
    rows = []
    for votes in count_votes(results):
        decided = votes.wins + votes.losses
        low, high = interval(votes.wins, votes.losses)
        p = sign_test(votes.wins, votes.losses)
        rows.append(
            [
                f"{votes.first} : {votes.second}",
                f"{decided}",
                f"{votes.wins}",
                f"{100 * votes.share:.1f} %" if decided else "-",
                f"{100 * low:.1f} .. {100 * high:.1f} %",
                f"{p:.4f}" if p >= 0.0001 else f"{p:.1e}",
                f"{votes.same}",
                f"{votes.participants[0]} : {votes.participants[1]}",
                f"{votes.seconds:.1f}",
            ]
        )
    return header, rows


def remarks(results: Results) -> list[str]:
    """Lines below the table: what the columns are, and the attention checks."""
    lines = [
        "votes: `same` is counted apart. p: two-sided exact sign test. Interval: Clopper-Pearson.",
        "participants: with more votes for the first : for the second method. seconds: median of a vote.",
        "The test takes votes as independent; votes of one participant or of one clip are not quite.",
    ]
    for path, values in results.items():
        checks = [answer for answer in values["answers"] if answer["left"] == answer["right"]]
        if checks:
            passed = sum(answer["choice"] == "same" for answer in checks)
            lines.append(f"{path}: {passed} of {len(checks)} attention checks answered `same`")
    return lines


def _answers(results: Results) -> list[tuple[str, dict[str, Any]]]:
    return [
        (path, answer)
        for path, values in results.items()
        for answer in values["answers"]
        if answer["left"] != answer["right"]
    ]


def _methods(answer: dict[str, Any]) -> tuple[str, str]:
    first, second = sorted((answer["left"], answer["right"]))
    return first, second


def _balance(answers: Sequence[dict[str, Any]], first: str, second: str) -> tuple[int, int, int]:
    chosen = [
        answer.get(answer["choice"])
        for answer in answers
        if {answer["left"], answer["right"]} == {first, second}
    ]
    return chosen.count(first), chosen.count(second), chosen.count(None)


def _below(k: int, total: int, p: float) -> float:
    """P(X <= k) of a binomial variable, 0 < p < 1."""
    logs = [
        math.lgamma(total + 1)
        - math.lgamma(i + 1)
        - math.lgamma(total - i + 1)
        + i * math.log(p)
        + (total - i) * math.log1p(-p)
        for i in range(k + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function of 0 .. 1 is zero, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


_RESULTS = fields(
    {
        "format": whole(FORMAT, FORMAT),
        "study": text(),
        "seed": whole(),
        "order": whole(0),
        "started": text(),
        "answers": array(
            fields(
                {
                    "pair": whole(0),
                    "clip": text(),
                    "left": text(),
                    "right": text(),
                    "choice": text(*CHOICES),
                    "seconds": number(0),
                }
            ),
            least=1,
        ),
    },
    others=anything,
)
