"""Settings by name.

Open-Sora's codebooks are the published ones (arXiv 2411.02397 and its code), except for the slow one of 100
steps, of which none was published: ours is the fast one with its rates halved. The digit model's are ours too
and fit that model alone: `python examples/digits/calibrate.py` found a multiple of the published thresholds
and a motion regularisation of the same cost, on clips of its training prompts.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from adacache.policies.adacache import AdaCache, MotionRegularization

_OPEN_SORA_MOTION = {
    30: MotionRegularization(window=(4, 26)),
    100: MotionRegularization(window=(10, 90)),
}

DIGIT_CODEBOOKS = Path(__file__).parent / "codebooks" / "digits.json"
"""What the calibration of the digit model wrote."""

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
    """All names that `preset` takes."""
    return [name + suffix for name in (*_OPEN_SORA, *_DIGITS) for suffix in ("", "+moreg")]


def preset(name: str | Path, num_steps: int | None) -> AdaCache:
    """The settings called `name`, e.g. "open-sora/fast" or "open-sora/slow+moreg", for a schedule of
    `num_steps`, or those of a file that `adacache calibrate` wrote. Without `num_steps`, those of any
    schedule that they have: this tells whether the name is known.

    Raises:
        ValueError: an unknown name, no such file, or a number of steps that the preset has no codebook for.
    """
    if isinstance(name, Path) or name.endswith(".json"):
        return _calibrated(Path(name), num_steps)
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
    calibrated = json.loads(DIGIT_CODEBOOKS.read_text())
    values = calibrated["presets"][name]
    motion = {**values["motion"], "window": tuple(values["motion"]["window"])}
    return {calibrated["num_steps"]: (dict(values["codebook"]), MotionRegularization(**motion))}


def _calibrated(path: Path, num_steps: int | None) -> AdaCache:
    """The settings in a file that `adacache calibrate` wrote."""
    try:
        values = json.loads(path.read_text())
        codebook = {float(threshold): int(rate) for threshold, rate in values["codebook"]}
        steps = int(values["num_steps"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"policy: {path} is no file that `adacache calibrate` wrote ({error!r})") from error
    if num_steps not in (None, steps):
        raise ValueError(f"num_steps: {path} was calibrated for {steps} steps, got {num_steps}")
    return AdaCache(
        codebook=codebook, metric_part=values.get("metric_part"), metric=values.get("metric", "l1")
    )
