# SPDX-License-Identifier: Apache-2.0
"""What single ranks run in the tests. Each function is called on all ranks and returns plain values and
tensors."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import adacache
import torch
import torch.distributed as dist
from adacache.models.sequence_parallel import SequenceParallel
from adacache.models.stdit3 import STDiT3, STDiT3Config
from adacache.policies.base import Decider, Plan, Step, Sums, Watch
from adacache.runtime.meter import Meter
from adacache.runtime.ranks import Ranks
from adacache.runtime.request import Facts, Request
from adacache.sites import BlockSites, ModelSites, Site
from model_cases import CHRONOEDIT, COGVIDEOX, HELIOS, LTX, WAN, Case, Values, randn
from torch import Tensor

import adacache_kernels

STEPS = 12
STDIT3 = Case(
    "STDiT3",
    lambda: STDiT3(
        STDiT3Config(
            depth=4, hidden_size=16, num_heads=2, caption_channels=12, model_max_length=5, input_sq_size=8
        )
    ),
    lambda videos, frames: {
        "x": randn(videos, 4, frames, 4, 8),
        "y": randn(videos, 1, 5, 12),
        "x_mask": torch.arange(frames).repeat(videos, 1) > 0,
    },
    lists=("spatial_blocks", "temporal_blocks"),
    latents="x",
    options={},
)
# Prompts of an even number of tokens, which two ranks share.
LTX_EVEN = replace(
    LTX,
    inputs=lambda videos, frames: {
        **LTX.inputs(videos, frames),
        "encoder_hidden_states": randn(videos, 6, 12),
        "encoder_attention_mask": None,  # diffusers cannot split masks by heads
    },
)
MODELS: dict[str, Case] = {"wan": WAN, "chronoedit": CHRONOEDIT, "ltx": LTX_EVEN, "stdit3": STDIT3}
MOTION = adacache.MotionRegularization(
    strides=(1, 2), window=(2, 11), scale=0.8, power=2.0, gradient_weight=0.5
)


def policy(case: Case, motion: bool = False, **settings: Any) -> adacache.AdaCache:
    return adacache.AdaCache(codebook=case.codebook, motion=MOTION if motion else None, **settings)


def generated(
    case: Case, model: Any, settings: Any, values: Values, rows_per_video: int = 1, **options: Any
) -> dict[str, Any]:
    """One generation with caching: its latents and what was decided."""
    handle = adacache.enable(model, settings, num_steps=STEPS, rows_per_video=rows_per_video, **options)
    try:
        latents = case.denoise(model, values, STEPS)
        trace = handle.trace
        return {
            "latents": latents,
            "computed": trace.computed,
            "measurements": trace.measurements,
            "bytes": trace.cache_bytes,
            "traffic": {} if handle.ranks is None else dict(handle.ranks.traffic),
        }
    finally:
        adacache.disable(model)


def enable_context_parallelism(model: Any, plan: Any = None, **config: Any) -> None:
    """diffusers' `enable_parallelism`, which expects an accelerator."""
    from diffusers import ContextParallelConfig

    with mock.patch("torch.accelerator.device_count", return_value=1):
        model.enable_parallelism(config=ContextParallelConfig(**config), cp_plan=plan)


