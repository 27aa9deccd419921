# SPDX-License-Identifier: Apache-2.0
"""Policies: per step, site and video, what is computed, reused or forecast. One file per method."""

from adacache.policies.adacache import AdaCache, MotionRegularization
from adacache.policies.adaptive_path import AdaptivePath
from adacache.policies.base import Action, Decider, Keep, Plan, Policy, Step, Sums, Watch, What
from adacache.policies.bwcache import BWCache
from adacache.policies.dbcache import DBCache
from adacache.policies.delta_dit import DeltaDiT
from adacache.policies.dicache import DiCache
from adacache.policies.dpcache import DPCache
from adacache.policies.easycache import EasyCache
from adacache.policies.first_block import FirstBlock
from adacache.policies.foca import FoCa
from adacache.policies.interval import Interval
from adacache.policies.limits import Limits
from adacache.policies.magcache import MagCache, MagRatios
from adacache.policies.meancache import MeanCache
from adacache.policies.pab import PAB
from adacache.policies.planned_path import PlannedPath, PlannedTimesteps, planned, timesteps
from adacache.policies.presets import Named, preset, preset_names
from adacache.policies.replay import Replay
from adacache.policies.seacache import SeaCache
from adacache.policies.sencache import SenCache
from adacache.policies.spectrum import Spectrum
from adacache.policies.taylorseer import TaylorSeer
from adacache.policies.teacache import TeaCache, TeaCacheChanges
from adacache.policies.tgate import TGATE

__all__ = [
    "PAB",
    "TGATE",
    "Action",
    "AdaCache",
    "AdaptivePath",
    "BWCache",
    "DBCache",
    "DPCache",
    "Decider",
    "DeltaDiT",
    "DiCache",
    "EasyCache",
    "FirstBlock",
    "FoCa",
    "Interval",
    "Keep",
    "Limits",
    "MagCache",
    "MagRatios",
    "MeanCache",
    "MotionRegularization",
    "Named",
    "Plan",
    "PlannedPath",
    "PlannedTimesteps",
    "Policy",
    "Replay",
    "SeaCache",
    "SenCache",
    "Spectrum",
    "Step",
    "Sums",
    "TaylorSeer",
    "TeaCache",
    "TeaCacheChanges",
    "Watch",
    "What",
    "planned",
    "preset",
    "preset_names",
    "timesteps",
]
