"""Adaptive caching for video diffusion transformers: residuals are kept, measured and reused while they last.

handle = adacache.enable(model, "open-sora/fast", num_steps=30)
...                                   # generate as before
handle.trace.computed_steps
adacache.disable(model)               # the model is as it was
"""

from adacache.adapters import known_models
from adacache.handle import Handle, disable, enable
from adacache.pipelines import PipelineHandle
from adacache.policies import AdaCache, MotionRegularization, Replay, preset, preset_names
from adacache.request import Request
from adacache.trace import Trace

__all__ = [
    "AdaCache",
    "Handle",
    "MotionRegularization",
    "PipelineHandle",
    "Replay",
    "Request",
    "Trace",
    "disable",
    "enable",
    "known_models",
    "preset",
    "preset_names",
]
