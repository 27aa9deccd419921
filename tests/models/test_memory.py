# SPDX-License-Identifier: Apache-2.0
"""The memory of kept tensors: what is kept now, and what will be, for all models."""

from __future__ import annotations

from typing import Any

import adacache
import pytest
import torch
from adacache.digits import FPS, SIZE, encode, noise, with_null
from adacache.digits.captions import all_prompts
from model_cases import CASES, CODEBOOK, WAN, Case
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed")

CHECKED = CASES
STEPS = 9
WITHIN = 0.02
REFUSED = {
    "MochiTransformer3DModel",  # autocast of the tokens' device
    "HunyuanVideo15Transformer3DModel",  # the length of the prompt is a value of its mask
    "HunyuanVideoFramepackTransformer3DModel",
    "HeliosTransformer3DModel",
}
"""Models that need values, so that their memory cannot be predicted."""


def meta(values: dict[str, Any]) -> dict[str, Any]:
    return {name: one.to("meta") if isinstance(one, Tensor) else one for name, one in values.items()}


def test_a_prediction_is_right_for_each_model(case: Case) -> None:
    model, values = case.model(), case.values()
    handle = adacache.enable(model, adacache.AdaCache({99.0: 3}), num_steps=STEPS, rows_per_video=1)
    t = case.timestep(case.schedule, 1)
    arguments = {**meta(values), case.time: t.to("meta"), **case.options}
    if case.name in REFUSED:
        with pytest.raises(RuntimeError, match=f"memory: {case.name} does not run on the meta device"):
            handle.predict_memory(kwargs=arguments)
        return
    predicted = handle.predict_memory(kwargs=arguments)
    with handle.request() as request:
        case.denoise(model, values, STEPS)
        assert handle.memory() == request.store.bytes_now > 0
    assert request.store.bytes == pytest.approx(predicted, rel=WITHIN)
    assert handle.memory() == 0


POLICIES: dict[str, Any] = {
    "stack": adacache.AdaCache(CODEBOOK),
    "block": adacache.AdaCache(CODEBOOK, cache="block", motion=adacache.MotionRegularization(window=(2, 8))),
    "sublayer": adacache.AdaCache(CODEBOOK, cache="sublayer", metric_part="mlp"),
    "float8": adacache.AdaCache(CODEBOOK, cache_dtype=torch.float8_e4m3fn),
    "bfloat16": adacache.Replay([1, 2, 5], cache_dtype=torch.bfloat16),
    "path of outputs": adacache.PlannedPath([1, 3], [0.0, 0.5]),
    "path of residuals": adacache.PlannedPath([1, 3], [0.0, 0.5], level="stack"),
    "TaylorSeer": adacache.TaylorSeer(),
    "EasyCache": adacache.EasyCache(),
    "TeaCache": adacache.TeaCache([1.0, 0.0], 0.1),
    "DiCache": adacache.DiCache(0.1),
    "PAB": adacache.PAB({"temporal_attention": 2}),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_prediction_is_right_for_each_method(tiny_digit_model: Any, name: str) -> None:
    x = torch.cat([noise([0, 1])] * 2)
    y = with_null(tiny_digit_model, encode(all_prompts()[:2]))
    handle = adacache.enable(tiny_digit_model, POLICIES[name], num_steps=STEPS)
    settings = {"fps": FPS, "height": SIZE, "width": SIZE}
    try:
        predicted = handle.predict_memory(
            (x.to("meta"), torch.empty(4, device="meta"), y), settings, num_videos=2
        )
        with handle.request(num_videos=2) as request, torch.no_grad():
            for step in range(STEPS):
                tiny_digit_model(x, torch.full((4,), 1000.0 - 100 * step), y, **settings)
        assert request.store.bytes == pytest.approx(predicted, rel=WITHIN)
        assert predicted > 0
    finally:
        adacache.disable(tiny_digit_model)


def test_guidance_in_two_calls() -> None:
    model, values = WAN.model(), WAN.values()
    handle = adacache.enable(model, adacache.Replay([1, 4]), num_steps=STEPS)
    arguments = {**values, WAN.time: torch.zeros(1), **WAN.options}
    assert handle.predict_memory(kwargs=arguments, branches=2) == 2 * handle.predict_memory(kwargs=arguments)
    with handle.request(branches=2) as request:
        for _ in range(2):
            model(**arguments)
    assert request.store.bytes == handle.predict_memory(kwargs=arguments, branches=2)


def test_an_aborted_request_keeps_nothing() -> None:
    model, values = WAN.model(), WAN.values()
    handle = adacache.enable(model, adacache.Replay([1, 2, 4]), num_steps=STEPS)
    arguments = {**values, WAN.time: torch.zeros(1), **WAN.options}
    with handle.request():
        model(**arguments)
        assert handle.memory() > 0
        with pytest.raises(RuntimeError):
            model(**{**arguments, "encoder_hidden_states": torch.zeros(1, 5, 13)})
    assert handle.memory() == 0


def test_what_cannot_be_predicted_is_refused() -> None:
    handle = adacache.enable(WAN.model(), adacache.Replay([1, 4]), num_steps=STEPS)
    wrong = {**WAN.values(), WAN.time: torch.zeros(1), "encoder_hidden_states": torch.zeros(1, 5, 13)}
    with pytest.raises(RuntimeError, match="WanTransformer3DModel does not run on the meta device"):
        handle.predict_memory(kwargs=wrong)
    handle.num_steps = None
    with pytest.raises(ValueError, match="num_steps: pass it"):
        handle.predict_memory(kwargs=wrong)
