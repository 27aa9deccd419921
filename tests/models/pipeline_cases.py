"""Diffusers pipelines assembled from small random parts: prompts are given as embeddings, so no text encoder
is needed, and latents are returned, so the autoencoders only tell their shapes (those that encode an image
run)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from model_cases import (
    ALLEGRO,
    COGVIDEOX,
    HUNYUAN,
    HUNYUAN_15,
    KANDINSKY,
    LATTE,
    LTX,
    MOCHI,
    SKYREELS,
    WAN,
    Values,
)
from torch import Tensor


@dataclass(frozen=True)
class PipelineCase:
    """One pipeline.

    Attributes:
        name: of its class.
        parts: makes its components.
        call: arguments for a number of prompts.
        title: what tells it from others of its class.
    """

    name: str
    parts: Callable[[], Values]
    call: Callable[[int], Values]
    title: str = ""

    def build(self) -> Any:
        import diffusers

        pipeline = getattr(diffusers, self.name)(**self.parts())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def generate(
        self, pipeline: Any, num_steps: int = 12, prompts: int = 1, seed: int = 0, **more: Any
    ) -> Tensor:
        generators = [torch.Generator().manual_seed(seed + i) for i in range(prompts)]
        frames = pipeline(
            **self.call(prompts),
            num_inference_steps=num_steps,
            output_type="latent",
            generator=generators if prompts > 1 else generators[0],
            **more,
        ).frames
        return frames

    def __str__(self) -> str:
        return (self.title or self.name).replace(" ", "_").replace(",", "")


def embedding(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def hunyuan_vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )


def flow() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def unipc() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def two_embeddings(prompts: int, tokens: int, channels: int) -> Values:
    return {
        "prompt_embeds": embedding(prompts, tokens, channels),
        "negative_prompt_embeds": embedding(prompts, tokens, channels, scale=0.5),
    }


def two_masks(prompts: int, tokens: int) -> Values:
    return {
        "prompt_attention_mask": torch.ones(prompts, tokens),
        "negative_prompt_attention_mask": torch.ones(prompts, tokens),
    }


NO_TEXT = {"tokenizer": None, "text_encoder": None}
NO_TEXTS = {**NO_TEXT, "tokenizer_2": None, "text_encoder_2": None}
SMALL = {"height": 32, "width": 32}


def _latte() -> Values:
    from diffusers import AutoencoderKL, DDIMScheduler

    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=4,
    )
    return {**NO_TEXT, "vae": vae, "transformer": LATTE.model(), "scheduler": DDIMScheduler()}


def _cogvideox(in_channels: int = 4) -> Values:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1
    )
    model = COGVIDEOX.model()
    if in_channels != 4:
        config = {**dict(model.config), "in_channels": in_channels}
        model = replace(COGVIDEOX, build=lambda: CogVideoXTransformer3DModel.from_config(config)).model()
    return {**NO_TEXT, "vae": vae, "transformer": model, "scheduler": CogVideoXDDIMScheduler()}


def _wan(in_channels: int = 4, **config: Any) -> Any:
    from diffusers import WanTransformer3DModel

    model = WAN.model()
    config = {**dict(model.config), "in_channels": in_channels, **config}
    return replace(WAN, build=lambda: WanTransformer3DModel.from_config(config)).model()


def _ltx() -> Values:
    from diffusers import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
    return {**NO_TEXT, "vae": vae.eval(), "transformer": LTX.model(), "scheduler": flow()}


def _mochi() -> Values:
    from diffusers import AutoencoderKLMochi

    vae = AutoencoderKLMochi(
        latent_channels=4,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return {**NO_TEXT, "vae": vae, "transformer": MOCHI.model(), "scheduler": flow()}


def _allegro() -> Values:
    from diffusers import AutoencoderKLAllegro, EulerAncestralDiscreteScheduler

    vae = AutoencoderKLAllegro(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2
    )
    return {
        **NO_TEXT,
        "vae": vae,
        "transformer": ALLEGRO.model(),
        "scheduler": EulerAncestralDiscreteScheduler(),
    }


def _hunyuan_15() -> Values:
    from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
    from diffusers.guiders import ClassifierFreeGuidance

    config = {**dict(HUNYUAN_15.model().config), "in_channels": 9}
    model = replace(HUNYUAN_15, build=lambda: HunyuanVideo15Transformer3DModel.from_config(config)).model()
    vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1)
    return {
        **NO_TEXTS,
        "vae": vae,
        "transformer": model,
        "scheduler": flow(),
        "guider": ClassifierFreeGuidance(guidance_scale=3.0),
    }


def _image(count: int) -> Any:
    import numpy
    import PIL.Image

    return PIL.Image.fromarray(numpy.full((32, 32, 3), 90 + count, dtype=numpy.uint8))


PIPELINES = [
    PipelineCase(
        "LattePipeline",
        _latte,
        lambda n: {
            **two_embeddings(n, 5, 12),
            **SMALL,
            "negative_prompt": None,
            "video_length": 3,
            "clean_caption": False,
            "mask_feature": False,
        },
    ),
    PipelineCase(
        "CogVideoXPipeline", _cogvideox, lambda n: {**two_embeddings(n, 5, 12), **SMALL, "num_frames": 9}
    ),
    PipelineCase(
        "CogVideoXImageToVideoPipeline",
        lambda: _cogvideox(8),
        lambda n: {**two_embeddings(n, 5, 12), **SMALL, "num_frames": 9, "image": _image(n)},
    ),
    PipelineCase(
        "WanPipeline",
        lambda: {**NO_TEXT, "vae": wan_vae(), "transformer": WAN.model(), "scheduler": flow()},
        lambda n: {**two_embeddings(n, 5, 12), **SMALL, "num_frames": 9},
    ),
    PipelineCase(
        "WanPipeline",
        lambda: {
            **NO_TEXT,
            "vae": wan_vae(),
            "transformer": WAN.model(),
            "transformer_2": WAN.model(1),
            "boundary_ratio": 0.8,
            "scheduler": unipc(),
        },
        lambda n: {**two_embeddings(n, 5, 12), **SMALL, "num_frames": 9},
        title="WanPipeline, two transformers",
    ),
    PipelineCase(
        "WanImageToVideoPipeline",
        lambda: {
            **NO_TEXT,
            "vae": wan_vae(),
            "transformer": _wan(12),
            "scheduler": unipc(),
            "image_processor": None,
            "image_encoder": None,
        },
        lambda n: {**two_embeddings(n, 5, 12), **SMALL, "num_frames": 9, "image": _image(n)},
    ),
    PipelineCase(
        "WanImageToVideoPipeline",
        lambda: {
            **NO_TEXT,
            "vae": wan_vae(),
            "transformer": WAN.model(),
            "scheduler": unipc(),
            "image_processor": None,
            "image_encoder": None,
            "expand_timesteps": True,
        },
        lambda n: {**two_embeddings(n, 5, 12), **SMALL, "num_frames": 9, "image": _image(n)},
        title="WanImageToVideoPipeline, one timestep per token",
    ),
    PipelineCase(
        "LTXPipeline",
        _ltx,
        lambda n: {
            **two_embeddings(n, 5, 12),
            **two_masks(n, 5),
            "height": 64,
            "width": 96,
            "num_frames": 17,
        },
    ),
    PipelineCase(
        "LTXImageToVideoPipeline",
        _ltx,
        lambda n: {
            **two_embeddings(n, 5, 12),
            **two_masks(n, 5),
            "height": 64,
            "width": 96,
            "num_frames": 17,
            "image": _image(n),
        },
    ),
    PipelineCase(
        "HunyuanVideoPipeline",
        lambda: {**NO_TEXTS, "vae": hunyuan_vae(), "transformer": HUNYUAN.model(), "scheduler": flow()},
        lambda n: {
            **two_embeddings(n, 5, 12),
            **two_masks(n, 5),
            **SMALL,
            "num_frames": 9,
            "true_cfg_scale": 2.0,
            "pooled_prompt_embeds": embedding(n, 8),
            "negative_pooled_prompt_embeds": embedding(n, 8),
        },
    ),
    PipelineCase(
        "HunyuanVideo15Pipeline",
        _hunyuan_15,
        lambda n: {
            "prompt_embeds": embedding(n, 5, 12),
            "prompt_embeds_mask": torch.ones(n, 5),
            "negative_prompt_embeds": embedding(n, 5, 12, scale=0.5),
            "negative_prompt_embeds_mask": torch.ones(n, 5),
            "prompt_embeds_2": embedding(n, 4, 8),
            "prompt_embeds_mask_2": torch.ones(n, 4),
            "negative_prompt_embeds_2": embedding(n, 4, 8, scale=0.5),
            "negative_prompt_embeds_mask_2": torch.ones(n, 4),
            **SMALL,
            "num_frames": 9,
        },
    ),
    PipelineCase(
        "MochiPipeline",
        _mochi,
        lambda n: {**two_embeddings(n, 5, 16), **two_masks(n, 5), **SMALL, "num_frames": 13},
    ),
    PipelineCase(
        "AllegroPipeline",
        _allegro,
        lambda n: {
            **two_embeddings(n, 5, 12),
            **two_masks(n, 5),
            **SMALL,
            "negative_prompt": None,
            "num_frames": 12,
            "clean_caption": False,
        },
    ),
    PipelineCase(
        "SkyReelsV2Pipeline",
        lambda: {**NO_TEXT, "vae": wan_vae(), "transformer": SKYREELS.model(), "scheduler": unipc()},
        lambda n: {**two_embeddings(n, 5, 12), **SMALL, "num_frames": 9},
    ),
    PipelineCase(
        "SkyReelsV2DiffusionForcingPipeline",
        lambda: {**NO_TEXT, "vae": wan_vae(), "transformer": SKYREELS.model(), "scheduler": unipc()},
        lambda n: {
            **two_embeddings(n, 5, 12),
            **SMALL,
            "prompt": None,
            "num_frames": 17,
            "base_num_frames": 9,
            "overlap_history": 1,
        },
    ),
    PipelineCase(
        "Kandinsky5T2VPipeline",
        lambda: {**NO_TEXTS, "vae": hunyuan_vae(), "transformer": KANDINSKY.model(), "scheduler": flow()},
        lambda n: {
            "prompt_embeds_qwen": embedding(n, 5, 12),
            "prompt_embeds_clip": embedding(n, 8),
            "prompt_cu_seqlens": torch.arange(n + 1) * 5,
            "negative_prompt_embeds_qwen": embedding(n, 5, 12, scale=0.5),
            "negative_prompt_embeds_clip": embedding(n, 8, scale=0.5),
            "negative_prompt_cu_seqlens": torch.arange(n + 1) * 5,
            **SMALL,
            "num_frames": 9,
        },
    ),
]
