# SPDX-License-Identifier: Apache-2.0
"""Random requests, batches, aborts and joins on the serving engine, against the single run of each video.

    python tests/serving/soak.py --seconds 600

A small random network, so that a video takes milliseconds. `make soak` runs this; the tests run some seconds.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import adacache
import torch
from adacache.models.rectified_flow import RectifiedFlow
from adacache.models.stdit3 import STDiT3
from adacache.serving import Engine, FlowDenoiser, NoCache, Video
from serving_cases import CODEBOOK, PATH, REPLAY, STACK_PATH, Wanted
from tiny_digits import network
from torch import Tensor

TOLERANCE = 1e-3
"""Of a batch: the network's own batching differs by 1e-5 after some steps. Single calls are bit-identical."""
POLICIES: list[Any] = [
    adacache.AdaCache(CODEBOOK),
    adacache.AdaCache({0.05: 5, 0.2: 2, 1.0: 1}, metric="l2"),
    adacache.AdaCache(CODEBOOK, cache="block"),
    adacache.AdaCache(CODEBOOK, motion=adacache.MotionRegularization(window=(2, 6))),
    adacache.AdaCache(CODEBOOK, cache_dtype=torch.float8_e4m3fn),
    REPLAY,
    PATH,
    STACK_PATH,
    None,
]


@dataclass
class Tally:
    """What a soak has done."""

    videos: int = 0
    aborted: int = 0
    broken: int = 0
    steps: int = 0
    engines: int = 0
    unstable: int = 0
    """Videos that were not used, because a decision of their single run is within rounding of a threshold."""


class Truth:
    """Single runs, each made once."""

    def __init__(self, model: STDiT3, tally: Tally):
        self._model = model
        self._known: dict[tuple[int, int, float, int], tuple[Tensor, list[int]] | None] = {}
        self._tally = tally

    def of(self, wanted: Wanted, number: int) -> tuple[Tensor, list[int]] | None:
        """The video and its schedule; None: rounding decides about its schedule."""
        key = wanted.seed, wanted.steps, wanted.guidance, number
        if key not in self._known:
            found = wanted.alone(self._model)
            stable = True
            if isinstance(wanted.policy, adacache.AdaCache):
                for factor in (1 - 1e-4, 1 + 1e-4):
                    codebook = {
                        threshold * factor: rate for threshold, rate in wanted.policy.codebook.items()
                    }
                    near = replace(wanted, policy=replace(wanted.policy, codebook=codebook))
                    stable = stable and near.alone(self._model)[1] == found[1]
            self._tally.unstable += not stable
            self._known[key] = found if stable else None
        return self._known[key]


def soak(seconds: float, seed: int, model: STDiT3 | None = None) -> Tally:
    """Runs for `seconds`.

    Raises:
        AssertionError: a video differs from its single run.
    """
    model = network() if model is None else model
    source, tally = random.Random(seed), Tally()
    truth, end = Truth(model, tally), time.monotonic() + seconds
    while time.monotonic() < end:
        tally.engines += 1
        wanted = []
        chosen = source.sample(range(len(POLICIES)), 3)
        while len(wanted) < 20:
            number = source.choice(chosen)
            one = Wanted(
                source.randrange(6), source.choice([7, 8, 9, 11]), source.choice([1.5, 3.0]), POLICIES[number]
            )
            expected = truth.of(one, number)
            if expected is not None:
                wanted.append((one, expected))
        _serve(model, wanted, source, tally)
    return tally


def _serve(model: STDiT3, wanted: list[tuple[Wanted, Any]], source: random.Random, tally: Tally) -> None:
    single = source.random() < 0.5
    policies = [one.policy for one, _ in wanted if one.policy is not None]
    engine = Engine(
        FlowDenoiser(model, RectifiedFlow(9)),
        None,
        policies=policies,
        largest=wanted[0][0].job(model),
        slots=source.randint(1, 6),
        max_batch=1 if single else source.choice([None, 2, 3]),
        pack=source.random() < 0.5,
    )
    waiting, running = list(wanted), dict[Video, tuple[Wanted, Any]]()
    broken: set[Video] = set()
    with engine:
        assert engine._pool is not None
        engine._pool.memory.fill_(255)
        while waiting or running:
            while waiting and engine.has_room and source.random() < 0.7:
                one, expected = waiting.pop(0)
                running[engine.join(one.job(model), one.policy or NoCache())] = one, expected
            for video in list(running):
                chance = source.random()
                if chance < 0.01:
                    engine.leave(video)
                    running.pop(video)
                    tally.aborted += 1
                elif chance < 0.015:
                    video.state.latents = video.state.latents * float("nan")
                    broken.add(video)
                    tally.broken += 1
            tally.steps += 1
            for video in engine.step():
                one, (result, steps) = running.pop(video)
                assert video.error is None, (one, video.error)
                tally.videos += 1
                if video in broken:
                    assert not video.result.isfinite().all(), one
                    continue
                assert video.trace.computed_steps == steps, (one, video.trace.computed_steps, steps)
                difference = float((video.result - result).abs().max())
                assert difference == 0 if single else difference <= TOLERANCE, (one, single, difference)
        assert engine._pool.free == engine._pool.memory.shape[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, help="default: of the time")
    options = parser.parse_args(arguments)
    seed = int(time.time()) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # few steps
    print(soak(options.seconds, seed))


if __name__ == "__main__":
    main()