@contextlib.contextmanager
def attention_with_sums() -> Iterator[None]:
    """The attention of diffusers with the logarithms of its sums, which ring attention needs and which it has
    on GPUs only."""
    from diffusers.models import attention_dispatch as dispatch

    plain = dispatch._native_attention_forward_op
    signature = inspect.signature(plain)

    def attention(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        asked = given.pop("return_lse", False)
        output = plain(**given)
        query, key = given["query"], given["key"]
        scores = torch.einsum("bqhd,bkhd->bqhk", query, key) * query.shape[-1] ** -0.5
        return (output, scores.logsumexp(-1)) if asked else output

    with mock.patch.object(dispatch, "_native_attention_forward_op", attention):
        yield


def parallelize(model: Any, name: str, **how: Any) -> None:
    if name == "stdit3":
        model.sequence = SequenceParallel(dist.group.WORLD, **how)
    else:
        enable_context_parallelism(model, **how)


def split_model(
    rank: int, size: int, name: str, motion: bool, videos: int, frames: int, how: Values
) -> dict[str, Any]:
    """A model on one process, and split over the ranks."""
    case = MODELS[name]
    model, values = case.model(), case.values(videos, frames=frames)
    expected = generated(case, model, policy(case, motion), values)
    with attention_with_sums():
        parallelize(model, name, **how)
        before = case.denoise(model, values, 1)
        found = generated(case, model, policy(case, motion), values)
        after = case.denoise(model, values, 1)
    return {"expected": expected, "found": found, "before": before, "after": after}


POLICIES: dict[str, Any] = {
    "sublayer": lambda: policy(STDIT3, True, cache="sublayer"),
    "block": lambda: policy(WAN, metric_part="block", cache="block"),
    "float8": lambda: policy(WAN, cache_dtype=torch.float8_e4m3fn),
    "DBCache": lambda: adacache.DBCache(probe=1, tail=1, threshold=0.35, first=2),
    "DiCache": lambda: adacache.DiCache(threshold=0.6),
    "FirstBlock": lambda: adacache.FirstBlock(threshold=0.3),
    "BWCache": lambda: adacache.BWCache(threshold=0.6),
    "TeaCache": lambda: adacache.TeaCache(threshold=0.8),
    "TaylorSeer": lambda: adacache.TaylorSeer(interval=3),
    "EasyCache": lambda: adacache.EasyCache(threshold=0.6, first=2),
}


def methods(rank: int, size: int, name: str, names: Sequence[str], how: Values) -> dict[str, Any]:
    """Each method on one process, and on a model that is split over the ranks."""
    case = MODELS[name]
    model, values = case.model(), case.values(2, frames=4)
    expected = {one: generated(case, model, POLICIES[one](), values) for one in names}
    parallelize(model, name, **how)
    return {one: (expected[one], generated(case, model, POLICIES[one](), values)) for one in names}


class Watching(Decider):
    """Watches one site and keeps its sums."""

    def __init__(self, strides: tuple[int, ...]):
        self.site = Site(0, 1, "attention")
        self.watches = {self.site: Watch("l2", strides)}
        self.seen: list[Sums] = []

    def plan(self, step: Step) -> Plan:
        return Plan()

    def observe(self, step: Step, site: Site, sums: Sums) -> None:
        self.seen.append(sums)


class WatchingPolicy:
    per_video = True

    def __init__(self, strides: tuple[int, ...]):
        self.decider = Watching(strides)

    def check(self, sites: ModelSites, num_steps: int) -> None: ...

    def start(self, *args: Any) -> Decider:
        return self.decider

    def describe(self) -> dict[str, Any]:
        return {}


def measured(
    residuals: Sequence[Any], frames: int, strides: tuple[int, ...], ranks: Ranks | None, rows: int = 2
) -> Sums:
    """The sums of the last of some residuals [rows, n, C], as the meter passes them to a decider."""
    settings: Any = WatchingPolicy(strides)
    sites = ModelSites((BlockSites(0, "", ("attention",)),))
    request = Request(settings, sites, num_steps=len(residuals), num_videos=2, ranks=ranks)
    for residual in residuals:
        branch = request.begin_call(Facts((rows, 1), torch.device("cpu")), True, "")
        meter = Meter(request, branch, frames)
        meter.residual(settings.decider.site, residual, None)
    return settings.decider.seen[-1]


def sums_of_ranks(
    rank: int, size: int, split: str, frames: int, width: int, strides: tuple[int, ...]
) -> dict[str, Any]:
    """Sums of random residuals on one process, and of the parts of the ranks."""
    torch.manual_seed(frames * width)
    residuals = [torch.randn(2, frames * width, 3) for _ in range(3)]
    expected = measured(residuals, frames, strides, None)
    ranks = Ranks([adacache.Parallel(dist.group.WORLD, split)])
    if split == "tokens":  # of different sizes if need be, as in diffusers' ulysses_anything
        parts, known = [x.tensor_split(size, 1)[rank] for x in residuals], frames
    elif split == "frames":
        grids = [x.unflatten(1, (frames, width)) for x in residuals]
        parts = [grid.tensor_split(size, 1)[rank].flatten(1, 2) for grid in grids]
        known = parts[0].shape[1] // width
    else:
        grids = [x.unflatten(1, (frames, width)) for x in residuals]
        parts, known = [grid.tensor_split(size, 2)[rank].flatten(1, 2) for grid in grids], frames
    found = measured(parts, known, strides, ranks)
    return {
        "names": adacache_kernels.sum_columns(strides),
        "expected": expected,
        "found": found,
        "traffic": dict(ranks.traffic),
    }


def other_rows(rank: int, size: int, nan_at: int | None = None) -> dict[str, Any]:
    """Two rows of one video in one batch, and one on each rank."""
    case = LTX
    model, values = case.model(), case.values(size)
    rows = case.rows(values, rank)
    if nan_at is not None:
        steps = 0

        def spoil(module: Any, args: Any, output: Any) -> Any:
            nonlocal steps
            steps += 1
            return torch.full_like(output, torch.nan) if steps == nan_at and rank == size - 1 else output

        model.transformer_blocks[1].attn1.register_forward_hook(spoil)
    parallel = adacache.Parallel(dist.group.WORLD, "rows")
    found = generated(case, model, policy(case), rows, parallel=parallel)
    expected = generated(case, case.model(), policy(case), values, rows_per_video=size)
    return {"expected": expected, "found": found, "row": expected["latents"][rank : rank + 1]}


def mesh_of_tokens_and_rows(rank: int, size: int) -> dict[str, Any]:
    """Guidance branches on different ranks, each of which is split over ranks."""
    mesh = dist.init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("guidance", "ring", "ulysses"))
    case = WAN
    values = case.values(2, frames=4)
    expected = generated(case, case.model(), policy(case, True), values, rows_per_video=2)
    model = case.model()
    enable_context_parallelism(model, ulysses_degree=2, mesh=mesh["ring", "ulysses"])
    parallel = [
        adacache.Parallel(model._parallel_config.context_parallel_config._flattened_mesh, "tokens"),
        adacache.Parallel(mesh["guidance"], "rows"),
    ]
    branch = mesh["guidance"].get_local_rank()
    rows = case.rows(values, branch)
    found = generated(case, model, policy(case, True), rows, parallel=parallel)
    return {"expected": expected, "found": found, "row": expected["latents"][branch : branch + 1]}


