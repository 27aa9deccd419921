# SPDX-License-Identifier: Apache-2.0
"""Small models with random weights, one per class, with inputs and a plain sampling loop; and a reference
implementation of AdaCache with hooks.

`CASES` are the classes of diffusers. All are float32 and run on the CPU in milliseconds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Values = dict[str, Any]
CODEBOOK = {0.2: 5, 0.4: 4, 0.6: 3, 0.8: 2, 1.0: 1}
"""Residuals of random networks change more between steps than those of trained ones."""


class CountOps(TorchDispatchMode):
    """Counts the calls of each op; with `shape`, those whose first argument is a tensor of this shape."""

    def __init__(self, shape: tuple[int, ...] | None = None):
        super().__init__()
        self.shape = shape
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.shape is None or (args and isinstance(args[0], Tensor) and args[0].shape == self.shape):
            self.ops[op.overloadpacket._qualified_op_name] += 1
        return op(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Case:
    """One model class.

    Attributes:
        name: name of the class.
        build: creates the model; `model` then sets the weights.
        inputs: (videos, frames) -> arguments of forward without the timestep, batch first; `shared` lists the
            arguments without a batch dimension.
        lists: names of the block lists in execution order (interleaved if `alternating`); "name[0::2]" is
            every second block of a list.
        streams: names of the block arguments that a block returns.
        after_attention: per list, the child of a block whose input is the tokens after the self-attention
            residual; "" if the block has no further residual.
        part: the measured part.
        places_first: whether tokens have the layout [places, frames, C] at the measured site.
        motion: whether the frames of the measured residual are known.
        latents: name of the argument that is denoised.
        schedule: the largest timestep.
        depth: number of blocks (of pairs, if alternating).
        seed: seed of the weights.
        codebook: a codebook that gives a nontrivial schedule.
        tolerance: relative tolerance for results with a different order of summation.
        fixed_frames: whether the model supports only one number of frames.
        works_between: whether the model computes between its blocks, so that a residual per block is kept.
        one_video: whether the model supports only one video per call.
        video_last: whether a block returns its streams in reverse order.
        returned: number of streams that the last block returns; None: all.
        keeps_float32: whether some modules require float32, so that half precision needs autocast.
        time: name of the timestep argument.
        options: further arguments.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Values]
    lists: tuple[str, ...] = ("transformer_blocks",)
    alternating: bool = False
    streams: tuple[str, ...] = ("hidden_states",)
    after_attention: dict[str, str] = field(default_factory=dict)
    part: str = "attention"
    places_first: bool = False
    motion: bool = True
    latents: str = "hidden_states"
    schedule: float = 1000.0
    shared: tuple[str, ...] = ()
    depth: int = 4
    seed: int = 0
    codebook: dict[float, int] = field(default_factory=lambda: CODEBOOK)
    tolerance: float = 1e-4
    fixed_frames: bool = False
    works_between: bool = False
    one_video: bool = False
    video_last: bool = False
    returned: int | None = None
    keeps_float32: bool = False
    time: str = "timestep"
    options: Values = field(default_factory=lambda: {"return_dict": False})
    timestep: Callable[[float, int], Tensor] = lambda t, rows: torch.full((rows,), t)

    def model(self, seed: int = 0) -> nn.Module:
        """The model, with weights for which every gate affects the output."""
        torch.manual_seed(self.seed + seed)
        model = self.build().eval().requires_grad_(False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "table" not in name:
                    parameter.copy_(torch.randn_like(parameter) / math.prod(parameter.shape[1:]) ** 0.5)
                elif "pos_frequencies" in name or "table" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        return model

    def values(self, videos: int = 1, seed: int = 0, frames: int = 3) -> Values:
        torch.manual_seed(seed + 100)
        return self.inputs(videos, frames)

    def rows(self, values: Values, video: int) -> Values:
        """One video of a batch of inputs."""
        return {
            name: value if name in self.shared or not isinstance(value, Tensor) else value[video : video + 1]
            for name, value in values.items()
        }

    def blocks(self, model: Any) -> list[tuple[str, nn.Module]]:
        """Blocks in execution order, each with the name of its list."""
        lists = []
        for label in self.lists:
            name, _, turn = label.partition("[")
            blocks = list(getattr(model, name))
            lists.append((label, blocks[int(turn[0]) :: 2] if turn else blocks))
        if self.alternating:
            return [(name, blocks[i]) for i in range(self.depth) for name, blocks in lists]
        return [(name, block) for name, blocks in lists for block in blocks]

    def predict(self, model: Any, values: Values, z: Tensor, step: int, num_steps: int) -> Tensor:
        """The output of the model for the latents at one step (0-based), in their shape."""
        t = self.timestep(self.schedule * (1 - step / num_steps), z.shape[0])
        output = model(**{**values, self.latents: z, self.time: t}, **self.options)
        return fit(output[0] if isinstance(output, tuple) else output, z)

    def denoise(self, model: Any, values: Values, num_steps: int) -> Tensor:
        """A plain sampling loop."""
        z = values[self.latents]
        with torch.no_grad():
            for step in range(num_steps):
                z = z - self.predict(model, values, z, step, num_steps) / num_steps
        return z

    def denoise_in_two_calls(
        self, model: Any, values: Values, null: Values, num_steps: int, context: bool
    ) -> Tensor:
        """A sampling loop with guidance in two calls, with or without `cache_context` of diffusers."""
        import contextlib

        z = values[self.latents]
        with torch.no_grad():
            for step in range(num_steps):
                outputs = []
                for name, some in (("cond", values), ("uncond", null)):
                    with model.cache_context(name) if context else contextlib.nullcontext():
                        outputs.append(self.predict(model, some, z, step, num_steps))
                z = z - (outputs[1] + 2.0 * (outputs[0] - outputs[1])) / num_steps
        return z


def ids(case: Case) -> str:
    """The pytest id of a case."""
    return case.name.replace(" ", "_").replace(",", "")


def fit(output: Tensor, like: Tensor) -> Tensor:
    """The part of an output with the shape of the latents (some models also predict a variance)."""
    if output.ndim == like.ndim - 1:
        output = output.unflatten(0, like.shape[:2])
    return output[tuple(slice(0, size) for size in like.shape)]


@torch.no_grad()
def denoise_slowly(
    case: Case, model: Any, values: Values, num_steps: int, codebook: dict[float, int], block: int
) -> tuple[Tensor, list[int], list[tuple[int, float, float]]]:
    """AdaCache implemented with hooks on a plain model, for one video: every block always runs; on a reused
    step its output is replaced by its input plus its residual of the last computed step.

    Returns the latent, the computed steps, and (step, relative distance, motion) of every measurement.
    """
    blocks = case.blocks(model)
    measured = [
        (name, one)
        for i, (name, one) in enumerate(blocks)
        if i // (len(case.lists) if case.alternating else 1) == block and name in case.after_attention
    ]
    ((list_name, site),) = measured
    kept: dict[nn.Module, list[Tensor | float]] = {}
    now: dict[str, Any] = {"computing": True, "residual": None, "input": None}

    def arguments(one: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
        import inspect

        names = list(inspect.signature(one.forward).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        return [given[name] for name in case.streams]

    def before_site(one: nn.Module, args: Any, kwargs: Any) -> None:
        now["input"] = arguments(one, args, kwargs)[0].double()

    def after_attention(child: nn.Module, args: Any, kwargs: Any) -> None:
        tokens = args[0] if args else kwargs["hidden_states"]
        # Some blocks drop the tokens of earlier frames, which come first.
        now["residual"] = tokens.double() - now["input"][:, -tokens.shape[1] :]

    def after_block(one: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        streams = arguments(one, args, kwargs)
        outputs = [output] if isinstance(output, Tensor) else list(output)[:: -1 if case.video_last else 1]
        if one is site and not case.after_attention[list_name]:
            now["residual"] = outputs[0].double() - now["input"]
        if now["computing"]:
            pairs = zip(streams, outputs, strict=True)
            kept[one] = [0.0 if out is None else out - x for x, out in pairs]
            return None
        outputs = [x + r for x, r in zip(streams, kept[one], strict=True)]
        if isinstance(output, Tensor):
            return outputs[0]
        return tuple(outputs[:: -1 if case.video_last else 1])

    hooks = [site.register_forward_pre_hook(before_site, with_kwargs=True)]
    if case.after_attention[list_name]:
        child = site.get_submodule(case.after_attention[list_name])
        hooks.append(child.register_forward_pre_hook(after_attention, with_kwargs=True))
    hooks += [one.register_forward_hook(after_block, with_kwargs=True) for _, one in blocks]
    z, last, rate, old = values[case.latents], 0, 1, None
    computed: list[int] = []
    distances: list[tuple[int, float, float]] = []
    try:
        for step in range(1, num_steps + 1):
            now["computing"] = step == last + rate or step in (1, num_steps - 1, num_steps)
            z = z - case.predict(model, values, z, step - 1, num_steps) / num_steps
            if now["computing"]:
                computed.append(step)
                new, last = now["residual"], step
                if old is not None:
                    distances.append(
                        (step, float((new - old).abs().sum() / old.abs().sum()), _motion(case, new))
                    )
                    score = distances[-1][1] / rate
                    rate = next(
                        (r for limit, r in codebook.items() if score < limit), [*codebook.values()][-1]
                    )
                old = new
    finally:
        for hook in hooks:
            hook.remove()
    return z, computed, distances


def _motion(case: Case, residual: Tensor, frames: int = 3) -> float:
    """The motion of the residual of one video."""
    if not case.motion:
        return math.nan
    by_frame = residual.transpose(0, 1) if case.places_first else residual
    by_frame = by_frame.reshape(frames, -1)
    change, size = by_frame.diff(dim=0).abs().sum(), by_frame.abs()
    return float(change / (size[1:].sum() + size[:-1].sum()))


def relative_error(a: Tensor, b: Tensor) -> float:
    """mean|a - b| / mean|b|."""
    return float((a - b).abs().mean() / b.abs().mean())


def of_diffusers(name: str, **config: Any) -> Callable[[], nn.Module]:
    """Builds a model of a class of diffusers."""

    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**config)

    return build


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


LATTE = Case(
    "LatteTransformer3DModel",
    of_diffusers(
        "LatteTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=4,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=12,
        video_length=3,
    ),
    lambda videos, frames: {
        "hidden_states": randn(videos, 4, frames, 4, 4),
        "encoder_hidden_states": randn(videos, 5, 12),
    },
    lists=("transformer_blocks", "temporal_transformer_blocks"),
    alternating=True,
    after_attention={"temporal_transformer_blocks": "norm2"},
    part="temporal_attention",
    fixed_frames=True,
    places_first=True,
)
COGVIDEOX_SIZE: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 12,
    "num_layers": 4,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 9,
    "patch_size": 2,
    "max_text_seq_length": 5,
    "use_rotary_positional_embeddings": True,
}
COGVIDEOX = Case(
    "CogVideoXTransformer3DModel",
    of_diffusers(
        "CogVideoXTransformer3DModel",
        **COGVIDEOX_SIZE,
    ),
    lambda videos, frames: {
        "hidden_states": randn(videos, frames, 4, 4, 4),
        "encoder_hidden_states": randn(videos, 5, 12),
        "image_rotary_emb": (torch.ones(frames * 4, 16), torch.zeros(frames * 4, 16)),
    },
    streams=("hidden_states", "encoder_hidden_states"),
    after_attention={"transformer_blocks": "norm2"},
)
WAN_SIZE: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 12,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}
WAN = Case(
    "WanTransformer3DModel",
    of_diffusers(
        "WanTransformer3DModel",
        **WAN_SIZE,
    ),
    lambda videos, frames: {
        "hidden_states": randn(videos, 4, frames, 4, 4),
        "encoder_hidden_states": randn(videos, 5, 12),
    },
    lists=("blocks",),
    after_attention={"blocks": "norm2"},
)
SKYREELS = replace(
    WAN,
    name="SkyReelsV2Transformer3DModel",
    build=of_diffusers("SkyReelsV2Transformer3DModel", **WAN_SIZE),
)
CHRONOEDIT = replace(
    WAN,
    name="ChronoEditTransformer3DModel",
    build=of_diffusers("ChronoEditTransformer3DModel", **WAN_SIZE),
)
LTX = Case(
    "LTXVideoTransformer3DModel",
    of_diffusers(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=4,
        caption_channels=12,
    ),
    lambda videos, frames: {
        "hidden_states": randn(videos, frames * 6, 4),
        "encoder_hidden_states": randn(videos, 5, 12),
        "encoder_attention_mask": torch.ones(videos, 5).bool(),
        "num_frames": frames,
        "height": 2,
        "width": 3,
    },
    after_attention={"transformer_blocks": "attn2"},
)
MOCHI = Case(
    "MochiTransformer3DModel",
    of_diffusers(
        "MochiTransformer3DModel",
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=5,
    ),
    lambda videos, frames: {
        "hidden_states": randn(videos, 4, frames, 4, 4),
        "encoder_hidden_states": randn(videos, 5, 16),
        "encoder_attention_mask": torch.ones(videos, 5).bool(),
    },
    streams=("hidden_states", "encoder_hidden_states"),
    after_attention={"transformer_blocks": "norm3"},
)
ALLEGRO = Case(
    "AllegroTransformer3DModel",
    of_diffusers(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        cross_attention_dim=24,
        sample_width=4,
        sample_height=4,
        sample_frames=3,
        caption_channels=12,
    ),
    lambda videos, frames: {
        "hidden_states": randn(videos, 4, frames, 4, 4),
        "encoder_hidden_states": randn(videos, 5, 12),
        "attention_mask": torch.ones(videos, frames, 4, 4),
        "encoder_attention_mask": torch.ones(videos, 5),
        "image_rotary_emb": _allegro_rotary(frames),
    },
    after_attention={"transformer_blocks": "attn2"},
    shared=("image_rotary_emb",),
    codebook={0.15: 4, 0.3: 3, 0.45: 2, 0.6: 1},
)


def _allegro_rotary(frames: int) -> Any:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    found = get_3d_rotary_pos_embed_allegro(
        embed_dim=12,
        crops_coords=((0, 0), (2, 2)),
        grid_size=(2, 2),
        temporal_size=frames,
        interpolation_scale=(1.0, 1.0, 1.0),
        device="cpu",
    )
    places = torch.cartesian_prod(*(torch.as_tensor(grid, dtype=torch.long) for grid in found[3:]))
    return found[:3], tuple(places.T.reshape(3, 1, -1).contiguous())


HUNYUAN_SIZE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 12,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 2, 4),
}
HUNYUAN = Case(
    "HunyuanVideoTransformer3DModel",
    of_diffusers(
        "HunyuanVideoTransformer3DModel",
        **HUNYUAN_SIZE,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
    ),
    lambda videos, frames: {
        "hidden_states": randn(videos, 4, frames, 4, 4),
        "encoder_hidden_states": randn(videos, 5, 12),
        "pooled_projections": randn(videos, 8),
        "encoder_attention_mask": torch.ones(videos, 5),
        "guidance": torch.full((videos,), 6000.0),
    },
    lists=("transformer_blocks", "single_transformer_blocks"),
    streams=("hidden_states", "encoder_hidden_states"),
    after_attention={"transformer_blocks": "norm2", "single_transformer_blocks": ""},
)
HUNYUAN_IMAGE = Case(
    "HunyuanVideoTransformer3DModel, first frame given",
    of_diffusers(
        "HunyuanVideoTransformer3DModel",
        **HUNYUAN_SIZE,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=False,
        image_condition_type="token_replace",
    ),
    lambda videos, frames: {
        name: v for name, v in HUNYUAN.inputs(videos, frames).items() if name != "guidance"
    },
    lists=HUNYUAN.lists,
    streams=HUNYUAN.streams,
    after_attention=HUNYUAN.after_attention,
)
HUNYUAN_15 = Case(
    "HunyuanVideo15Transformer3DModel",
    of_diffusers(
        "HunyuanVideo15Transformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=12,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
    ),
    lambda videos, frames: {
        "hidden_states": randn(videos, 4, frames, 2, 2),
        "encoder_hidden_states": randn(videos, 5, 12),
        "encoder_attention_mask": torch.ones(videos, 5),
        "encoder_hidden_states_2": randn(videos, 4, 8),
        "encoder_attention_mask_2": torch.ones(videos, 4),
        "image_embeds": torch.zeros(videos, 3, 8),
    },
    streams=("hidden_states", "encoder_hidden_states"),
    after_attention={"transformer_blocks": "norm2"},
    keeps_float32=True,
)
COSMOS_SIZE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 4,
    "mlp_ratio": 2,
    "text_embed_dim": 24,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": False,
    "extra_pos_embed_type": None,
}
COSMOS = Case(
    "CosmosTransformer3DModel",
    of_diffusers("CosmosTransformer3DModel", **COSMOS_SIZE),
    lambda videos, frames: {
        "hidden_states": randn(videos, 4, frames, 4, 4),
        "encoder_hidden_states": randn(videos, 5, 24),
        "fps": 24,
    },
    after_attention={"transformer_blocks": "norm2"},
    schedule=1.0,
)
SANA_SIZE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 8,
    "mlp_ratio": 2.0,
    "sample_size": 4,
    "patch_size": (1, 2, 2),
    "rope_max_seq_len": 32,
    "qk_norm": "rms_norm_across_heads",
}
SANA = Case(
    "SanaVideoTransformer3DModel",
    of_diffusers("SanaVideoTransformer3DModel", **SANA_SIZE),
    lambda videos, frames: {
        "hidden_states": randn(videos, 4, frames, 4, 4),
        "encoder_hidden_states": randn(videos, 5, 8),
    },
    after_attention={"transformer_blocks": "attn2"},
    seed=1,  # avoids tiny divisors in the linear attention
)
KANDINSKY = Case(
    "Kandinsky5Transformer3DModel",
    of_diffusers(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        in_text_dim=12,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=4,
        axes_dims=(4, 4, 4),
        attention_type="regular",
    ),
    lambda videos, frames: {
        "hidden_states": randn(videos, frames, 4, 4, 4),
        "encoder_hidden_states": randn(videos, 5, 12),
        "pooled_projections": randn(videos, 8),
        "visual_rope_pos": [torch.arange(frames), torch.arange(2), torch.arange(2)],
        "text_rope_pos": torch.arange(5),
    },
    lists=("visual_transformer_blocks",),
    tolerance=2e-2,  # the model rounds q and k to bfloat16
    streams=("visual_embed",),
    after_attention={"visual_transformer_blocks": "cross_attention_norm"},
    shared=("text_rope_pos",),
    keeps_float32=True,
)
EASYANIMATE = Case(
    "EasyAnimateTransformer3DModel",
    of_diffusers(
        "EasyAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        mmdit_layers=4,
        num_layers=4,
        patch_size=2,
        sample_width=4,
        sample_height=4,
        text_embed_dim=12,
        text_embed_dim_t5=None,
        time_embed_dim=8,
        time_position_encoding_type="3d_rope",
    ),
    lambda videos, frames: {
        "hidden_states": randn(videos, 4, frames, 4, 4),
        "encoder_hidden_states": randn(videos, 5, 12),
    },
    streams=("hidden_states", "encoder_hidden_states"),
    after_attention={"transformer_blocks": "norm2"},
    codebook={1.0: 4, 1.5: 3, 2.0: 2, 3.0: 1},
)
CONSISID = Case(
    "ConsisIDTransformer3DModel",
    of_diffusers(
        "ConsisIDTransformer3DModel",
        **COGVIDEOX_SIZE,
        is_train_face=False,
    ),
    COGVIDEOX.inputs,
    streams=("hidden_states", "encoder_hidden_states"),
    after_attention={"transformer_blocks": "norm2"},
)
WAN_VACE = Case(
    "WanVACETransformer3DModel",
    of_diffusers(
        "WanVACETransformer3DModel",
        **WAN_SIZE,
        vace_layers=[0, 2],
        vace_in_channels=4,
    ),
    lambda videos, frames: {
        **WAN.inputs(videos, frames),
        "control_hidden_states": randn(videos, 4, frames, 4, 4),
        "control_hidden_states_scale": torch.full((2,), 0.5),
    },
    lists=("blocks",),
    after_attention={"blocks": "norm2"},
    shared=("control_hidden_states_scale",),
    codebook={0.3: 4, 0.67: 3, 1.05: 2, 1.5: 1},
    works_between=True,
)
WAN_ANIMATE = Case(
    "WanAnimateTransformer3DModel",
    of_diffusers(
        "WanAnimateTransformer3DModel",
        **WAN_SIZE | {"in_channels": 12, "out_channels": 12},
        latent_channels=4,
        image_dim=8,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    ),
    lambda videos, frames: {
        "hidden_states": randn(videos, 12, frames, 4, 4),
        "encoder_hidden_states": randn(videos, 5, 12),
        "encoder_hidden_states_image": randn(videos, 3, 8),
        "pose_hidden_states": randn(videos, 4, frames - 1, 4, 4),
        "face_pixel_values": randn(videos, 3, 4 * frames - 7, 16, 16),
    },
    lists=("blocks",),
    after_attention={"blocks": "norm2"},
    works_between=True,
)
HELIOS = Case(
    "HeliosTransformer3DModel",
    of_diffusers(
        "HeliosTransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_dim=(4, 4, 4),
    ),
    lambda videos, frames: {
        **WAN.inputs(videos, frames),
        "indices_hidden_states": torch.arange(2, 2 + frames).expand(videos, -1),
        "latents_history_short": randn(videos, 4, 2, 4, 4),
        "indices_latents_history_short": torch.arange(2).expand(videos, -1),
    },
    lists=("blocks",),
    after_attention={"blocks": "norm2"},
)
FRAMEPACK = Case(
    "HunyuanVideoFramepackTransformer3DModel",
    of_diffusers(
        "HunyuanVideoFramepackTransformer3DModel",
        **HUNYUAN_SIZE,
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    ),
    lambda videos, frames: {
        **HUNYUAN.inputs(videos, frames),
        "image_embeds": randn(videos, 3, 8),
        "indices_latents": torch.arange(1, 1 + frames),
        "latents_clean": randn(videos, 4, 2, 4, 4),
        "indices_latents_clean": torch.tensor([0, 9]),
        "latents_history_2x": randn(videos, 4, 2, 4, 4),
        "indices_latents_history_2x": torch.arange(4, 6),
        "latents_history_4x": randn(videos, 4, 4, 8, 8),
        "indices_latents_history_4x": torch.arange(6, 10),
    },
    lists=HUNYUAN.lists,
    streams=HUNYUAN.streams,
    after_attention=HUNYUAN.after_attention,
    shared=(
        "indices_latents",
        "indices_latents_clean",
        "indices_latents_history_2x",
        "indices_latents_history_4x",
    ),
    motion=False,
)
LTX2_SIZE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 4,
    "caption_channels": 12,
}
LTX2 = Case(
    "LTX2VideoTransformer3DModel",
    of_diffusers("LTX2VideoTransformer3DModel", **LTX2_SIZE),
    lambda videos, frames: {
        **LTX.inputs(videos, frames),
        "audio_hidden_states": randn(videos, 4, 4),
        "audio_encoder_hidden_states": randn(videos, 5, 12),
        "audio_num_frames": 4,
    },
    streams=("hidden_states", "audio_hidden_states"),
    after_attention={"transformer_blocks": "norm2"},
)

