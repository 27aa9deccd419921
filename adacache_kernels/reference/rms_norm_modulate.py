# SPDX-License-Identifier: Apache-2.0
"""The modulated RMS norm of each token."""

from __future__ import annotations

import torch

from .._choices import NORMS
from .arguments import Norm
from .norm_modulate import norm_modulate


def rms_norm_modulate(
    x: torch.Tensor, norm: Norm, x_rows: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    return norm_modulate(x, norm, NORMS["rms"], x_rows, out)