def sharded_weights(rank: int, size: int, split: str) -> dict[str, Any]:
    """Ranks that hold parts of the weights, with videos of their own, or with parts of the tokens."""
    from torch.distributed.fsdp import fully_shard

    case = WAN
    values = case.values(size, frames=4)
    expected = generated(case, case.model(), policy(case), values, rows_per_video=size)
    model, mesh = case.model(), dist.init_device_mesh("cpu", (size,))
    if split == "tokens":
        enable_context_parallelism(model, ulysses_degree=size)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if split == "tokens":
        found = generated(case, model, policy(case), values, rows_per_video=size)
        return {"expected": expected, "found": found, "row": expected["latents"]}
    refused = message(lambda: adacache.enable(model, policy(case), num_steps=STEPS))
    parallel = adacache.Parallel(mesh, "rows")
    found = generated(case, model, policy(case), case.rows(values, rank), parallel=parallel)
    row = expected["latents"][rank : rank + 1]
    return {"expected": expected, "found": found, "row": row, "refused": refused}


@torch.inference_mode()
def same_tokens(rank: int, size: int) -> dict[str, Any]:
    """Ranks with all tokens, as in tensor parallelism, one of which has other rounding; in inference mode."""
    case = LTX
    values = case.values(2)
    expected = generated(case, case.model(), policy(case, True), values)
    model = case.model()
    if rank:
        model.transformer_blocks[1].attn1.register_forward_hook(lambda module, args, y: y * (1 + 1e-6))
    parallel = adacache.Parallel(dist.group.WORLD, "none")
    found = generated(case, model, policy(case, True), values, parallel=parallel)
    return {"expected": expected, "found": found}


