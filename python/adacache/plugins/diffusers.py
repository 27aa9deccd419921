# SPDX-License-Identifier: Apache-2.0
"""`transformer.enable_cache(adacache.AdaCacheConfig(...))` on the models of diffusers.

    from adacache.plugins import diffusers
    diffusers.register()

`register` replaces `enable_cache` and `disable_cache` of diffusers' `CacheMixin` by methods that know
`AdaCacheConfig` and pass everything else on.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adacache.api import disable, enable
from adacache.policies import Policy

_REGISTERED = "_adacache_registered"


@dataclass(frozen=True)
class AdaCacheConfig:
    """Arguments of `adacache.enable` for a transformer.

    Attributes:
        policy: settings such as `adacache.AdaCache(...)`, the name of a preset, or a file of planned paths.
        num_inference_steps: steps that the pipeline runs.
        rows_per_video: rows of the batch per video: 2 with guidance in one batch, 1 without; None: 2 if the
            batch is even.
        budget, speedup: of a file of planned paths.
    """

    policy: Policy | str | Path
    num_inference_steps: int
    rows_per_video: int | None = None
    budget: int | None = None
    speedup: float | None = None

    def enable(self, model: Any) -> Any:
        """Enables caching on a transformer; returns the handle."""
        return enable(
            model,
            self.policy,
            num_steps=self.num_inference_steps,
            rows_per_video=self.rows_per_video,
            budget=self.budget,
            speedup=self.speedup,
        )


def register() -> None:
    """Makes `AdaCacheConfig` known to diffusers. Twice is as good as once.

    Raises:
        ImportError: diffusers is not installed, or has no `CacheMixin`.
    """
    from diffusers.models.cache_utils import CacheMixin

    if _REGISTERED in CacheMixin.__dict__:
        return
    plain_enable, plain_disable = CacheMixin.enable_cache, CacheMixin.disable_cache

    @functools.wraps(plain_enable)
    def enable_cache(self: Any, config: Any) -> None:
        if not isinstance(config, AdaCacheConfig):
            plain_enable(self, config)
            return
        if self.is_cache_enabled:
            raise ValueError(
                f"config: caching is enabled with {type(self._cache_config).__name__} already; call "
                "disable_cache() first"
            )
        config.enable(self)
        self._cache_config = config

    @functools.wraps(plain_disable)
    def disable_cache(self: Any) -> None:
        if not isinstance(self._cache_config, AdaCacheConfig):
            plain_disable(self)
            return
        disable(self)
        self._cache_config = None

    CacheMixin.enable_cache, CacheMixin.disable_cache = enable_cache, disable_cache
    setattr(CacheMixin, _REGISTERED, True)
