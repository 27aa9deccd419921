# SPDX-License-Identifier: Apache-2.0
"""Planned paths against a reference implementation: on models, on diffusers pipelines, and as timesteps."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adacache
import pytest
import torch
from adacache.policies.planned_path import FORMAT
from model_cases import COGVIDEOX, HUNYUAN, LATTE, WAN, Case, ids, relative_error
from pipeline_cases import PIPELINES, unipc
from test_models import enabled
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS = 12
COMPUTED = [1, 2, 4, 7, 12]
FACTORS = [0.0, 0.6, 1.2, 0.35, 0.0]
CASE = {str(case): case for case in PIPELINES}
CALLED = [name for name in CASE if "SkyReelsV2Diffusion" not in name]


def built(name: str) -> Any:
    """A pipeline; every call gives equal weights."""
    torch.manual_seed(0)
    return CASE[name].build()


class Rule:
    """Reference implementation of the rule for one sequence of outputs."""

    def __init__(self) -> None:
        self.outputs: dict[int, Tensor] = {}

    def __call__(self, step: int, output: Tensor) -> Tensor:
        if step in COMPUTED:
            self.outputs[step] = output.double()
            return output
        earlier = [one for one in COMPUTED if one < step]
        i = earlier[-1]
        last = self.outputs[i]
        if len(earlier) == 1:
            return last.to(output.dtype)
        h = earlier[-2]
        slope = (last - self.outputs[h]) / (i - h)
        return (last + FACTORS[len(earlier) - 1] * (step - i) * slope).to(output.dtype)


def count_calls(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("case", [WAN, COGVIDEOX, LATTE, HUNYUAN], ids=ids)
def test_branches_follow_the_rule(case: Case) -> None:
    """level="branch": the output of the model is extrapolated; skipped steps do not call the model."""
    plain, values, rule = case.model(), case.values(2), Rule()
    z = values[case.latents]
    with torch.no_grad():
        for step in range(STEPS):
            z = z - rule(step + 1, case.predict(plain, values, z, step, STEPS)) / STEPS
    model = case.model()
    calls = count_calls(next(module for name, module in model.named_modules() if name))
    with enabled(model, adacache.PlannedPath(COMPUTED, FACTORS, "branch"), STEPS) as handle:
        found = case.denoise(model, values, STEPS)
        assert handle.trace.computed_steps == COMPUTED
        assert handle.describe()["runs"] == "whole model"
    assert relative_error(found, z) < 1e-5
    assert len(calls) % len(COMPUTED) == 0
    assert 0 < len(calls) <= 2 * len(COMPUTED)  # the first child may run twice per call


def test_stack_follows_the_rule() -> None:
    """level="stack": the residual of the block stack is extrapolated; every step calls the model."""
    case, rule = WAN, Rule()
    plain, values = case.model(), case.values(1)
    step = 0
    tokens: dict[str, Tensor] = {}

    def first(_: Any, args: Any, kwargs: Any) -> None:
        tokens["in"] = args[0] if args else kwargs["hidden_states"]

    def last(_: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return tokens["in"] + rule(step + 1, output - tokens["in"])

    plain.blocks[0].register_forward_pre_hook(first, with_kwargs=True)
    plain.blocks[-1].register_forward_hook(last, with_kwargs=True)
    z = values[case.latents]
    with torch.no_grad():
        for step in range(STEPS):
            z = z - case.predict(plain, values, z, step, STEPS) / STEPS
    with enabled(case.model(), adacache.PlannedPath(COMPUTED, FACTORS, "stack"), STEPS) as handle:
        found = case.denoise(handle.model, values, STEPS)
        assert handle.trace.computed_steps == COMPUTED
    assert relative_error(found, z) < 1e-5


def replace_guided(pipeline: Any, rules: Callable[[int], Rule]) -> None:
    """Replaces the model output that the pipeline passes to its scheduler; the model runs at each step."""
    plain, state = pipeline.scheduler.step, {"timestep": None, "step": 0, "stream": 0}

    @functools.wraps(plain)  # pipelines inspect the signature
    def step(output: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        now = float(torch.as_tensor(timestep).float().mean())
        if now != state["timestep"]:
            state.update(timestep=now, step=state["step"] + 1, stream=0)
        rule = rules(state["stream"])
        state["stream"] += 1
        return plain(rule(state["step"], output), timestep, *args, **kwargs)

    pipeline.scheduler.step = step


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.sampled(2)
def test_guided_outputs_follow_the_rule(name: str) -> None:
    """level="guided" on each pipeline: the input of the scheduler is extrapolated."""
    case = CASE[name]
    slow, rules = built(name), {}
    replace_guided(slow, lambda stream: rules.setdefault(stream, Rule()))
    expected = case.generate(slow, STEPS)
    pipeline = built(name)
    handle = adacache.enable(pipeline, adacache.PlannedPath(COMPUTED, FACTORS))
    found = case.generate(pipeline, STEPS)
    assert handle.trace.computed_steps == COMPUTED
    assert relative_error(found, expected) < 1e-4
    again = case.generate(pipeline, STEPS)
    assert torch.equal(again, found)
    adacache.disable(pipeline)
    assert torch.equal(case.generate(pipeline, STEPS), case.generate(built(name), STEPS))


def test_branch_and_guided_agree_in_a_pipeline() -> None:
    """Guidance is linear, so extrapolation of the guided output equals extrapolation of its branches."""
    case = CASE["WanPipeline"]
    outputs = []
    for level in ("guided", "branch"):
        pipeline = case.build()
        handle = adacache.enable(pipeline, adacache.PlannedPath(COMPUTED, FACTORS, level))
        outputs.append(case.generate(pipeline, STEPS))
        assert handle.trace.computed_steps == COMPUTED
    assert relative_error(*outputs) < 1e-5


def test_skipped_steps_do_not_call_the_model() -> None:
    case = CASE["WanPipeline"]
    pipeline = case.build()
    calls = count_calls(pipeline.transformer.blocks[0])
    adacache.enable(pipeline, adacache.PlannedPath(COMPUTED, FACTORS))
    case.generate(pipeline, STEPS)
    assert len(calls) == 2 * len(COMPUTED)  # guidance in two calls


def test_a_path_crosses_two_transformers() -> None:
    """Wan 2.2: the guided output is extrapolated across the change of transformers."""
    case = CASE["WanPipeline_two_transformers"]
    pipeline = case.build()
    first, second = count_calls(pipeline.transformer), count_calls(pipeline.transformer_2)
    handle = adacache.enable(pipeline, adacache.PlannedPath(COMPUTED, FACTORS))
    case.generate(pipeline, STEPS)
    assert handle.trace.computed_steps == COMPUTED
    assert len(first) + len(second) == 2 * len(COMPUTED)
    assert first
    assert second


def test_a_pipeline_with_a_unet() -> None:
    """A planned path wraps no block, so it supports any model."""
    import diffusers

    def build() -> Any:
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        vae = diffusers.AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=2, latent_channels=4)
        pipeline = diffusers.StableDiffusionPipeline(
            vae, None, None, unet.eval(), diffusers.DDIMScheduler(), None, None, requires_safety_checker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def generate(pipeline: Any) -> Tensor:
        prompt = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))
        return pipeline(
            prompt_embeds=prompt,
            negative_prompt_embeds=prompt * 0.3,
            height=16,
            width=16,
            num_inference_steps=STEPS,
            output_type="latent",
            generator=torch.Generator().manual_seed(2),
        ).images

    slow, rule = build(), Rule()
    replace_guided(slow, lambda _: rule)
    expected = generate(slow)
    pipeline = build()
    calls = count_calls(pipeline.unet)
    handle = adacache.enable(pipeline, adacache.PlannedPath(COMPUTED, FACTORS))
    assert relative_error(generate(pipeline), expected) < 1e-5
    assert handle.trace.computed_steps == COMPUTED
    assert len(calls) == len(COMPUTED)  # guidance in one batch


def of_timesteps(pipeline: Any) -> list[float]:
    return [float(one) for one in pipeline.scheduler.timesteps]


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_timesteps_alone(scheduler: str) -> None:
    """`PlannedTimesteps` equals a pipeline whose scheduler has only these timesteps."""
    case = CASE["WanPipeline"]

    def build() -> Any:
        pipeline = case.build()
        if scheduler == "unipc":
            pipeline.scheduler = unipc()
        return pipeline

    pipeline = build()
    handle = adacache.enable(pipeline, adacache.PlannedTimesteps(COMPUTED, STEPS))
    found = case.generate(pipeline, STEPS)
    assert handle.trace.computed_steps == list(range(1, len(COMPUTED) + 1))
    kept = of_timesteps(pipeline)
    adacache.disable(pipeline)
    case.generate(pipeline, STEPS)
    assert kept == [of_timesteps(pipeline)[step - 1] for step in COMPUTED]

    slow = build()
    plain = slow.scheduler.set_timesteps

    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        places = [step - 1 for step in COMPUTED]
        slow.scheduler.timesteps = slow.scheduler.timesteps[places]
        slow.scheduler.sigmas = slow.scheduler.sigmas[[*places, STEPS]]
        slow.scheduler.num_inference_steps = len(COMPUTED)

    slow.scheduler.set_timesteps = set_timesteps
    assert torch.equal(case.generate(slow, STEPS), found)


# Files.


def write(folder: Path, **changes: Any) -> Path:
    budgets = {
        "5": {"computed": COMPUTED, "factors": FACTORS, "use": "cache"},
        "3": {"computed": [1, 3, 9], "factors": [0, 0.5, 1.0], "use": "timesteps"},
    }
    values = {
        "format": FORMAT,
        "model": "WanTransformer3DModel",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "num_steps": STEPS,
        "timesteps": None,
        "shape": [4, 3, 4, 4],
        "level": "guided",
        "budgets": budgets,
        **changes,
    }
    path = folder / "paths.json"
    path.write_text(json.dumps(values))
    return path


def test_a_file_by_budget_and_by_speedup(tmp_path: Path) -> None:
    case, path = CASE["WanPipeline"], write(tmp_path)
    results = []
    for choice in ({"budget": 5}, {"speedup": 2.0}, {"speedup": 2.4}):
        pipeline = case.build()
        handle = adacache.enable(pipeline, path, **choice)
        results.append(case.generate(pipeline, STEPS))
        assert handle.trace.computed_steps == COMPUTED
    assert torch.equal(results[0], results[1])
    pipeline = case.build()
    handle = adacache.enable(pipeline, str(path), speedup=2.5)  # the next smaller budget: timesteps alone
    case.generate(pipeline, STEPS)
    assert handle.trace.num_steps == 3


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, r"budget: expected either budget= .*\[3, 5\].* or speedup=, got neither"),
        ({"budget": 5, "speedup": 2}, "got both"),
        ({"budget": 4}, r"budget: .* was calibrated for budgets \[3, 5\], got 4"),
        ({"speedup": 5}, r"speedup: .* has budgets \[3, 5\] of 12 steps, so at most 4.00, got 5"),
        ({"speedup": -1}, "speedup: expected a number above 0, got -1"),
        ({"budget": 5, "num_steps": 30}, "num_steps: .* was calibrated for 12 steps, got 30"),
    ],
    ids=["neither", "both", "budget", "speedup", "negative", "steps"],
)
def test_budget_or_speedup_not_in_the_file(tmp_path: Path, choice: dict[str, Any], message: str) -> None:
    path = write(tmp_path)
    with pytest.raises(ValueError, match=message):
        adacache.enable(CASE["WanPipeline"].build(), path, **choice)


def test_path_of_another_model_or_schedule(tmp_path: Path) -> None:
    case = CASE["WanPipeline"]
    with pytest.raises(ValueError, match="calibrated on LatteTransformer3DModel, got a model of Wan"):
        adacache.enable(case.build(), write(tmp_path, model="LatteTransformer3DModel"), budget=5)
    pipeline = case.build()
    adacache.enable(pipeline, write(tmp_path), budget=5)
    with pytest.raises(ValueError, match=r"num_steps: .* was calibrated for 12 steps, got 20"):
        case.generate(pipeline, 20)
    for changes, message in (
        ({"scheduler": "UniPCMultistepScheduler"}, "calibrated with the scheduler UniPC"),
        ({"timesteps": [1000.0 - i for i in range(STEPS)]}, "calibrated with other timesteps"),
        (
            {"shape": [4, 3, 8, 8]},
            r"calibrated on latents of shape \[4, 3, 8, 8\], and these have \[4, 3, 4, 4\]",
        ),
    ):
        pipeline = case.build()
        adacache.enable(pipeline, write(tmp_path, **changes), budget=5)
        with pytest.warns(UserWarning, match=message):
            case.generate(pipeline, STEPS)


def test_a_budget_needs_a_file_of_paths() -> None:
    pipeline = CASE["WanPipeline"].build()
    with pytest.raises(
        ValueError, match="budget: expected None, because open-sora/fast has no planned paths"
    ):
        adacache.enable(pipeline, "open-sora/fast", budget=5)
    with pytest.raises(ValueError, match="budget, speedup, adaptive: expected none of them"):
        adacache.enable(pipeline, adacache.TaylorSeer(), speedup=3)


def test_timesteps_need_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="these are timesteps for a pipeline's scheduler"):
        adacache.enable(WAN.model(), write(tmp_path), budget=3, num_steps=STEPS)
    pipeline = CASE["LattePipeline"].build()  # DDIM has no sigmas
    adacache.enable(pipeline, adacache.PlannedTimesteps(COMPUTED, STEPS))
    with pytest.raises(ValueError, match="DDIMScheduler does not state one sigma per step"):
        CASE["LattePipeline"].generate(pipeline, STEPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([2, 3], [0, 0]), "computed: expected steps that rise from 1"),
        (([1, 3, 3], [0, 0, 0]), "computed: expected steps that rise from 1"),
        (([1, 3], [0.0]), "factors: expected 2, one per computed step, got 1"),
        (([1, 3], [0.0, float("nan")]), r"factors\[1\]: expected a number, got nan"),
        (([1, 3], [0, 0], "blocks"), "level: expected one of guided, branch, stack"),
        (([1], [0], "guided", torch.float8_e4m3fn), "cache_dtype: expected float32"),
    ],
    ids=["first", "twice", "count", "nan", "level", "float8"],
)
def test_bad_settings(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adacache.PlannedPath(*arguments)


def test_timesteps_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, timesteps=[1000.0 - 80 * i for i in range(STEPS)])
    assert adacache.timesteps(path, 3) == [1000.0, 840.0, 360.0]
    assert len(adacache.timesteps(path, 5)) == 5
    with pytest.raises(ValueError, match=r"path: .* states no timesteps"):
        adacache.timesteps(write(tmp_path), 3)


def test_a_short_schedule_is_refused() -> None:
    policy = adacache.PlannedPath([1, 20], [0, 0], "branch")
    with pytest.raises(ValueError, match="the path computes step 20, got a schedule of 12"):
        adacache.enable(WAN.model(), policy, num_steps=STEPS)


def test_model_of_a_pipeline_called_outside_the_pipeline() -> None:
    """Outside the pipeline, the same path extrapolates the model's output."""
    case = CASE["WanPipeline"]
    pipeline = case.build()
    handle = adacache.enable(pipeline, adacache.PlannedPath(COMPUTED, FACTORS), num_steps=STEPS)
    values = WAN.values(1)
    rule, z = Rule(), values[WAN.latents]
    with torch.no_grad():
        plain = case.build().transformer
        for step in range(STEPS):
            z = z - rule(step + 1, WAN.predict(plain, values, z, step, STEPS)) / STEPS
    with handle.handles["transformer"].request():
        found = WAN.denoise(pipeline.transformer, values, STEPS)
    assert relative_error(found, z) < 1e-5
