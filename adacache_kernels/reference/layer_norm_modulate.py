# SPDX-License-Identifier: Apache-2.0
"""The modulated layer norm of each token."""

from __future__ import annotations

import torch

from .._choices import NORMS
from .arguments import Norm
from .norm_modulate import norm_modulate


def layer_norm_modulate(
    x: torch.Tensor, norm: Norm, x_rows: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor:
    return norm_modulate(x, norm, NORMS["layer"], x_rows, out)
