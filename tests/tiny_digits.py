# SPDX-License-Identifier: Apache-2.0
"""A small random network with the inputs of the digit model."""

from __future__ import annotations

import torch
from adacache.digits import SIZE
from adacache.digits.captions import CHANNELS, TOKENS
from adacache.models.stdit3 import STDiT3, STDiT3Config


def network() -> STDiT3:
    torch.manual_seed(0)
    config = STDiT3Config(
        depth=2,
        hidden_size=16,
        num_heads=2,
        in_channels=1,
        patch_size=(1, 16, 16),
        caption_channels=CHANNELS,
        model_max_length=TOKENS,
        pred_sigma=False,
        input_sq_size=SIZE,
    )
    return STDiT3(config).eval().requires_grad_(False)
