# SPDX-License-Identifier: Apache-2.0
"""Checks the results of an op for a benchmark case. Ops with wrong results are not timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from cases import Case, Tensors, Values, copy_inputs

import adacache_kernels as ak
from adacache_kernels import _backend


@dataclass(frozen=True)
class Expected:
    """Expected results for one set of inputs: of the chain, of the chain in float64, of the reference
    backend."""

    plain: Tensors
    exact: Tensors
    reference: Tensors


def expect(case: Case, values: Values) -> Expected:
    plain = case.chain(copy_inputs(values))
    exact = case.chain(copy_inputs(values, torch.float64)) if "close" in case.checks else plain
    with ak.use_backend("reference"):
        return Expected(plain, exact, case.call(ak, copy_inputs(values), {}))


def has_backend(op: str, backend: str) -> bool:
    """Whether this backend has the op and can run on this machine."""
    return _backend._missing(backend, op) is None


def outputs_for(case: Case, values: Values) -> dict[str, torch.Tensor]:
    """Output tensors for the op, filled with NaN."""
    results = case.call(ak, values, {})
    return {
        name: torch.full_like(result, torch.nan) for name, result in zip(case.outs, results, strict=False)
    }


def find_fault(case: Case, expected: Expected, values: Values, backend: str) -> str:
    """The fault in the results of the backend, or "", with allocated and with given outputs."""
    with ak.use_backend(backend):
        given = outputs_for(case, copy_inputs(values))
        results = [case.call(ak, copy_inputs(values), outputs) for outputs in ({}, given)]
    for result in results:
        for index, kind in enumerate(case.checks):
            if fault := judge(kind, result, expected, index):
                return f"output {index}: {fault}"
    return ""


def judge(kind: str, results: Tensors, expected: Expected, index: int) -> str:
    """The fault in output `index`, or "". See `Case.checks` for the kinds."""
    given = results[index]
    if kind == "bits":
        different = bits(given) != bits(expected.plain[index].to(given.device))
        return f"{int(different.sum())} bytes differ from eager PyTorch" if different.any() else ""
    if kind == "close":
        float8 = given.dtype == torch.float8_e4m3fn
        exact, *both = (
            (tensors[index].double() * tensors[index + 1] if float8 else tensors[index].double()).to(
                given.device
            )
            for tensors in (expected.exact, results, expected.plain)
        )
        error, allowed = (float((one - exact).abs().max()) for one in both)
        floor = torch.finfo(torch.float32 if float8 else given.dtype).eps * float(exact.abs().max())
        return "" if error <= 2 * allowed + floor else f"error {error:.3g}, of eager PyTorch {allowed:.3g}"
    sums = expected.reference[index].to(given.device)
    tolerance = 1e-5
    most = float(sums.nan_to_num().abs().max())
    close = torch.allclose(given, sums, rtol=tolerance, atol=tolerance * most, equal_nan=True)
    return "" if close else f"sums are {given.tolist()}, expected {sums.tolist()}"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def same_bits(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(one, other, strict=True))