class MixingBlock(torch.nn.Module):
    """Mixes all tokens, by a sum over the ranks if they are split."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.split = False

    def forward(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        total, count = hidden_states.sum(1, keepdim=True), hidden_states.shape[1]
        if self.split:
            dist.all_reduce(total)
            count *= dist.get_world_size()
        return hidden_states + torch.tanh(self.linear(hidden_states + total / count) * time)


class Mixing(torch.nn.Module):
    """A model without a declaration, whose latents can be split outside."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(MixingBlock() for _ in range(4))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, timestep.view(-1, 1, 1) / 1000)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:]) * 0.1


MIXING = Case(
    "Mixing",
    Mixing,
    lambda videos, frames: {"x": randn(videos, 8, frames, 4, 2)},
    lists=("blocks",),
    latents="x",
    codebook={0.02: 4, 0.05: 3, 0.1: 2, 9.0: 1},
    options={},
)


def split_outside(rank: int, size: int, split: str, dimension: int) -> dict[str, Any]:
    """Latents that the caller splits along a dimension; the blocks of the model communicate by themselves."""
    case = MIXING
    model, values = case.model(), case.values(2, frames=4)
    expected = generated(case, model, policy(case, True), values)
    for block in model.blocks:
        block.split = True
    parallel = adacache.Parallel(dist.group.WORLD, split)
    part = {"x": values["x"].chunk(size, dimension)[rank]}
    found = generated(case, model, policy(case, True), part, parallel=parallel)
    own = expected["latents"].chunk(size, dimension)[rank]
    return {"expected": expected, "found": found, "own": own}


def warm_up(rank: int, size: int) -> dict[str, Any]:
    """A call before the generation, with the timestep of its first step."""
    case = WAN
    model, values = case.model(), case.values(1, frames=4)
    expected = generated(case, model, policy(case), values)
    enable_context_parallelism(model, ulysses_degree=size)
    handle = adacache.enable(model, policy(case), num_steps=STEPS, rows_per_video=1)
    with torch.no_grad():
        case.predict(model, case.values(1, seed=1, frames=4), values[case.latents], 0, STEPS)
    latents = case.denoise(model, values, STEPS)
    trace = handle.trace
    found = {"latents": latents, "computed": trace.computed, "measurements": trace.measurements}
    adacache.disable(model)
    return {"expected": expected, "found": found}


def engine(rank: int, size: int) -> str:
    from adacache.digits import sampler
    from adacache.serving import Engine, FlowDenoiser

    model = STDIT3.model()
    model.sequence = SequenceParallel(dist.group.WORLD)
    return message(lambda: Engine(FlowDenoiser(model, sampler(STEPS)), policy(STDIT3), slots=2))


def split_later(rank: int, size: int) -> list[str]:
    """Models that are split after caching was enabled."""
    from torch.distributed.fsdp import fully_shard

    found = []
    for name in ("context", "weights", "weights_of_a_known_class", "sequence"):
        case = {"weights": LTX, "sequence": STDIT3}.get(name, WAN)
        if name == "weights_of_a_known_class":
            fully_shard(case.model(), mesh=dist.init_device_mesh("cpu", (size,)))
        model = case.model()
        adacache.enable(model, policy(case), num_steps=STEPS, rows_per_video=1)
        if name == "context":
            enable_context_parallelism(model, ulysses_degree=size)
        elif name.startswith("weights"):
            fully_shard(model, mesh=dist.init_device_mesh("cpu", (size,)))
        else:
            model.sequence = SequenceParallel(dist.group.WORLD)
        found.append(message(lambda case=case, model=model: case.denoise(model, case.values(1, frames=4), 1)))
    return found


def message(run: Any) -> str:
    """The message of the ValueError that it raises."""
    try:
        run()
    except ValueError as error:
        return str(error)
    return "no error"