CASES = [
    LATTE,
    COGVIDEOX,
    WAN,
    SKYREELS,
    CHRONOEDIT,
    LTX,
    MOCHI,
    ALLEGRO,
    HUNYUAN,
    HUNYUAN_IMAGE,
    HUNYUAN_15,
    COSMOS,
    SANA,
    KANDINSKY,
    EASYANIMATE,
    CONSISID,
    WAN_VACE,
    WAN_ANIMATE,
    HELIOS,
    FRAMEPACK,
    LTX2,
]


def _twin(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import importlib

        model: nn.Module = getattr(importlib.import_module(f"twins.{module}"), name)(**options)
        return model

    return build


def _twin_inputs(videos: int, frames: int) -> Values:
    return {"hidden_states": randn(videos, 4, frames, 4, 4), "encoder_hidden_states": randn(videos, 5, 12)}


OPEN_SORA = Case(
    "STDiT3",
    _twin("open_sora", "STDiT3"),
    lambda videos, frames: {"x": randn(videos, 4, frames, 4, 4), "y": randn(videos, 1, 5, 12)},
    lists=("spatial_blocks", "temporal_blocks"),
    alternating=True,
    streams=("x",),
    after_attention={"temporal_blocks": "cross_attn"},
    part="temporal_attention",
    latents="x",
)
OPEN_SORA_PACKED = Case(
    "STDiT3, packed captions and a given frame",
    OPEN_SORA.build,
    lambda videos, frames: {
        **OPEN_SORA.inputs(videos, frames),
        "mask": (torch.arange(5)[None] < torch.arange(videos)[:, None] % 3 + 3).long(),
        "x_mask": torch.arange(frames).expand(videos, -1) > 0,
    },
    lists=OPEN_SORA.lists,
    alternating=True,
    streams=("x",),
    part="temporal_attention",
    latents="x",
    after_attention={"temporal_blocks": "cross_attn"},
)
OPEN_SORA_WINDOWS = replace(
    OPEN_SORA_PACKED, name="STDiT3, windows", build=_twin("open_sora", "STDiT3", windows=True)
)
LATTE_T2V = Case(
    "LatteT2V",
    _twin("latte", "LatteT2V"),
    _twin_inputs,
    lists=LATTE.lists,
    alternating=True,
    after_attention={"temporal_transformer_blocks": "norm3"},
    part="temporal_attention",
    fixed_frames=True,
    places_first=True,
)
LATTE_OF_ONE_LIST = Case(
    "Latte",
    _twin("latte", "Latte"),
    lambda videos, frames: {"x": randn(videos, frames, 4, 4, 4), "y": torch.randint(10, (videos,))},
    lists=("blocks[0::2]", "blocks[1::2]"),
    alternating=True,
    streams=("x",),
    after_attention={"blocks[1::2]": "norm2"},
    part="temporal_attention",
    latents="x",
    time="t",
    options={},
    fixed_frames=True,
    places_first=True,
)
OPEN_SORA_PLAN_12 = Case(
    "OpenSoraT2V",
    _twin("open_sora_plan", "OpenSoraT2V"),
    _twin_inputs,
    after_attention={"transformer_blocks": "attn2"},
)
OPEN_SORA_PLAN_13 = Case(
    "OpenSoraT2V_v1_3",
    _twin("open_sora_plan", "OpenSoraT2V_v1_3"),
    lambda videos, frames: {
        **_twin_inputs(videos, frames),
        "attention_mask": 1.0 - torch.eye(4 * frames)[:videos],
    },
    after_attention={"transformer_blocks": "attn2"},
)
VCHITECT = Case(
    "VchitectXLTransformerModel",
    _twin("vchitect", "VchitectXLTransformerModel"),
    lambda videos, frames: {
        "hidden_states": randn(videos, frames, 4, 4, 4),
        "encoder_hidden_states": randn(videos, 5, 12),
    },
    streams=("hidden_states", "encoder_hidden_states"),
    video_last=True,
    returned=1,
    after_attention={"transformer_blocks": "norm2"},
    one_video=True,
)
TWINS = [
    OPEN_SORA,
    OPEN_SORA_PACKED,
    OPEN_SORA_WINDOWS,
    LATTE_T2V,
    LATTE_OF_ONE_LIST,
    OPEN_SORA_PLAN_12,
    OPEN_SORA_PLAN_13,
    VCHITECT,
]
