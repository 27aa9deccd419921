# SPDX-License-Identifier: Apache-2.0
"""The benchmark cases: inputs, the plain PyTorch chain that the op replaces, its call, its minimum bytes, the
checks of its results, and its speed goals. kernels.py, prediction.py and check.py use them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

Values = Any  # a namespace: the tensors of one case, and `frames`
Tensors = tuple[torch.Tensor, ...]
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """[rows, frames * places, channels]."""

    rows: int
    frames: int
    places: int
    channels: int

    @property
    def tokens(self) -> int:
        return self.frames * self.places

    @property
    def size(self) -> tuple[int, int, int]:
        return self.rows, self.tokens, self.channels

    @property
    def head_dim(self) -> int:
        return 72 if self.channels % 72 == 0 else self.channels // 4

    @property
    def heads(self) -> int:
        return self.channels // self.head_dim

    def __str__(self) -> str:
        return f"[{self.rows}, {self.frames}*{self.places}, {self.channels}]"


#: Two seconds of Open-Sora with guidance, and a shape for two CPU cores.
SHAPES = {
    "480p-2s": Shape(2, 15, 1590, 1152),
    "720p-2s": Shape(2, 15, 3600, 1152),
    "cpu": Shape(2, 15, 400, 1152),
}


@dataclass(frozen=True)
class Peer:
    """Another implementation, timed in the same rounds. The case is skipped if its package is not
    installed."""

    package: str
    call: Callable[[Values], Tensors]


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    `checks` has one entry per tensor that `call` returns: "bits" (bit-identical to `chain`), "close" (the
    error against `chain` in float64 is at most twice that of `chain`; a float8 tensor is multiplied by its
    scales, the next tensor), "sums" (close to the reference backend).
    """

    name: str
    op: str
    inputs: Mapping[str, str]  # name to kind, see MAKERS
    chain: Callable[[Values], Tensors]
    call: Callable[[Any, Values, dict[str, torch.Tensor]], Tensors]
    passes: float  # minimum number over [B, N, C] in the dtype of x
    checks: tuple[str, ...]
    float8_passes: float = 0  # over [B, N, C] in float8 and over the scales [B, N]
    outs: tuple[str, ...] = ("out",)  # keyword arguments of the outputs
    gpu_goals: Mapping[str, float] = field(default_factory=dict)  # lower limits
    channels: int | None = None  # replaces the channels of the shape
    peer: Peer | None = None
    kernel: str = ""  # the name in tools/kernel_report.py, in bfloat16 at a common width; "": no CUDA kernel

    def bytes(self, shape: Shape, element_size: int) -> int:
        """The minimum bytes: each element is read or written once."""
        rows, tokens, channels = shape.size
        total = self.passes * rows * tokens * channels * element_size
        total += self.float8_passes * rows * tokens * (channels + 4)
        for kind in self.inputs.values():
            if kind in SMALL:
                total += math.prod(SMALL[kind](shape)) * (4 if kind in FLOAT32 else element_size)
        return int(total)

    def at(self, shape: Shape) -> Shape:
        """The shape of this case, with the same number of elements as `shape`."""
        if self.channels is None:
            return shape
        places = max(1, shape.places * shape.channels // self.channels)
        return Shape(shape.rows, shape.frames, places, self.channels)


#: Inputs that `passes` does not count; each is read once.
SMALL: dict[str, Callable[[Shape], tuple[int, ...]]] = {
    "row": lambda s: (s.rows, 1, s.channels),
    "frame": lambda s: (s.rows, s.frames, s.channels),
    "table": lambda s: (1, 1, s.channels),
    "shift_chunk": lambda s: s.size,
    "scale_chunk": lambda s: s.size,
    "gate_chunk": lambda s: s.size,
    "head": lambda s: (s.head_dim,),
    "cosine": lambda s: (s.frames, s.head_dim // 2),
    "sine": lambda s: (s.frames, s.head_dim // 2),
}
FLOAT32 = ("cosine", "sine", "table")
#: Chunks of a per-token projection of the timestep embedding.
CHUNKS = ("shift_chunk", "scale_chunk", "gate_chunk")


def make_inputs(case: Case, shape: Shape, dtype: torch.dtype, device: torch.device) -> Values:
    """Random inputs for one case."""
    values = SimpleNamespace(frames=shape.frames)
    for name, kind in case.inputs.items():
        setattr(values, name, _make(kind, shape, dtype, device, values))
    vars(values).pop("modulation", None)
    return values


def copy_inputs(
    values: Values, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Values:
    """A copy, for ops that write in place; converted to `dtype` if given, except float8 tensors."""
    copied = SimpleNamespace()
    for name, value in vars(values).items():
        if isinstance(value, torch.Tensor):
            kept = value.dtype if dtype is None or value.dtype == torch.float8_e4m3fn else dtype
            value = value.to(device or value.device, kept, copy=True)
        setattr(copied, name, value)
    return copied


def _make(kind: str, shape: Shape, dtype: torch.dtype, device: torch.device, made: Values) -> torch.Tensor:
    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    if kind in ("tokens", "residual"):
        return normal(*shape.size)
    if kind == "float8":
        return normal(*shape.size).mul_(50).to(torch.float8_e4m3fn)
    if kind == "float8_scale":
        return torch.rand(shape.rows, shape.tokens, device=device) / 100
    if kind == "coefficients":
        factors = sum(name.startswith("factor") for name in vars(made))
        return torch.tensor([[1.0, -0.5, 0.25, -0.125][:factors]], device=device)
    if kind == "other_coefficients":
        return made.coefficients * 0.75
    if kind == "qkv":
        return normal(shape.rows, shape.tokens, 3, shape.heads, shape.head_dim)
    if kind == "qkv_by_place":  # the layout of models that rearrange their tokens before the attention
        return made.qkv.unflatten(1, (shape.frames, -1)).transpose(1, 2).contiguous().flatten(0, 1)
    if kind in CHUNKS:
        if not hasattr(made, "modulation"):
            made.modulation = normal(shape.rows, shape.tokens, 6 * shape.channels)
        return made.modulation.chunk(6, 2)[CHUNKS.index(kind)]
    if kind in ("cosine", "sine"):
        positions = torch.arange(shape.frames, device=device, dtype=torch.float32)
        frequency = 10000.0 ** (-torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim)
        angle = torch.outer(positions, frequency)
        return angle.cos() if kind == "cosine" else angle.sin()
    made_of = normal(*SMALL[kind](shape))
    return made_of.float() if kind in FLOAT32 else made_of


# The chains: the operations of the models and the published code in plain PyTorch.


def gated(y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    if gate.shape[1] in (1, y.shape[1]):
        return gate * y
    return (gate[:, :, None] * y.unflatten(1, (gate.shape[1], -1))).flatten(1, 2)


def measured(new: torch.Tensor, old: torch.Tensor, frames: int, metric: str = "l1") -> Tensors:
    """The published measurement (`compute_next_step` with motion regularization, stride 1), without host
    synchronization."""
    by_frame = new.unflatten(1, (frames, -1))
    later, earlier = by_frame[:, 1:], by_frame[:, :-1]
    motion = ((later - earlier).norm(p=1), later.norm(p=1), earlier.norm(p=1))
    if metric == "cosine":
        return (F.cosine_similarity(new.flatten(), old.flatten(), 0), *motion)
    return ((new - old).norm(p=1), old.norm(p=1), *motion)


def gated_residual_chain(v: Values) -> Tensors:
    return (v.x + gated(v.y, v.gate),)


def gated_residual_meter_chain(v: Values, metric: str = "l1") -> Tensors:
    new = gated(v.y, v.gate)
    return v.x + new, new, *measured(new, v.residual, v.frames, metric)


def to_float8(values: torch.Tensor) -> Tensors:
    """Quantizes per token. Returns the float8 values and the scales. Values in float64 are not rounded."""
    wide = widened(values)
    largest = wide.abs().amax(-1)
    small = largest < 2.0**-100
    scale = torch.where(small, 1.0, largest * (1 / 448))
    inverse = torch.where(small, 1.0, largest.new_tensor(448.0) / largest)  # 448 / largest would be inexact
    scaled = wide * inverse[..., None]
    return scaled if values.dtype == torch.float64 else scaled.to(torch.float8_e4m3fn), scale


def from_float8(stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return stored.float() * scale[..., None]


def gated_residual_meter_float8_chain(v: Values) -> Tensors:
    new = gated(v.y, v.gate)
    old = from_float8(v.residual, v.residual_scale)
    return v.x + new, *to_float8(new), *measured(new, old, v.frames)


def stack_residual_meter_chain(v: Values) -> Tensors:
    new = v.x_out - v.x_in
    return new, *measured(new, v.residual, v.frames)


def reuse_residual_float8_chain(v: Values) -> Tensors:
    return ((v.x.float() + from_float8(v.residual, v.residual_scale)).to(v.x.dtype),)


def factors_of(v: Values) -> list[torch.Tensor]:
    return [value for name, value in sorted(vars(v).items()) if name.startswith("factor")]


def extrapolate_residual_chain(v: Values) -> Tensors:
    coefficients = v.coefficients[0].to(v.x.dtype)
    total = coefficients[0] * v.factor0
    for index, factor in enumerate(factors_of(v)[1:], 1):
        total = total + coefficients[index] * factor
    return (v.x + total,)


def extrapolate_residual_meter_chain(v: Values) -> Tensors:
    own, other = v.coefficients[0].to(v.x.dtype), v.other_coefficients[0].to(v.x.dtype)
    factors = factors_of(v)
    new, old = own[0] * factors[0], other[0] * factors[0]
    for index, factor in enumerate(factors[1:], 1):
        new, old = new + own[index] * factor, old + other[index] * factor
    return v.x + new, *measured(new, old, v.frames)


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
    if scale.shape[1] in (1, x.shape[1]):
        return normed * (1 + scale) + shift
    by_frame = normed.unflatten(1, (scale.shape[1], -1))
    return (by_frame * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def layer_norm_modulate_chain(v: Values) -> Tensors:
    return (modulated(v.x, v.shift, v.scale),)


def norm_modulate_float8_chain(v: Values) -> Tensors:
    stored, scale = to_float8(modulated(v.x, v.shift, v.scale))
    return stored, scale[..., None]


def gated_residual_norm_float8_chain(v: Values) -> Tensors:
    x_out, normed = gated_residual_norm_chain(v)
    stored, scale = to_float8(normed)
    return x_out, stored, scale[..., None]


def gated_residual_norm_chain(v: Values) -> Tensors:
    x_out = v.x + gated(v.y, v.gate)
    return x_out, modulated(x_out, v.shift, v.scale)


def wan_chain(v: Values) -> Tensors:
    """The modulation, residual and norm of a block of Wan."""
    gate, shift, scale = (
        table + widened(part)
        for table, part in (
            (v.gate_table, v.gate),
            (v.shift_table, v.shift),
            (v.scale_table, v.scale),
        )
    )
    x_out = (widened(v.x) + v.y * gate).type_as(v.x)
    normed = F.layer_norm(widened(x_out), x_out.shape[-1:], eps=EPS)
    return x_out, (normed * (1 + scale) + shift).type_as(v.x)


def widened(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_modulate_chain(v: Values) -> Tensors:
    normed = F.rms_norm(v.x, v.x.shape[-1:], eps=EPS)
    return (normed * (1 + v.scale) + v.shift,)


def gated_residual_norm_meter_chain(v: Values) -> Tensors:
    x_out, new, *rest = gated_residual_meter_chain(v)
    return x_out, modulated(x_out, v.shift, v.scale), new, *rest


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = widened(x)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates interleaved pairs of x [..., dim] by angles that broadcast to [..., dim / 2]."""
    cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


def fused_qk_norm_rope_chain(v: Values) -> Tensors:
    q, k, _ = v.qkv.unflatten(1, (v.frames, -1)).unbind(3)
    angles = [angle[:, None, None] for angle in (v.cos, v.sin)]
    return tuple(
        rotate(rms_norm(one, weight), *angles).flatten(1, 2)
        for one, weight in ((q, v.q_weight), (k, v.k_weight))
    )


def temporal_attention_chain(v: Values) -> Tensors:
    """As in STDiT3 and Latte: tokens are rearranged to one sequence per place before the projection (not
    included), and results are rearranged back after the attention."""
    rows, tokens, _ = v.x.shape
    v.x.unflatten(1, (v.frames, -1)).transpose(1, 2).contiguous()
    q, k, value = v.qkv_by_place.permute(2, 0, 3, 1, 4)
    q, k = (rotate(rms_norm(one, weight), v.cos, v.sin) for one, weight in ((q, v.q_weight), (k, v.k_weight)))
    attended = F.scaled_dot_product_attention(q, k, value).transpose(1, 2).flatten(2)
    return (attended.unflatten(0, (rows, -1)).transpose(1, 2).reshape(rows, tokens, -1),)


def _norm(v: Values) -> dict[str, torch.Tensor]:
    return {"shift": v.shift, "scale": v.scale}


def _call_meter(metric: str = "l1", **extra: str) -> Callable[..., Tensors]:
    def call(ak: Any, v: Values, out: dict[str, torch.Tensor]) -> Tensors:
        more = {keyword: getattr(v, name) for keyword, name in extra.items()}
        x_out, sums = ak.gated_residual_meter(
            v.x, v.y, v.gate, v.residual, frames=v.frames, metric=metric, **more, **out
        )
        return x_out, v.residual, *more.values(), sums

    return call


def _call_stack_meter(ak: Any, v: Values, out: dict[str, torch.Tensor]) -> Tensors:
    sums = ak.stack_residual_meter(v.x_out, v.x_in, v.residual, frames=v.frames)
    return v.residual, sums


def _call_norm_meter(ak: Any, v: Values, out: dict[str, torch.Tensor]) -> Tensors:
    x_out, normed, sums = ak.gated_residual_norm_meter(
        v.x, v.y, v.gate, v.residual, v.shift, v.scale, frames=v.frames, **out
    )
    return x_out, normed, v.residual, sums


def _call_qk_norm_rope(ak: Any, v: Values, out: dict[str, torch.Tensor]) -> Tensors:
    ak.fused_qk_norm_rope(v.qkv, v.q_weight, v.k_weight, v.cos, v.sin)
    return v.qkv[:, :, 0], v.qkv[:, :, 1]


def _flashinfer_norm(v: Values) -> Tensors:
    from flashinfer.norm import fused_dit_gate_residual_layernorm_scale_shift

    return fused_dit_gate_residual_layernorm_scale_shift(
        input=v.y, residual=v.x, gate=v.gate, scale=v.scale, shift=v.shift, epsilon=EPS
    )


STREAM = {"x": "tokens", "y": "tokens", "gate": "row"}
PER_FRAME = STREAM | {"gate": "frame"}
KEPT = {"residual": "residual"}
FLOAT8 = {"residual": "float8", "residual_scale": "float8_scale"}
MODULATION = {"shift": "row", "scale": "row"}
MODULATION_PER_FRAME = {"shift": "frame", "scale": "frame"}
HEADS = {"q_weight": "head", "k_weight": "head", "cos": "cosine", "sin": "sine"}


def _extrapolation(order: int) -> Case:
    return Case(
        f"extrapolate_residual order {order}",
        "extrapolate_residual",
        {"x": "tokens"}
        | {f"factor{i}": "tokens" for i in range(order + 1)}
        | {"coefficients": "coefficients"},
        extrapolate_residual_chain,
        lambda ak, v, out: (ak.extrapolate_residual(v.x, factors_of(v), v.coefficients, **out),),
        passes=3 + order,
        checks=("close",),
        kernel="extrapolate_residual<bf16, bf16, 8>",
    )


def _call_forecast_meter(ak: Any, v: Values, out: dict[str, torch.Tensor]) -> Tensors:
    given = (v.x, factors_of(v), v.coefficients)
    x_out, sums = ak.extrapolate_residual_meter(
        *given, other_coefficients=v.other_coefficients, frames=v.frames, **out
    )
    return x_out, sums


def _metered_extrapolation(order: int) -> Case:
    return Case(
        f"extrapolate_residual_meter order {order}",
        "extrapolate_residual_meter",
        {"x": "tokens"}
        | {f"factor{i}": "tokens" for i in range(order + 1)}
        | {"coefficients": "coefficients", "other_coefficients": "other_coefficients"},
        extrapolate_residual_meter_chain,
        _call_forecast_meter,
        passes=3 + order,
        checks=("close", "sums"),
        kernel="extrapolate_residual_meter<bf16, bf16, 8, false>",
    )


CASES = [
    Case(
        "gated_residual",
        "gated_residual",
        STREAM,
        gated_residual_chain,
        lambda ak, v, out: (ak.gated_residual(v.x, v.y, v.gate, **out),),
        passes=3,
        checks=("bits",),
        kernel="gated_residual<bf16, 8>",
    ),
    Case(
        "gated_residual per frame",
        "gated_residual",
        PER_FRAME,
        gated_residual_chain,
        lambda ak, v, out: (ak.gated_residual(v.x, v.y, v.gate, **out),),
        passes=3,
        checks=("bits",),
        kernel="gated_residual<bf16, 8>",
    ),
    Case(
        "gated_residual_meter",
        "gated_residual_meter",
        STREAM | KEPT,
        gated_residual_meter_chain,
        _call_meter(),
        passes=5,
        checks=("bits", "bits", "sums"),
        gpu_goals={"share_of_copy_rate": 0.90, "times_eager": 4, "times_compiled": 1.5},
        kernel="meter<GatedResidualMeter, bf16, 8, false>",
    ),
    Case(
        "gated_residual_meter per frame",
        "gated_residual_meter",
        PER_FRAME | KEPT,
        gated_residual_meter_chain,
        _call_meter(),
        passes=5,
        checks=("bits", "bits", "sums"),
        gpu_goals={"share_of_copy_rate": 0.90},
        kernel="meter<GatedResidualMeter, bf16, 8, false>",
    ),
    Case(
        "gated_residual_meter cosine",
        "gated_residual_meter",
        STREAM | KEPT,
        lambda v: gated_residual_meter_chain(v, "cosine"),
        _call_meter("cosine"),
        passes=5,
        checks=("bits", "bits", "sums"),
        gpu_goals={"share_of_copy_rate": 0.90},
        kernel="meter<GatedResidualMeter, bf16, 8, true>",
    ),
    Case(
        "gated_residual_meter float8",
        "gated_residual_meter",
        STREAM | FLOAT8,
        gated_residual_meter_float8_chain,
        _call_meter(residual_scale="residual_scale"),
        passes=3,
        float8_passes=2,
        checks=("bits", "bits", "bits", "sums"),
        kernel="float8_meter<GatedResidualMeter, bf16, 1>",
    ),
    Case(
        "stack_residual_meter",
        "stack_residual_meter",
        {"x_out": "tokens", "x_in": "tokens"} | KEPT,
        stack_residual_meter_chain,
        _call_stack_meter,
        passes=4,
        checks=("bits", "sums"),
        outs=(),
        kernel="meter<StackResidualMeter, bf16, 8, false>",
    ),
    Case(
        "residual_meter",
        "residual_meter",
        {"residual": "residual", "old": "tokens"},
        lambda v: measured(v.residual, v.old, v.frames),
        lambda ak, v, out: (ak.residual_meter(v.residual, v.old, frames=v.frames),),
        passes=2,
        checks=("sums",),
        outs=(),
        kernel="meter<ResidualMeter, bf16, 8, false>",
    ),
    Case(
        "reuse_residual",
        "reuse_residual",
        {"x": "tokens"} | KEPT,
        lambda v: (v.x + v.residual,),
        lambda ak, v, out: (ak.reuse_residual(v.x, v.residual, **out),),
        passes=3,
        checks=("bits",),
        gpu_goals={"share_of_copy_rate": 0.92},
        kernel="reuse_residual<bf16, 8, KnownElements<bf16, 8>, true>",
    ),
    Case(
        "reuse_residual float8",
        "reuse_residual",
        {"x": "tokens"} | FLOAT8,
        reuse_residual_float8_chain,
        lambda ak, v, out: (ak.reuse_residual(v.x, v.residual, residual_scale=v.residual_scale, **out),),
        passes=2,
        float8_passes=1,
        checks=("bits",),
        kernel="reuse_residual<bf16, 8, KnownElements<float8_e4m3, 8>, false>",
    ),
    *map(_extrapolation, (1, 2, 3)),
    _metered_extrapolation(2),
    Case(
        "layer_norm_modulate",
        "layer_norm_modulate",
        {"x": "tokens"} | MODULATION,
        layer_norm_modulate_chain,
        lambda ak, v, out: (ak.layer_norm_modulate(v.x, v.shift, v.scale, **out),),
        passes=2,
        checks=("close",),
        gpu_goals={"share_of_copy_rate": 0.85},
        kernel="layer_norm_modulate<bf16, 1>",
    ),
    Case(
        "layer_norm_modulate per frame",
        "layer_norm_modulate",
        {"x": "tokens"} | MODULATION_PER_FRAME,
        layer_norm_modulate_chain,
        lambda ak, v, out: (ak.layer_norm_modulate(v.x, v.shift, v.scale, **out),),
        passes=2,
        checks=("close",),
        gpu_goals={"share_of_copy_rate": 0.85},
        kernel="layer_norm_modulate<bf16, 1>",
    ),
    Case(
        "rms_norm_modulate",
        "rms_norm_modulate",
        {"x": "tokens"} | MODULATION,
        rms_norm_modulate_chain,
        lambda ak, v, out: (ak.rms_norm_modulate(v.x, v.shift, v.scale, **out),),
        passes=2,
        checks=("close",),
        kernel="layer_norm_modulate<General<bf16>, 1>",
    ),
    Case(
        "norm_modulate_float8",
        "norm_modulate_float8",
        {"x": "tokens"} | MODULATION,
        norm_modulate_float8_chain,
        lambda ak, v, out: ak.norm_modulate_float8(v.x, v.shift, v.scale, **out),
        passes=1,
        float8_passes=1,
        checks=("close", "close"),
        outs=("norm_out", "norm_scale"),
        kernel="norm_modulate_float8<bf16, 1>",
    ),
    Case(
        "gated_residual_norm",
        "gated_residual_norm",
        STREAM | MODULATION,
        gated_residual_norm_chain,
        lambda ak, v, out: ak.gated_residual_norm(v.x, v.y, v.gate, v.shift, v.scale, **out),
        passes=4,
        checks=("bits", "close"),
        outs=("out", "norm_out"),
        gpu_goals={"share_of_copy_rate": 0.85},
        kernel="gated_residual_norm<bf16, 1>",
    ),
    Case(
        "gated_residual_norm of Wan",
        "gated_residual_norm",
        STREAM | MODULATION | dict.fromkeys(("gate_table", "shift_table", "scale_table"), "table"),
        wan_chain,
        lambda ak, v, out: ak.gated_residual_norm(
            *(v.x, v.y, v.gate, v.shift, v.scale),
            gate_table=v.gate_table,
            shift_table=v.shift_table,
            scale_table=v.scale_table,
            rounding="float32",
            **out,
        ),
        passes=4,
        checks=("bits", "close"),
        outs=("out", "norm_out"),
        kernel="gated_residual_norm<General<bf16>, 1>",
    ),
    Case(
        "gated_residual_norm per token",
        "gated_residual_norm",
        {"x": "tokens", "y": "tokens", "shift": "shift_chunk", "scale": "scale_chunk", "gate": "gate_chunk"},
        gated_residual_norm_chain,
        lambda ak, v, out: ak.gated_residual_norm(v.x, v.y, v.gate, v.shift, v.scale, **out),
        passes=4,
        checks=("bits", "close"),
        outs=("out", "norm_out"),
        gpu_goals={"times_peer": 1},
        channels=3072,  # the only width that this kernel supports
        peer=Peer("flashinfer", _flashinfer_norm),
    ),
    Case(
        "gated_residual_norm_float8",
        "gated_residual_norm_float8",
        STREAM | MODULATION,
        gated_residual_norm_float8_chain,
        lambda ak, v, out: ak.gated_residual_norm_float8(v.x, v.y, v.gate, v.shift, v.scale, **out),
        passes=3,
        float8_passes=1,
        checks=("bits", "close", "close"),
        outs=("out", "norm_out", "norm_scale"),
        kernel="gated_residual_norm_float8<bf16, 1>",
    ),
    Case(
        "gated_residual_norm_meter",
        "gated_residual_norm_meter",
        STREAM | KEPT | MODULATION,
        gated_residual_norm_meter_chain,
        _call_norm_meter,
        passes=6,
        checks=("bits", "close", "bits", "sums"),
        outs=("out", "norm_out"),
        gpu_goals={"share_of_copy_rate": 0.85},
        kernel="gated_residual_norm_meter<bf16, bf16, 1>",
    ),
    Case(
        "fused_qk_norm_rope",
        "fused_qk_norm_rope",
        {"qkv": "qkv"} | HEADS,
        fused_qk_norm_rope_chain,
        _call_qk_norm_rope,
        passes=4,
        checks=("close", "close"),
        outs=(),
    ),
    Case(
        "temporal_attention",
        "temporal_attention",
        {"x": "tokens", "qkv": "qkv", "qkv_by_place": "qkv_by_place"} | HEADS,
        temporal_attention_chain,
        lambda ak, v, out: (
            ak.temporal_attention(v.qkv, v.q_weight, v.k_weight, v.cos, v.sin, frames=v.frames, **out),
        ),
        passes=4,
        checks=("close",),
        gpu_goals={"times_eager": 3},
    ),
]
