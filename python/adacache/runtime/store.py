# SPDX-License-Identifier: Apache-2.0
"""The only owner of kept tensors: residuals and outputs of sites, per guidance branch, and watched
residuals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import adacache_kernels
from adacache.policies.base import MOST_FACTORS, Keep
from adacache.rows import Split, to_device
from adacache.sites import Site

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Kept:
    """One kept feature.

    Attributes:
        factors: of its forecast: the feature, and what `Keep` states beside it.
        scale: of a float8 feature, per token.
        copies: how often the blocks repeat the tokens that they take (1, or once per frame).
        steps: per row of the batch, the steps at which the feature was kept.
        version: of the feature's tensor when it was kept.
        copied: the model modifies the tensor when it is reused, so it gets copies.
    """

    factors: list[Tensor] = field(default_factory=list)
    scale: Tensor | None = None
    copies: int = 1
    steps: list[list[int]] = field(default_factory=list)
    version: int = 0
    copied: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.factors[0].shape

    def fits(self, x: Tensor) -> bool:
        """Whether the feature is one of tokens of x's shape."""
        kept = self.shape
        return kept == x.shape if self.copies == 1 else kept == repeated(x, self.copies).shape

    def fits_tokens(self, x: Tensor) -> bool:
        """Whether x has as many rows and tokens as the feature."""
        return self.shape[:2] == x.shape[:2]

    def tensors(self) -> list[Tensor]:
        return self.factors if self.scale is None else [*self.factors, self.scale]


