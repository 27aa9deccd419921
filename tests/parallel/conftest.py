# SPDX-License-Identifier: Apache-2.0
"""Groups of processes, started once per number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_processes import RankProcesses


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankProcesses]:
    with RankProcesses(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankProcesses]:
    with RankProcesses(4) as ranks:
        yield ranks
