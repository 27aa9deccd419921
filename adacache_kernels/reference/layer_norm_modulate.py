"""The modulated layer norm of each token: LN(x) * (1 + scale) + shift."""

from __future__ import annotations

import torch

from .arguments import Norm
from .tokens import by_token, pick_rows


def layer_norm_modulate(
    x: torch.Tensor,
    norm: Norm,
    x_rows: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    shift, scale, weight, bias, eps = norm
    tokens = x.shape[1]
    values = pick_rows(x, x_rows).float()
    centred = values - values.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.float()
    if bias is not None:
        normed = normed + bias.float()
    if scale is not None:
        normed = normed * (1 + by_token(scale, tokens).float())
    if shift is not None:
        normed = normed + by_token(shift, tokens).float()
    result = normed.to(x.dtype)
    return result if out is None else out.copy_(result)
