# SPDX-License-Identifier: Apache-2.0
# The pybind11 module of csrc/engine; adacache_kernels.simulate documents its functions.
from collections.abc import Sequence

import numpy
from numpy.typing import ArrayLike, NDArray

def initial_state(num_videos: int, sites: int, rule: int = 0) -> NDArray[numpy.float64]: ...
def decide(
    sums: ArrayLike,
    state: NDArray[numpy.float64],
    thresholds: ArrayLike,
    rates: ArrayLike,
    step: ArrayLike,
    num_steps: ArrayLike,
    site: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    rule: int,
    elements: float,
    first_step: ArrayLike,
    last_step: ArrayLike,
    scale: float,
    power: float,
    divisor: float,
    gradient_weight: float,
) -> None: ...
def simulate(
    distances: ArrayLike,
    motion: ArrayLike,
    thresholds: ArrayLike,
    rates: ArrayLike,
    rule: int = 0,
    motion_on: bool = False,
    first_step: int = 1,
    last_step: int | None = None,
    scale: float = 0.385,
    power: float = 8.0,
    divisor: float = 1.0,
    gradient_weight: float = 10.0,
) -> tuple[NDArray[numpy.bool_], NDArray[numpy.int32]]: ...
