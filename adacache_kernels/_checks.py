# SPDX-License-Identifier: Apache-2.0
"""Argument checks of all ops by role, with all error messages. The reference and Triton backends run them on
every call; compiled backends run them after their C++ checks raised, for the error message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from ._choices import NORMS, ROUNDINGS
from ._fakes import ARGUMENTS, FLOAT8, NAMES, dtype_of_output
from ._memory import overlap, overlaps_itself
from .columns import state_columns, sum_columns

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BASE_COLUMNS = len(state_columns(1)) - 1
MAX_STRIDES = 8
MAX_FACTORS = 4
MAX_FRAMES = 64  # of temporal attention
MAX_HEAD_DIM = 256
MAX_VIDEOS = 65536
#: Arguments that autocast may produce in another dtype than that of the stream: sub-layer outputs and
#: modulators. The latter may stay in float32.
CAST = frozenset(("y", "gate", "shift", "scale", "weight", "bias", "q_weight", "k_weight"))
MAY_BE_FLOAT32 = frozenset(("gate", "shift", "scale", "weight", "bias"))


def check(op: str, arguments: Sequence[Any], outputs: Sequence[torch.Tensor] = ()) -> None:
    """Raise TypeError or ValueError for the first invalid argument of `op`. The message names the
    argument."""
    call = Call(op, arguments, outputs)
    for name, kind, _ in ARGUMENTS[call.schema]:
        _check_type(name, kind, call.given[name])
    for name, role in _PLANS[call.schema]:
        value = call.given[name]
        if value is not None:
            role(call, name, value)
    _check_memory(call)


def require_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        raise refusal(name, "a dense tensor", "a nested one" if value.is_nested else value.layout)


def require_bool(name: str, value: object) -> None:
    """Called by the ops, because torch accepts any number as a bool."""
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def refusal(name: str, expected: str, got: object) -> ValueError:
    """Return the error of an argument. `got` may be a shape."""
    return ValueError(f"{name}: expected {expected}, got {list(got) if isinstance(got, torch.Size) else got}")


def refuse_grad(names: Sequence[str], arguments: Sequence[Any]) -> None:
    """Raise for an input that requires grad or has a tangent."""
    for name, argument in zip(names, arguments, strict=False):
        for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{name}: requires grad, but the ops have no backward; expected a tensor without grad, "
                    "or a call under torch.no_grad() or torch.inference_mode()"
                )
            if forward_ad_is_on() and forward_ad.unpack_dual(tensor).tangent is not None:
                raise ValueError(
                    f"{name}: has a tangent, but the ops have no forward-mode derivative; expected a tensor "
                    "without one"
                )


def forward_ad_is_on() -> bool:
    """Whether tensors may have tangents: in `forward_ad.dual_level()` or `torch.func.jvp`."""
    return forward_ad._current_level >= 0


def cast_under_autocast(
    dtype: torch.dtype, names: Sequence[str], arguments: Sequence[Any]
) -> tuple[Any, ...]:
    """Cast the arguments in CAST to the dtype of the stream, unless they may stay in float32."""
    return tuple(
        argument.to(dtype)
        if name in CAST
        and isinstance(argument, torch.Tensor)
        and argument.is_floating_point()
        and not (name in MAY_BE_FLOAT32 and argument.dtype == torch.float32)
        else argument
        for name, argument in zip(names, arguments, strict=True)
    )


class Call:
    """The arguments of a call by name, and the values that checks compare with."""

    def __init__(self, op: str, arguments: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
        self.op = op
        self.schema = f"{op}_out" if outputs else op
        self.given: dict[str, Any] = dict(zip(NAMES[self.schema], (*arguments, *outputs), strict=True))
        self.lead, self.x = NAMES[op][0], arguments[0]  # sets shape, dtype and device
        self.groups: int | None = self.given.get("frames")
        self.groups_of = ""  # the modulator that set `groups`, in ops without `frames`

    @property
    def rows(self) -> int:
        """B: the length of x_rows if given, otherwise the rows of x."""
        x_rows = self.given.get("x_rows")
        picked: torch.Tensor = x_rows if x_rows is not None and x_rows.dim() == 1 else self.x
        return picked.shape[0]

    def kept_rows(self, tensor: torch.Tensor) -> int:
        """The expected rows of a kept residual; with an index, any number."""
        if self.op == "stack_residual_meter":
            index, tensor = self.given["rows"], self.given["x_in"]
        else:
            index = self.given.get("residual_rows")
        return self.rows if index is None else tensor.shape[0] if tensor.dim() else 0


#: The checks by argument name, in the order in which they run.
ROLES: dict[str, Callable[[Call, str, Any], None]] = {}


def role_of(*names: str) -> Callable[[Callable[[Call, str, Any], None]], Callable[[Call, str, Any], None]]:
    """Register a check for the arguments with these names."""

    def register(function: Callable[[Call, str, Any], None]) -> Callable[[Call, str, Any], None]:
        ROLES.update(dict.fromkeys(names, function))
        return function

    return register


@role_of("x", "x_out")
def _lead_tokens(call: Call, name: str, x: torch.Tensor) -> None:
    if x.dim() != 3:
        raise refusal(name, "[B, N, C]", x.shape)
    _check_floating(name, x)
    _check_channels(name, x)


@role_of("qkv")
def _qkv(call: Call, name: str, qkv: torch.Tensor) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise refusal(name, "[B, N, 3, heads, dim]", qkv.shape)
    _check_floating(name, qkv)
    heads, dim = qkv.shape[3:]
    if dim > MAX_HEAD_DIM:
        raise refusal(name, f"dim of at most {MAX_HEAD_DIM}", dim)
    wanted = (heads * dim, dim, 1)
    sizes_and_strides = zip(qkv.shape[2:], qkv.stride()[2:], wanted, strict=True)
    if qkv.numel() and any(size > 1 and stride != want for size, stride, want in sizes_and_strides):
        expected = f"the last three dimensions contiguous (strides {list(wanted)})"
        raise refusal(name, expected, f"strides {list(qkv.stride())}")
    for one, other in (("q_weight", "k_weight"), ("cos", "sin")):
        for absent, present in ((one, other), (other, one)):
            if call.given[absent] is None and call.given[present] is not None:
                raise refusal(absent, f"a tensor with {present}", "None")


@role_of("sums")
def _float64(call: Call, name: str, tensor: torch.Tensor) -> None:
    _check_packed(call, name, tensor, torch.float64)


@role_of("x_rows")
def _x_rows(call: Call, name: str, rows: torch.Tensor) -> None:
    if rows.dim() != 1:
        raise refusal(name, "[B]", rows.shape)
    _index(call, name, rows)


@role_of("frames")
def _frames(call: Call, name: str, frames: int) -> None:
    if call.op == "decide":
        return
    tokens = call.x.shape[1]
    if call.op == "temporal_attention" and not 1 <= frames <= MAX_FRAMES:
        raise refusal(name, f"1 to {MAX_FRAMES}", frames)
    if frames < 1:
        raise refusal(name, "at least 1", frames)
    if tokens % frames:
        raise refusal(name, f"a divisor of N = {tokens}", frames)


@role_of("strides")
def _strides(call: Call, name: str, strides: Sequence[int]) -> None:
    if len(strides) > MAX_STRIDES:
        raise refusal(name, f"at most {MAX_STRIDES}", len(strides))
    frames = call.given["frames"]
    for stride in strides:
        if not 1 <= stride < frames:
            raise refusal(name, f"1 <= stride < frames = {frames}", stride)


@role_of("y", "old", "computed")
def _tokens(call: Call, name: str, tensor: torch.Tensor) -> None:
    _check_tokens(call, name, tensor, call.rows)


@role_of("x_in")
def _kept_tokens(call: Call, name: str, tensor: torch.Tensor) -> None:
    _check_tokens(call, name, tensor, call.kept_rows(tensor))


@role_of("residual")
def _cache(call: Call, name: str, residual: torch.Tensor) -> None:
    if call.lead == name:
        return _lead_tokens(call, name, residual)
    size = (call.kept_rows(residual), *call.x.shape[1:])
    _check_shape(name, residual, "[B, N, C]", size, call.lead)
    read_only = call.op == "reuse_residual"
    accepted = (*(DTYPES if read_only else (call.x.dtype,)), FLOAT8)
    _check_device(call, name, residual)
    if residual.dtype not in accepted:
        raise refusal(name, f"dtype {' or '.join(map(str, accepted))}", residual.dtype)
    _check_channels(name, residual)
    scale = call.given["residual_scale"]
    if scale is None:
        if residual.dtype == FLOAT8:
            raise refusal("residual_scale", f"a tensor with a residual of {FLOAT8}", "None")
        return
    if residual.dtype != FLOAT8:
        raise refusal(
            "residual_scale",
            f"None with a residual of {residual.dtype}",
            f"a tensor; only {FLOAT8} has scales",
        )
    _check_shape("residual_scale", scale, "[B, N]", size[:2])
    _check_like(call, "residual_scale", scale, torch.float32)


@role_of("factors")
def _factors(call: Call, name: str, factors: Sequence[torch.Tensor]) -> None:
    if not 1 <= len(factors) <= MAX_FACTORS:
        raise refusal(name, f"1 to {MAX_FACTORS} tensors", len(factors))
    for factor in factors:
        if factor.dtype != factors[0].dtype:
            raise refusal(name, "one dtype", f"{factors[0].dtype} and {factor.dtype}")
        _check_tokens(call, name, factor, call.kept_rows(factors[0]), factor.dtype)


@role_of("rows", "residual_rows")
def _index(call: Call, name: str, rows: torch.Tensor) -> None:
    """int32 [B] row indices into another tensor; distinct if the rows are written."""
    if rows.dim() != 1 or rows.shape[0] != call.rows:
        raise refusal(name, f"[B] = [{call.rows}]", rows.shape)
    _check_packed(call, name, rows, torch.int32)
    if not _values_are_readable(rows):
        return
    written = name == "rows" or (name == "residual_rows" and "meter" in call.op and "residual" in call.given)
    of = call.given["x_in"] if name == "rows" else call.x
    if name == "residual_rows":
        of = call.given["residual"] if "residual" in call.given else call.given["factors"][0]
    _check_range(name, rows, of.shape[0])
    values = rows.tolist() if written else []
    if len(set(values)) < len(values):
        again = next(value for value in values if values.count(value) > 1)
        raise refusal(name, "each row once, since it is written", f"{again} twice")


@role_of("coefficients", "other_coefficients", "reuse")
def _by_video(call: Call, name: str, tensor: torch.Tensor) -> None:
    """`reuse` [num_videos] and `coefficients` [num_videos, factors]. Without video_of_row the first dimension
    is 1 or B; in meters it is num_videos."""
    factors = (len(call.given["factors"]),) if name != "reuse" else ()
    if "num_videos" in call.given:
        _check_compared(call)
        num_videos = call.given["num_videos"]
        _num_videos(call, "num_videos", num_videos)
        _check_shape(name, tensor, "[num_videos, factors]", (num_videos, *factors))
        _check_packed(call, name, tensor, torch.float32)
        return
    by_row = call.given["video_of_row"] is None
    fits = tensor.dim() == 1 + len(factors) and tuple(tensor.shape[1:]) == factors
    if not fits or (by_row and tensor.shape[0] not in (1, call.rows)):
        videos = f"1|B = 1|{call.rows} without video_of_row" if by_row else "num_videos"
        expected = ", ".join([videos, *(f"factors = {count}" for count in factors)])
        raise refusal(name, f"[{expected}]", tensor.shape)
    _check_packed(call, name, tensor, torch.float32 if factors else torch.bool)


def _check_compared(call: Call) -> None:
    """What the forecast is measured against is given once."""
    other, computed = call.given["other_coefficients"], call.given["computed"]
    if other is None and computed is None:
        raise refusal("computed", "a tensor without other_coefficients", "None")
    if other is not None and computed is not None:
        raise refusal("other_coefficients", "None with computed", "a tensor")


@role_of("gate", "shift", "scale")
def _modulator(call: Call, name: str, modulator: torch.Tensor | float) -> None:
    """In ops without `frames`, the first modulator that is neither per row nor per token sets the number of
    groups."""
    if not isinstance(modulator, torch.Tensor):  # the `scale` of attention
        return
    _, tokens, channels = call.x.shape
    groups = modulator.shape[1] if modulator.dim() == 3 else 0
    if groups in (1, tokens):
        fits = True
    elif call.groups is not None:
        fits = groups == call.groups
    else:
        fits = groups > 0 and tokens % groups == 0
    if modulator.dim() != 3 or modulator.shape[0] != call.rows or modulator.shape[2] != channels or not fits:
        number = call.groups if call.groups is not None else f"divisor of {tokens}"
        as_other = f" as {call.groups_of}" if call.groups_of else ""
        middle = "T" if "frames" in call.given else "groups"
        size = f"[{call.rows}, 1|{number}{as_other}|{tokens}, {channels}]"
        raise refusal(name, f"[B, 1|{middle}|N, C] = {size}", modulator.shape)
    if call.groups is None and groups not in (1, tokens):
        call.groups, call.groups_of = groups, name
    _check_like_or_float32(call, name, modulator)
    _check_channels(name, modulator)


@role_of("gate_table", "shift_table", "scale_table")
def _table(call: Call, name: str, table: torch.Tensor) -> None:
    modulator = name.removesuffix("_table")
    if call.given[modulator] is None:
        raise refusal(name, f"None without {modulator}", "a tensor")
    _check_shape(name, table, "[1, 1, C]", (1, 1, call.x.shape[2]))
    _check_like(call, name, table, torch.float32)
    _check_channels(name, table)


@role_of("weight", "bias")
def _per_channel(call: Call, name: str, vector: torch.Tensor) -> None:
    _check_shape(name, vector, "[C]", (call.x.shape[-1],))
    _check_like_or_float32(call, name, vector)
    _check_channels(name, vector)


@role_of("q_weight", "k_weight")
def _per_dim(call: Call, name: str, vector: torch.Tensor) -> None:
    _check_shape(name, vector, "[dim]", (call.x.shape[-1],))
    _check_like(call, name, vector)
    _check_channels(name, vector)


@role_of("cos", "sin")
def _angles(call: Call, name: str, angles: torch.Tensor) -> None:
    tokens, dim = call.x.shape[1], call.x.shape[4]
    if dim % 2:
        raise refusal("qkv", f"an even dim with {name}", dim)
    frames = call.groups
    length = angles.shape[0] if angles.dim() == 2 else 0
    groups: int | str = frames if frames is not None else f"divisor of {tokens}"
    fits = length == frames if frames is not None else length > 0 and tokens % length == 0
    if angles.dim() != 2 or angles.shape[1] != dim // 2 or not (fits or length == tokens):
        raise refusal(name, f"[T|N, dim / 2] = [{groups}|{tokens}, {dim // 2}]", angles.shape)
    cos = call.given["cos"]
    if length != cos.shape[0]:
        raise refusal(name, f"{list(cos.shape)} as cos", angles.shape)
    _check_packed(call, name, angles, torch.float32)


@role_of("eps")
def _eps(call: Call, name: str, eps: float) -> None:
    if not eps >= 0:
        raise refusal(name, "at least 0", eps)


@role_of("rounding", "norm")
def _choice(call: Call, name: str, number: int) -> None:
    numbers = {"rounding": ROUNDINGS, "norm": NORMS}[name].values()
    if number not in numbers:
        raise refusal(name, f"one of {', '.join(map(str, numbers))}", number)


@role_of("num_videos")
def _num_videos(call: Call, name: str, num_videos: int) -> None:
    if not 1 <= num_videos <= MAX_VIDEOS:
        raise refusal(name, f"1 to {MAX_VIDEOS}", num_videos)
    if call.given["video_of_row"] is None and num_videos != 1:
        raise refusal("video_of_row", f"[B] = [{call.rows}] for num_videos = {num_videos}", "None")


@role_of("video_of_row")
def _video_of_row(call: Call, name: str, videos: torch.Tensor) -> None:
    by_video = call.given.get("reuse", call.given.get("coefficients"))
    if "num_videos" not in call.given and by_video is None:  # nothing is per video
        return
    _check_shape(name, videos, "[B]", (call.rows,))
    _check_packed(call, name, videos, torch.int32)
    if _values_are_readable(videos):
        _check_range(name, videos, call.given["num_videos"] if by_video is None else int(by_video.shape[0]))


@role_of("state")
def _state(call: Call, name: str, state: torch.Tensor) -> None:
    _float64(call, name, state)
    if state.dim() != 2 or state.shape[1] <= BASE_COLUMNS:
        raise refusal(name, f"[num_videos, {BASE_COLUMNS} + sites]", state.shape)
    size = (state.shape[0], len(sum_columns(call.given["strides"])))
    _check_shape("sums", call.x, "[num_videos, columns]", size)


@role_of("thresholds")
def _thresholds(call: Call, name: str, thresholds: torch.Tensor) -> None:
    _float64(call, name, thresholds)
    videos = call.x.shape[0]
    by_video = thresholds.dim() == 2 and thresholds.shape[0] == videos
    if not (thresholds.dim() == 1 or by_video) or thresholds.shape[-1] == 0:
        expected = f"[entries] or [num_videos, entries] = [{videos}, entries] with at least one entry"
        raise refusal(name, expected, thresholds.shape)


@role_of("rates")
def _rates(call: Call, name: str, rates: torch.Tensor) -> None:
    _float64(call, name, rates)
    thresholds = call.given["thresholds"]
    if rates.shape != thresholds.shape:
        raise refusal(name, f"{list(thresholds.shape)} as thresholds", rates.shape)


@role_of("num_steps_of_video", "step_of_video", "window_of_video")
def _of_video(call: Call, name: str, values: torch.Tensor) -> None:
    name, videos = name.removesuffix("_of_video"), call.x.shape[0]
    edges = (2,) if name == "window" else ()
    _check_shape(name, values, "[num_videos, 2]" if edges else "[num_videos]", (videos, *edges))
    _check_packed(call, name, values, torch.int32)


@role_of("num_steps")
def _num_steps(call: Call, name: str, num_steps: int) -> None:
    for value in _per_video(call, name, num_steps):
        if value < 1:
            raise refusal(name, "at least 1", value)


@role_of("step")
def _step(call: Call, name: str, step: int) -> None:
    steps, ends = _per_video(call, name, step), _per_video(call, "num_steps", call.given["num_steps"])
    for video in range(max(len(steps), len(ends)) if steps and ends else 0):
        value, end = steps[video % len(steps)], ends[video % len(ends)]
        if not 1 <= value <= end:
            raise refusal(name, f"1..num_steps = 1..{end}", value)
    if step < 1:
        raise refusal(name, "at least 1", step)


def _per_video(call: Call, name: str, value: int) -> list[Any]:
    """The values of a tensor over videos if they can be read, none if they cannot, or the common value."""
    of_video = call.given[f"{name}_of_video"]
    if of_video is None:
        return [value]
    return of_video.tolist() if _values_are_readable(of_video) else []


@role_of("site")
def _site(call: Call, name: str, site: int) -> None:
    sites = call.given["state"].shape[1] - BASE_COLUMNS
    if not 0 <= site < sites:
        raise refusal(name, f"0..{sites - 1}, since state has {sites} previous factors", site)


@role_of("out", "norm_out")
def _output(call: Call, name: str, tensor: torch.Tensor) -> None:
    if call.lead != "qkv":
        rows = call.kept_rows(tensor) if call.lead == "x_out" else call.rows
        _check_tokens(call, name, tensor, rows, dtype_of_output(call.op, name, call.x))
        return
    rows, tokens, _, heads, dim = call.x.shape
    _check_shape(name, tensor, "[B, N, heads * dim]", (rows, tokens, heads * dim))
    _check_like(call, name, tensor)
    _check_channels(name, tensor)


@role_of("norm_scale")
def _scale_of_output(call: Call, name: str, scale: torch.Tensor) -> None:
    _check_shape(name, scale, "[B, N, 1]", (call.rows, call.x.shape[1], 1))
    _check_like(call, name, scale, torch.float32)


#: The checks of each schema in order, starting with the first argument.
_PLANS = {
    schema: [(name, ROLES[name]) for name in (names[0], *ROLES) if name in names and name in ROLES]
    for schema, names in NAMES.items()
}


def _check_type(name: str, kind: str, value: Any) -> None:
    """Check one argument against its type in the schema."""
    if kind == "Tensor" or (kind == "Optional[Tensor]" and value is not None):
        require_tensor(name, value)
    elif kind in ("List[Tensor]", "List[int]"):
        of = kind[5:-1]
        if not isinstance(value, (list, tuple)):
            listed = "tensors" if of == "Tensor" else "integers"
            raise TypeError(f"{name}: expected a list of {listed}, got {type(value).__name__}")
        for item in value:
            _check_type(name, of, item)
    elif kind == "int" and not isinstance(value, torch.SymInt):
        # Dynamo of torch 2.11 shows a dynamic number as an int, and traces no hasattr of it.
        if not isinstance(value, int) and not hasattr(value, "__index__"):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        if not -(2**63) <= value < 2**63:
            raise refusal(name, "a 64-bit integer", value)
    elif kind == "float" and not isinstance(value, int | float) and not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    elif kind == "bool":
        require_bool(name, value)


def _check_shape(name: str, tensor: torch.Tensor, what: str, size: tuple[int, ...], of: str = "") -> None:
    if tuple(tensor.shape) != size:
        as_other = f" as {of}" if of else ""
        raise refusal(name, f"{what} = {list(size)}{as_other}", tensor.shape)


def _check_device(call: Call, name: str, tensor: torch.Tensor) -> None:
    if tensor.device != call.x.device:
        raise refusal(name, f"device {call.x.device} as {call.lead}", tensor.device)


def _check_like(call: Call, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Check the device, and the dtype against `dtype` or that of the stream."""
    _check_device(call, name, tensor)
    if tensor.dtype != (dtype or call.x.dtype):
        wanted = f"{dtype}" if dtype else f"{call.x.dtype} as {call.lead}"
        raise refusal(name, f"dtype {wanted}", tensor.dtype)


