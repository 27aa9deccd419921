"""Settings by name.

Open-Sora's codebooks are the published ones (arXiv 2411.02397 and its code), except for the slow one of 100
steps, of
which none was published: ours is the fast one with its rates halved. The digit model's were calibrated for
    that model.
"""

from __future__ import annotations

from dataclasses import replace

from adacache.policies.adacache import AdaCache, MotionRegularization

_OPEN_SORA_MOTION = {
    30: MotionRegularization(window=(4, 26)),
    100: MotionRegularization(window=(10, 90)),
}

_PRESETS: dict[str, dict[int, tuple[dict[float, int], MotionRegularization]]] = {
    "open-sora/fast": {
        30: ({0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.40: 2, 1.0: 1}, _OPEN_SORA_MOTION[30]),
        100: ({0.03: 12, 0.05: 10, 0.07: 8, 0.09: 6, 0.11: 4, 1.0: 3}, _OPEN_SORA_MOTION[100]),
    },
    "open-sora/slow": {
        30: ({0.08: 3, 0.16: 2, 0.24: 1, 0.32: 1, 0.40: 1, 1.0: 1}, _OPEN_SORA_MOTION[30]),
        100: ({0.03: 6, 0.05: 5, 0.07: 4, 0.09: 3, 0.11: 2, 1.0: 1}, _OPEN_SORA_MOTION[100]),
    },
}


def preset_names() -> list[str]:
    """All names that `preset` takes."""
    return [name + suffix for name in _PRESETS for suffix in ("", "+moreg")]


def preset(name: str, num_steps: int) -> AdaCache:
    """The settings called `name`, e.g. "open-sora/fast" or "open-sora/slow+moreg", for a schedule of
    `num_steps`.

    Raises:
        ValueError: an unknown name, or a number of steps that the preset has no codebook for.
    """
    base = name.removesuffix("+moreg")
    if base not in _PRESETS:
        raise ValueError(f"policy: expected one of {preset_names()}, got {name!r}")
    codebooks = _PRESETS[base]
    if num_steps not in codebooks:
        raise ValueError(
            f"num_steps: {name} has codebooks for {sorted(codebooks)} steps, got {num_steps}; "
            "pass adacache.AdaCache(codebook=...) with thresholds for your schedule"
        )
    codebook, motion = codebooks[num_steps]
    policy = AdaCache(codebook=codebook)
    return replace(policy, motion=motion) if name.endswith("+moreg") else policy
