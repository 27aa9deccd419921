# SPDX-License-Identifier: Apache-2.0
"""Caching for video diffusion transformers: residuals are kept, measured, and reused while they change
little.

handle = adacache.enable(model, "open-sora/fast", num_steps=30)
...                                   # generate as before
handle.trace.computed_steps
adacache.disable(model)               # the model is restored
"""

from adacache.adapters.registry import known_models
from adacache.api import accelerate, disable, enable
from adacache.handle import Handle
from adacache.integrations.pipelines import PipelineHandle
from adacache.plugins.diffusers import AdaCacheConfig
from adacache.policies import (
    PAB,
    TGATE,
    AdaCache,
    AdaptivePath,
    BWCache,
    DBCache,
    DeltaDiT,
    DiCache,
    DPCache,
    EasyCache,
    FirstBlock,
    FoCa,
    Interval,
    Limits,
    MagCache,
    MagRatios,
    MeanCache,
    MotionRegularization,
    PlannedPath,
    PlannedTimesteps,
    Replay,
    SeaCache,
    SenCache,
    Spectrum,
    TaylorSeer,
    TeaCache,
    TeaCacheChanges,
    planned,
    preset,
    preset_names,
    timesteps,
)
from adacache.runtime.accelerated import Accelerated
from adacache.runtime.ranks import Parallel
from adacache.runtime.request import Request
from adacache.trace import Trace

__all__ = [
    "PAB",
    "TGATE",
    "Accelerated",
    "AdaCache",
    "AdaCacheConfig",
    "AdaptivePath",
    "BWCache",
    "DBCache",
    "DPCache",
    "DeltaDiT",
    "DiCache",
    "EasyCache",
    "FirstBlock",
    "FoCa",
    "Handle",
    "Interval",
    "Limits",
    "MagCache",
    "MagRatios",
    "MeanCache",
    "MotionRegularization",
    "Parallel",
    "PipelineHandle",
    "PlannedPath",
    "PlannedTimesteps",
    "Replay",
    "Request",
    "SeaCache",
    "SenCache",
    "Spectrum",
    "TaylorSeer",
    "TeaCache",
    "TeaCacheChanges",
    "Trace",
    "accelerate",
    "disable",
    "enable",
    "known_models",
    "planned",
    "preset",
    "preset_names",
    "timesteps",
]
