# SPDX-License-Identifier: Apache-2.0
"""Serving: continuous batching of videos with a cache (docs/serving.md)."""

from adacache.serving.batcher import AsyncBatcher, Batcher, Counts, DeadlineExceeded, QueueFull, Ticket
from adacache.serving.denoiser import (
    Denoiser,
    Denoising,
    DiffusersDenoiser,
    DiffusersJob,
    FlowDenoiser,
    FlowJob,
)
from adacache.serving.engine import Engine, NoCache, Video

__all__ = [
    "AsyncBatcher",
    "Batcher",
    "Counts",
    "DeadlineExceeded",
    "Denoiser",
    "Denoising",
    "DiffusersDenoiser",
    "DiffusersJob",
    "Engine",
    "FlowDenoiser",
    "FlowJob",
    "NoCache",
    "QueueFull",
    "Ticket",
    "Video",
]
