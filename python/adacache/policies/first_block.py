# SPDX-License-Identifier: Apache-2.0
"""First-block cache (FBCache): the first block runs at every step; if its residual changed little, the cached
residual of all other blocks is reused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from adacache.policies.base import check_steps, described
from adacache.policies.dbcache import DBCache, DBCacheDecider
from adacache.sites import ModelSites


@dataclass(frozen=True)
class FirstBlock:
    """Reuses blocks 2..L if mean|r - r_c| / mean|r_c| < threshold, r the residual of block 1, r_c that of the
    last computed step: `DBCache` with one probe block, no tail and no warm-up.

    Attributes:
        threshold: relative L1 change; published values are .05 to .08.
        cache_dtype: dtype of the kept residual; None: that of the tokens.

    Each step reads one number per video from the device, after the first block: the method needs it there.
    """

    threshold: float = 0.08
    cache_dtype: torch.dtype | None = None

    per_video = True

    def __post_init__(self) -> None:
        self._rule()

    def _rule(self) -> DBCache:
        return DBCache(probe=1, threshold=self.threshold, first=1, cache_dtype=self.cache_dtype)

    def check(self, sites: ModelSites, num_steps: int) -> None:
        check_steps(num_steps)
        if len(sites.blocks) < 2:
            raise ValueError("model: FirstBlock needs a model of at least two blocks")

    def start(
        self, sites: ModelSites, num_steps: int, num_videos: int, device: torch.device
    ) -> DBCacheDecider:
        self.check(sites, num_steps)
        return self._rule().start(sites, num_steps, num_videos, device)

    def describe(self) -> dict[str, Any]:
        return described(self)


PRESETS = {"fbcache/slow": FirstBlock(0.05), "fbcache/fast": FirstBlock(0.08)}
