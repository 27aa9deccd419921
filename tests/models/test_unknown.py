"""The checks of test_models.py on a class that no adapter knows."""

from __future__ import annotations

import pytest
from model_cases import Case, randn
from test_models import (
    test_a_reused_step_runs_no_block,
    test_an_exception_leaves_nothing_behind,
    test_autocast,
    test_computing_always_changes_no_bit,
    test_guidance_in_two_calls,
    test_half_precision,
    test_schedule_is_that_of_the_rule_written_out,
    test_videos_of_a_batch_decide_for_themselves,
)
from unknown import Unknown

__all__ = [
    "test_a_reused_step_runs_no_block",
    "test_an_exception_leaves_nothing_behind",
    "test_autocast",
    "test_computing_always_changes_no_bit",
    "test_guidance_in_two_calls",
    "test_half_precision",
    "test_schedule_is_that_of_the_rule_written_out",
    "test_videos_of_a_batch_decide_for_themselves",
]

CHECKED = [
    Case(
        "a class that nobody knows",
        lambda: Unknown(first=2, second=2),
        lambda videos, frames: {"x": randn(videos, 4 * frames, 8)},
        lists=("zeta", "alpha"),
        after_attention={"zeta": "", "alpha": ""},
        part="block",
        latents="x",
        options={},
        codebook={0.03: 4, 0.1: 3, 0.2: 2, 1.0: 1},
    )
]

pytestmark = pytest.mark.filterwarnings("ignore:AdaCache. no adapter knows Unknown")
