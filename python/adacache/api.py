# SPDX-License-Identifier: Apache-2.0
"""`enable`, `accelerate` and `disable`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from adacache.adapters.registry import declared_spec
from adacache.adapters.spec import ModelSpec
from adacache.checks import refuse
from adacache.handle import Handle, tier_of
from adacache.integrations.context_parallel import MovedSplits, declared, sharded_over
from adacache.integrations.pipelines import ATTRIBUTE as PIPELINE
from adacache.integrations.pipelines import PipelineHandle, is_pipeline, transformers
from adacache.interpose import STATE, is_interposed, plain_class
from adacache.policies import Named, Policy
from adacache.policies.base import wraps_of
from adacache.runtime.accelerated import Accelerated
from adacache.runtime.ranks import Parallel

ATTRIBUTE = f"{STATE}_handle"


def enable(
    model: Any,
    policy: Policy | str | Path,
    *,
    num_steps: int | None = None,
    rows_per_video: int | None = None,
    budget: int | None = None,
    speedup: float | None = None,
    adaptive: bool = False,
    fused: bool | str = True,
    parallel: Parallel | Sequence[Parallel] | None = None,
) -> Any:
    """Enables caching; each generation is then one request.

    Args:
        model: a video diffusion transformer, or a pipeline that has one or two of them (such as diffusers'):
            of a known class (`adacache.known_models()`), or any that keeps its blocks in `nn.ModuleList`s.
            With a policy that wraps no block, such as a planned path: any model, also a UNet.
        policy: settings such as `AdaCache(...)`, the name of a preset (`adacache.preset_names()`), or the
            path of a file that `adacache calibrate` wrote.
        num_steps: denoising steps that the sampler runs. None for a pipeline: its scheduler states them.
        rows_per_video: rows of the batch per video, for calls outside `handle.request()` and pipelines: 2
            with guidance in one batch, 1 without; None: 2 if the batch is even.
        budget, speedup: for a file of planned paths, the number of computed steps; or the number of steps
            over it, of which the next smaller budget in the file is taken. Exactly one of them.
        adaptive: for a file of planned paths that `adacache calibrate --adaptive` extended: each video gets
            its own number of computed steps; the budget is their mean (`AdaptivePath`). For pipelines only.
        fused: whether blocks run on the fused ops where a program for their class exists (docs/models.md):
            True or "exact": bit-identical to the model's own; "close": norms are computed in float32 and
            rounded once, which is faster; False: blocks are only wrapped. `describe()` of the result says
            which blocks run so.
        parallel: how several processes share each forward call (docs/several_gpus.md); one per dimension of
            a mesh. None: as the model states it (`enable_parallelism` of diffusers, `STDiT3.sequence`); if
            it does not, each process has calls of its own. All processes of a group call `enable` with the
            same settings, after `enable_parallelism` and `fully_shard`.

    Pipelines that share a transformer can be enabled with the same settings.

    Returns:
        A `Handle` with `trace`, `request()` and `sites`; for a pipeline, a `PipelineHandle`.

    Raises:
        ValueError: no block list is found, an unknown preset, settings that do not fit the model or the
            schedule, a model that cannot be cached, "exact" or "close" for a model without a fused program,
            processes that cannot decide together, or caching is enabled already.
    """
    if not (isinstance(policy, str | Path) or hasattr(policy, "start")):
        raise ValueError(
            "policy: expected settings such as adacache.AdaCache(...), the name of a preset or a path, "
            f"got {type(policy).__name__}"
        )
    if isinstance(policy, str | Path):
        settings: Policy | Named = Named(policy, budget, speedup, adaptive)
    elif budget is None and speedup is None and not adaptive:
        settings = policy
    else:
        raise ValueError(
            "budget, speedup, adaptive: expected none of them with settings; they choose from a file of paths"
        )
    needs_blocks = (
        wraps_of(settings.policy(num_steps) if isinstance(settings, Named) else settings) == "blocks"
    )
    if is_pipeline(model, unets=not needs_blocks):
        if is_interposed(model):
            raise ValueError(
                "model: AdaCache is enabled on it already; call adacache.disable(pipeline) first"
            )

        def enable_part(part: nn.Module) -> Handle:
            return _enable_model(part, settings, num_steps, rows_per_video, True, fused, parallel)

        return PipelineHandle(model, enable_part, _release)
    return _enable_model(model, settings, num_steps, rows_per_video, False, fused, parallel)


def _enable_model(
    model: nn.Module,
    policy: Policy | Named,
    num_steps: int | None,
    rows_per_video: int | None,
    in_pipeline: bool,
    fused: bool | str,
    parallel: Parallel | Sequence[Parallel] | None,
) -> Handle:
    wrapper, model = _unwrapped(model)
    if isinstance(model, nn.Module) and ATTRIBUTE in model.__dict__:
        shared: Handle = model.__dict__[ATTRIBUTE]
        settings = policy, num_steps, rows_per_video, fused, _parallels(model, parallel)
        if in_pipeline and shared.users and shared.has_settings(*settings):
            shared.users += 1
            return shared
        raise ValueError("model: AdaCache is enabled on it already; call adacache.disable(model) first")
    if num_steps is None and not in_pipeline and isinstance(model, nn.Module):
        raise ValueError(
            "num_steps: expected the number of denoising steps, got None (a pipeline would state it)"
        )
    parallels = _parallels(model, parallel)
    handle = Handle(model, policy, num_steps, rows_per_video, fused, parallels)

    def check_model() -> None:
        if handle.wraps == "blocks" and not parallels:
            _check_weights(model)
        if _parallels(model, parallel) != parallels:
            raise ValueError(
                "model: how it is split over processes changed after AdaCache was enabled; disable it first"
            )

    check_model()
    if handle.grid is not None and not in_pipeline:
        raise ValueError(
            "policy: these are timesteps for a pipeline's scheduler; enable them on the pipeline"
        )
    handle.install(wrapper, MovedSplits if parallels else None)
    handle.check_model = check_model
    handle.users = 1 if in_pipeline else 0
    model.__dict__[ATTRIBUTE] = handle
    return handle


def accelerate(model: Any, *, fused: bool | str = True) -> Any:
    """Runs the blocks of a model on the fused ops, without caching. `disable` undoes it.

    Args:
        model: of a class with a fused program (docs/models.md), or a pipeline that has one or two of them.
        fused: True, "exact" or "close"; see `enable`, which does the same for the steps that it computes.

    Returns:
        An `Accelerated` with `describe()`; for a pipeline, one per transformer by its name.

    Raises:
        ValueError: the model has no fused program, or caching is enabled on it.
    """
    if is_pipeline(model):
        found = transformers(model)
        for part in found.values():
            _check_can_accelerate(part, fused)
        return {name: accelerate(part, fused=fused) for name, part in found.items()}
    _, model = _unwrapped(model)
    spec, tier = _check_can_accelerate(model, fused)
    model.__dict__[ATTRIBUTE] = accelerated = Accelerated(model, spec, tier)
    return accelerated


def _check_can_accelerate(model: Any, fused: bool | str) -> tuple[ModelSpec, str]:
    """The declaration of a model and the tier that it would run with. Raises ValueError; see `accelerate`."""
    if isinstance(model, nn.Module) and ATTRIBUTE in model.__dict__:
        raise ValueError("model: AdaCache is enabled on it already; call adacache.disable(model) first")
    spec = declared_spec(model)
    if spec is None or spec.block_program is None:
        raise ValueError(f"model: {plain_class(model).__name__} has no fused program (docs/models.md)")
    tier = tier_of(fused, spec)
    if tier is None:
        raise ValueError('fused: expected True, "exact" or "close", got False')
    return spec, tier


def _release(handle: Handle) -> None:
    """Disables a transformer that no other enabled pipeline uses."""
    handle.users -= 1
    if handle.users < 1 and handle.enabled:
        disable(handle.model)


def disable(model: Any) -> None:
    """Disables caching, or undoes `accelerate`: the model is restored, bit for bit. The handle's last trace
    stays readable.

    Raises:
        ValueError: caching is not enabled on the model or pipeline.
    """
    if not isinstance(model, nn.Module) and PIPELINE in getattr(model, "__dict__", {}):
        model.__dict__[PIPELINE].disable()
        return
    if is_pipeline(model):
        parts = [part for part in transformers(model).values() if ATTRIBUTE in part.__dict__]
        if not parts:
            raise ValueError("model: AdaCache is not enabled on it")
        for part in parts:
            disable(part)
        return
    _, model = _unwrapped(model)
    handle = getattr(model, "__dict__", {}).pop(ATTRIBUTE, None)
    if handle is None:
        raise ValueError("model: AdaCache is not enabled on it")
    handle.uninstall()


def _unwrapped(model: Any) -> tuple[Any, Any]:
    """What `torch.compile` has wrapped around a model, or None, and the model."""
    inner = getattr(model, "_orig_mod", None)
    return (None, model) if inner is None else (model, inner)


def _parallels(model: Any, given: Parallel | Sequence[Parallel] | None) -> tuple[Parallel, ...]:
    """How processes share the calls of a model; empty: they do not.

    Raises:
        ValueError: the given groups leave out that of diffusers.
    """
    found = declared(model)
    if given is None:
        return () if found is None else (found,)
    parallels = (given,) if isinstance(given, Parallel) else tuple(given)
    for one in parallels:
        if not isinstance(one, Parallel):
            refuse("parallel", "adacache.Parallel(group, split), several of them, or None", one)
    stated = {(one.process_group, one.split) for one in parallels}
    if found is not None and (found.process_group, found.split) not in stated:
        raise ValueError(
            f"parallel: expected the group that the model states ({found.size} ranks, split "
            f"{found.split!r}) among the given ones, or None"
        )
    return parallels


def _check_weights(model: nn.Module) -> None:
    """Raises ValueError if ranks run the blocks together, but decide apart."""
    size = sharded_over(model)
    if size > 1:
        raise ValueError(
            f"model: its weights are split over {size} ranks, which must run the same blocks; pass "
            'parallel=adacache.Parallel(mesh, "rows") for ranks with videos of their own, "none" for ranks '
            "with the same tokens, or how they split the tokens"
        )
