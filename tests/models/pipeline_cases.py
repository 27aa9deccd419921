# SPDX-License-Identifier: Apache-2.0
"""Diffusers pipelines with small random components. Prompts are passed as embeddings, so there is no text
encoder. Latents are returned, so autoencoders only define shapes (and encode images for image-to-video)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from model_cases import (
    ALLEGRO,
    CHRONOEDIT,
    COGVIDEOX,
    CONSISID,
    COSMOS,
    EASYANIMATE,
    HUNYUAN,
    HUNYUAN_15,
    KANDINSKY,
    LATTE,
    LTX,
    MOCHI,
    SANA,
    SKYREELS,
    WAN,
    WAN_VACE,
    Case,
    Values,
)
from torch import Tensor


@dataclass(frozen=True)
class PipelineCase:
    """One pipeline.

    Attributes:
        name: name of the class.
        parts: creates the components.
        call: number of prompts -> arguments of the call.
        title: distinguishes cases of the same class.
        needs: a package that the class imports.
    """

    name: str
    parts: Callable[[], Values]
    call: Callable[[int], Values]
    title: str = ""
    needs: str = "diffusers"

    def build(self) -> Any:
        pytest.importorskip(self.needs)
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


def altered(case: Case, **config: Any) -> Any:
    """The model of a case with a changed configuration."""
    model: Any = case.model()
    kind, config = type(model), {**dict(model.config), "_use_default_values": [], **config}
    return replace(case, build=lambda: kind.from_config(config)).model()


def _cogvideox(case: Case = COGVIDEOX, in_channels: int = 4) -> Values:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler

    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=2, latent_channels=4, layers_per_block=1
    )
    model = altered(case, in_channels=in_channels)
    return {**NO_TEXT, "vae": vae, "transformer": model, "scheduler": CogVideoXDDIMScheduler()}


def _easyanimate() -> Values:
    from diffusers import AutoencoderKLMagvit

    vae = AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 2, "SpatialDownBlock3D"),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 2, "SpatialUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=2,
    )
    return {**NO_TEXT, "vae": vae, "transformer": EASYANIMATE.model(), "scheduler": flow()}


def _cosmos() -> Values:
    from diffusers import AutoencoderKLCosmos, EDMEulerScheduler

    vae = AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8,) * 4,
        decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
        temporal_compression_ratio=4,
        spatial_compression_ratio=4,
    )
    scheduler = EDMEulerScheduler(
        sigma_min=0.002,
        sigma_max=80,
        sigma_data=0.5,
        sigma_schedule="karras",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        rho=7.0,
        final_sigmas_type="sigma_min",
    )
    return {
        **NO_TEXT,
        "vae": vae,
        "transformer": COSMOS.model(),
        "scheduler": scheduler,
        "safety_checker": Unchecked(),
    }


class Unchecked(torch.nn.Module):
    """Replaces the safety checker, which would have to be downloaded and is not used here."""

    device, dtype = torch.device("cpu"), torch.float32


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


def _image_encoder() -> Values:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    return {
        "image_encoder": CLIPVisionModel(config).eval(),
        "image_processor": CLIPImageProcessor(size=32, crop_size=32),
    }


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
        lambda: _cogvideox(in_channels=8),
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
            "transformer": altered(WAN, in_channels=12),
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
    PipelineCase(
        "ChronoEditPipeline",
        lambda: {
            **NO_TEXT,
            "vae": wan_vae(),
            "transformer": altered(CHRONOEDIT, in_channels=12, image_dim=8, added_kv_proj_dim=24),
            "scheduler": unipc(),
            **_image_encoder(),
        },
        # Its attention splits image and text tokens by a fixed number of 512 text tokens.
        lambda n: {**two_embeddings(n, 512, 12), **SMALL, "image": _image(n)},
    ),
    PipelineCase(
        "CosmosTextToWorldPipeline",
        _cosmos,
        lambda n: {**two_embeddings(n, 5, 24), **SMALL, "num_frames": 9},
    ),
    PipelineCase(
        "SanaVideoPipeline",
        lambda: {**NO_TEXT, "vae": wan_vae(), "transformer": SANA.model(), "scheduler": unipc()},
        lambda n: {
            **two_embeddings(n, 5, 8),
            **two_masks(n, 5),
            **SMALL,
            "negative_prompt": None,
            "frames": 9,
            "use_resolution_binning": False,
        },
    ),
    PipelineCase(
        "EasyAnimatePipeline",
        _easyanimate,
        lambda n: {**two_embeddings(n, 5, 12), **two_masks(n, 5), **SMALL, "num_frames": 9},
    ),
    PipelineCase(
        "ConsisIDPipeline",
        lambda: _cogvideox(CONSISID, 8),
        lambda n: {**two_embeddings(n, 5, 12), **SMALL, "num_frames": 9, "image": _image(n)},
        needs="cv2",
    ),
    PipelineCase(
        "WanVACEPipeline",
        lambda: {
            **NO_TEXT,
            "vae": wan_vae(),
            "transformer": altered(WAN_VACE, vace_in_channels=72),
            "scheduler": unipc(),
        },
        lambda n: {**two_embeddings(n, 5, 12), **SMALL, "num_frames": 9},
    ),
]
