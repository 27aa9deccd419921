"""Policies: per video and step, what is computed and what is reused."""

from adacache.policies.adacache import AdaCache, MotionRegularization
from adacache.policies.base import MetricSite, Policy, Schedule, StackInfo
from adacache.policies.presets import preset, preset_names
from adacache.policies.replay import Replay

__all__ = [
    "AdaCache",
    "MetricSite",
    "MotionRegularization",
    "Policy",
    "Replay",
    "Schedule",
    "StackInfo",
    "preset",
    "preset_names",
]
