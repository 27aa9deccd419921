# SPDX-License-Identifier: Apache-2.0
"""The block of LTX-2 in diffusers: video and audio, each with self-attention, attention to a text and to the
other stream, and an MLP; RMS norms, modulators per video or per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from adacache.fused.norms import ModelNorm
from adacache.fused.program import Add
from adacache.models.modulation import modulate


class LTX2Block:
    """See `BlockProgram`."""

    parts: tuple[str, ...] = ("attention", "cross_attention", "attention_to_audio", "mlp")
    forwards = frozenset({"1aa8dce692e991e1"})  # diffusers 0.42.1

    def refuses(self, block: Any) -> str | None:
        return None

    def takes(self, block: Any, given: Mapping[str, Any]) -> bool:
        # The sum of an RMS norm over channels with another stride has another order.
        return all(
            isinstance(given.get(name), Tensor) and given[name].ndim == 3 and given[name].stride(2) == 1
            for name in ("hidden_states", "audio_hidden_states", "temb", "temb_audio")
        )

    def run(self, block: Any, given: Mapping[str, Any], add: Add) -> tuple[Tensor, Tensor]:
        video, audio = _Stream(block, given, add), _Stream(block, given, add, "audio_", "_audio")
        to_video = given.get("use_a2v_cross_attention", True)
        to_audio = given.get("use_v2a_cross_attention", True)
        joined = to_video or to_audio
        for stream in (video, audio):
            stream.attend()
        video.attend_to_text(ModelNorm(block.audio_to_video_norm) if joined else video.norm_mlp)
        audio.attend_to_text(ModelNorm(block.video_to_audio_norm) if joined else audio.norm_mlp)
        if joined:
            # Both directions take the streams as they were before either.
            before, audio_before = video.normed, audio.normed
            for_video, for_audio, gate = _between(block, given, "video_a2v", "")
            audio_for_video, audio_for_audio, audio_gate = _between(block, given, "audio_a2v", "_audio")
            if to_video:
                y = block.audio_to_video_attn(
                    modulate(before, *for_video),
                    encoder_hidden_states=modulate(audio_before, *audio_for_video),
                    query_rotary_emb=given.get("ca_video_rotary_emb"),
                    key_rotary_emb=given.get("ca_audio_rotary_emb"),
                    attention_mask=given.get("a2v_cross_attention_mask"),
                )
            video.add_other(y if to_video else None, gate)
            if to_audio:
                y = block.video_to_audio_attn(
                    modulate(audio_before, *audio_for_audio),
                    encoder_hidden_states=modulate(before, *for_audio),
                    query_rotary_emb=given.get("ca_audio_rotary_emb"),
                    key_rotary_emb=given.get("ca_video_rotary_emb"),
                    attention_mask=given.get("v2a_cross_attention_mask"),
                )
            audio.add_other(y if to_audio else None, audio_gate)
        return video.after_mlp(), audio.after_mlp()


class _Stream:
    """Video or audio in a block: its tokens x, and the norm that its next sub-layer takes.

    Args:
        prefix, suffix: of the names of its children and arguments.
    """

    def __init__(self, block: Any, given: Mapping[str, Any], add: Add, prefix: str = "", suffix: str = ""):
        self._block, self._given, self._add, self._prefix = block, given, add, prefix
        self.x: Tensor = given[f"{prefix}hidden_states"]
        self.normed: Any = None
        values = _modulators(block, self._child("scale_shift_table"), given[f"temb{suffix}"])
        shift, scale, self._gate, shift_mlp, scale_mlp, self._gate_mlp = values[:6]
        self._norm1 = ModelNorm(self._child("norm1"), shift, scale)
        self.norm_mlp = ModelNorm(self._child("norm3"), shift_mlp, scale_mlp)
        self._norm2, self._gate_text = ModelNorm(self._child("norm2")), None
        if getattr(block, f"{prefix or 'video_'}cross_attn_adaln"):
            shift, scale, self._gate_text = values[6:9]
            self._norm2 = ModelNorm(self._child("norm2"), shift, scale)
        self._text_time = given.get(f"temb_prompt{suffix}")

    def _child(self, name: str) -> Any:
        return getattr(self._block, self._prefix + name)

    def _argument(self, name: str) -> Any:
        return self._given.get(self._prefix + name)

    def attend(self) -> None:
        perturbed = ("perturbation_mask", "all_perturbed") if self._block.perturbed_attn else ()
        y = self._child("attn1")(
            hidden_states=self._add.norm(self.x, self._norm1),
            encoder_hidden_states=None,
            query_rotary_emb=self._given.get(f"{self._prefix or 'video_'}rotary_emb"),
            attention_mask=self._argument("self_attention_mask"),
            **{name: self._given.get(name) for name in perturbed},
        )
        self._add_residual("attention", y, self._gate, self._norm2)

    def attend_to_text(self, norm: ModelNorm) -> None:
        """`norm`: of the next sub-layer."""
        text = self._given[f"{self._prefix}encoder_hidden_states"]
        if self._block.cross_attn_adaln:
            table, time = self._child("prompt_scale_shift_table"), self._text_time
            if time is None:
                shift, scale = table[None, None].to(device=self.x.device, dtype=self.x.dtype).unbind(2)
            else:
                shift, scale = _modulators(self._block, table, time)
            text = text * (1 + scale) + shift
        y = self._child("attn2")(
            self.normed,
            encoder_hidden_states=text,
            query_rotary_emb=None,
            attention_mask=self._argument("encoder_attention_mask"),
        )
        self._add_residual("cross_attention", y, self._gate_text, norm)

    def add_other(self, y: Tensor | None, gate: Tensor) -> None:
        """Adds what the stream took from the other one; None: nothing."""
        if y is None:
            self.normed = self._add.norm(self.x, self.norm_mlp)
        else:
            self._add_residual("attention_to_audio", y, gate, self.norm_mlp)

    def after_mlp(self) -> Tensor:
        self._add_residual("mlp", self._child("ff")(self.normed), self._gate_mlp, None)
        return self.x

    def _add_residual(self, part: str, y: Tensor, gate: Tensor | None, norm: ModelNorm | None) -> None:
        self.x, self.normed = self._add(self._prefix + part, self.x, y, gate, norm)


def _between(
    block: Any, given: Mapping[str, Any], stream: str, suffix: str
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Shift and scale of a stream's norm for the attention to audio, and for that to video; and the stream's
    gate."""
    table = getattr(block, f"{stream}_cross_attn_scale_shift_table")
    time, time_gate = given[f"temb_ca{suffix}_scale_shift"], given[f"temb_ca{suffix}_gate"]
    scale, shift, scale_to_audio, shift_to_audio = _modulators(block, table[:4, :], time)
    (gate,) = _modulators(block, table[4:, :], time_gate)
    return (shift, scale), (shift_to_audio, scale_to_audio), gate


def _modulators(block: Any, table: Tensor, time: Tensor) -> Sequence[Tensor]:
    """table + time [B, 1|N, k * C], k tensors [B, 1|N, C]."""
    return tuple(block.get_mod_params(table, time, time.shape[0]))
