# SPDX-License-Identifier: Apache-2.0
"""Settings by name. A module of this package that has `PRESETS`, {name: policy}, adds these to the names.

Open-Sora's codebooks are the published ones (arXiv 2411.02397 and its code). For 100 steps no slow codebook
was published: ours is the fast one with its rates halved. The digit model's codebooks fit that model alone:
`python examples/digits/calibrate.py` scaled the published thresholds and searched for a motion regularisation
of the same cost, on clips of training prompts.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adacache.checks import anything, array, fields, number, optional, refuse, text, whole
from adacache.files import read_json
from adacache.policies.adacache import METRICS, AdaCache, MotionRegularization
from adacache.policies.adaptive_path import adaptive_path
from adacache.policies.base import Policy
from adacache.policies.planned_path import is_path_file, planned

_OPEN_SORA_MOTION = {
    30: MotionRegularization(window=(4, 26)),
    100: MotionRegularization(window=(10, 90)),
}

DIGIT_CODEBOOKS = Path(__file__).parent / "codebooks" / "digits.json"
"""Written by `python examples/digits/calibrate.py --write`."""

_Codebooks = dict[int, tuple[dict[float, int], MotionRegularization]]
"""Codebook and motion regularisation by number of steps."""

_OPEN_SORA: dict[str, _Codebooks] = {
    "open-sora/fast": {
        30: ({0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.40: 2, 1.0: 1}, _OPEN_SORA_MOTION[30]),
        100: ({0.03: 12, 0.05: 10, 0.07: 8, 0.09: 6, 0.11: 4, 1.0: 3}, _OPEN_SORA_MOTION[100]),
    },
    "open-sora/slow": {
        30: ({0.08: 3, 0.16: 2, 0.24: 1, 0.32: 1, 0.40: 1, 1.0: 1}, _OPEN_SORA_MOTION[30]),
        100: ({0.03: 6, 0.05: 5, 0.07: 4, 0.09: 3, 0.11: 2, 1.0: 1}, _OPEN_SORA_MOTION[100]),
    },
}
_DIGITS = ("digits/fast", "digits/slow")


def preset_names() -> list[str]:
    """All preset names."""
    adacache = [name + suffix for name in (*_OPEN_SORA, *_DIGITS) for suffix in ("", "+moreg")]
    return [*adacache, *_others()]


@functools.cache
def _others() -> Mapping[str, Policy]:
    """The settings of other methods, as their modules declare them."""
    found: dict[str, Policy] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != Path(__file__).stem:
            own = importlib.import_module(f"{__package__}.{module.name}")
            found |= getattr(own, "PRESETS", {})
    return dict(sorted(found.items()))


def preset(
    name: str | Path,
    num_steps: int | None,
    *,
    budget: int | None = None,
    speedup: float | None = None,
    adaptive: bool = False,
) -> Policy:
    """The settings of a preset, such as "open-sora/fast", "open-sora/slow+moreg" or
    "teacache/open-sora-fast", or of a file that `adacache calibrate` wrote.

    Args:
        name: preset or path; text that ends in ".json" is a path.
        num_steps: steps of the schedule; None: those of the file, or of the preset's first codebook.
        budget, speedup: for a file of planned paths, see `planned`; with `adaptive`, `adaptive_path`.

    Raises:
        ValueError: an unknown name, a missing or invalid file, or a number of steps without a codebook.
    """
    if isinstance(name, Path) or name.endswith(".json"):
        path = Path(name)
        if is_path_file(_contents(path)):
            choose = adaptive_path if adaptive else planned
            return choose(path, num_steps=num_steps, budget=budget, speedup=speedup)
        _refuse_budget(str(path), budget, speedup, adaptive)
        return _calibrated(path, num_steps)
    _refuse_budget(name, budget, speedup, adaptive)
    if name in _others():
        return _others()[name]
    base = name.removesuffix("+moreg")
    if base not in (*_OPEN_SORA, *_DIGITS):
        raise ValueError(f"policy: expected one of {preset_names()}, got {name!r}")
    codebooks = _OPEN_SORA[base] if base in _OPEN_SORA else _digit_codebooks(base)
    if num_steps is None:
        num_steps = next(iter(codebooks))
    if num_steps not in codebooks:
        raise ValueError(
            f"num_steps: {name} has codebooks for {sorted(codebooks)} steps, got {num_steps}; "
            "pass adacache.AdaCache(codebook=...) with thresholds for your schedule"
        )
    codebook, motion = codebooks[num_steps]
    policy = AdaCache(codebook=codebook)
    return replace(policy, motion=motion) if name.endswith("+moreg") else policy


def _digit_codebooks(name: str) -> _Codebooks:
    file = read_json(DIGIT_CODEBOOKS, _DIGIT_FILE)
    values = file["presets"][name]
    motion = {**values["motion"], "window": tuple(values["motion"]["window"])}
    return {file["num_steps"]: (values["codebook"], MotionRegularization(**motion))}


@dataclass(frozen=True)
class Named:
    """A preset or a file by its name, before the number of steps is known; see `preset`."""

    name: str | Path
    budget: int | None = None
    speedup: float | None = None
    adaptive: bool = False

    def policy(self, num_steps: int | None) -> Policy:
        return preset(self.name, num_steps, budget=self.budget, speedup=self.speedup, adaptive=self.adaptive)


def _refuse_budget(name: str, budget: int | None, speedup: float | None, adaptive: bool) -> None:
    for argument, value in {"budget": budget, "speedup": speedup, "adaptive": adaptive or None}.items():
        if value is not None:
            expected = False if argument == "adaptive" else None
            raise ValueError(
                f"{argument}: expected {expected}, because {name} has no planned paths "
                f"(`adacache calibrate --method path` writes them), got {value!r}"
            )


def _contents(path: Path) -> Any:
    try:
        return read_json(path, anything)
    except (OSError, ValueError) as error:
        raise ValueError(f"policy: not a file that `adacache calibrate` wrote: {error}") from error


def _calibrated(path: Path, num_steps: int | None) -> AdaCache:
    """The settings in a file with a codebook."""
    try:
        values = _CALIBRATION(_contents(path), "")
    except ValueError as error:
        raise ValueError(
            f"policy: not a file that `adacache calibrate` wrote: {path}: {str(error).removeprefix(': ')}"
        ) from error
    if num_steps not in (None, values["num_steps"]):
        raise ValueError(f"num_steps: {path} was calibrated for {values['num_steps']} steps, got {num_steps}")
    block = values.get("metric_block")
    return AdaCache(
        codebook=values["codebook"],
        metric_blocks=None if block is None else [block],
        metric_part=values.get("metric_part"),
        metric=values.get("metric", "l1"),
    )


def check_pairs(value: Any, name: str) -> dict[float, int]:
    """The check of a codebook in JSON, [[threshold, rate], ...]: rising positive thresholds, whole rates."""
    pairs = array(array(anything, 2, 2), least=1)(value, name)
    codebook: dict[float, int] = {}
    for i, (threshold, rate) in enumerate(pairs):
        edge = float(number(above=0)(threshold, f"{name}[{i}][0]"))
        if codebook and edge <= max(codebook):
            refuse(f"{name}[{i}][0]", f"a threshold above {max(codebook)}", threshold)
        codebook[edge] = whole(1)(rate, f"{name}[{i}][1]")
    return codebook


_CALIBRATION = fields(
    {"num_steps": whole(1), "codebook": check_pairs},
    {"metric_block": optional(whole(0)), "metric_part": optional(text()), "metric": text(*METRICS)},
    others=anything,
)
_MOTION = fields(
    {
        "strides": array(whole(1), least=1),
        "window": array(whole(1), 2, 2),
        "scale": number(above=0),
        "power": number(0),
        "divisor": number(above=0),
        "gradient_weight": number(0),
    }
)
_DIGIT_FILE = fields(
    {
        "num_steps": whole(1),
        "presets": fields(
            dict.fromkeys(_DIGITS, fields({"codebook": check_pairs, "motion": _MOTION}, others=anything))
        ),
    },
    others=anything,
)
