# SPDX-License-Identifier: Apache-2.0
"""Some seconds of `make soak`."""

from __future__ import annotations

import time

import pytest
import soak


@pytest.mark.filterwarnings("ignore:AdaCache. of .* steps")
def test_random_videos_equal_their_single_runs() -> None:
    seed = int(time.time())
    print(f"seed {seed}")
    tally = soak.soak(4.0, seed)
    assert tally.videos > 0
    assert tally.engines > 0
