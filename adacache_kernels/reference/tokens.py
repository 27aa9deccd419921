# SPDX-License-Identifier: Apache-2.0
"""Shared by the ops: modulators, row indices, float8 caches."""

from __future__ import annotations

import torch

from .._choices import ROUNDINGS

#: The largest finite value of float8_e4m3fn.
FLOAT8_LARGEST = 448.0
#: A token whose largest magnitude is below this has scale 1, because 448 / largest would overflow.
FLOAT8_NEGLIGIBLE = 2.0**-100


def by_token(modulator: torch.Tensor, tokens: int) -> torch.Tensor:
    """Repeat a modulator per group of tokens to [B, N, C]; one with a single group broadcasts."""
    groups = modulator.shape[1]
    return modulator if groups in (1, tokens) else modulator.repeat_interleave(tokens // groups, 1)


def modulator(values: torch.Tensor, table: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """A gate, shift or scale [B, N, C] or [B, 1, C] in float32."""
    values = by_token(values, tokens).float()
    return values if table is None else table + values


def gated(y: torch.Tensor, gate: torch.Tensor | None, table: torch.Tensor | None) -> torch.Tensor:
    """gate*y in float32, not rounded to the dtype of y."""
    return y if gate is None else y * modulator(gate, table, y.shape[1])


def added(x: torch.Tensor, product: torch.Tensor, rounding: int) -> torch.Tensor:
    """x + gate*y in the dtype of x."""
    if rounding == ROUNDINGS["float32"]:
        return (x.float() + product).to(x.dtype)
    return x + product.to(x.dtype)


def pick_rows(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Gather rows; NaN for out-of-range indices."""
    if rows is None:
        return tensor
    total = tensor.shape[0]
    if total == 0:
        return tensor.new_full((rows.shape[0], *tensor.shape[1:]), torch.nan)
    known = known_rows(rows, total).view(-1, *[1] * (tensor.dim() - 1))
    return torch.where(known, tensor.index_select(0, rows.clamp(0, total - 1)), torch.nan)


def known_rows(rows: torch.Tensor, total: int) -> torch.Tensor:
    return (rows >= 0) & (rows < total)


def kept_rows(rows: torch.Tensor | None, x_rows: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """The cache rows of the batch; -1 where x_rows is out of range."""
    if x_rows is None:
        return rows
    if rows is None:
        rows = torch.arange(x_rows.shape[0], dtype=x_rows.dtype, device=x_rows.device)
    return torch.where(known_rows(x_rows, x.shape[0]), rows, -1)


def of_known(values: torch.Tensor, rows: torch.Tensor | None, total: int) -> torch.Tensor:
    """Set the rows of the batch with an out-of-range index to NaN."""
    return values if rows is None else torch.where(known_rows(rows, total)[:, None, None], values, torch.nan)


def store_rows(tensor: torch.Tensor, rows: torch.Tensor | None, values: torch.Tensor) -> None:
    """Scatter rows; out-of-range indices write nothing. Does not synchronize."""
    if rows is None:
        tensor.copy_(values)
        return
    mine = rows == torch.arange(tensor.shape[0], dtype=rows.dtype, device=rows.device)[:, None]
    if rows.shape[0]:
        writer = mine.int().argmax(1)
        written = mine.any(1).view(-1, *[1] * (tensor.dim() - 1))
        tensor.copy_(torch.where(written, values.index_select(0, writer), tensor))


def load_cache(residual: torch.Tensor, scale: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor:
    """The cached residual: float32 if it is float8 with a scale per token, else in its dtype."""
    if scale is None:
        return pick_rows(residual, rows)
    return pick_rows(residual.float(), rows) * pick_rows(scale, rows)[:, :, None]


def store_cache(
    residual: torch.Tensor, scale: torch.Tensor | None, rows: torch.Tensor | None, new: torch.Tensor
) -> None:
    if scale is None:
        store_rows(residual, rows, new)
        return
    if not new.shape[-1]:  # no channels
        return
    stored, scales = quantized(new)
    store_rows(residual.view(torch.uint8), rows, stored.view(torch.uint8))
    store_rows(scale, rows, scales)


def quantized(new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize [B, N, C] to float8 with one scale per token, max|value| / 448."""
    values = new.float()
    largest = values.abs().amax(-1)
    negligible = largest < FLOAT8_NEGLIGIBLE
    one = torch.ones_like(largest)
    scale = torch.where(negligible, one, largest * (1 / FLOAT8_LARGEST))
    # PyTorch evaluates number / tensor as number * (1 / tensor), with two roundings.
    inverse = torch.where(negligible, one, torch.full_like(largest, FLOAT8_LARGEST) / largest)
    return (values * inverse[:, :, None]).to(torch.float8_e4m3fn), scale
