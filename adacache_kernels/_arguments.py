"""Argument checks of the ops, in Python: the reference and Triton backends run them on every call, the
compiled ones only to turn a refusal by C++ into the same ValueError."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .columns import state_columns, sum_columns

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT8 = torch.float8_e4m3fn
MAX_STRIDES = 8
MAX_FACTORS = 4
MAX_FRAMES = 64  # of temporal attention
MAX_HEAD_DIM = 256


#: What autocast may hand over in another floating dtype than the stream's: outputs of sub-layers, and what
#: modulates them.
_CAST = frozenset(("y", "gate", "shift", "scale", "weight", "bias", "q_weight", "k_weight"))


def refuse_grad(names: Sequence[str], arguments: Sequence[Any]) -> None:
    """Raise for an input that autograd would have to follow; call it only where gradients are enabled."""
    for name, argument in zip(names, arguments, strict=False):
        for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                raise ValueError(
                    f"{name}: requires grad, but the ops have no backward; expected a tensor without grad, "
                    "or a call under torch.no_grad() or torch.inference_mode()"
                )


def cast_under_autocast(
    dtype: torch.dtype, names: Sequence[str], arguments: Sequence[Any]
) -> tuple[Any, ...]:
    """Give the tensors that autocast may have cast the dtype of the stream; others are left for the checks to
    refuse."""
    return tuple(
        argument.to(dtype)
        if name in _CAST and isinstance(argument, torch.Tensor) and argument.is_floating_point()
        else argument
        for name, argument in zip(names, arguments, strict=True)
    )


def explain_refusal(check: Callable[..., None], *arguments: Any) -> None:
    """Run a check on what a compiled op has refused, so that every backend raises the same error; it may find
    nothing."""
    try:
        check(*arguments)
    except (TypeError, ValueError) as refusal:
        raise refusal from None


def check_gated_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    x_rows: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> None:
    rows = _check_stream(x, x_rows)
    size = (rows, *x.shape[1:])
    _check_like("y", y, x, size)
    _check_modulators(x, rows, None, gate=gate)
    _check_outputs({"out": out}, x, size, {"y": y, "gate": gate}, x_rows)


def check_gated_residual_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor | None = None,
) -> None:
    check_gated_residual_norm_meter(
        x,
        y,
        gate,
        residual,
        residual_scale,
        None,
        None,
        None,
        None,
        0.0,
        x_rows,
        residual_rows,
        video_of_row,
        num_videos,
        frames,
        strides,
        metric,
        out,
    )


def check_stack_residual_meter(
    x_out: torch.Tensor,
    x_in: torch.Tensor,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor | None = None,
) -> None:
    _check_tokens("x_out", x_out)
    _check_tokens("x_in", x_in)
    total = x_in.shape[0] if rows is not None else x_out.shape[0]
    size = (total, *x_out.shape[1:])
    _check_like("x_in", x_in, x_out, size, of="x_out")
    _check_rows("rows", rows, x_in, written=True)
    if rows is not None and rows.shape[0] != x_out.shape[0]:
        raise ValueError(f"rows: expected [B] = [{x_out.shape[0]}], got {list(rows.shape)}")
    _check_frames(frames, strides, x_out.shape[1])
    _check_cache(residual, residual_scale, x_out, size, of="x_out")
    _check_videos(video_of_row, num_videos, x_out.shape[0], x_out)
    read = {"x_out": x_out, "rows": rows, "video_of_row": video_of_row}
    _check_kept(residual, residual_scale, {"x_in": x_in, **read})
    kept = {"residual": residual, "residual_scale": residual_scale}
    if out is not None:
        _check_like("out", out, x_out, size, of="x_out")
        _check_written("out", out, read | kept)
        _check_in_place(out, "x_in", x_in)


def check_residual_meter(
    residual: torch.Tensor,
    old: torch.Tensor,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
) -> None:
    _check_tokens("residual", residual)
    _check_like("old", old, residual, tuple(residual.shape), of="residual")
    _check_frames(frames, strides, residual.shape[1])
    _check_videos(video_of_row, num_videos, residual.shape[0], residual)


def check_reuse_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    reuse: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> None:
    rows = _check_stream(x, x_rows)
    size = (rows, *x.shape[1:])
    _check_tensor("residual", residual)
    kept_size = size if residual_rows is None else (*residual.shape[:1], *size[1:])
    _check_cache(residual, residual_scale, x, kept_size, dtypes=DTYPES)
    _check_batch_rows("residual_rows", residual_rows, residual, rows)
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
            _check_videos(video_of_row, reuse.shape[0], rows, x)
    read = {"residual": residual, "residual_scale": residual_scale, "residual_rows": residual_rows}
    read |= {"video_of_row": video_of_row, "reuse": reuse}
    _check_outputs({"out": out}, x, size, read, x_rows)


def check_extrapolate_residual(
    x: torch.Tensor,
    factors: Sequence[torch.Tensor],
    coefficients: torch.Tensor,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> None:
    rows = _check_stream(x, x_rows)
    size = (rows, *x.shape[1:])
    if not isinstance(factors, (list, tuple)):
        raise TypeError(f"factors: expected a list of tensors, got {type(factors).__name__}")
    if not 1 <= len(factors) <= MAX_FACTORS:
        raise ValueError(f"factors: expected 1 to {MAX_FACTORS} tensors, got {len(factors)}")
    _check_tensor("factors", factors[0])
    kept_size = size if residual_rows is None else (*factors[0].shape[:1], *size[1:])
    for factor in factors:
        _check_like("factors", factor, x, kept_size, same_dtype=False)
        if factor.dtype != factors[0].dtype:
            raise ValueError(f"factors: expected one dtype, got {factors[0].dtype} and {factor.dtype}")
    _check_batch_rows("residual_rows", residual_rows, factors[0], rows)
    _check_tensor("coefficients", coefficients)
    _check_device("coefficients", coefficients, x)
    if coefficients.dtype != torch.float32:
        raise ValueError(f"coefficients: expected dtype torch.float32, got {coefficients.dtype}")
    if (
        coefficients.dim() != 2
        or coefficients.shape[1] != len(factors)
        or (video_of_row is None and coefficients.shape[0] not in (1, rows))
    ):
        videos = "num_videos" if video_of_row is not None else f"1|B = 1|{rows} without video_of_row"
        raise ValueError(
            f"coefficients: expected [{videos}, factors = {len(factors)}], got {list(coefficients.shape)}"
        )
    _check_contiguous("coefficients", coefficients)
    if video_of_row is not None:
        _check_videos(video_of_row, coefficients.shape[0], rows, x)
    read: dict[str, Any] = {f"factors[{index}]": factor for index, factor in enumerate(factors)}
    read |= {"coefficients": coefficients, "residual_rows": residual_rows, "video_of_row": video_of_row}
    _check_outputs({"out": out}, x, size, read, x_rows)


def check_layer_norm_modulate(
    x: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    x_rows: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> None:
    rows = _check_stream(x, x_rows)
    _check_modulators(x, rows, None, shift=shift, scale=scale)
    _check_per_channel(x, weight=weight, bias=bias)
    read = {"shift": shift, "scale": scale, "weight": weight, "bias": bias}
    _check_outputs({"out": out}, x, (rows, *x.shape[1:]), read, x_rows)


def check_gated_residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    x_rows: torch.Tensor | None,
    out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
) -> None:
    rows = _check_stream(x, x_rows)
    size = (rows, *x.shape[1:])
    _check_like("y", y, x, size)
    _check_modulators(x, rows, None, gate=gate, shift=shift, scale=scale)
    _check_per_channel(x, weight=weight, bias=bias)
    read = {"y": y, "gate": gate, "shift": shift, "scale": scale, "weight": weight, "bias": bias}
    _check_outputs({"out": out, "norm_out": norm_out}, x, size, read, x_rows)


def check_gated_residual_norm_meter(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    residual: torch.Tensor,
    residual_scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    x_rows: torch.Tensor | None,
    residual_rows: torch.Tensor | None,
    video_of_row: torch.Tensor | None,
    num_videos: int,
    frames: int,
    strides: Sequence[int],
    metric: int,
    out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
) -> None:
    rows = _check_stream(x, x_rows)
    size = (rows, *x.shape[1:])
    _check_like("y", y, x, size)
    _check_tensor("residual", residual)
    kept_size = size if residual_rows is None else (*residual.shape[:1], *size[1:])
    _check_cache(residual, residual_scale, x, kept_size)
    _check_batch_rows("residual_rows", residual_rows, residual, rows, written=True)
    _check_frames(frames, strides, x.shape[1])
    _check_modulators(x, rows, frames, gate=gate, shift=shift, scale=scale)
    _check_per_channel(x, weight=weight, bias=bias)
    _check_videos(video_of_row, num_videos, rows, x)
    read = {"y": y, "gate": gate, "shift": shift, "scale": scale, "weight": weight, "bias": bias}
    read |= {"residual_rows": residual_rows, "video_of_row": video_of_row}
    _check_kept(residual, residual_scale, {"x": x, "x_rows": x_rows, **read})
    read |= {"residual": residual, "residual_scale": residual_scale}
    _check_outputs({"out": out, "norm_out": norm_out}, x, size, read, x_rows)


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
    *rule: Any,  # plain numbers, whatever they are
) -> None:
    for name, tensor in (("sums", sums), ("state", state), ("thresholds", thresholds), ("rates", rates)):
        _check_tensor(name, tensor)
        _check_device(name, tensor, sums, of="sums")
        if tensor.dtype != torch.float64:
            raise ValueError(f"{name}: expected dtype torch.float64, got {tensor.dtype}")
        _check_contiguous(name, tensor)
    base = len(state_columns(1)) - 1
    if state.dim() != 2 or state.shape[1] <= base:
        raise ValueError(f"state: expected [num_videos, {base} + sites], got {list(state.shape)}")
    columns = len(sum_columns(strides))
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
    sites = state.shape[1] - base
    if not 0 <= site < sites:
        raise ValueError(
            f"site: expected 0..{sites - 1}, since state has {sites} previous factors, got {site}"
        )
    _check_strides(strides, frames)


def check_fused_qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    eps: float,
) -> None:
    _check_qkv(qkv)
    angles = {"cos": cos, "sin": sin}
    _check_norm_and_rope(qkv, q_weight, k_weight, angles, eps, None)
    _check_written("qkv", qkv.flatten(2), {"q_weight": q_weight, "k_weight": k_weight, **angles})


def check_temporal_attention(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    frames: int,
    eps: float,
    scale: float,
    out: torch.Tensor | None = None,
) -> None:
    _check_qkv(qkv)
    if not 1 <= frames <= MAX_FRAMES:
        raise ValueError(f"frames: expected 1 to {MAX_FRAMES}, got {frames}")
    _check_frames(frames, (), qkv.shape[1])
    angles = {"cos": cos, "sin": sin}
    _check_norm_and_rope(qkv, q_weight, k_weight, angles, eps, frames)
    if out is not None:
        rows, tokens, _, heads, dim = qkv.shape
        _check_tensor("out", out)
        if tuple(out.shape) != (rows, tokens, heads * dim):
            wanted = [rows, tokens, heads * dim]
            raise ValueError(f"out: expected [B, N, heads * dim] = {wanted}, got {list(out.shape)}")
        _check_device("out", out, qkv, of="qkv")
        if out.dtype != qkv.dtype:
            raise ValueError(f"out: expected dtype {qkv.dtype} as qkv, got {out.dtype}")
        _check_channels("out", out)
        _check_written("out", out, {"qkv": qkv, "q_weight": q_weight, "k_weight": k_weight, **angles})


def _check_qkv(qkv: torch.Tensor) -> None:
    _check_tensor("qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: expected [B, N, 3, heads, dim], got {list(qkv.shape)}")
    _check_dtype("qkv", qkv)
    heads, dim = qkv.shape[3:]
    if dim > MAX_HEAD_DIM:
        raise ValueError(f"qkv: expected dim of at most {MAX_HEAD_DIM}, got {dim}")
    wanted = (heads * dim, dim, 1)
    if qkv.numel() and any(
        size > 1 and stride != want
        for size, stride, want in zip(qkv.shape[2:], qkv.stride()[2:], wanted, strict=True)
    ):
        raise ValueError(
            f"qkv: expected the last three dimensions contiguous (strides {list(wanted)}), got strides "
            f"{list(qkv.stride())}"
        )


def _check_norm_and_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    angles: dict[str, torch.Tensor | None],
    eps: float,
    frames: int | None,
) -> None:
    if eps < 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    tokens, dim = qkv.shape[1], qkv.shape[4]
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    for pair in (weights, angles):
        for name, other in zip(pair, reversed(pair), strict=True):
            if pair[name] is None and pair[other] is not None:
                raise ValueError(f"{name}: expected a tensor with {other}, got None")
    for name, weight in weights.items():
        if weight is None:
            continue
        _check_tensor(name, weight)
        if tuple(weight.shape) != (dim,):
            raise ValueError(f"{name}: expected [dim] = [{dim}], got {list(weight.shape)}")
        _check_device(name, weight, qkv, of="qkv")
        if weight.dtype != qkv.dtype:
            raise ValueError(f"{name}: expected dtype {qkv.dtype} as qkv, got {weight.dtype}")
        _check_channels(name, weight)
    for name, angle in angles.items():
        if angle is None:
            continue
        _check_tensor(name, angle)
        if dim % 2:
            raise ValueError(f"qkv: expected an even dim with {name}, got {dim}")
        length = angle.shape[0] if angle.dim() == 2 else 0
        groups: int | str = frames if frames is not None else f"divisor of {tokens}"
        fits = length == frames if frames is not None else length > 0 and tokens % length == 0
        if angle.dim() != 2 or angle.shape[1] != dim // 2 or not (fits or length == tokens):
            raise ValueError(
                f"{name}: expected [T|N, dim / 2] = [{groups}|{tokens}, {dim // 2}], got {list(angle.shape)}"
            )
        first = angles["cos"]
        if first is not None and angle.shape[0] != first.shape[0]:
            raise ValueError(f"{name}: expected {list(first.shape)} as cos, got {list(angle.shape)}")
        _check_device(name, angle, qkv, of="qkv")
        if angle.dtype != torch.float32:
            raise ValueError(f"{name}: expected dtype torch.float32, got {angle.dtype}")
        _check_contiguous(name, angle)


def _check_tokens(name: str, tensor: torch.Tensor) -> None:
    _check_tensor(name, tensor)
    if tensor.dim() != 3:
        raise ValueError(f"{name}: expected [B, N, C], got {list(tensor.shape)}")
    _check_dtype(name, tensor)
    _check_channels(name, tensor)


def _check_stream(x: torch.Tensor, x_rows: torch.Tensor | None) -> int:
    """The rows B of the batch: those of x, or those that x_rows picks."""
    _check_tokens("x", x)
    _check_rows("x_rows", x_rows, x)
    return x.shape[0] if x_rows is None else x_rows.shape[0]


def _check_like(
    name: str,
    tensor: torch.Tensor,
    like: torch.Tensor,
    size: tuple[int, ...],
    *,
    of: str = "x",
    same_dtype: bool = True,
) -> None:
    _check_tensor(name, tensor)
    if tuple(tensor.shape) != size:
        raise ValueError(f"{name}: expected [B, N, C] = {list(size)} as {of}, got {list(tensor.shape)}")
    _check_device(name, tensor, like, of=of)
    if same_dtype and tensor.dtype != like.dtype:
        raise ValueError(f"{name}: expected dtype {like.dtype} as {of}, got {tensor.dtype}")
    _check_dtype(name, tensor)
    _check_channels(name, tensor)


def _check_modulators(
    x: torch.Tensor, rows: int, frames: int | None, **modulators: torch.Tensor | None
) -> None:
    """Without `frames`, the first modulator that is neither one for all tokens nor one for each says how many
    groups of tokens there are."""
    _, tokens, channels = x.shape
    set_by = ""
    for name, modulator in modulators.items():
        if modulator is None:
            continue
        _check_tensor(name, modulator)
        groups = modulator.shape[1] if modulator.dim() == 3 else 0
        if groups in (1, tokens):
            fits = True
        elif frames is not None:
            fits = groups == frames
        else:
            fits = groups > 0 and tokens % groups == 0
        if modulator.dim() != 3 or modulator.shape[0] != rows or modulator.shape[2] != channels or not fits:
            middle = "T" if frames is not None else "groups"
            number = frames if frames is not None else f"divisor of {tokens}"
            as_other = f" as {set_by}" if set_by else ""
            raise ValueError(
                f"{name}: expected [B, 1|{middle}|N, C] = [{rows}, 1|{number}{as_other}|{tokens}, "
                f"{channels}], got {list(modulator.shape)}"
            )
        if frames is None and groups not in (1, tokens):
            frames, set_by = groups, name
        _check_device(name, modulator, x)
        if modulator.dtype != x.dtype:
            raise ValueError(f"{name}: expected dtype {x.dtype} as x, got {modulator.dtype}")
        _check_channels(name, modulator)


def _check_per_channel(x: torch.Tensor, **vectors: torch.Tensor | None) -> None:
    for name, vector in vectors.items():
        if vector is None:
            continue
        _check_tensor(name, vector)
        if tuple(vector.shape) != (x.shape[2],):
            raise ValueError(f"{name}: expected [C] = [{x.shape[2]}], got {list(vector.shape)}")
        _check_device(name, vector, x)
        if vector.dtype != x.dtype:
            raise ValueError(f"{name}: expected dtype {x.dtype} as x, got {vector.dtype}")
        _check_channels(name, vector)


def _check_cache(
    residual: torch.Tensor,
    scale: torch.Tensor | None,
    like: torch.Tensor,
    size: tuple[int, ...],
    *,
    of: str = "x",
    dtypes: Sequence[torch.dtype] = (),
) -> None:
    _check_tensor("residual", residual)
    if tuple(residual.shape) != size:
        raise ValueError(f"residual: expected [B, N, C] = {list(size)} as {of}, got {list(residual.shape)}")
    _check_device("residual", residual, like, of=of)
    accepted = (*(dtypes or (like.dtype,)), FLOAT8)
    if residual.dtype not in accepted:
        raise ValueError(f"residual: expected dtype {' or '.join(map(str, accepted))}, got {residual.dtype}")
    _check_channels("residual", residual)
    if scale is None:
        if residual.dtype == FLOAT8:
            raise ValueError(f"residual_scale: expected a tensor with a residual of {FLOAT8}, got None")
        return
    _check_tensor("residual_scale", scale)
    if residual.dtype != FLOAT8:
        raise ValueError(
            f"residual_scale: expected None with a residual of {residual.dtype}, got a tensor; only {FLOAT8} "
            "has scales"
        )
    if tuple(scale.shape) != size[:2]:
        raise ValueError(f"residual_scale: expected [B, N] = {list(size[:2])}, got {list(scale.shape)}")
    _check_device("residual_scale", scale, like, of=of)
    if scale.dtype != torch.float32:
        raise ValueError(f"residual_scale: expected dtype torch.float32, got {scale.dtype}")


def _check_rows(name: str, rows: torch.Tensor | None, of: torch.Tensor, *, written: bool = False) -> None:
    """Check int32 [B] that picks rows of `of`; each row at most once where it is written."""
    if rows is None:
        return
    _check_tensor(name, rows)
    if rows.dim() != 1:
        raise ValueError(f"{name}: expected [B], got {list(rows.shape)}")
    if rows.dtype != torch.int32:
        raise ValueError(f"{name}: expected dtype torch.int32, got {rows.dtype}")
    _check_device(name, rows, of)
    _check_contiguous(name, rows)
    if _can_look_at(rows):
        _check_range(name, rows, of.shape[0])
        values = rows.tolist() if written else []
        if len(set(values)) < len(values):
            again = next(value for value in values if values.count(value) > 1)
            raise ValueError(f"{name}: expected each row once, since it is written, got {again} twice")


def _check_batch_rows(
    name: str, rows: torch.Tensor | None, of: torch.Tensor, batch: int, *, written: bool = False
) -> None:
    if isinstance(rows, torch.Tensor) and rows.dim() == 1 and rows.shape[0] != batch:
        raise ValueError(f"{name}: expected [B] = [{batch}], got {list(rows.shape)}")
    _check_rows(name, rows, of, written=written)


def _can_look_at(rows: torch.Tensor) -> bool:
    """Elsewhere looking at the values would stop the device, or the tracing; there an id out of range makes
    NaN."""
    return rows.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_range(name: str, ids: torch.Tensor, end: int) -> None:
    outside = (ids < 0) | (ids >= end)
    if outside.any():
        raise ValueError(f"{name}: expected values in 0..{end - 1}, got {ids[outside][0].item()}")


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


def _check_videos(video_of_row: torch.Tensor | None, num_videos: int, rows: int, x: torch.Tensor) -> None:
    if num_videos < 1:
        raise ValueError(f"num_videos: expected at least 1, got {num_videos}")
    if video_of_row is None:
        if num_videos != 1:
            raise ValueError(f"video_of_row: expected [B] = [{rows}] for num_videos = {num_videos}, got None")
        return
    _check_tensor("video_of_row", video_of_row)
    if tuple(video_of_row.shape) != (rows,):
        raise ValueError(f"video_of_row: expected [B] = [{rows}], got {list(video_of_row.shape)}")
    if video_of_row.dtype != torch.int32:
        raise ValueError(f"video_of_row: expected dtype torch.int32, got {video_of_row.dtype}")
    _check_device("video_of_row", video_of_row, x)
    _check_contiguous("video_of_row", video_of_row)
    if _can_look_at(video_of_row):
        _check_range("video_of_row", video_of_row, num_videos)


def _check_kept(
    residual: torch.Tensor, scale: torch.Tensor | None, read: dict[str, torch.Tensor | None]
) -> None:
    """Check the memory of a cache that is written over."""
    _check_written("residual", residual, read)
    if scale is not None:
        _check_written("residual_scale", scale, {**read, "residual": residual})


def _check_outputs(
    outputs: dict[str, torch.Tensor | None],
    x: torch.Tensor,
    size: tuple[int, ...],
    read: dict[str, torch.Tensor | None],
    x_rows: torch.Tensor | None,
) -> None:
    """Check what a caller gives to be written: like x, in memory of its own; the first may be x itself."""
    before: dict[str, torch.Tensor | None] = read | {"x_rows": x_rows}
    for index, (name, output) in enumerate(outputs.items()):
        if output is None:
            continue
        _check_like(name, output, x, size)
        if index == 0 and x_rows is None:
            _check_written(name, output, before)
            _check_in_place(output, "x", x)
        else:
            _check_written(name, output, {"x": x, **before})
        before[name] = output


def _check_written(name: str, tensor: torch.Tensor, read: dict[str, torch.Tensor | None]) -> None:
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


def _check_in_place(out: torch.Tensor, name: str, x: torch.Tensor) -> None:
    if _overlap(out, x) and not (out.data_ptr() == x.data_ptr() and out.stride() == x.stride()):
        raise ValueError(
            f"out: expected {name} itself or memory of its own, got memory that overlaps {name} in part"
        )


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0:
        return False
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
