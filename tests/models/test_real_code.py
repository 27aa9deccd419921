"""The checks of test_models.py on classes of other repositories, where those are on PYTHONPATH."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from real_cases import IMAGES_GIVEN, LATTE_OF_ONE_LIST, REAL
from test_models import (
    calls_past_the_model,
    test_a_reused_step_runs_no_block,
    test_an_exception_leaves_nothing_behind,
    test_autocast,
    test_computing_always_changes_no_bit,
    test_found_by_structure_gives_the_same,
    test_guidance_in_two_calls,
    test_half_precision,
    test_schedule_is_that_of_the_rule_written_out,
    test_videos_of_a_batch_decide_for_themselves,
)
from torch import Tensor

__all__ = [
    "test_a_reused_step_runs_no_block",
    "test_an_exception_leaves_nothing_behind",
    "test_autocast",
    "test_computing_always_changes_no_bit",
    "test_found_by_structure_gives_the_same",
    "test_guidance_in_two_calls",
    "test_half_precision",
    "test_schedule_is_that_of_the_rule_written_out",
    "test_videos_of_a_batch_decide_for_themselves",
]

CHECKED = [
    pytest.param(case, marks=[] if (reason := case.missing()) is None else pytest.mark.skip(reason=reason))
    for case in REAL
]

pytestmark = pytest.mark.filterwarnings("ignore")


def test_calls_past_the_model_of_latte() -> None:
    if (reason := LATTE_OF_ONE_LIST.missing()) is not None:
        pytest.skip(reason)
    calls_past_the_model(LATTE_OF_ONE_LIST)


def test_frames_given_to_windows() -> None:
    if (reason := IMAGES_GIVEN.missing()) is not None:
        pytest.skip(reason)
    test_computing_always_changes_no_bit(IMAGES_GIVEN)
    test_videos_of_a_batch_decide_for_themselves(IMAGES_GIVEN)
    test_guidance_in_two_calls(IMAGES_GIVEN)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of which these repositories ask for the CUDA kernel by name."""
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
