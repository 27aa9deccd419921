"""AdaCache in `adacache.models.stdit3.STDiT3`: alternating spatial and temporal blocks are one stack in true
order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import adacache_kernels
from adacache.models.stdit3 import (
    NORM_EPS,
    PARTS,
    AddResidual,
    Conditioning,
    Modulation,
    STDiT3,
    add_residual,
    gated,
    norm_modulate,
)
from adacache.policies import MetricSite, StackInfo
from adacache.policies.adacache import measurable_strides
from adacache.request import Call, Request

if TYPE_CHECKING:
    from adacache.handle import Handle

KINDS = ("spatial", "temporal")


class STDiT3Adapter:
    model_class = f"{STDiT3.__module__}.{STDiT3.__qualname__}"

    def matches(self, model: object) -> bool:
        return isinstance(model, STDiT3)

    def stack(self, model: STDiT3) -> StackInfo:
        return StackInfo(
            depth=model.config.depth,
            parts=(*PARTS, "cross_attention_mlp"),
            kinds={
                "spatial_attention": ("spatial",),
                "temporal_attention": ("temporal",),
                "cross_attention": KINDS,
                "mlp": KINDS,
                "cross_attention_mlp": KINDS,
            },
        )

    def sites(self, model: STDiT3) -> list[str]:
        return [
            str(MetricSite(block, kind, part))
            for block in range(model.config.depth)
            for kind in KINDS
            for part in (f"{kind}_attention", "cross_attention", "mlp")
        ]

    def forward(
        self,
        model: STDiT3,
        handle: Handle,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | Sequence[int] | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | float | None = None,
        height: Tensor | float | None = None,
        width: Tensor | float | None = None,
    ) -> Tensor:
        tokens, conditioning = model.embed(x, timestep, x_mask, fps, height, width)
        with handle.call(x, timestep) as (request, call):
            if call.computing:
                # Captions are embedded only here: a reused step does not need them.
                conditioning = model.with_captions(conditioning, y, mask)
            if not call.reusing:
                tokens = _compute(model, request, call, tokens, conditioning)
            elif not call.computing:
                tokens = _reuse(request, call, tokens, None)
            else:
                # Built on the host and sent without waiting.
                rows = torch.tensor(call.computing, dtype=torch.int32).to(x.device, non_blocking=True)
                reuses = [row in call.reusing for row in range(x.shape[0])]
                reusing = torch.tensor(reuses).to(x.device, non_blocking=True)
                _compute(model, request, call, tokens, conditioning.rows(rows), rows)
                tokens = _reuse(request, call, tokens, reusing)
        return model.unembed(tokens, conditioning)


def _compute(
    model: STDiT3,
    request: Request,
    call: Call,
    tokens: Tensor,
    conditioning: Conditioning,
    rows: Tensor | None = None,
) -> Tensor:
    """Runs the block stack and refreshes the caches: on all rows, or on some (rows int32 [n]), which are then
    overwritten in `tokens`."""
    residuals = _Residuals(request, call, conditioning, rows)
    result = model.run_stack(tokens, conditioning, residuals.at, rows)
    if request.policy.cache == "stack":
        residuals.store_stack(result, tokens)
    if rows is None:
        return result
    if request.policy.cache != "stack":
        tokens.index_copy_(0, rows.long(), result)
    return tokens


def _reuse(request: Request, call: Call, tokens: Tensor, reusing: Tensor | None) -> Tensor:
    """Adds the kept residuals to the tokens in place, for all rows or those of `reusing` [B] bool."""
    for key, cache in request.caches.items():
        if key[0] == call.branch:
            scale = request.caches.get(("scale", *key))
            adacache_kernels.reuse_residual(tokens, cache, residual_scale=scale, reuse=reusing, out=tokens)
    return tokens


class _Residuals:
    """Looks at the residuals of one forward call as they are formed: measures some, keeps some."""

    def __init__(self, request: Request, call: Call, conditioning: Conditioning, rows: Tensor | None):
        self.request = request
        self.call = call
        self.rows = rows
        self.frames = conditioning.frames
        self.video_of_row = call.video_of_row
        if self.video_of_row is not None and rows is not None:
            self.video_of_row = self.video_of_row[rows]
        self.sites = {
            (site.block, site.kind): (i, site.part) for i, site in enumerate(request.schedule.sites)
        }
        self.keeps = request.policy.cache == "sublayer"

    def at(self, position: int) -> AddResidual:
        """How the block at a position of the stack forms and adds its residuals."""
        block, kind = position // len(KINDS), KINDS[position % len(KINDS)]
        site, measured_part = self.sites.get((block, kind), (None, "")) if self.call.measures else (None, "")
        # Of some rows only, the first sub-layer takes its x from the whole batch.
        first = position == 0 and self.rows is not None
        if site is None and not self.keeps and not first:
            return add_residual
        cross: list[Tensor] = []

        def add(
            part: str, x: Tensor, y: Tensor, gate: Tensor | None, norm: Modulation | None
        ) -> tuple[Tensor, Tensor | None]:
            x_rows = self.rows if first and part == f"{kind}_attention" else None
            if site is not None and part == measured_part and not self.keeps:
                return self.measure_while_adding(site, x, y, gate, norm, x_rows)
            if not self.keeps and measured_part != "cross_attention_mlp":
                if x_rows is None:
                    return add_residual(part, x, y, gate, norm)
                return adacache_kernels.gated_residual(x, y, gate, x_rows=x_rows), None
            residual = y if gate is None else gated(y, gate)
            if site is not None and part == measured_part:
                self.measure(site, residual)
            if part == "cross_attention":
                cross.append(residual)
            elif part == "mlp":
                both = cross.pop() + residual
                if site is not None and measured_part == "cross_attention_mlp":
                    self.measure(site, both)
                if self.keeps:
                    self.store((self.call.branch, block, kind, "cross_attention_mlp"), both)
            elif self.keeps:
                self.store((self.call.branch, block, kind, part), residual)
            x = (x if x_rows is None else x[x_rows]) + residual
            return x, None if norm is None else norm_modulate(x, norm)

        return add

    def measure_while_adding(
        self,
        site: int,
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        norm: Modulation | None,
        x_rows: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """x + gate * y and its norm, with the residual measured against the last one and kept in its place,
        in one pass."""
        old = self.old(site, y)
        metering = {"x_rows": x_rows, "residual_rows": self.rows, **self.metering()}
        normed: Tensor | None = None
        if norm is None:
            x, sums = adacache_kernels.gated_residual_meter(x, y, gate, old, **metering)
        else:
            shift, scale = norm
            x, normed, sums = adacache_kernels.gated_residual_norm_meter(
                x, y, gate, old, shift, scale, eps=NORM_EPS, **metering
            )
        self.decide(site, sums, y)
        return x, normed

    def measure(self, site: int, residual: Tensor) -> None:
        """Measures a residual against the last one, and keeps it in its place."""
        kept = self.old(site, residual)
        old = kept if self.rows is None else kept[self.rows]
        sums = adacache_kernels.residual_meter(residual, old, **self.metering())
        if self.rows is None:
            kept.copy_(residual)
        else:
            kept.index_copy_(0, self.rows.long(), residual)
        self.decide(site, sums, residual)

    def metering(self) -> dict[str, Any]:
        schedule = self.request.schedule
        return {
            "frames": self.frames,
            "strides": measurable_strides(schedule.strides, self.frames),
            "video_of_row": self.video_of_row,
            "num_videos": self.request.decisions,
            "metric": schedule.metric,
        }

    def decide(self, site: int, sums: Tensor, residual: Tensor) -> None:
        elements = self.request.rows_per_decision * residual.shape[1] * residual.shape[2]
        self.request.schedule.measured(site, self.call.step, sums, frames=self.frames, elements=elements)

    def old(self, site: int, like: Tensor) -> Tensor:
        """The residuals last measured at a site, of the whole batch; zeros before the first (then nothing is
        decided)."""
        return self._kept(("metric", site), like.shape, like)

    def store(self, key: tuple[object, ...], residual: Tensor) -> None:
        """Keeps a residual for reuse, in the policy's dtype or its own."""
        dtype = self.request.policy.cache_dtype
        residual = residual if dtype is None else residual.to(dtype)
        if self.rows is None:
            self.request.keep(key, residual)
        else:
            self.request.caches[key].index_copy_(0, self.rows.long(), residual)

    def store_stack(self, result: Tensor, tokens: Tensor) -> None:
        """Keeps what the stack added to these rows of `tokens`; if they are not all, puts the result into
        `tokens` too."""
        key = (self.call.branch, "stack")
        dtype = self.request.policy.cache_dtype or tokens.dtype
        if dtype not in (tokens.dtype, torch.float8_e4m3fn):
            self.store(key, result - (tokens if self.rows is None else tokens[self.rows]))
            if self.rows is not None:
                tokens.index_copy_(0, self.rows.long(), result)
            return
        cache, scale = self._kept(key, tokens.shape, tokens, dtype), None
        if dtype == torch.float8_e4m3fn:
            scale = self._kept(("scale", *key), tokens.shape[:2], tokens, torch.float32)
        adacache_kernels.stack_residual_meter(
            result,
            tokens,
            cache,
            residual_scale=scale,
            rows=self.rows,
            out=None if self.rows is None else tokens,
            **self.metering() | {"strides": ()},
        )

    def _kept(
        self, key: tuple[object, ...], shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A tensor of the request, zeros at first."""
        if key not in self.request.caches:
            assert self.rows is None, "every row computes the first step"
            self.request.keep(key, torch.zeros(shape, dtype=dtype or like.dtype, device=like.device))
        return self.request.caches[key]
