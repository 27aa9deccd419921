# SPDX-License-Identifier: Apache-2.0
"""Plug-ins for frameworks, against small twins of the frameworks' interfaces."""

from __future__ import annotations

import abc
import importlib
import sys
import types
from typing import Any

import adacache
import pytest
import torch
from adacache.plugins.diffusers import AdaCacheConfig, register
from adacache.plugins.sglang import AdaCacheMixin
from model_cases import CODEBOOK, WAN
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

STEPS = 9
POLICY = adacache.AdaCache(CODEBOOK)


class VllmOmniCacheBackend(abc.ABC):
    """The interface of vLLM-Omni 0.30: vllm_omni.diffusion.cache.base.CacheBackend."""

    def __init__(self, config: Any):
        self.config = config
        self.enabled = False

    @abc.abstractmethod
    def enable(self, pipeline: Any) -> None: ...

    @abc.abstractmethod
    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None: ...

    def is_enabled(self) -> bool:
        return self.enabled


class TensorRTCacheAccelerator(abc.ABC):
    """The interface of TensorRT-LLM: tensorrt_llm._torch.visual_gen.cache.base.CacheAccelerator."""

    @abc.abstractmethod
    def wrap(self, *args: Any, **kwargs: Any) -> None: ...

    @abc.abstractmethod
    def unwrap(self) -> None: ...

    @abc.abstractmethod
    def refresh(self, num_inference_steps: int) -> None: ...

    @abc.abstractmethod
    def get_stats(self) -> dict[str, Any]: ...

    @abc.abstractmethod
    def is_enabled(self) -> bool: ...


def imported(monkeypatch: pytest.MonkeyPatch, plugin: str, base: str, twin: type) -> Any:
    """A plug-in, imported where the framework has this base class."""
    name, _, attribute = base.rpartition(".")
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:i]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    setattr(sys.modules[name], attribute, twin)
    monkeypatch.delitem(sys.modules, f"adacache.plugins.{plugin}", raising=False)
    module = importlib.import_module(f"adacache.plugins.{plugin}")
    monkeypatch.delitem(sys.modules, f"adacache.plugins.{plugin}")
    return module


class Pipeline:
    """A pipeline of a framework: it has a transformer."""

    def __init__(self, transformer: nn.Module):
        self.transformer = transformer


def denoise(model: Any, steps: int = STEPS, videos: int = 1) -> Tensor:
    return WAN.denoise(model, WAN.values(videos), steps)


def expected(steps: int, videos: int = 1) -> tuple[Tensor, list[int]]:
    model = WAN.model()
    handle = adacache.enable(model, POLICY, num_steps=steps, rows_per_video=1)
    return denoise(model, steps, videos), handle.trace.computed_steps


def test_vllm_omni(monkeypatch: pytest.MonkeyPatch) -> None:
    base = "vllm_omni.diffusion.cache.base.CacheBackend"
    plugin = imported(monkeypatch, "vllm_omni", base, VllmOmniCacheBackend)
    backend = plugin.AdaCacheBackend({"policy": POLICY, "rows_per_video": 1})
    assert isinstance(backend, VllmOmniCacheBackend)
    pipeline = Pipeline(WAN.model())
    plain = denoise(pipeline.transformer)
    assert not backend.is_enabled()
    with pytest.raises(RuntimeError, match=r"call enable\(pipeline\) first"):
        backend.refresh(pipeline, STEPS)
    backend.enable(pipeline)
    assert backend.is_enabled()
    for steps in (STEPS, STEPS, 12, STEPS):
        backend.refresh(pipeline, steps, verbose=False)
        result, computed = expected(steps)
        assert torch.equal(denoise(pipeline.transformer, steps), result)
        assert backend.get_stats()["computed_steps"] == [computed]
        assert backend.get_stats()["cache_bytes"] > 0
    # A generation that was aborted leaves nothing behind.
    backend.refresh(pipeline, STEPS)
    WAN.predict(pipeline.transformer, WAN.values(), WAN.values()[WAN.latents], 0, STEPS)
    backend.refresh(pipeline, STEPS)
    assert torch.equal(denoise(pipeline.transformer), expected(STEPS)[0])
    # An exchanged transformer is wrapped, and the old one restored.
    old, pipeline.transformer = pipeline.transformer, WAN.model()
    backend.refresh(pipeline, STEPS)
    assert torch.equal(denoise(pipeline.transformer), expected(STEPS)[0])
    assert torch.equal(denoise(old), plain)
    backend.disable(pipeline)
    assert torch.equal(denoise(pipeline.transformer), plain)


