# SPDX-License-Identifier: Apache-2.0
"""Caching on the transformers of a framework that states the number of steps before each generation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from adacache.api import disable, enable
from adacache.handle import Handle
from adacache.integrations.pipelines import transformers

SETTINGS = ("policy", "budget", "speedup", "rows_per_video")


def settings_of(config: Any) -> dict[str, Any]:
    """The arguments of `adacache.enable` in a framework's configuration.

    Args:
        config: a mapping, or an object with attributes: `policy` (settings, the name of a preset, or a file),
            and perhaps `budget`, `speedup` and `rows_per_video`. A policy may itself be the configuration.

    Raises:
        ValueError: it states no policy.
    """
    if isinstance(config, str | Path) or hasattr(config, "start"):
        return {"policy": config}
    given = (
        config if isinstance(config, Mapping) else {name: getattr(config, name, None) for name in SETTINGS}
    )
    found = {name: given[name] for name in SETTINGS if given.get(name) is not None}
    if "policy" not in found:
        raise ValueError(
            "config: expected policy=, which is settings such as adacache.AdaCache(...), the name of a "
            f"preset or a file of planned paths; got {config!r}"
        )
    return found


class Loop:
    """Transformers that are wrapped at the first generation, and know the steps of each.

    Calls are assigned to steps by their timestep, which is read once per call; guidance may be in one call
    or in several.

    Args:
        config: see `settings_of`.
    """

    def __init__(self, config: Any):
        self._settings = settings_of(config)
        self.handles: list[Handle] = []

    def refresh(self, owner: Any, num_steps: int) -> None:
        """Begins a generation.

        Args:
            owner: a transformer, or an object that has them under the names that pipelines use.

        Raises:
            ValueError: the settings do not fit the model or the steps, or there is no transformer.
        """
        models = [owner] if isinstance(owner, nn.Module) and not transformers(owner) else None
        models = list(transformers(owner).values()) if models is None else models
        if not models:
            raise ValueError(f"pipeline: found no transformer in {type(owner).__name__}")
        if [handle.model for handle in self.handles] != models or not self.enabled:
            self.remove()
            try:
                for model in models:
                    self.handles.append(enable(model, num_steps=num_steps, **self._settings))
            except BaseException:
                self.remove()
                raise
        for handle in self.handles:
            handle.refresh(num_steps)

    def remove(self) -> None:
        """Restores the transformers."""
        for handle in self.handles:
            if handle.enabled:
                disable(handle.model)
        self.handles = []

    @property
    def enabled(self) -> bool:
        return bool(self.handles) and all(handle.enabled for handle in self.handles)

    def stats(self) -> dict[str, Any]:
        """Of the latest generation: its steps, those that computed, and the bytes that it kept."""
        traces = [handle.trace for handle in self.handles if handle.has_run]
        return {
            "policy": [trace.policy for trace in traces],
            "num_steps": [trace.num_steps for trace in traces],
            "computed_steps": [trace.computed_steps for trace in traces],
            "cache_bytes": sum(trace.cache_bytes for trace in traces),
        }
