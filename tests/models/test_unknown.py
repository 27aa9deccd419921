# SPDX-License-Identifier: Apache-2.0
"""The checks of test_models.py on a class without an adapter."""

from __future__ import annotations

import pytest
from model_cases import Case, randn
from test_models import CHECKS
from unknown import Unknown

globals().update(CHECKS)
del globals()["test_found_by_structure_gives_the_same"]  # compares with an adapter

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
        motion=False,
        codebook={0.03: 4, 0.1: 3, 0.2: 2, 1.0: 1},
    )
]

pytestmark = pytest.mark.filterwarnings("ignore:AdaCache. Unknown is not a known model")
