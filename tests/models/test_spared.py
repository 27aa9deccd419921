# SPDX-License-Identifier: Apache-2.0
"""Children that only feed the blocks do not run on steps that skip all blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import adacache
import pytest
import torch
from adacache.adapters.registry import spec_for
from model_cases import COGVIDEOX, LATTE, SKYREELS, WAN, WAN_VACE, Case
from test_models import STEPS, enabled

pytest.importorskip("diffusers", reason="diffusers is not installed")

CHECKED = [LATTE, WAN, SKYREELS, COGVIDEOX]
"""The cases of the tests, see conftest.py."""
REUSING = adacache.Replay([1, 2, 5, 11, 12])


def spare_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(model: Any, blocks: bool = True) -> Any:
        spec, known = spec_for(model, blocks)
        return replace(spec, spared=()), known

    monkeypatch.setattr("adacache.handle.spec_for", without)


def counted(model: Any) -> list[str]:
    """Calls of the spared children of a model, as they happen."""
    calls: list[str] = []
    spec, _ = spec_for(model)
    for spared in spec.spared:
        try:
            child = model.get_submodule(spared.child)
        except AttributeError:
            continue
        child.register_forward_hook(lambda *_, name=spared.child: calls.append(name))
    return calls


def test_the_result_is_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, values, null = case.model(), case.values(seed=1), case.values(seed=2)
    calls = counted(model)
    finals = []
    for _ in range(2):
        with enabled(model, REUSING) as handle:
            finals.append(case.denoise(model, values, STEPS))
            finals.append(case.denoise_in_two_calls(model, values, null, STEPS, False))
        assert handle.trace.computed_steps == [1, 2, 5, 11, 12]
        finals[-1] = finals[-1], list(calls)  # type: ignore[call-overload]
        calls.clear()
        spare_nothing(monkeypatch)
    (one, (two, few), plain_one, (plain_two, many)) = finals
    assert torch.equal(one, plain_one)
    assert torch.equal(two, plain_two)
    assert len(few) * STEPS == len(many) * 5 > 0
    before = len(calls)
    case.denoise(model, values, 1)
    assert len(calls) > before, "after disable, the children run"


def test_signals_are_measured_from_real_inputs(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """TeaCache reads what the first block gets, so nothing is spared."""
    model, values = case.model(), case.values()
    calls = counted(model)
    policy = adacache.TeaCache(threshold=0.3, coefficients=(1.0, 0.0))
    with enabled(model, policy) as handle:
        final = case.denoise(model, values, STEPS)
        assert len(handle.trace.computed_steps) < STEPS
    count = len(calls)
    spare_nothing(monkeypatch)
    with enabled(model, policy):
        assert torch.equal(case.denoise(model, values, STEPS), final)
    assert len(calls) == 2 * count


def test_a_prompt_of_another_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a request: a kept text stream does not fit it, so the step is computed."""
    case, model = COGVIDEOX, COGVIDEOX.model()
    values = case.values()
    longer = {**values, "encoder_hidden_states": values["encoder_hidden_states"].repeat(1, 2, 1)}
    results = []
    for _ in range(2):
        with torch.no_grad(), enabled(model, REUSING) as handle, handle.request():
            z = values["hidden_states"]
            for step in range(STEPS):
                z = z - case.predict(model, longer if step > 2 else values, z, step, STEPS) / STEPS
            results.append((z, handle.trace.computed_steps))
        spare_nothing(monkeypatch)
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] != [1, 2, 5, 11, 12]


def test_control_blocks_need_the_text_at_every_step() -> None:
    assert not spec_for(WAN_VACE.model())[0].spared