def _check_like_or_float32(call: Call, name: str, tensor: torch.Tensor) -> None:
    _check_device(call, name, tensor)
    if tensor.dtype not in (call.x.dtype, torch.float32):
        or_float32 = "" if call.x.dtype == torch.float32 else f" or {torch.float32}"
        raise refusal(name, f"dtype {call.x.dtype} as {call.lead}{or_float32}", tensor.dtype)


def _check_tokens(
    call: Call, name: str, tensor: torch.Tensor, rows: int, dtype: torch.dtype | None = None
) -> None:
    _check_shape(name, tensor, "[B, N, C]", (rows, *call.x.shape[1:]), call.lead)
    _check_like(call, name, tensor, dtype)
    if dtype != FLOAT8:
        _check_floating(name, tensor)
    _check_channels(name, tensor)


def _check_floating(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise refusal(name, f"dtype {', '.join(map(str, DTYPES))}", tensor.dtype)


def _check_channels(name: str, tensor: torch.Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise refusal(name, "contiguous channels (stride 1)", f"strides {list(tensor.stride())}")


def _check_packed(call: Call, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    _check_like(call, name, tensor, dtype)
    if not tensor.is_contiguous():
        raise refusal(name, "a contiguous tensor", f"strides {list(tensor.stride())}")


def _check_range(name: str, ids: torch.Tensor, end: int) -> None:
    outside = (ids < 0) | (ids >= end)
    if outside.any():
        raise refusal(name, f"values in 0..{end - 1}", ids[outside][0].item())


def _values_are_readable(tensor: torch.Tensor) -> bool:
    """Reading values on CUDA would synchronize, and it breaks tracing. Out-of-range values then give NaN."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_memory(call: Call) -> None:
    """Check that written tensors overlap neither themselves nor other arguments. `out` may be the same view
    as the input that it replaces."""
    replaced = "x_in" if call.lead == "x_out" else "x" if call.given.get("x_rows") is None else None
    writes = [name for name, _, written in ARGUMENTS[call.schema] if written]
    others = {name: tensor for name, tensor in _tensors(call) if name not in writes}
    for name in writes:
        tensor = call.given[name]
        if tensor is None:
            continue
        if overlaps_itself(tensor):
            got = f"strides {list(tensor.stride())} for {list(tensor.shape)}"
            raise refusal(name, "non-overlapping elements, since it is written", got)
        for other_name, other in others.items():
            may_be = f"{other_name} itself or " if name == "out" and other_name == replaced else ""
            if not overlap(tensor, other):
                continue
            same_view = tensor.data_ptr() == other.data_ptr() and tensor.stride() == other.stride()
            if not (may_be and same_view):
                got = f"memory that overlaps {other_name}"
                raise refusal(name, f"{may_be}separate memory, since it is written", got)
        others[name] = tensor


def _tensors(call: Call) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in call.given.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif name == "factors":
            yield from ((f"factors[{index}]", factor) for index, factor in enumerate(value))
