"""Faults for tools/mutation_check.py: each an exact text of one file, what takes its place, and the tests
that have to catch it.

To add one, pick the cheapest selection that could; `python tools/mutation_check.py --only NAME` tries it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Selection:
    """Tests that are quick enough to run once for each fault. `library`: the CPU library is built before;
    `caught`: the exit statuses of a failed test, which a crash may be for compiled code."""

    commands: Sequence[Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    library: bool = False
    caught: Sequence[int] = (1,)


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    find: str
    replace: str
    selection: str


def pytest(*arguments: str) -> list[str]:
    return ["python", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]


def interpreted(*arguments: str) -> Selection:
    environment = {"TRITON_INTERPRET": "1", "ADACACHE_TEST_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}
    return Selection([pytest("-W", "ignore::RuntimeWarning", *arguments)], environment)


SELECTIONS = {
    "layer": Selection([pytest("tests/layer/test_adacache.py", "-k", "rule_written_out or half_precision")]),
    "triton meter": interpreted("tests/ops/test_gated_residual_meter.py", "-k", "random_cases or strides"),
}

MUTATIONS = [
    Mutation(
        "the first step's rate is never left",
        "python/adacache/policies/adacache.py",
        "        return [forced(step, self.num_steps) or int(due) == step for due in next_step.tolist()]\n",
        "        return [forced(step, self.num_steps) or int(due) <= step for due in next_step.tolist()]\n",
        "layer",
    ),
]