def test_videos_of_a_request_batch_decide_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    base = "vllm_omni.diffusion.cache.base.CacheBackend"
    plugin = imported(monkeypatch, "vllm_omni", base, VllmOmniCacheBackend)
    config = types.SimpleNamespace(policy=POLICY, rows_per_video=1, other=3)
    backend, pipeline = plugin.AdaCacheBackend(config), Pipeline(WAN.model())
    backend.enable(pipeline)
    backend.refresh(pipeline, STEPS)
    assert torch.equal(denoise(pipeline.transformer, STEPS, 3), expected(STEPS, 3)[0])
    assert backend._loop.handles[0].trace.num_videos == 3
    with pytest.raises(ValueError, match="config: expected policy="):
        plugin.AdaCacheBackend({"threshold": 1})


def test_tensorrt_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    base = "tensorrt_llm._torch.visual_gen.cache.base.CacheAccelerator"
    plugin = imported(monkeypatch, "tensorrt_llm", base, TensorRTCacheAccelerator)
    accelerator = plugin.AdaCacheAccelerator({"policy": POLICY, "rows_per_video": 1})
    assert isinstance(accelerator, TensorRTCacheAccelerator)
    model = WAN.model()
    plain = denoise(model)
    with pytest.raises(RuntimeError, match=r"call wrap\(model\) first"):
        accelerator.refresh(STEPS)
    with pytest.raises(ValueError, match="model: expected a transformer"):
        accelerator.wrap()
    accelerator.wrap(model=model)
    accelerator.wrap(model)
    with pytest.raises(RuntimeError, match="wraps another model"):
        accelerator.wrap(WAN.model())
    assert accelerator.is_enabled()
    assert accelerator.get_stats()["computed_steps"] == []
    for steps in (STEPS, 12):
        accelerator.refresh(steps)
        result, computed = expected(steps)
        assert torch.equal(denoise(model, steps), result)
        assert accelerator.get_stats()["computed_steps"] == [computed]
    accelerator.unwrap()
    assert not accelerator.is_enabled()
    assert torch.equal(denoise(model), plain)


def test_plugins_are_imported_without_the_frameworks() -> None:
    for name, kind in (("vllm_omni", "AdaCacheBackend"), ("tensorrt_llm", "AdaCacheAccelerator")):
        module = importlib.import_module(f"adacache.plugins.{name}")
        assert hasattr(getattr(module, kind)("open-sora/fast"), "refresh")


class WithMixin(diffusers.WanTransformer3DModel, AdaCacheMixin):
    """A model of SGLang is a class of its own."""


def test_sglang() -> None:
    model: Any = WAN.model()
    plain = denoise(model)
    model.__class__ = WithMixin
    for steps in (STEPS, 12):
        result, computed = expected(steps)
        with model.adacache_request(POLICY, steps) as request:
            assert torch.equal(denoise(model, steps), result)
        assert request.trace.computed_steps == computed
        assert model.adacache_handle.trace.computed_steps == computed
    # A preset, another policy for the next request, then none.
    with model.adacache_request("fbcache/fast", STEPS):
        handle = model.adacache_handle
    with model.adacache_request("fbcache/fast", STEPS):
        assert model.adacache_handle is handle
    with model.adacache_request(adacache.Replay([1, 5]), STEPS) as request:
        denoise(model)
    assert request.trace.computed_steps == [1, 5]
    with model.adacache_request(POLICY, STEPS, branches=2) as request:
        WAN.denoise_in_two_calls(model, WAN.values(), WAN.values(seed=1), STEPS, context=False)
    assert request.step == STEPS
    with model.adacache_request(None, STEPS) as request:
        assert request is None
        assert torch.equal(denoise(model), plain)
    assert model.adacache_handle is None


def test_diffusers_config(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.cache_utils import CacheMixin

    for name in ("enable_cache", "disable_cache"):
        monkeypatch.setattr(CacheMixin, name, getattr(CacheMixin, name))
    monkeypatch.setattr(CacheMixin, "_adacache_registered", True, raising=False)
    monkeypatch.delattr(CacheMixin, "_adacache_registered")
    register()
    register()
    assert AdaCacheConfig is adacache.AdaCacheConfig
    model: Any = WAN.model()
    plain = denoise(model)
    config = adacache.AdaCacheConfig(POLICY, num_inference_steps=STEPS, rows_per_video=1)
    model.enable_cache(config)
    assert model.is_cache_enabled
    assert torch.equal(denoise(model), expected(STEPS)[0])
    with pytest.raises(ValueError, match="config: caching is enabled with AdaCacheConfig already"):
        model.enable_cache(config)
    model.disable_cache()
    assert not model.is_cache_enabled
    assert torch.equal(denoise(model), plain)
    # The configurations of diffusers work as before.
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    assert model.is_cache_enabled
    model.disable_cache()
    with pytest.raises(ValueError, match="is not supported"):
        model.enable_cache(3)
