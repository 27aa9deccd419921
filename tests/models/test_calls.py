# SPDX-License-Identifier: Apache-2.0
"""The assignment of calls to request, step and branch, in situations from public bug reports."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from typing import Any

import adacache
import pytest
import torch
from model_cases import CASES, COGVIDEOX, LATTE, LTX, WAN, Case, ids
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed")

STEPS = 12
P3 = adacache.AdaCache(codebook={99.0: 3})
"""Computes steps 1 2 5 8 11 12 of 12."""
DUE = [1, 2, 5, 8, 11, 12]


def computes(case: Case, model: Any) -> list[int]:
    """A list with one entry per call of the second block."""
    ran: list[int] = []
    case.blocks(model)[1][1].register_forward_hook(lambda *_: ran.append(1))
    return ran


class Calls:
    """Calls a model and records which calls ran blocks: C for computed, r for reused."""

    def __init__(self, case: Case, model: Any):
        self.case, self.model = case, model
        self.ran = computes(case, model)
        self.pattern = ""

    @torch.no_grad()
    def __call__(self, values: dict[str, Any], z: Tensor, step: int, steps: int = STEPS) -> Tensor:
        before = len(self.ran)
        out = self.case.predict(self.model, values, z, step, steps)
        self.pattern += "C" if len(self.ran) > before else "r"
        return out


def pattern(steps: int, computed: list[int], calls: int) -> str:
    return "".join(("C" if step in computed else "r") * calls for step in range(1, steps + 1))


@pytest.mark.parametrize("explicit", [True, False])
def test_calls_of_one_step_may_differ_in_rows(explicit: bool) -> None:
    """Each step: guidance in a batch of two, then a call with one row."""
    model, pair, one = WAN.model(), WAN.values(2, seed=1), WAN.values(1, seed=2)
    handle = adacache.enable(model, P3, num_steps=STEPS, rows_per_video=2)
    calls = Calls(WAN, model)

    def loop() -> None:
        for step in range(STEPS):
            calls(pair, pair["hidden_states"], step)
            calls(one, one["hidden_states"], step)

    if explicit:
        with handle.request(branches=2):
            loop()
    else:
        loop()
    assert calls.pattern == pattern(STEPS, DUE, 2)
    assert handle.trace.computed_steps == DUE
    assert len(handle.trace.computed) == STEPS


def test_windows_of_one_step_have_separate_residuals() -> None:
    """A long clip in two windows: two calls per window and step, with the same two names."""
    model = WAN.model()
    windows = [WAN.values(seed=1), WAN.values(seed=2)]
    alone = []
    for window in windows:
        handle = adacache.enable(model, P3, num_steps=STEPS, rows_per_video=1)
        alone.append(WAN.denoise(model, window, STEPS))
        adacache.disable(model)
    handle = adacache.enable(model, P3, num_steps=STEPS, rows_per_video=1)
    calls, z = Calls(WAN, model), [window["hidden_states"] for window in windows]
    for step in range(STEPS):
        for k, window in enumerate(windows):
            for name in ("cond", "uncond"):
                with model.cache_context(name):
                    out = calls(window, z[k], step)
            z[k] = z[k] - out / STEPS
    assert calls.pattern == pattern(STEPS, DUE, 4)
    assert all(torch.equal(a, b) for a, b in zip(z, alone, strict=True))
    assert handle.trace.computed_steps == DUE


def test_row_count_changes_within_one_request() -> None:
    """Guidance is disabled at step 6: the unconditional rows are dropped."""
    model, pair = WAN.model(), WAN.values(2, seed=1)
    handle = adacache.enable(model, P3, num_steps=STEPS, rows_per_video=2)
    calls = Calls(WAN, model)
    one = WAN.rows(pair, 0)
    for step in range(STEPS):
        values = pair if step < 5 else one
        calls(values, values["hidden_states"], step)
    # The first call with the new shape computes; later decisions count from there.
    assert calls.pattern[5] == "C"
    assert calls.pattern.endswith("CC")
    assert calls.pattern.count("r") >= 4
    assert len(handle.trace.computed) == STEPS
    assert handle.trace.computed_steps == [i for i, c in enumerate(calls.pattern, 1) if c == "C"]


@pytest.mark.parametrize("case", [WAN, COGVIDEOX], ids=ids)
def test_shape_change_in_an_explicit_request_forces_compute(case: Case) -> None:
    model, first, second = case.model(), case.values(seed=1), case.values(seed=2, frames=2)
    handle = adacache.enable(model, P3, num_steps=STEPS)
    calls = Calls(case, model)
    with handle.request():
        for step in range(STEPS):
            values = first if step < 6 else second
            calls(values, values[case.latents], step)
    assert calls.pattern[:6] == "CCrrCr"
    assert calls.pattern[6:8] == "CC"  # no old residual: this step and the next are computed
    assert calls.pattern.endswith("CC")


def test_prompt_length_change_forces_compute() -> None:
    """Two-stream models also keep a residual of the text."""
    model, values = COGVIDEOX.model(), COGVIDEOX.values(seed=1)
    longer = dict(values)
    text = values["encoder_hidden_states"]
    longer["encoder_hidden_states"] = torch.cat((text, text), dim=1)
    handle = adacache.enable(model, P3, num_steps=STEPS)
    calls = Calls(COGVIDEOX, model)
    with handle.request():
        for step in range(STEPS):
            out = calls(values if step < 3 else longer, values["hidden_states"], step)
            assert torch.isfinite(out).all()
    assert calls.pattern[:4] == "CCrC"
    assert "r" in calls.pattern[4:]


@pytest.mark.parametrize("part", [None, "block"])
@pytest.mark.parametrize("calls_before", [1, 2])
def test_warm_up_call_at_the_first_timestep_is_not_part_of_the_request(
    calls_before: int, part: str | None
) -> None:
    model, values, other = WAN.model(), WAN.values(seed=1), WAN.values(seed=3)
    policy = adacache.AdaCache(codebook=WAN.codebook, metric_part=part)
    handle = adacache.enable(model, policy, num_steps=STEPS, rows_per_video=1)
    expected = WAN.denoise(model, values, STEPS)
    trace = handle.trace
    adacache.disable(model)
    handle = adacache.enable(model, policy, num_steps=STEPS, rows_per_video=1)
    with torch.no_grad():
        for _ in range(calls_before):
            WAN.predict(model, other, other["hidden_states"] * 3, 0, STEPS)
    assert torch.equal(WAN.denoise(model, values, STEPS), expected)
    assert handle.trace.computed == trace.computed
    assert handle.trace.measurements == trace.measurements


def test_rising_timesteps() -> None:
    model, values = WAN.model(), WAN.values()
    adacache.enable(model, P3, num_steps=STEPS, rows_per_video=1)
    calls = Calls(WAN, model)
    for _ in range(2):
        for step in range(STEPS):
            calls(values, values["hidden_states"], STEPS - step)
    assert calls.pattern == 2 * pattern(STEPS, DUE, 1)


def test_model_may_skip_the_metric_block() -> None:
    """Layer skipping: without a measurement every step is computed, with a warning."""
    model, values = WAN.model(), WAN.values()
    kept = [block for i, block in enumerate(model.blocks) if i != 1]
    handle = adacache.enable(model, P3, num_steps=STEPS, rows_per_video=1)
    whole = model.blocks
    model.blocks = torch.nn.ModuleList(kept)
    with pytest.warns(UserWarning, match=r"did not run \['blocks.1.attention'\] at a computed step"):
        WAN.denoise(model, values, STEPS)
    assert handle.trace.computed_steps == list(range(1, STEPS + 1))
    model.blocks = whole


def test_an_implicit_request_frees_its_tensors_after_the_last_step() -> None:
    model, values = WAN.model(), WAN.values()
    handle = adacache.enable(model, P3, num_steps=STEPS, rows_per_video=1)
    WAN.denoise(model, values, STEPS)
    assert handle.trace.cache_bytes > 0
    assert not handle._latest.caches


def run_threads(count: int, work: Any) -> list[Any]:
    results: list[Any] = [None] * count

    def run(k: int) -> None:
        try:
            results[k] = work(k)
        except BaseException as error:  # reported by the assertion on the results
            results[k] = error

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("case", [WAN, LATTE, COGVIDEOX], ids=ids)
def test_threads_on_one_model(case: Case, explicit: bool) -> None:
    model = case.model()
    policy = adacache.AdaCache(codebook=case.codebook)
    values = [case.values(seed=seed) for seed in range(4)]
    handle = adacache.enable(model, policy, num_steps=STEPS, rows_per_video=1)
    alone = [case.denoise(model, one, STEPS) for one in values]

    def work(k: int) -> list[Tensor]:
        finals = []
        for _ in range(5):
            if explicit:
                with handle.request():
                    finals.append(case.denoise(model, values[k], STEPS))
            else:
                finals.append(case.denoise(model, values[k], STEPS))
        return finals

    for k, finals in enumerate(run_threads(4, work)):
        assert isinstance(finals, list), finals
        assert all(torch.equal(final, alone[k]) for final in finals)


def test_a_request_in_a_generator_that_ends_in_another_context() -> None:
    """A generator may be resumed and closed in another context than that of its start."""
    model, values = WAN.model(), WAN.values()
    handle = adacache.enable(model, P3, num_steps=STEPS, rows_per_video=1)
    opened = []

    def loop() -> Iterator[int]:
        with handle.request() as request:
            opened.append(request)
            for step in range(STEPS):
                WAN.predict(model, values, values["hidden_states"], step, STEPS)
                yield request.step

    steps, context = loop(), contextvars.copy_context()
    with torch.no_grad():
        for expected in range(1, 5):
            assert context.run(next, steps) == expected
        assert opened[0].caches
        steps.close()
    assert not opened[0].caches
    assert handle.current is None
    assert context.run(lambda: handle.current) is None
    expected_final = WAN.denoise(model, values, STEPS)
    assert torch.equal(context.run(WAN.denoise, model, values, STEPS), expected_final)


def test_inference_mode_and_no_grad_in_one_request() -> None:
    model, values = LATTE.model(), LATTE.values()
    handle = adacache.enable(model, adacache.AdaCache(codebook={99.0: 1}), num_steps=STEPS)
    z = values["hidden_states"]
    with handle.request():
        for step in range(STEPS):
            with torch.inference_mode() if step % 2 else torch.no_grad():
                assert torch.isfinite(LATTE.predict(model, values, z, step, STEPS)).all()


def test_latents_that_require_gradients_raise() -> None:
    model, values = WAN.model(), WAN.values()
    adacache.enable(model, P3, num_steps=STEPS, rows_per_video=1)
    z = values["hidden_states"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        WAN.predict(model, values, z, 0, STEPS)


@pytest.mark.parametrize("case", [WAN, LTX], ids=ids)
def test_call_that_writes_its_own_cache_is_never_skipped(case: Case) -> None:
    model, values = case.model(), case.values()
    handle = adacache.enable(model, P3, num_steps=STEPS)
    kind = type(model)
    runner = handle._runner
    assert kind is not None
    with torch.no_grad(), handle.request():
        case.predict(model, values, values[case.latents], 0, STEPS)
    given = {case.latents: values[case.latents], case.time: torch.ones(1)}
    assert not runner._facts(given).must_compute
    for name in ("kv_cache", "cache", "past_cache"):
        assert runner._facts({**given, name: [torch.ones(1)]}).must_compute
        assert not runner._facts({**given, name: None}).must_compute


def test_case_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
