# SPDX-License-Identifier: Apache-2.0
"""A cache backend for vLLM-Omni.

Its registry of backends (vllm_omni/diffusion/cache/selector.py) needs one line:

    "adacache": adacache.plugins.vllm_omni.AdaCacheBackend,

and the configuration `policy`, such as "open-sora/fast" or the path of a file of planned paths.
"""

from __future__ import annotations

from typing import Any

from adacache.plugins.loop import Loop

try:
    from vllm_omni.diffusion.cache.base import CacheBackend
except ImportError:

    class CacheBackend:  # type: ignore[no-redef]
        """Used where vLLM-Omni is not installed."""

        def __init__(self, config: Any):
            self.config = config
            self.enabled = False


class AdaCacheBackend(CacheBackend):  # type: ignore[misc, unused-ignore]
    """AdaCache, or another policy, on the transformers of a pipeline of vLLM-Omni.

    Each video of a request batch has its own decision, if the policy has one per video; all of them have the
    number of steps that `refresh` states.

    Args:
        config: has `policy`, and perhaps `budget`, `speedup` and `rows_per_video`; see `adacache.enable`.
    """

    def __init__(self, config: Any):
        super().__init__(config)
        self._loop = Loop(config)
        self.enabled = False

    def enable(self, pipeline: Any) -> None:
        """Transformers are wrapped at the first `refresh`, which states the number of steps."""
        self.enabled = True

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """Begins a generation."""
        if not self.enabled:
            raise RuntimeError("AdaCacheBackend: call enable(pipeline) first")
        self._loop.refresh(pipeline, num_inference_steps)

    def disable(self, pipeline: Any = None) -> None:
        """Restores the transformers."""
        self._loop.remove()
        self.enabled = False

    def is_enabled(self) -> bool:
        return bool(self.enabled)

    def get_stats(self) -> dict[str, Any]:
        """See `Loop.stats`."""
        return self._loop.stats()
