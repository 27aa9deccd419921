"""Caching for video diffusion transformers: residuals are kept, measured, and reused while they change
little.

handle = adacache.enable(model, "open-sora/fast", num_steps=30)
...                                   # generate as before
handle.trace.computed_steps
adacache.disable(model)               # the model is restored
"""

from adacache.adapters.registry import known_models
from adacache.api import disable, enable
from adacache.handle import Handle
from adacache.integrations.pipelines import PipelineHandle
from adacache.policies import (
    PAB,
    AdaCache,
    DBCache,
    DeltaDiT,
    DPCache,
    FirstBlock,
    FoCa,
    Interval,
    MagCache,
    MagRatios,
    MeanCache,
    MotionRegularization,
    PlannedPath,
    PlannedTimesteps,
    Replay,
    Spectrum,
    TaylorSeer,
    planned,
    preset,
    preset_names,
)
from adacache.runtime.request import Request
from adacache.trace import Trace

__all__ = [
    "PAB",
    "AdaCache",
    "DBCache",
    "DPCache",
    "DeltaDiT",
    "FirstBlock",
    "FoCa",
    "Handle",
    "Interval",
    "MagCache",
    "MagRatios",
    "MeanCache",
    "MotionRegularization",
    "PipelineHandle",
    "PlannedPath",
    "PlannedTimesteps",
    "Replay",
    "Request",
    "Spectrum",
    "TaylorSeer",
    "Trace",
    "disable",
    "enable",
    "known_models",
    "planned",
    "preset",
    "preset_names",
]
