"""AdaCache in `adacache.models.stdit3.STDiT3`: alternating spatial and temporal blocks are one stack in true
order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import adacache_kernels
from adacache.models.stdit3 import PARTS, AddResidual, Conditioning, STDiT3, add_residual, gated
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
                tokens = _compute(model, request, call, tokens, conditioning, None)
            elif not call.computing:
                tokens = _reuse(request, call, tokens, None)
            else:
                index = torch.tensor(call.computing, device=x.device)
                computed = _compute(model, request, call, tokens[index], conditioning.rows(index), index)
                reusing = torch.ones(x.shape[0], dtype=torch.bool, device=x.device).index_fill_(
                    0, index, False
                )
                tokens = _reuse(request, call, tokens, reusing).index_copy_(0, index, computed)
        return model.unembed(tokens, conditioning)


def _compute(
    model: STDiT3,
    request: Request,
    call: Call,
    tokens: Tensor,
    conditioning: Conditioning,
    rows: Tensor | None,
) -> Tensor:
    """Runs the block stack on all rows, or on some (rows [n] int64 of the batch), and refreshes their
    caches."""
    residuals = _Residuals(request, call, conditioning, rows)
    before = tokens
    for position, (block, angles) in enumerate(model.stack(conditioning)):
        tokens = block(tokens, conditioning, angles, residuals.at(*divmod(position, 2)))
    if request.policy.cache == "stack":
        residuals.store((call.branch, "stack"), tokens - before, request.policy.cache_dtype)
    return tokens


def _reuse(request: Request, call: Call, tokens: Tensor, reusing: Tensor | None) -> Tensor:
    """Adds the kept residuals to the tokens in place, for all rows or those of `reusing` [B] bool."""
    for key, cache in request.caches.items():
        if key[0] == call.branch:
            adacache_kernels.reuse_residual(tokens, cache, reuse=reusing, out=tokens)
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

    def at(self, block: int, position: int) -> AddResidual:
        """How the given block forms and adds its residuals; `position` is that of its kind in the pair."""
        kind = KINDS[position]
        site, measured_part = self.sites.get((block, kind), (None, "")) if self.call.measures else (None, "")
        if site is None and not self.keeps:
            return add_residual
        cross: list[Tensor] = []

        def add(part: str, x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
            if part == measured_part and gate is not None and not self.keeps:
                return self.measure_while_adding(site, x, y, gate)
            residual = y if gate is None else gated(y, gate)
            if part == measured_part:
                self.measure(site, residual)
            if part == "cross_attention":
                cross.append(residual)
            elif part == "mlp":
                both = cross.pop() + residual
                if measured_part == "cross_attention_mlp":
                    self.measure(site, both)
                if self.keeps:
                    self.store((self.call.branch, block, kind, "cross_attention_mlp"), both, self.cache_dtype)
            elif self.keeps:
                self.store((self.call.branch, block, kind, part), residual, self.cache_dtype)
            return x + residual

        return add

    @property
    def cache_dtype(self) -> torch.dtype | None:
        return self.request.policy.cache_dtype

    def measure_while_adding(self, site: int | None, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """x + gate * y, with the residual measured against the last one and kept in its place, in one
        pass."""
        old = self.old(site, y)
        x, sums = adacache_kernels.gated_residual_meter(x, y, gate, old, **self.metering())
        self.put_back(site, old)
        self.decide(site, sums, y)
        return x

    def measure(self, site: int | None, residual: Tensor) -> None:
        """Measures a residual against the last one, and keeps it in its place."""
        old = self.old(site, residual)
        sums = adacache_kernels.residual_meter(residual, old, **self.metering())
        old.copy_(residual)
        self.put_back(site, old)
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

    def decide(self, site: int | None, sums: Tensor, residual: Tensor) -> None:
        assert site is not None
        elements = self.request.rows_per_decision * residual.shape[1] * residual.shape[2]
        self.request.schedule.measured(site, self.call.step, sums, frames=self.frames, elements=elements)

    def old(self, site: int | None, like: Tensor) -> Tensor:
        """The residual last measured at a site, of these rows; zeros before the first (then nothing is
        decided)."""
        key = ("metric", site)
        if key not in self.request.caches:
            assert self.rows is None, "every row computes the first step"
            self.request.keep(key, torch.zeros_like(like, memory_format=torch.contiguous_format))
        cache = self.request.caches[key]
        return cache if self.rows is None else cache[self.rows]

    def put_back(self, site: int | None, residual: Tensor) -> None:
        if self.rows is not None:
            self.request.caches["metric", site].index_copy_(0, self.rows, residual)

    def store(self, key: tuple[object, ...], residual: Tensor, dtype: torch.dtype | None) -> None:
        """Keeps a residual for reuse, in `dtype` or its own."""
        residual = residual if dtype is None else residual.to(dtype)
        if self.rows is None:
            self.request.keep(key, residual)
        else:
            self.request.caches[key].index_copy_(0, self.rows, residual)
