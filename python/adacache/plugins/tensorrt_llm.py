# SPDX-License-Identifier: Apache-2.0
"""A cache accelerator for TensorRT-LLM's VisualGen."""

from __future__ import annotations

from typing import Any

from adacache.plugins.loop import Loop

try:
    from tensorrt_llm._torch.visual_gen.cache.base import CacheAccelerator
except ImportError:

    class CacheAccelerator:  # type: ignore[no-redef]
        """Used where TensorRT-LLM is not installed."""


class AdaCacheAccelerator(CacheAccelerator):  # type: ignore[misc, unused-ignore]
    """AdaCache, or another policy, on a transformer of VisualGen or on those of a pipeline.

    Args:
        config: has `policy`, and perhaps `budget`, `speedup` and `rows_per_video`; see `adacache.enable`.
    """

    def __init__(self, config: Any):
        self._loop = Loop(config)
        self._model: Any = None

    def wrap(self, model: Any = None, **kwargs: Any) -> None:
        """Notes the model; it is wrapped at the first `refresh`, which states the number of steps. Compile
        blocks, not the whole model, in either order.

        Args:
            model: a transformer, or a pipeline that has one.

        Raises:
            ValueError: there is no model, or unknown arguments.
            RuntimeError: another model is wrapped.
        """
        if model is None or kwargs:
            raise ValueError(
                f"model: expected a transformer or a pipeline alone, got {model!r}, {sorted(kwargs)}"
            )
        if self._model is not None and self._model is not model:
            raise RuntimeError("AdaCacheAccelerator: it wraps another model; call unwrap() first")
        self._model = model

    def unwrap(self) -> None:
        self._loop.remove()
        self._model = None

    def refresh(self, num_inference_steps: int) -> None:
        """Begins a generation."""
        if self._model is None:
            raise RuntimeError("AdaCacheAccelerator: call wrap(model) first")
        self._loop.refresh(self._model, num_inference_steps)

    def get_stats(self) -> dict[str, Any]:
        """See `Loop.stats`."""
        return self._loop.stats()

    def is_enabled(self) -> bool:
        return self._model is not None
