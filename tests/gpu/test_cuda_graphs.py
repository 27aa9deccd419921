# SPDX-License-Identifier: Apache-2.0
"""Every op in a CUDA graph: a replay with other values is bit-identical to a plain call."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case, Shape, copy_inputs, make_inputs
from check import has_backend, same_bits

import adacache_kernels as ak

SHAPE = Shape(2, 3, 7, 144)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.channels is None], ids=lambda case: case.name
)
def test_graph_replay_is_bit_identical(case: Case, backend: str) -> None:
    if not has_backend(case.op, backend):
        pytest.skip(f"backend {backend} has no {case.op}")
    device = torch.device("cuda")
    values, others = (make_inputs(case, SHAPE, torch.bfloat16, device) for _ in range(2))
    with ak.use_backend(backend):
        case.call(ak, copy_inputs(values), {})  # loads and compiles before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = case.call(ak, values, {})
        for name, value in vars(values).items():
            if isinstance(value, torch.Tensor):
                value.copy_(getattr(others, name))
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(results, case.call(ak, copy_inputs(others), {}))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_meter_and_decide_in_one_graph(backend: str) -> None:
    device = torch.device("cuda")
    case = next(case for case in CASES if case.name == "gated_residual_meter")
    values = make_inputs(case, SHAPE, torch.bfloat16, device)
    thresholds = torch.tensor([0.5, 1e9], dtype=torch.float64, device=device)
    rates = torch.tensor([4.0, 2.0], dtype=torch.float64, device=device)
    state = ak.initial_state(num_videos=1, device=device)

    def measure_and_decide() -> None:
        sums = case.call(ak, values, {})[-1]
        ak.decide(sums, state, step=2, num_steps=30, thresholds=thresholds, rates=rates, frames=SHAPE.frames)

    with ak.use_backend(backend):
        state[0, ak.state_columns(1).index("next_step")] = 2
        before = state.clone()
        measure_and_decide()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            measure_and_decide()
        rate = ak.state_columns(1).index("rate")
        for residual, expected in ((torch.zeros_like(values.y), 2.0), (values.gate * values.y, 4.0)):
            state.copy_(before)
            values.residual.copy_(residual)
            graph.replay()
            assert state[0, rate].item() == (1.0 if residual.count_nonzero() == 0 else expected)