class Store:
    """Kept tensors of one request. A key is (branch, site, stream)."""

    def __init__(self) -> None:
        self._kept: dict[Any, Kept] = {}
        self._watched: dict[Site, Tensor] = {}
        self._newer: dict[Site, list[Tensor]] = {}
        """Watched tensors that are newer than the one that is compared, the oldest first."""
        self._first: dict[tuple[int, Site], Tensor] = {}
        """What further branches measured in the first step."""
        self.step = 0
        """The step under way."""
        self.bytes = 0
        """Most bytes kept at once so far, watched residuals included."""

    def __len__(self) -> int:
        return len(self._kept) + len(self._watched)

    def get(self, key: Any) -> Kept | None:
        return self._kept.get(key)

    def kept_once(self, key: Any, rows: Sequence[int]) -> bool:
        """Whether a feature was kept no more than once in some of these rows."""
        kept = self._kept.get(key)
        return kept is None or any(len(kept.steps[row]) < 2 for row in rows)

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
        """Keeps after - before. A difference beyond the range of float16 becomes its largest value.

        Args:
            after: [b, ...], the rows that computed.
            before: [B, ...], all rows.
            split: the rows of `before` that `after` has; None: all.
            gaps: per row of `before`, steps since its last computed one, for divided differences.
            out: of before's shape: `after` is written into its rows too.
        """
        copies = 1
        if before.ndim > 1 and after.shape[1] > before.shape[1] > 0 and not after.shape[1] % before.shape[1]:
            copies = after.shape[1] // before.shape[1]
            before = repeated(before, copies)
        dtype = keep.dtype or before.dtype
        same = after.dtype == before.dtype and after.dtype in FLOATS and before.numel() > 0
        if keep.factors == 1 and same and dtype in (before.dtype, torch.float8_e4m3fn):
            kept = self._allocated(key, before, dtype)
            kept.copies = copies
            adacache_kernels.stack_residual_meter(
                as_tokens(after),
                as_tokens(before),
                as_tokens(kept.factors[0]),
                residual_scale=kept.scale,
                frames=1,
                strides=(),
                rows=None if split is None else split.index,
                out=None if out is None else as_tokens(out),
            )
            if dtype == torch.float16:
                most = torch.finfo(dtype).max
                kept.factors[0].clamp_(-most, most)
            kept.version = kept.factors[0]._version
            return
        rows = before if split is None else split.take(before)
        self.keep(key, after.float() - rows.float(), keep, split, gaps, before)
        self._kept[key].copies = copies
        if out is not None and split is not None:
            split.put(out, after)

    def keep(
        self, key: Any, value: Tensor, keep: Keep, split: Split | None, gaps: Sequence[int], like: Tensor
    ) -> None:
        """Keeps a feature. Differences that would need a feature from before the first are 0.

        Args:
            value: [b, ...], the rows that computed.
            split, gaps: see `keep_difference`.
            like: has the shape of all rows and the dtype that is kept unless `keep` states one.
        """
        dtype = keep.dtype or like.dtype
        if dtype == torch.float8_e4m3fn:
            base = torch.zeros_like(like, dtype=torch.float32 if value.dtype not in FLOATS else value.dtype)
            self.keep_difference(key, value.to(base.dtype), base, Keep(dtype=dtype), split, gaps)
            return
        kept = self._allocated(key, like, dtype, keep.factors)
        kept.steps = kept.steps or [[] for _ in gaps]
        computing = range(len(gaps)) if split is None else split.computing
        if keep.recurrence is None:
            self._keep_differences(kept, value, split, gaps, computing)
        else:
            weights = [keep.recurrence(kept.steps[row], self.step) for row in computing]
            self._keep_combinations(kept, value, split, weights)
        for row in computing:
            kept.steps[row].append(self.step)
        kept.version = kept.factors[0]._version

    def _keep_differences(
        self, kept: Kept, value: Tensor, split: Split | None, gaps: Sequence[int], computing: Sequence[int]
    ) -> None:
        """The feature and its divided differences."""
        new, difference = value, value
        for i, factor in enumerate(kept.factors):
            if i + 1 < len(kept.factors):
                old = factor if split is None else split.rows_of(factor)
                steps = [gaps[row] if len(kept.steps[row]) > i else math.inf for row in computing]
                wide = new.to(torch.promote_types(new.dtype, torch.float32))
                difference = (wide - old) / self._per_row(steps, old)
            self._write(factor, new, split)
            new = difference

    def _keep_combinations(
        self,
        kept: Kept,
        value: Tensor,
        split: Split | None,
        weights: Sequence[Sequence[Sequence[float]]],
    ) -> None:
        """The feature, and per further factor and row the weighted sum of the feature and the old factors.
        From the last factor on, so that few new ones have to wait until the old ones are not needed."""
        wide = torch.promote_types(value.dtype, torch.float32)
        waiting: list[tuple[Tensor, Tensor]] = []
        columns = len(kept.factors) + 1
        table = [[[*row, *[0.0] * columns][:columns] for row in one] for one in weights]
        for i in range(len(kept.factors) - 1, -1, -1):
            new = value
            if i > 0:
                new = torch.zeros_like(value, dtype=wide)
                for k in range(columns):
                    own = [rows[i - 1][k] for rows in table]
                    if any(own):
                        factor = value if k == 0 else kept.factors[k - 1]
                        term = factor if split is None or k == 0 else split.rows_of(factor)
                        new += term.to(wide) * self._per_row(own, term)
            if any(rows[j][i + 1] for rows in table for j in range(i - 1)):
                waiting.append((kept.factors[i], new))
            else:
                self._write(kept.factors[i], new, split)
        for factor, new in waiting:
            self._write(factor, new, split)

    @staticmethod
    def _per_row(values: Sequence[float], like: Tensor) -> Tensor | float:
        """One value per row of the batch, for arithmetic with a tensor in which a row may have several
        parts."""
        if len(set(values)) == 1:
            return values[0]
        by_row = to_device(torch.tensor(values, dtype=torch.float32), like.device)
        return by_row.repeat_interleave(like.shape[0] // len(values)).view(-1, *[1] * (like.ndim - 1))

    @staticmethod
    def _write(into: Tensor, value: Tensor, split: Split | None) -> None:
        value = saturated(value, into.dtype)
        if split is None:
            into.copy_(value)
        else:
            split.put(into, value)

    def _allocated(self, key: Any, like: Tensor, dtype: torch.dtype, factors: int = 1) -> Kept:
        """The tensors under `key`, of like's shape; zeros if they are new or have to be made anew."""
        kept = self._kept.get(key)
        if kept is not None and kept.shape == like.shape and kept.factors[0].dtype == dtype:
            return kept
        with torch.inference_mode(False):
            kept = Kept([zeros(like.shape, dtype, like.device) for _ in range(factors)])
            if dtype == torch.float8_e4m3fn:
                kept.scale = zeros(as_tokens(like).shape[:2], torch.float32, like.device)
        self._kept[key] = kept
        self._count()
        return kept

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
        """x + the kept residual, or its forecast, in the rows that reuse; other rows hold x or are
        unspecified.

        Args:
            split: the rows that reuse; None: all.
            coefficients: float32 [videos, factors] of a forecast.
            video_of_row: int32 [B], for the coefficients.
            out: of x's shape, may be x.
        """
        reuse = None if split is None else split.reuse
        return add_kept(self._kept[key], x, reuse, coefficients, video_of_row, out)

    def output(
        self,
        key: Any,
        dtype: torch.dtype,
        *,
        coefficients: Tensor | None = None,
        video_of_row: Tensor | None = None,
    ) -> Tensor:
        """A kept output, or its forecast; the kept tensor itself, where the model does not modify it."""
        kept = self._kept[key]
        if kept.scale is not None:
            wide = as_tokens(kept.factors[0]).float() * kept.scale[..., None]
            return wide.view(kept.shape).to(dtype)
        if coefficients is None or dtype not in FLOATS:
            result = _forecast(kept.factors, coefficients, video_of_row, dtype)
            return result.clone() if kept.copied and result is kept.factors[0] else result
        factors = [as_tokens(factor) for factor in kept.factors]
        if video_of_row is not None:
            video_of_row = video_of_row.repeat_interleave(kept.shape[0] // len(video_of_row))
        nothing = zeros(factors[0].shape[2:], dtype, factors[0].device).expand(factors[0].shape)
        return _extrapolated(nothing, factors, coefficients, video_of_row).view(kept.shape)

    def intact(self, key: Any) -> bool:
        """Whether a kept output is unmodified: the model may have modified it in place when it was reused."""
        kept = self._kept.get(key)
        if kept is None:
            return False
        modified = kept.factors[0]._version != kept.version
        kept.copied = kept.copied or modified
        return not modified

    def old_watched(self, site: Site, like: Tensor, shape: Sequence[int], age: int = 1) -> Tensor:
        """The tensor last measured at a site, or with a greater age one before it; zeros before the first and
        after a change of shape, so that the distance from it is not finite."""
        old = self._watched.get(site)
        if old is None or old.shape != torch.Size(shape) or old.dtype != like.dtype:
            with torch.inference_mode(False):
                old = zeros(shape, like.dtype, like.device)
                self._newer[site] = [zeros(shape, like.dtype, like.device) for _ in range(age - 1)]
            self._watched[site] = old
            self._count()
        return old

    def copy_watched(self, site: Site, value: Tensor, split: Split | None = None) -> None:
        """Copies what was measured, in the rows of a split or in all.

        Args:
            value: has all rows.
        """
        tensors = [self._watched[site], *self._newer.get(site, [])]  # the oldest first
        for into, new in zip(tensors, [*tensors[1:], value], strict=True):
            if split is None:
                into.copy_(new)
            else:
                split.put(into, split.rows_of(new))

    has_part_rows = True
    """Whether `watched_rows` can be of several parts per row."""

    def watched_rows(self, split: Split | None, parts: int) -> Tensor | None:
        """int32 [b * parts], the rows of a watched tensor that belong to the rows that compute; None: all, in
        order."""
        return None if split is None else split.part_index(parts)

    def watched_of(self, watched: Tensor, split: Split | None, like: Tensor) -> Tensor:
        """The rows that compute of what `old_watched` returned, in like's shape."""
        return watched if split is None else split.rows_of(watched)

    def write_watched(self, site: Site, value: Tensor, split: Split | None) -> None:
        """Replaces what was last measured at a site, in the rows that compute."""
        if split is not None:
            split.put(self._watched[site], value)
        elif value.is_inference():
            self._watched[site].copy_(value)
        else:
            self._watched[site] = value

    def forget_watched(self, site: Site) -> None:
        self._watched.pop(site, None)

    def note_first(self, branch: int, site: Site, value: Tensor) -> None:
        """Keeps what a further branch measured in the first step."""
        self._first[branch, site] = value

    def first_watched(self, branch: int, site: Site) -> Tensor | None:
        """What a further branch measured in the first step."""
        return self._first.get((branch, site))

    def forget_first(self) -> None:
        self._first.clear()

    def residual(self, site: Site) -> Tensor | None:
        """See `policies.base.Kept`."""
        kept = self._kept.get((0, site, 0, ""))
        return None if kept is None else kept.factors[0]

    def watched(self, site: Site) -> Tensor | None:
        """See `policies.base.Kept`."""
        return self._watched.get(site)

    def drop(self, branch: Any) -> None:
        """Frees what one branch keeps."""
        self._kept = {key: kept for key, kept in self._kept.items() if key[0] != branch}

    def clear(self) -> None:
        self._kept.clear()
        self._watched.clear()
        self._newer.clear()
        self._first.clear()

    def named_tensors(self) -> list[tuple[Any, Tensor]]:
        """All that is kept now; each tensor with a key of its own."""
        watched: list[tuple[Any, Tensor]] = [(("watched", site), one) for site, one in self._watched.items()]
        watched += [
            (("newer", site, i), t) for site, newer in self._newer.items() for i, t in enumerate(newer)
        ]
        kept: list[tuple[Any, Tensor]] = []
        for key, one in self._kept.items():
            parts: list[tuple[int | str, Tensor]] = [*enumerate(one.factors)]
            parts += [] if one.scale is None else [("scale", one.scale)]
            kept += [((key, part, one.factors[0].dtype), tensor) for part, tensor in parts]
        return [*watched, *kept]

    @property
    def bytes_now(self) -> int:
        """Bytes kept now."""
        tensors = [tensor for _, tensor in self.named_tensors()] + list(self._first.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _count(self) -> None:
        self.bytes = max(self.bytes, self.bytes_now)


def add_kept(
    kept: Kept,
    x: Tensor,
    reuse: Tensor | None,
    coefficients: Tensor | None,
    video_of_row: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """See `Store.apply`; `reuse`: bool [B], the rows that reuse; None: all."""
    x = repeated(x, kept.copies)
    if x.dtype not in FLOATS:
        result = x + _forecast(kept.factors, coefficients, video_of_row, x.dtype)
        return result if out is None else out.copy_(result)
    tokens, given = as_tokens(x), None if out is None else as_tokens(out)
    if coefficients is None:
        result = adacache_kernels.reuse_residual(
            tokens,
            as_tokens(kept.factors[0]).view(tokens.shape),
            residual_scale=kept.scale,
            reuse=reuse,
            out=given,
        )
    else:
        factors = [as_tokens(factor).view(tokens.shape) for factor in kept.factors]
        result = _extrapolated(tokens, factors, coefficients, video_of_row, given)
    return result.view(x.shape)


def _extrapolated(
    x: Tensor,
    factors: Sequence[Tensor],
    coefficients: Tensor,
    video_of_row: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """x + the weighted sum of the factors, as many of them in a pass as the op takes."""
    for start in range(0, len(factors), MOST_FACTORS):
        chosen = slice(start, start + MOST_FACTORS)
        x = adacache_kernels.extrapolate_residual(
            x,
            list(factors[chosen]),
            coefficients[:, chosen].contiguous(),
            video_of_row=video_of_row,
            out=out,
        )
    return x


def _forecast(
    factors: Sequence[Tensor], coefficients: Tensor | None, video_of_row: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The feature in a dtype, or its forecast, by plain PyTorch."""
    if coefficients is None:
        return factors[0].to(dtype)
    weights = coefficients if video_of_row is None else coefficients.index_select(0, video_of_row)
    per_row = weights.repeat_interleave(factors[0].shape[0] // len(weights), dim=0)
    terms = [
        factor.to(dtype) * per_row[:, i].to(dtype).view(-1, *[1] * (factor.ndim - 1))
        for i, factor in enumerate(factors)
    ]
    return torch.stack(terms).sum(0)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(tuple(shape), dtype=dtype, device=device)


def repeated(x: Tensor, copies: int) -> Tensor:
    """The tokens [B, N, C] one after the other, `copies` times."""
    return x if copies == 1 else x.repeat(1, copies, *[1] * (x.ndim - 2))


def saturated(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in another dtype; finite values beyond float16's range become its largest."""
    if dtype == torch.float16 and value.dtype != torch.float16:
        most = torch.finfo(dtype).max
        value = torch.where(value.isfinite(), value.clamp(-most, most), value)
    return value.to(dtype)


def as_tokens(x: Tensor) -> Tensor:
    """x as [B, N, C], contiguous in C, without a copy where its strides allow."""
    if x.ndim == 3 and (x.stride(2) == 1 or x.shape[2] == 1):
        return x
    return x.reshape(x.shape[0], -1, x.shape[-1]).contiguous()
