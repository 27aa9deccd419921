"""Argument checks of the ops, in Python: the reference and Triton backends run them on every call, the
compiled ones only to turn a refusal by C++ into the same ValueError."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_STRIDES = 8


def refuse_grad(**tensors: torch.Tensor | None) -> None:
    """Raise for an input that autograd would have to follow; call it only where gradients are enabled."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name}: requires grad, but the ops have no backward; expected a tensor without grad, or a "
                "call under torch.no_grad() or torch.inference_mode()"
            )


def cast_under_autocast(x: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Give `tensors` the dtype of x where autocast is on for x's device; elsewhere leave them for the checks
    to refuse."""
    if not torch.is_autocast_enabled(x.device.type):
        return tensors
    return tuple(tensor.to(x.dtype) if tensor.is_floating_point() else tensor for tensor in tensors)


def explain_refusal(check: Callable[..., None], *arguments: Any) -> None:
    """Run a check on what a compiled op has refused, so that every backend raises the same error; it may find
    nothing."""
    try:
        check(*arguments)
    except (TypeError, ValueError) as refusal:
        raise refusal from None


def check_gated_residual_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    residual: torch.Tensor,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    out: torch.Tensor | None,
) -> None:
    _check_tokens("x", x)
    for name, tensor in (("y", y), ("residual", residual), ("out", out)):
        if tensor is not None:
            _check_like(name, tensor, x)
    _check_frames(frames, strides, x.shape[1])
    _check_gate(gate, x, frames)
    _check_videos(video_of_row, num_videos, x)
    _check_written("residual", residual, x=x, y=y, gate=gate, video_of_row=video_of_row)
    if out is not None:
        _check_written("out", out, y=y, gate=gate, residual=residual, video_of_row=video_of_row)
        _check_in_place(out, x)


def check_residual_meter(
    residual: torch.Tensor,
    old: torch.Tensor,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
) -> None:
    _check_tokens("residual", residual)
    _check_like("old", old, residual, of="residual")
    _check_frames(frames, strides, residual.shape[1])
    _check_videos(video_of_row, num_videos, residual)


def check_reuse_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    video_of_row: torch.Tensor | None,
    reuse: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    _check_tokens("x", x)
    _check_like("residual", residual, x, same_dtype=False)
    if out is not None:
        _check_like("out", out, x)
        _check_written("out", out, residual=residual, video_of_row=video_of_row, reuse=reuse)
        _check_in_place(out, x)
    rows = x.shape[0]
    if reuse is not None:
        _check_tensor("reuse", reuse)
        _check_device("reuse", reuse, x)
        if reuse.dtype != torch.bool:
            raise ValueError(f"reuse: expected dtype torch.bool, got {reuse.dtype}")
        if reuse.dim() != 1 or (video_of_row is None and reuse.shape[0] not in (1, rows)):
            videos = (
                "[num_videos]" if video_of_row is not None else f"[1] or [B] = [{rows}] without video_of_row"
            )
            raise ValueError(f"reuse: expected {videos}, got {list(reuse.shape)}")
        _check_contiguous("reuse", reuse)
        if video_of_row is not None:
            _check_videos(video_of_row, reuse.shape[0], x)


def check_decide(
    sums: torch.Tensor,
    state: torch.Tensor,
    thresholds: torch.Tensor,
    rates: torch.Tensor,
    step: int,
    num_steps: int,
    site: int,
    frames: int,
    strides: Sequence[int],
    base_columns: tuple[int, int],
) -> None:
    sum_columns, state_columns = base_columns
    for name, tensor in (("sums", sums), ("state", state), ("thresholds", thresholds), ("rates", rates)):
        _check_tensor(name, tensor)
        _check_device(name, tensor, sums, of="sums")
        if tensor.dtype != torch.float64:
            raise ValueError(f"{name}: expected dtype torch.float64, got {tensor.dtype}")
        _check_contiguous(name, tensor)
    if state.dim() != 2 or state.shape[1] <= state_columns:
        raise ValueError(f"state: expected [num_videos, {state_columns} + sites], got {list(state.shape)}")
    columns = sum_columns + 2 * len(strides)
    if tuple(sums.shape) != (state.shape[0], columns):
        raise ValueError(
            f"sums: expected [num_videos, columns] = [{state.shape[0]}, {columns}], got {list(sums.shape)}"
        )
    if thresholds.dim() != 1 or thresholds.shape[0] == 0:
        raise ValueError(
            f"thresholds: expected [entries] with at least one entry, got {list(thresholds.shape)}"
        )
    if rates.shape != thresholds.shape:
        raise ValueError(f"rates: expected {list(thresholds.shape)} as thresholds, got {list(rates.shape)}")
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
    if not 1 <= step <= num_steps:
        raise ValueError(f"step: expected 1..num_steps = 1..{num_steps}, got {step}")
    sites = state.shape[1] - state_columns
    if not 0 <= site < sites:
        raise ValueError(
            f"site: expected 0..{sites - 1}, since state has {sites} previous factors, got {site}"
        )
    _check_strides(strides, frames)


def _check_tokens(name: str, tensor: torch.Tensor) -> None:
    _check_tensor(name, tensor)
    if tensor.dim() != 3:
        raise ValueError(f"{name}: expected [B, N, C], got {list(tensor.shape)}")
    _check_dtype(name, tensor)
    _check_channels(name, tensor)


def _check_like(
    name: str, tensor: torch.Tensor, like: torch.Tensor, *, of: str = "x", same_dtype: bool = True
) -> None:
    _check_tensor(name, tensor)
    if tensor.shape != like.shape:
        raise ValueError(f"{name}: expected [B, N, C] = {list(like.shape)} as {of}, got {list(tensor.shape)}")
    _check_device(name, tensor, like, of=of)
    if same_dtype and tensor.dtype != like.dtype:
        raise ValueError(f"{name}: expected dtype {like.dtype} as {of}, got {tensor.dtype}")
    _check_dtype(name, tensor)
    _check_channels(name, tensor)


def _check_gate(gate: torch.Tensor, x: torch.Tensor, frames: int) -> None:
    rows, tokens, channels = x.shape
    _check_tensor("gate", gate)
    if (
        gate.dim() != 3
        or gate.shape[0] != rows
        or gate.shape[2] != channels
        or gate.shape[1] not in (1, frames, tokens)
    ):
        raise ValueError(
            f"gate: expected [B, 1|T|N, C] = [{rows}, 1|{frames}|{tokens}, {channels}], "
            f"got {list(gate.shape)}"
        )
    _check_device("gate", gate, x)
    if gate.dtype != x.dtype:
        raise ValueError(f"gate: expected dtype {x.dtype} as x, got {gate.dtype}")
    _check_channels("gate", gate)


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def _check_device(name: str, tensor: torch.Tensor, like: torch.Tensor, *, of: str = "x") -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as {of}, got {tensor.device}")


def _check_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: expected dtype {', '.join(map(str, DTYPES))}, got {tensor.dtype}")


def _check_channels(name: str, tensor: torch.Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected contiguous channels (stride 1), got strides {list(tensor.stride())}"
        )


def _check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}")


def _check_frames(frames: int, strides: Sequence[int], tokens: int) -> None:
    if frames < 1:
        raise ValueError(f"frames: expected at least 1, got {frames}")
    if tokens % frames:
        raise ValueError(f"frames: expected a divisor of N = {tokens}, got {frames}")
    _check_strides(strides, frames)


def _check_strides(strides: Sequence[int], frames: int) -> None:
    if len(strides) > MAX_STRIDES:
        raise ValueError(f"strides: expected at most {MAX_STRIDES}, got {len(strides)}")
    for stride in strides:
        if not 1 <= stride < frames:
            raise ValueError(f"strides: expected 1 <= stride < frames = {frames}, got {stride}")


def _check_videos(video_of_row: torch.Tensor | None, num_videos: int, x: torch.Tensor) -> None:
    if num_videos < 1:
        raise ValueError(f"num_videos: expected at least 1, got {num_videos}")
    if video_of_row is None:
        if num_videos != 1:
            raise ValueError(
                f"video_of_row: expected [B] = [{x.shape[0]}] for num_videos = {num_videos}, got None"
            )
        return
    _check_tensor("video_of_row", video_of_row)
    if tuple(video_of_row.shape) != (x.shape[0],):
        raise ValueError(f"video_of_row: expected [B] = [{x.shape[0]}], got {list(video_of_row.shape)}")
    if video_of_row.dtype != torch.int32:
        raise ValueError(f"video_of_row: expected dtype torch.int32, got {video_of_row.dtype}")
    _check_device("video_of_row", video_of_row, x)
    _check_contiguous("video_of_row", video_of_row)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # Elsewhere looking at the values would stop the device; there an id out of range makes the sums NaN.
        outside = (video_of_row < 0) | (video_of_row >= num_videos)
        if outside.any():
            given = video_of_row[outside][0].item()
            raise ValueError(f"video_of_row: expected values in 0..{num_videos - 1}, got {given}")


def _check_written(name: str, tensor: torch.Tensor, **read: torch.Tensor | None) -> None:
    if _overlaps_itself(tensor):
        raise ValueError(
            f"{name}: is written and so needs memory of its own for each element, got strides "
            f"{list(tensor.stride())} for {list(tensor.shape)}"
        )
    for other_name, other in read.items():
        if other is not None and _overlap(tensor, other):
            raise ValueError(
                f"{name}: expected memory of its own, since it is written; got some of {other_name}'s"
            )


def _check_in_place(out: torch.Tensor, x: torch.Tensor) -> None:
    if _overlap(out, x) and not (out.data_ptr() == x.data_ptr() and out.stride() == x.stride()):
        raise ValueError("out: expected x itself or memory of its own, got memory that overlaps x in part")


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share memory. Views of one tensor with equal strides, such as the halves that
    `chunk` gives, are told apart; others whose address ranges cross are taken to share."""
    if a.numel() == 0 or b.numel() == 0 or a.device.type == "meta" or torch.compiler.is_compiling():
        return False
    start_a, start_b = a.data_ptr(), b.data_ptr()
    if start_a >= start_b + _extent(b) or start_b >= start_a + _extent(a):
        return False
    distance, within = divmod(start_b - start_a, a.element_size())
    if a.dim() != 3 or a.shape != b.shape or a.stride() != b.stride() or a.dtype != b.dtype or within:
        return True
    # They meet where distance = i * stride(0) + j * stride(1) + k with each index difference smaller than its
    # size.
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
