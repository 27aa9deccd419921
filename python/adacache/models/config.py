# SPDX-License-Identifier: Apache-2.0
"""STDiT3's configuration in JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adacache.checks import Check, anything, array, fields, flag, number, whole
from adacache.files import read_json
from adacache.models.stdit3 import STDiT3Config

SHAPE: dict[str, Check] = {
    "depth": whole(1, 256),
    "hidden_size": whole(1, 1 << 16),
    "num_heads": whole(1, 1 << 12),
    "in_channels": whole(1, 1 << 12),
    "patch_size": array(whole(1, 1 << 10), 3, 3),
    "caption_channels": whole(1, 1 << 16),
    "model_max_length": whole(1, 1 << 16),
    "mlp_ratio": number(above=0, most=64),
    "pred_sigma": flag,
    "qk_norm": flag,
    "input_sq_size": whole(1, 1 << 20),
}
"""The check of each field of `STDiT3Config`."""


def config_of(values: dict[str, Any]) -> STDiT3Config:
    """The configuration in checked values; other keys are ignored."""
    known = {name: values[name] for name in SHAPE if name in values}
    if "patch_size" in known:
        known["patch_size"] = tuple(known["patch_size"])
    return STDiT3Config(**known)


def read_config(path: str | Path) -> STDiT3Config:
    """Reads a config.json; keys that do not describe the network's shape are ignored.

    Raises:
        ValueError: the file is not JSON, or a field is wrong; names it.
        OSError: the file cannot be read.
    """
    return config_of(read_json(path, fields({}, SHAPE, others=anything)))
