# SPDX-License-Identifier: Apache-2.0
"""The checks of test_models.py on classes of other repositories, if they are on PYTHONPATH."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import adacache
import pytest
import torch
import torch.nn.functional as F
from model_cases import relative_error
from real_cases import IMAGES_GIVEN, LATTE_OF_ONE_LIST, REAL, REAL_PIPELINES, STDIT3, WINDOWS, RealPipeline
from test_models import CHECKS, STEPS, calls_past_the_model, enabled
from test_pipelines import test_end_to_end as check_pipeline
from torch import Tensor

MISSING = {case.name: reason for case in REAL if (reason := case.missing()) is not None}
CHECKED = [case for case in REAL if case.name not in MISSING]
if CHECKED:
    globals().update(CHECKS)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", MISSING)
def test_missing(name: str) -> None:
    pytest.skip(MISSING[name])


def test_calls_past_the_model_of_latte() -> None:
    if (reason := LATTE_OF_ONE_LIST.missing()) is not None:
        pytest.skip(reason)
    calls_past_the_model(LATTE_OF_ONE_LIST)


@pytest.mark.parametrize("pipeline", REAL_PIPELINES, ids=str)
def test_pipeline_end_to_end(pipeline: RealPipeline) -> None:
    if (reason := pipeline.missing()) is not None:
        pytest.skip(reason)
    check_pipeline(pipeline)


def test_frames_given_to_windows() -> None:
    if (reason := IMAGES_GIVEN.missing()) is not None:
        pytest.skip(reason)
    CHECKS["test_computing_always_changes_no_bit"](IMAGES_GIVEN)
    CHECKS["test_videos_of_a_batch_decide_for_themselves"](IMAGES_GIVEN)
    CHECKS["test_guidance_in_two_calls"](IMAGES_GIVEN)


def test_sampler_of_open_sora() -> None:
    """The sampler of Open-Sora 1.2, with guidance in one batch and a given frame for the second video."""
    if (reason := STDIT3.missing()) is not None:
        pytest.skip(reason)
    if WINDOWS.missing() is None:
        pytest.skip("the Open-Sora on PYTHONPATH is 1.3, whose sampler has another text encoder interface")
    sampler = pytest.importorskip("opensora.schedulers.rf").RFLOW(num_sampling_steps=STEPS)
    model, values = STDIT3.model(), STDIT3.values(3, seed=1)
    z = values.pop("x") * torch.tensor([1.0, 4.0, 0.25]).view(3, 1, 1, 1, 1)
    captions, null = values.pop("y"), torch.randn(3, 1, 5, 12)
    frames = torch.ones(3, 3)
    frames[1, 0] = 0

    def sample(of: slice) -> Tensor:
        class Text:
            def encode(self, _: Any) -> dict[str, Tensor]:
                return {"y": captions[of], "mask": mask[of]}

            def null(self, _: Any) -> Tensor:
                return null[of]

        mask, others = values["mask"], {name: v[of] for name, v in values.items() if name != "mask"}
        with torch.no_grad():
            return sampler.sample(  # type: ignore[no-any-return]
                model,
                Text(),
                z[of],
                [""] * len(z[of]),
                z.device,
                additional_args=others,
                mask=frames[of],
                progress=False,
            )

    plain = sample(slice(0, 3))
    with enabled(model, adacache.AdaCache(codebook={9.0: 1}), rows_per_video=2):
        assert torch.equal(sample(slice(0, 3)), plain)
    singles, schedules = [], []
    for video in range(3):
        with enabled(model, adacache.AdaCache(codebook=STDIT3.codebook), rows_per_video=2) as handle:
            singles.append(sample(slice(video, video + 1)))
        schedules.append(handle.trace.computed_steps)
    assert len({tuple(steps) for steps in schedules}) > 1, "all videos have the same schedule"
    with enabled(model, adacache.AdaCache(codebook=STDIT3.codebook), rows_per_video=2) as handle:
        together = sample(slice(0, 3))
    assert [handle.trace.steps_of(video) for video in range(3)] == schedules
    assert relative_error(together, torch.cat(singles)) < STDIT3.tolerance


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces attention functions that require CUDA kernels."""
    monkeypatch.setattr(
        torch.backends.cuda, "sdp_kernel", lambda **_: contextlib.nullcontext(), raising=False
    )
    if "xformers.ops" in sys.modules:
        monkeypatch.setattr("xformers.ops.memory_efficient_attention", _attention)


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, p: float = 0.0) -> Tensor:
    mask = None
    if attn_bias is not None:
        mask = attn_bias.materialize((1, 1, q.shape[1], k.shape[1]), dtype=q.dtype, device=q.device)
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask, p).transpose(1, 2)