def refusals(rank: int, size: int) -> dict[str, str]:
    """What cannot work raises before the first step."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    found = {}
    group = dist.group.WORLD
    tokens = adacache.Parallel(group, "tokens")

    def enable(model: Any, settings: Any = None, **options: Any) -> str:
        chosen = policy(WAN) if settings is None else settings
        return message(lambda: adacache.enable(model, chosen, num_steps=STEPS, **options))

    gathers = WAN.model()
    plan = {
        "blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "blocks.3": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    enable_context_parallelism(gathers, plan, ulysses_degree=size)
    found["gathers"] = enable(gathers)
    attention = COGVIDEOX.model()
    enable_context_parallelism(
        attention,
        {"transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)}},
        ulysses_degree=size,
    )
    found["attention"] = enable(attention)
    found["places"] = enable(HELIOS.model(), parallel=tokens)
    wan = WAN.model()
    enable_context_parallelism(wan, ulysses_degree=size)
    found["another group"] = enable(wan, parallel=adacache.Parallel(group, "rows"))
    found["kept"] = enable(wan, adacache.MagRatios())
    found["filter"] = enable(WAN.model(), adacache.SeaCache(0.3), parallel=adacache.Parallel(group, "frames"))
    found["type"] = enable(WAN.model(), parallel="tokens")
    found["two splits"] = enable(WAN.model(), parallel=[tokens, adacache.Parallel(group, "frames")])
    found["split"] = message(lambda: adacache.Parallel(group, "heads"))
    found["group"] = message(lambda: adacache.Parallel(None))
    handle = adacache.enable(wan, policy(WAN), num_steps=STEPS)
    found["memory"] = message(lambda: handle.predict_memory((), WAN.values()))
    adacache.disable(wan)
    model = STDIT3.model()
    model.sequence = SequenceParallel(group)
    found["frames"] = message(lambda: STDIT3.denoise(model, STDIT3.values(1, frames=1), 1))
    return found


def different_calls(rank: int, size: int, differ: str) -> str:
    """Ranks whose calls do not fit together raise in the first step."""
    case = LTX
    model, values = case.model(), case.values(1 + (rank if differ == "batch" else 0))
    settings = policy(case, motion=rank == 0 and differ == "settings")
    steps = STEPS + (rank if differ == "steps" else 0)
    parallel = adacache.Parallel(dist.group.WORLD, "none")
    adacache.enable(model, settings, num_steps=steps, rows_per_video=1, parallel=parallel)
    return message(lambda: case.denoise(model, values, 1))


def ends_at(rank: int, size: int, step: int) -> None:
    """The last rank ends without a word after some steps."""
    case = WAN
    model = case.model()
    enable_context_parallelism(model, ulysses_degree=size)
    adacache.enable(model, adacache.AdaCache(codebook={9.0: 1}), num_steps=STEPS)
    calls = 0

    def end(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == step and rank == size - 1:
            os._exit(3)

    model.proj_out.register_forward_pre_hook(end)
    case.denoise(model, case.values(1, frames=4), STEPS)


def stops_deciding(rank: int, size: int, step: int) -> None:
    """The last rank ends between the collectives of the model; the others wait for its sums."""
    case = LTX
    model = case.model()
    parallel = adacache.Parallel(dist.group.WORLD, "rows")
    adacache.enable(model, adacache.AdaCache(codebook={9.0: 1}), num_steps=STEPS, parallel=parallel)
    calls = 0

    def end(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == step and rank == size - 1:
            os._exit(3)

    model.transformer_blocks[0].register_forward_pre_hook(end)
    case.denoise(model, case.values(), STEPS)


def pipeline(rank: int, size: int) -> dict[str, Any]:
    """A pipeline with guidance in two calls, on one process and split over the ranks."""
    from pipeline_cases import PIPELINES

    case = next(one for one in PIPELINES if one.name == "WanPipeline")
    found = []
    for split in (False, True):
        pipe = case.build()
        if split:
            enable_context_parallelism(pipe.transformer, ulysses_degree=size)
        handle = adacache.enable(pipe, policy(WAN))
        call = case.call(1)
        frames = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
        found.append({"latents": torch.as_tensor(frames), "computed": handle.trace.computed})
    return {"expected": found[0], "found": found[1]}
