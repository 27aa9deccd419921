# SPDX-License-Identifier: Apache-2.0
"""STDiT3, the spatial-temporal diffusion transformer of Open-Sora 1.2, on the fused ops; in plain PyTorch
where gradients are recorded.

Parameter names are those of the released checkpoints, so their safetensors files load strictly. A forward
pass has three parts: `embed`, the blocks (spatial, temporal, spatial ...) and `unembed`. Caching replaces the
second.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adacache_kernels
from adacache.models.modulation import gated, modulate
from adacache.models.sequence_parallel import SequenceParallel

Modulation = tuple[Tensor, Tensor]
"""shift and scale of a layer norm, each [B, 1|T, C]."""

AddResidual = Callable[
    [str, Tensor, Callable[[], Tensor], Tensor | None, Modulation | None], tuple[Tensor, Tensor | None]
]
"""(part, x, y, gate, norm) -> x + gate * y() and its modulated layer norm, the input of the next sub-layer.

part is one of `PARTS`; y runs the sub-layer; gate is [B, 1|T, C] or None for an ungated residual; without
`norm` the second result is None."""

NORM_EPS = 1e-6
LONGEST_FUSED_CLIP = 64
"""Latent frames up to which temporal attention is one kernel."""


class BlockModulation(NamedTuple):
    """What modulates one block: norms and gates of its attention and its MLP, each [B, 1|T, C]."""

    attention_norm: Modulation
    attention_gate: Tensor
    mlp_norm: Modulation
    mlp_gate: Tensor


PARTS = ("spatial_attention", "temporal_attention", "cross_attention", "mlp")


@dataclass(frozen=True)
class STDiT3Config:
    """Shape of the network; the defaults are STDiT3-XL/2 as released (Open-Sora 1.2)."""

    depth: int = 28
    hidden_size: int = 1152
    num_heads: int = 16
    in_channels: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    caption_channels: int = 4096
    model_max_length: int = 300
    mlp_ratio: float = 4.0
    pred_sigma: bool = True
    qk_norm: bool = True
    input_sq_size: int = 512

    def to_json(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True)
class Conditioning:
    """What every block needs besides the tokens, for B rows, T latent frames of S = H*W places."""

    frames: int
    places: int
    grid: tuple[int, int]
    """Places per latent frame: (H, W)."""
    latent_size: tuple[int, int, int]
    """(T, H, W) of the latent before padding to whole patches."""
    t: Tensor
    """[B, C] embedding of timestep and fps."""
    modulation: Tensor
    """[B, 6, C] shift, scale and gate of attention, then of the MLP, before a block adds its own table."""
    t_zero: Tensor | None = None
    """The same at timestep 0, for the frames that x_mask excludes."""
    modulation_zero: Tensor | None = None
    x_mask: Tensor | None = None
    """[B, T] bool: True where a frame is being generated, False where it is given."""
    captions: Tensor | None = None
    """[B, L, C] embedded captions, padded."""
    caption_mask: Tensor | None = None
    """[B, L] bool, or None if every token is valid."""
    whole: Conditioning | None = None
    """That of all ranks, if this is the part of one."""
    sequence: SequenceParallel | None = None
    """How the tokens are split over ranks."""

    def part(self, sequence: SequenceParallel) -> Conditioning:
        """That of this rank's tokens."""
        frames, places = sequence.local(self.frames, self.places)
        x_mask = self.x_mask
        if x_mask is not None and frames < self.frames:
            x_mask = x_mask.tensor_split(sequence.size, 1)[sequence.rank]
        return replace(self, frames=frames, places=places, x_mask=x_mask, whole=self, sequence=sequence)

    def rows(self, index: Tensor) -> Conditioning:
        """The conditioning of some rows of the batch, index int64 [rows]."""

        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[index]

        return replace(
            self,
            t=self.t[index],
            modulation=self.modulation[index],
            t_zero=pick(self.t_zero),
            modulation_zero=pick(self.modulation_zero),
            x_mask=pick(self.x_mask),
            captions=pick(self.captions),
            caption_mask=pick(self.caption_mask),
        )


