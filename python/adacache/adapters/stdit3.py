# SPDX-License-Identifier: Apache-2.0
"""`adacache.models.stdit3.STDiT3`: spatial and temporal blocks alternate."""

from __future__ import annotations

from adacache.adapters.spec import BlockList, ModelSpec
from adacache.fused.stdit3 import STDiT3Program
from adacache.models.stdit3 import STDiT3

STDIT3 = ModelSpec(
    classes=("STDiT3",),
    lists=(BlockList("spatial_blocks", "spatial"), BlockList("temporal_blocks", "temporal")),
    alternating=True,
    latents="x",
    default_part="temporal_attention",
    requires=lambda model: isinstance(model, STDiT3),
    program=STDiT3Program(),
)
