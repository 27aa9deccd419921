# SPDX-License-Identifier: Apache-2.0
"""The store of one forward call over videos of several requests: its tensors are rows of a pool."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import adacache_kernels
from adacache.policies.base import Keep
from adacache.rows import Split, to_device
from adacache.runtime.store import FLOATS, Kept, Store, as_tokens, saturated
from adacache.serving.pool import Layout, SlotPool, aligned
from adacache.sites import Site


class PooledFeature(Kept):
    """A kept feature of a pool; its tensors have a row per row of the pool."""

    def fits(self, x: Tensor) -> bool:
        return self.shape[1:] == x.shape[1:]

    def fits_tokens(self, x: Tensor) -> bool:
        return self.shape[1:2] == x.shape[1:2]


class SlotStore(Store):
    """Kept tensors of the videos of one call.

    Args:
        pool, layout: where they are.
        rows: the pool's row of each row of the batch.
        keep_of: how a site, or a block of it, is kept.
        keepers: the same -> per row of the batch, whether its video keeps it.
        device: of the pool.
    """

    def __init__(
        self,
        pool: SlotPool,
        layout: Layout,
        rows: Sequence[int],
        keep_of: Callable[[Site], Keep],
        keepers: Callable[[Site], list[bool]],
        device: torch.device,
    ):
        super().__init__()
        self._pool = pool
        self._layout = layout
        self._rows = list(rows)
        self._keep_of = keep_of
        self._keepers = keepers
        self._device = device
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self.dropped = False
        """Whether what the call kept is not valid."""

    # Kept features.

    def get(self, key: Any) -> Kept | None:
        keep = self._keep_of(key[1])
        dtype = keep.dtype or self._layout.dtypes.get(key)
        place = self._layout.places.get((key, 0, dtype))
        if dtype is None or place is None:
            return None
        shape = place[1]
        factors = [self._tensor(key, i, dtype, shape) for i in range(keep.factors)]
        if dtype != torch.float8_e4m3fn:
            return PooledFeature(factors)
        return PooledFeature(factors, self._scale(key, as_tokens(factors[0]).shape[1:2]))

    def _tensor(self, key: Any, part: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        return self._pool.tensor(self._layout, (key, part, dtype), shape, dtype)

    def _scale(self, key: Any, shape: Sequence[int]) -> Tensor:
        place = key, "scale", torch.float8_e4m3fn
        return self._pool.tensor(self._layout, place, shape, torch.float32)

    def apply(
        self,
        key: Any,
        x: Tensor,
        *,
        split: Split | None = None,
        coefficients: Tensor | None = None,
        video_of_row: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        kept = self.get(key)
        assert kept is not None
        tokens, given = as_tokens(x), None if out is None else as_tokens(out)
        rows = self._index(self._rows)
        if coefficients is None:
            result = adacache_kernels.reuse_residual(
                tokens,
                as_tokens(kept.factors[0]),
                residual_scale=kept.scale,
                residual_rows=rows,
                reuse=None if split is None else split.reuse,
                out=given,
            )
        else:
            result = adacache_kernels.extrapolate_residual(
                tokens,
                [as_tokens(factor) for factor in kept.factors],
                coefficients,
                residual_rows=rows,
                video_of_row=video_of_row,
                out=given,
            )
        return result.view(x.shape)

    def keep_difference(
        self,
        key: Any,
        after: Tensor,
        before: Tensor,
        keep: Keep,
        split: Split | None,
        gaps: Sequence[int],
        out: Tensor | None = None,
    ) -> None:
        rows = before if split is None else split.take(before)
        if after.shape != rows.shape:
            raise RuntimeError(
                "model: its blocks change the number of tokens, which batches of several requests do not "
                f"support: {list(rows.shape)} before them, {list(after.shape)} after"
            )
        plain = keep.factors == 1 and after.dtype == rows.dtype
        difference = after - rows if plain else after.float() - rows.float()
        self.keep(key, difference, keep, split, gaps, before)
        if out is not None:
            out.copy_(after) if split is None else split.put(out, after)

    def keep(
        self, key: Any, value: Tensor, keep: Keep, split: Split | None, gaps: Sequence[int], like: Tensor
    ) -> None:
        computing = range(len(self._rows)) if split is None else split.computing
        keepers = self._keepers(key[1])
        places = [place for place, row in enumerate(computing) if keepers[row]]
        if len(places) < len(computing):
            value = value.index_select(0, self._index(places))
        rows = [self._rows[computing[place]] for place in places]
        gaps = [gaps[computing[place]] for place in places]
        dtype, shape = keep.dtype or like.dtype, like.shape[1:]
        if keep.dtype is None:
            self._layout.dtypes[key] = dtype
        index = self._index(rows).long()
        counts = self._layout.kept.setdefault(key, {})
        if dtype == torch.float8_e4m3fn:
            self._keep_float8(key, value, shape, index)
        else:
            new = value
            for i in range(keep.factors):
                factor = self._tensor(key, i, dtype, shape)
                written = new
                if i + 1 < keep.factors:
                    old = factor.index_select(0, index)
                    steps = [
                        gap if counts.get(row, 0) > i else math.inf
                        for gap, row in zip(gaps, rows, strict=True)
                    ]
                    wide = new.to(torch.promote_types(new.dtype, torch.float32))
                    new = (wide - old) / self._per_row(steps, old)
                factor.index_copy_(0, index, saturated(written, dtype))
        for row in rows:
            counts[row] = counts.get(row, 0) + 1

    def _keep_float8(self, key: Any, value: Tensor, shape: torch.Size, index: Tensor) -> None:
        wide = as_tokens(value if value.dtype in FLOATS else value.float())
        rounded = torch.zeros_like(wide, dtype=torch.float8_e4m3fn)
        scale = torch.zeros(wide.shape[:2], dtype=torch.float32, device=wide.device)
        adacache_kernels.stack_residual_meter(
            wide, torch.zeros_like(wide), rounded, residual_scale=scale, frames=1, strides=()
        )
        factor = self._tensor(key, 0, torch.float8_e4m3fn, shape)
        scales = self._scale(key, wide.shape[1:2])
        codes = rounded.view(torch.uint8).view(value.shape)
        factor.view(torch.uint8).index_copy_(0, index, codes)
        scales.index_copy_(0, index, scale)

    def outputs(self, key: Any, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        """Forecasts of kept outputs: one row of coefficients per row of the batch."""
        kept = self.get(key)
        assert kept is not None
        factors = [as_tokens(factor) for factor in kept.factors]
        nothing = torch.zeros(factors[0].shape[2:], dtype=dtype, device=self._device)
        rows = self._index(self._rows)
        result = adacache_kernels.extrapolate_residual(
            nothing.expand(len(rows), *factors[0].shape[1:]), factors, coefficients, residual_rows=rows
        )
        return result.view(len(rows), *kept.shape[1:])

    # Watched tensors.

    def old_watched(self, site: Site, like: Tensor, shape: Sequence[int], age: int = 1) -> Tensor:
        """The tensor of the pool."""
        parts = shape[0] // len(self._rows)
        own = tuple(shape[1:]) if parts == 1 else (parts * shape[1], *shape[2:])
        return self._pool.tensor(self._layout, ("watched", site), own, like.dtype)

    has_part_rows = False

    def watched_rows(self, split: Split | None, parts: int) -> Tensor:
        if parts > 1:
            raise RuntimeError("rows of the pool contain all parts of a row")
        return self._index(self._computing(split))

    def watched_of(self, watched: Tensor, split: Split | None, like: Tensor) -> Tensor:
        return watched.index_select(0, self.watched_rows(split, 1)).view(like.shape)

    def write_watched(self, site: Site, value: Tensor, split: Split | None) -> None:
        rows = self._computing(split)
        _, shape, dtype = self._layout.places["watched", site]
        into = self._pool.tensor(self._layout, ("watched", site), shape, dtype)
        into.index_copy_(0, self._index(rows).long(), value.view(len(rows), *shape))

    def drop(self, branch: Any) -> None:
        self.dropped = True

    def _computing(self, split: Split | None) -> list[int]:
        return self._rows if split is None else [self._rows[row] for row in split.computing]

    def _index(self, rows: Sequence[int]) -> Tensor:
        """int32, on the device; sent once per call."""
        key = tuple(rows)
        if key not in self._indices:
            self._indices[key] = to_device(torch.tensor(key, dtype=torch.int32), self._device)
        return self._indices[key]


def places(store: Store, rows: int) -> dict[Any, int]:
    """The bytes per row that each tensor of a store takes in a pool; the store has `rows` rows."""
    return {
        key: aligned(-(-tensor.numel() * tensor.element_size() // rows))
        for key, tensor in store.named_tensors()
    }