def records_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records any of them; the fused ops have no backward."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def add_residual(
    part: str, x: Tensor, y: Callable[[], Tensor], gate: Tensor | None, norm: Modulation | None
) -> tuple[Tensor, Tensor | None]:
    """x + gate * y() and its modulated layer norm, for x, y() [B, N, C]; see `AddResidual`."""
    output = y()
    if records_gradients(x, output, gate):
        x = x + (output if gate is None else gated(output, gate))
        return x, None if norm is None else norm_modulate(x, norm)
    if norm is None:
        return adacache_kernels.gated_residual(x, output, gate), None
    return adacache_kernels.gated_residual_norm(x, output, gate, *norm, eps=NORM_EPS)


def norm_modulate(x: Tensor, norm: Modulation, rows: Tensor | None = None) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift for x [B, N, C]; with rows int32 [b], for these rows of x."""
    if not records_gradients(x, *norm):
        return adacache_kernels.layer_norm_modulate(x, *norm, eps=NORM_EPS, x_rows=rows)
    x = x if rows is None else x[rows]
    return modulate(F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), *norm)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the head dimension, in float32, as the released weights expect."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding over interleaved pairs of channels (arXiv 2104.09864); the frequencies are
    weights."""

    def __init__(self, dim: int, theta: float = 10000.0):
        super().__init__()
        self.freqs = nn.Parameter(theta ** (-torch.arange(0, dim, 2).float() / dim), requires_grad=False)

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [length, dim / 2] for positions 0 .. length-1, in float32."""
        positions = torch.arange(length, device=self.freqs.device, dtype=torch.float32)
        angle = torch.outer(positions, self.freqs.float())
        return angle.cos(), angle.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates interleaved channel pairs of x [..., length, dim] by the angles of its positions."""
    cos, sin = angles
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention over the places of a frame or the frames of a place, with qk-norm and, over
    frames, rotary embedding."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, frames: int, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [B, T*S, C] -> same shape; over frames with the angles of the T positions, over places
        without."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        if records_gradients(qkv) or (angles is not None and frames > LONGEST_FUSED_CLIP):
            return self.proj(self._attend_plainly(qkv, frames, angles))
        weights, eps = self._norm(qkv.dtype)
        if angles is not None:
            y = adacache_kernels.temporal_attention(qkv, *weights, *angles, frames=frames, eps=eps)
            return self.proj(y)
        if weights[0] is not None:
            adacache_kernels.fused_qk_norm_rope(qkv, *weights, None, None, eps=eps)
        q, k, v = qkv.unflatten(1, (frames, -1)).flatten(0, 1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(y.unflatten(0, (-1, frames)).flatten(1, 2))

    def _norm(self, dtype: torch.dtype) -> tuple[tuple[Tensor | None, Tensor | None], float]:
        """Weights of the norms of q and k, if any, and their eps."""
        if not isinstance(self.q_norm, RMSNorm) or not isinstance(self.k_norm, RMSNorm):
            return (None, None), 0.0
        return (self.q_norm.weight.to(dtype), self.k_norm.weight.to(dtype)), self.q_norm.eps

    def _attend_plainly(self, qkv: Tensor, frames: int, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """[B, T*S, 3, heads, dim] -> [B, T*S, C], in PyTorch's own operations."""
        grid = qkv.unflatten(1, (frames, -1))
        if angles is not None:
            grid = grid.transpose(1, 2)
        q, k, v = grid.flatten(0, 1).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = y.unflatten(0, (qkv.shape[0], -1))
        return (y if angles is None else y.transpose(1, 2)).flatten(1, 2)


class CrossAttention(nn.Module):
    """Multi-head attention from video tokens to caption tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, captions: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, N, C], captions [B, L, C], mask [B, L] bool or None."""
        q = self.q_linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(captions).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if mask is None else mask[:, None, None, :]
        return cast(
            Tensor,
            self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)),
        )


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim if out is None else out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class STDiT3Block(nn.Module):
    """One block: gated self-attention (over space or time), cross-attention, gated MLP; each adds a
    residual."""

    def __init__(self, config: STDiT3Config, temporal: bool):
        super().__init__()
        dim = config.hidden_size
        self.temporal = temporal
        self.attn = SelfAttention(dim, config.num_heads, config.qk_norm)
        self.cross_attn = CrossAttention(dim, config.num_heads)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    @property
    def attention_part(self) -> str:
        return "temporal_attention" if self.temporal else "spatial_attention"

    def forward(
        self,
        x: Tensor,
        conditioning: Conditioning,
        angles: tuple[Tensor, Tensor] | None = None,
        add: AddResidual = add_residual,
    ) -> Tensor:
        """x [B, T*S, C] -> same shape.

        Args:
            conditioning: modulation, captions and masks of these rows.
            angles: rotary angles of the T positions (temporal blocks).
            add: forms each residual and adds it; the hook for caching.
        """
        modulation = self.modulation(conditioning)
        normed = norm_modulate(x, modulation.attention_norm)
        return self.run(x, normed, modulation, conditioning, angles, add, None)[0]

    def run(
        self,
        x: Tensor,
        normed: Tensor,
        modulation: BlockModulation,
        conditioning: Conditioning,
        angles: tuple[Tensor, Tensor] | None,
        add: AddResidual,
        following: Modulation | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The block between two norms: each residual is added in one pass with the norm that comes after it.

        Args:
            x: [B, T*S, C], or the first x of `add`, which may have more rows.
            normed: the modulated norm of x, the input of the attention.
            modulation: of this block.
            following: shift and scale of the first norm after this block.

        Returns:
            x [B, T*S, C], and its norm if `following` is given.
        """

        def attend() -> Tensor:
            sequence, whole = conditioning.sequence, conditioning.whole
            if sequence is None or whole is None or self.temporal != (sequence.split == "frames"):
                return cast(Tensor, self.attn(normed, conditioning.frames, angles))
            return sequence.across(
                lambda x, frames: cast(Tensor, self.attn(x, frames, angles)),
                normed,
                whole.frames,
                whole.places,
            )

        after_attention, _ = add(self.attention_part, x, attend, modulation.attention_gate, None)

        def attend_to_captions() -> Tensor:
            captions, mask = conditioning.captions, conditioning.caption_mask
            return cast(Tensor, self.cross_attn(after_attention, captions, mask))

        x, normed_mlp = add("cross_attention", after_attention, attend_to_captions, None, modulation.mlp_norm)
        return add("mlp", x, lambda: self.mlp(normed_mlp), modulation.mlp_gate, following)

    def modulation(self, conditioning: Conditioning) -> BlockModulation:
        """[B, 1, C] each, or [B, T, C] if some frames are given (x_mask), which use the modulation of
        t = 0."""
        table = self.scale_shift_table[None] + conditioning.modulation
        if conditioning.x_mask is None:
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
        else:
            assert conditioning.modulation_zero is not None
            zero = self.scale_shift_table[None] + conditioning.modulation_zero
            given = conditioning.x_mask[:, None, :, None]
            per_frame = torch.where(given, table[:, :, None], zero[:, :, None])
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = per_frame.unbind(dim=1)
        return BlockModulation((shift, scale), gate, (shift_mlp, scale_mlp), gate_mlp)


class SinusoidalEmbedder(nn.Module):
    """A scalar per row as 256 cosines and sines, then a two-layer perceptron."""

    def __init__(self, dim: int, frequencies: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.frequencies = frequencies

    def forward(self, value: Tensor) -> Tensor:
        """value [B] -> [B, C] in the weights' dtype."""
        half = self.frequencies // 2
        steps = torch.arange(half, dtype=torch.float32, device=value.device)
        angle = value[:, None].float() * torch.exp(-math.log(10000.0) * steps / half)
        wave = torch.cat((angle.cos(), angle.sin()), dim=-1)
        return self.mlp(wave.to(cast(nn.Linear, self.mlp[0]).weight.dtype))


class CaptionEmbedder(nn.Module):
    """Projects caption tokens; `y_embedding` is the learned unconditional caption."""

    y_embedding: Tensor

    def __init__(self, config: STDiT3Config):
        super().__init__()
        tokens, channels = config.model_max_length, config.caption_channels
        self.y_proj = Mlp(channels, config.hidden_size, config.hidden_size)
        self.register_buffer("y_embedding", torch.randn(tokens, channels) / channels**0.5)

    def forward(self, y: Tensor) -> Tensor:
        return self.y_proj(y)


class PatchEmbed(nn.Module):
    """Latent [B, C_in, T, H, W] -> tokens [B, N, C]; sizes that are not a multiple of the patch are padded
    with zeros."""

    def __init__(self, config: STDiT3Config):
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Conv3d(
            config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size
        )

    def forward(self, x: Tensor) -> Tensor:
        missing = [-size % patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True)]
        x = F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0])) if any(missing) else x
        # A convolution whose stride is its kernel is a matrix product over patches, which runs faster as one.
        for axis, patch in zip((2, 4, 6), self.patch_size, strict=True):
            x = x.unflatten(axis, (-1, patch))
        patches = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class FinalLayer(nn.Module):
    def __init__(self, config: STDiT3Config, out_channels: int):
        super().__init__()
        dim = config.hidden_size
        self.linear = nn.Linear(dim, math.prod(config.patch_size) * out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        table = self.scale_shift_table[None] + conditioning.t[:, None]
        shift, scale = table.chunk(2, dim=1)
        if conditioning.x_mask is not None:
            assert conditioning.t_zero is not None
            zero = self.scale_shift_table[None] + conditioning.t_zero[:, None]
            given = conditioning.x_mask[:, :, None]
            shift, scale = (
                torch.where(given, now, then)
                for now, then in zip((shift, scale), zero.chunk(2, 1), strict=True)
            )
        return self.linear(norm_modulate(x, (shift, scale)))


class STDiT3(nn.Module):
    """Open-Sora 1.2's network. Output has 2 * in_channels if the variance is predicted; the first half is the
    velocity."""

    def __init__(self, config: STDiT3Config | None = None):
        super().__init__()
        self.config = config = STDiT3Config() if config is None else config
        if (
            config.hidden_size % config.num_heads
            or (config.hidden_size // config.num_heads) % 2
            or config.hidden_size % 4
        ):
            raise ValueError(
                f"hidden_size: expected a multiple of 4 that {config.num_heads} heads share in even parts, "
                f"got {config.hidden_size}"
            )
        self.out_channels = config.in_channels * (2 if config.pred_sigma else 1)
        self.rope = RotaryEmbedding(config.hidden_size // config.num_heads)
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = SinusoidalEmbedder(config.hidden_size)
        self.fps_embedder = SinusoidalEmbedder(config.hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, 6 * config.hidden_size))
        self.y_embedder = CaptionEmbedder(config)
        self.spatial_blocks = nn.ModuleList(STDiT3Block(config, temporal=False) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(config, temporal=True) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, self.out_channels)
        self.sequence: SequenceParallel | None = None
        """How tokens are split over processes that run each forward call together, with equal inputs; None:
        they are not. All of them return the whole output. Set it before caching is enabled."""
        self._positions: dict[tuple[Any, ...], Tensor] = {}
        self._angles: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_safetensors(cls, config: STDiT3Config, *files: str | Path) -> STDiT3:
        """A model with the weights of one or more safetensors files, loaded strictly.

        Raises:
            ValueError: a file is not a safetensors file, or keys are missing, unexpected or of another shape.
        """
        from adacache.models.weights import load_safetensors

        model = cls(config)
        load_safetensors(model, *files)
        return model.eval()

    def initialize(self) -> None:
        """Weights to start training from: Xavier linears; temporal blocks begin as the identity (Open-Sora
        1.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(cast(nn.Linear, self.fps_embedder.mlp[0]).weight, std=0.02)
        nn.init.zeros_(cast(nn.Linear, self.fps_embedder.mlp[2]).weight)
        for block in cast(list[STDiT3Block], list(self.temporal_blocks)):
            for layer in (block.attn.proj, block.cross_attn.proj, block.mlp.fc2):
                nn.init.zeros_(layer.weight)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | Sequence[int] | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | float | None = None,
        height: Tensor | float | None = None,
        width: Tensor | float | None = None,
    ) -> Tensor:
        """Velocity (and variance) for noisy latents.

        Args:
            x: [B, in_channels, T, H, W] latent.
            timestep: [B], in 0..1000.
            y: captions, padded [B, 1, L, caption_channels], or packed [1, sum of lengths, caption_channels].
            mask: [B or fewer, L] of valid caption tokens (repeated over the rows), or the B lengths of packed
                captions; None if all are valid.
            x_mask: [B, T] bool, False for frames that are given and not generated (image conditioning).
            fps: frames per second, a number or [B] or [1]; None means 24.
            height, width: pixels of the decoded video, a number or a tensor whose first entry counts; None
                means the latent's size times 8.

        Returns:
            [B, 2 * in_channels, T, H, W] (in_channels if pred_sigma is off), float32.

        Raises:
            ValueError: naming the argument of a wrong shape.
        """
        tokens, conditioning = self.embed(x, timestep, x_mask, fps, height, width)
        return self.unembed(self.run_stack(tokens, conditioning, y, mask), conditioning)

    def run_stack(
        self,
        tokens: Tensor,
        conditioning: Conditioning,
        y: Tensor,
        mask: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """All blocks, for tokens [B, N, C]; see `forward` for y and mask. Caching replaces this method."""
        return self.run_blocks(tokens, self.with_captions(conditioning, y, mask))

    def generation(self, *, num_steps: int, num_videos: int) -> AbstractContextManager[Any]:
        """Encloses the loop of a sampler over all steps of some videos. Caching replaces this method."""
        return nullcontext()

    def run_blocks(
        self,
        tokens: Tensor,
        conditioning: Conditioning,
        add_at: Callable[[int], AddResidual] = lambda position: add_residual,
        rows: Tensor | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> Tensor:
        """The blocks [first, last) in the order they run; None: to the last one.

        Args:
            tokens: [B, N, C].
            conditioning: of the rows that run.
            add_at: how the block at a position forms and adds its residuals.
            rows: int32 [b], the rows of tokens that run; `add_at(first)` gets the whole batch as its first x.
                None: all.

        Returns:
            [b, N, C].
        """
        blocks = list(self.stack(conditioning))[first:last]
        modulations = [block.modulation(conditioning) for block, _ in blocks]
        following = [*(modulation.attention_norm for modulation in modulations[1:]), None]
        normed: Tensor | None = norm_modulate(tokens, modulations[0].attention_norm, rows)
        for position, (block, angles) in enumerate(blocks):
            assert normed is not None
            tokens, normed = block.run(
                tokens,
                normed,
                modulations[position],
                conditioning,
                angles,
                add_at(first + position),
                following[position],
            )
        return tokens

    def stack(self, conditioning: Conditioning) -> Iterator[tuple[STDiT3Block, tuple[Tensor, Tensor] | None]]:
        """The blocks in the order they run, each with its rotary angles."""
        angles = self.rotary_angles((conditioning.whole or conditioning).frames)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            yield cast(STDiT3Block, spatial), None
            yield cast(STDiT3Block, temporal), angles

    def embed(
        self,
        x: Tensor,
        timestep: Tensor,
        x_mask: Tensor | None = None,
        fps: Tensor | float | None = None,
        height: Tensor | float | None = None,
        width: Tensor | float | None = None,
    ) -> tuple[Tensor, Conditioning]:
        """Tokens [B, N, C] and the conditioning, without captions: enough for a reused step."""
        config = self.config
        if x.ndim != 5 or x.shape[1] != config.in_channels:
            raise ValueError(f"x: expected [B, {config.in_channels}, T, H, W], got {list(x.shape)}")
        batch = x.shape[0]
        if timestep.shape != (batch,):
            raise ValueError(f"timestep: expected [B] = [{batch}], got {list(timestep.shape)}")
        frames, rows, columns = (
            -(-size // patch) for size, patch in zip(x.shape[2:], config.patch_size, strict=True)
        )
        if x_mask is not None and x_mask.shape != (batch, frames):
            raise ValueError(f"x_mask: expected [B, T] = [{batch}, {frames}], got {list(x_mask.shape)}")
        dtype = self.x_embedder.proj.weight.dtype
        height = 8.0 * x.shape[3] if height is None else _number(height)
        width = 8.0 * x.shape[4] if width is None else _number(width)
        if not isinstance(fps, Tensor):  # filled on the device: copying a number would synchronize
            fps = torch.full((1,), 24.0 if fps is None else fps, device=x.device)
        fps = fps.to(x.device).reshape(-1)
        if fps.shape[0] not in (1, batch):
            raise ValueError(f"fps: expected a number, [1] or [B] = [{batch}], got {list(fps.shape)}")

        tokens = self.x_embedder(x.to(dtype))
        position = self.position_embedding(
            rows, columns, (height * width) ** 0.5 / config.input_sq_size, tokens
        )
        tokens = (tokens.unflatten(1, (frames, rows * columns)) + position).flatten(1, 2)

        fps_embedding = self.fps_embedder(fps)
        t = self.t_embedder(timestep.to(dtype)) + fps_embedding
        t_zero = None if x_mask is None else self.t_embedder(torch.zeros_like(timestep)) + fps_embedding
        conditioning = Conditioning(
            frames=frames,
            places=rows * columns,
            grid=(rows, columns),
            latent_size=(x.shape[2], x.shape[3], x.shape[4]),
            t=t,
            modulation=self.t_block(t).unflatten(-1, (6, -1)),
            t_zero=t_zero,
            modulation_zero=None if t_zero is None else self.t_block(t_zero).unflatten(-1, (6, -1)),
            x_mask=None if x_mask is None else x_mask.to(torch.bool),
        )
        if self.sequence is not None:
            conditioning = conditioning.part(self.sequence)
            tokens = self.sequence.part(tokens, frames)
        return tokens, conditioning

    def with_captions(
        self, conditioning: Conditioning, y: Tensor, mask: Tensor | Sequence[int] | None = None
    ) -> Conditioning:
        """The conditioning with embedded captions; see `forward` for y and mask."""
        batch = conditioning.t.shape[0]
        y, valid = _padded_captions(y, mask, batch, self.config.caption_channels)
        captions = self.y_embedder(y.to(self.x_embedder.proj.weight.dtype))
        return replace(conditioning, captions=captions, caption_mask=valid)

    def unembed(self, tokens: Tensor, conditioning: Conditioning) -> Tensor:
        """Tokens [B, N, C] -> [B, C_out, T, H, W] in float32."""
        (rows, columns), patch = conditioning.grid, self.config.patch_size
        x = self.final_layer(tokens, conditioning)
        if conditioning.sequence is not None and conditioning.whole is not None:
            whole = conditioning.whole
            x = conditioning.sequence.whole(x, whole.frames, whole.places)
            conditioning = whole
        x = x.unflatten(2, (*patch, self.out_channels)).unflatten(1, (conditioning.frames, rows, columns))
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        t, h, w = conditioning.latent_size
        return x[:, :, :t, :h, :w].float()

    def rotary_angles(self, length: int) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():  # a graph computes its own
            return self.rope.angles(length)
        freqs = self.rope.freqs
        key = (length, freqs.device, freqs.data_ptr() if freqs.device.type != "meta" else 0, freqs._version)
        if key not in self._angles:
            self._angles = {key: self.rope.angles(length)}
        return self._angles[key]

    def position_embedding(self, rows: int, columns: int, scale: float, like: Tensor) -> Tensor:
        """[S, C] sines and cosines of column, then row, stretched to the size that the network was trained
        at."""
        if torch.compiler.is_compiling():
            return self._position_embedding(rows, columns, scale, like)
        key = (rows, columns, scale, like.device, like.dtype)
        if key not in self._positions:
            self._positions[key] = self._position_embedding(rows, columns, scale, like)
        return self._positions[key]

    def _position_embedding(self, rows: int, columns: int, scale: float, like: Tensor) -> Tensor:
        half = self.config.hidden_size // 2
        side = round((rows * columns) ** 0.5)
        frequency = 10000.0 ** (-torch.arange(0, half, 2, device=like.device).float() / half)

        def waves(count: int) -> Tensor:
            angle = torch.outer(torch.arange(count, device=like.device) / scale * (side / count), frequency)
            return torch.cat((angle.sin(), angle.cos()), dim=-1)

        of_column = waves(columns)[None].expand(rows, -1, -1)
        of_row = waves(rows)[:, None].expand(-1, columns, -1)
        return torch.cat((of_column, of_row), dim=-1).flatten(0, 1).to(like.dtype)

    def null_captions(self, count: int) -> Tensor:
        """The unconditional caption for `count` videos, [count, 1, L, caption_channels]."""
        return self.y_embedder.y_embedding[None, None].expand(count, -1, -1, -1)


def _number(value: Tensor | float) -> float:
    return float(value.reshape(-1)[0]) if isinstance(value, Tensor) else float(value)


def _padded_captions(
    y: Tensor, mask: Tensor | Sequence[int] | None, batch: int, channels: int
) -> tuple[Tensor, Tensor | None]:
    """Captions [B, L, channels] and the mask [B, L] bool (None if all tokens are valid)."""
    if y.ndim == 4 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 3 or y.shape[-1] != channels:
        raise ValueError(
            f"y: expected [B, 1, L, {channels}] or packed [1, tokens, {channels}], got {list(y.shape)}"
        )
    if mask is not None and not isinstance(mask, Tensor):
        lengths = [int(length) for length in mask]
        if y.shape[0] != 1 or len(lengths) != batch or sum(lengths) != y.shape[1]:
            raise ValueError(
                f"mask: expected {batch} lengths that add up to the {y.shape[1]} packed tokens of y, "
                f"got {lengths}"
            )
        pieces = y[0].split(lengths)
        y = nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
        valid = (
            torch.arange(y.shape[1], device=y.device)[None] < torch.tensor(lengths, device=y.device)[:, None]
        )
        return y, valid
    if y.shape[0] != batch:
        raise ValueError(f"y: expected {batch} rows as in x, got {list(y.shape)}")
    if mask is None:
        return y, None
    mask = mask.reshape(mask.shape[0], -1)
    if mask.shape[1] != y.shape[1] or batch % mask.shape[0]:
        raise ValueError(
            f"mask: expected [B, L] = [{batch}, {y.shape[1]}] or fewer rows to repeat, got {list(mask.shape)}"
        )
    return y, (mask != 0).repeat(batch // mask.shape[0], 1)
