# SPDX-License-Identifier: Apache-2.0
"""Overlap checks for tensors."""

from __future__ import annotations

import torch


def overlaps_itself(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0:
        return False
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share memory. Exact for views of one tensor with equal strides, such as the results
    of `chunk`; for other views, whether their address ranges overlap."""
    if a.numel() == 0 or b.numel() == 0 or a.device.type == "meta" or torch.compiler.is_compiling():
        return False
    start_a, start_b = a.data_ptr(), b.data_ptr()
    if start_a >= start_b + _extent(b) or start_b >= start_a + _extent(a):
        return False
    distance, within = divmod(start_b - start_a, a.element_size())
    if a.dim() != 3 or a.shape != b.shape or a.stride() != b.stride() or a.dtype != b.dtype or within:
        return True
    # Elements coincide where distance = i * stride(0) + j * stride(1) + k, with |i|, |j|, |k| smaller than
    # the sizes.
    outer, inner = sorted(zip(a.stride()[:2], a.shape[:2], strict=True), reverse=True)
    for i in _index_differences(distance, *outer):
        for j in _index_differences(distance - i * outer[0], *inner):
            if abs(distance - i * outer[0] - j * inner[0]) < a.shape[2]:
                return True
    return False


def _index_differences(distance: int, stride: int, size: int) -> list[int]:
    if size == 1 or stride == 0:
        return [0]
    nearest = distance // stride
    return [index for index in (nearest, nearest + 1) if abs(index) < size]


def _extent(tensor: torch.Tensor) -> int:
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return (reach + 1) * tensor.element_size()
