# SPDX-License-Identifier: Apache-2.0
"""Model classes that no package index ships, from their repositories on PYTHONPATH.

Several repositories and tags share a package name (`opensora` is that of Open-Sora and of Open-Sora-Plan), so
a case is identified by the file of its class.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from model_cases import COGVIDEOX, COGVIDEOX_SIZE, LATTE, Case, Values, randn
from model_cases import LATTE_OF_ONE_LIST as TWIN
from pipeline_cases import SMALL, PipelineCase, flow, two_embeddings, two_masks
from torch import Tensor, nn


@dataclass(frozen=True)
class RealCase(Case):
    """A class of another repository.

    Attributes:
        module: the module of the class.
        needs: a word in the source of that module, if only some tags have the tested feature.
    """

    module: str = ""
    needs: str = ""

    def missing(self) -> str | None:
        """Why the class cannot be imported; None if it can."""
        package, *path = self.module.split(".")
        try:
            found = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            found = None
        if found is None:
            return f"{self.name}: no package {package!r} on PYTHONPATH"
        places = [Path(place, *path).with_suffix(".py") for place in found.submodule_search_locations or ()]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            return f"{self.name}: the {package!r} on PYTHONPATH has no {'/'.join(path)}.py"
        if self.needs not in file.read_text():
            return f"{self.name}: {'/'.join(path)}.py on PYTHONPATH has no {self.needs}"
        try:
            importlib.import_module(self.module)
        except Exception as error:  # from any dependency
            return f"{self.name}: importing {self.module} failed ({type(error).__name__}: {error})"
        return None


def _build(module: str, name: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model: nn.Module = getattr(importlib.import_module(module), name)(**config)
        for part in model.modules():
            if "parallel_manager" in part.__dict__:  # videosys
                part.parallel_manager = SimpleNamespace(dp_size=1, cp_size=1, sp_size=1)
        return model

    return build


def _stdit3(module: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        given = {
            "depth": 4,
            "hidden_size": 24,
            "num_heads": 2,
            "in_channels": 4,
            "caption_channels": 12,
            "model_max_length": 5,
            "input_sq_size": 32,
            **config,
        }
        return _build(module, "STDiT3", config=importlib.import_module(module).STDiT3Config(**given))()

    return build


def _stdit3_inputs(videos: int, frames: int) -> Values:
    return {
        "x": randn(videos, 4, frames, 4, 4),
        "y": randn(videos, 1, 5, 12),
        "mask": (torch.arange(5)[None] < torch.arange(videos)[:, None] % 3 + 3).long(),
        "fps": torch.full((videos,), 24.0),
        "height": torch.full((videos,), 32.0),
        "width": torch.full((videos,), 32.0),
    }


def _captions_of_a_length(videos: int, frames: int) -> Values:
    """As required by videosys without flash-attn."""
    return {
        **_stdit3_inputs(videos, frames),
        "mask": (torch.arange(5)[None] < 4).expand(videos, -1).long(),
        "all_timesteps": torch.arange(12.0),
    }


def _whole_captions(videos: int, frames: int) -> Values:
    return {name: v for name, v in _stdit3_inputs(videos, frames).items() if name != "mask"}


def _with_timesteps(inputs: Callable[[int, int], Values]) -> Callable[[int, int], Values]:
    """As passed by the pipelines of videosys; here as many as a block of three videos has rows."""
    return lambda videos, frames: {**inputs(videos, frames), "all_timesteps": torch.arange(9.0)}


def _frames_given(inputs: Callable[[int, int], Values]) -> Callable[[int, int], Values]:
    return lambda videos, frames: {
        **inputs(videos, frames),
        "x_mask": torch.arange(frames).expand(videos, -1) > torch.arange(videos)[:, None] % 2,
    }


def _images_given(videos: int, frames: int) -> Values:
    return {
        **_stdit3_inputs(videos, frames),
        "y_null": randn(videos, 1, 5, 12),
        "cond": randn(videos, 4, frames, 4, 4),
        "cond_mask": torch.ones(videos, 4, frames, 4, 4),
        "mask_index": [0],
    }


def _stdit3_case(
    of: str, module: str, inputs: Callable[[int, int], Values], needs: str = "", **config: Any
) -> RealCase:
    return RealCase(
        f"STDiT3 of {of}",
        _stdit3(module, **config),
        inputs,
        module=module,
        needs=needs,
        lists=("spatial_blocks", "temporal_blocks"),
        alternating=True,
        streams=("x",),
        after_attention={"temporal_blocks": "cross_attn"},
        part="temporal_attention",
        latents="x",
        codebook={0.15: 5, 0.3: 4, 0.5: 3, 1.0: 2, 1.1: 1},
    )


def _latte_inputs(videos: int, frames: int) -> Values:
    return {
        "hidden_states": randn(videos, 4, frames, 4, 4),
        "encoder_hidden_states": randn(videos, 5, 12),
        "encoder_attention_mask": (torch.arange(5)[None] < torch.arange(videos)[:, None] % 3 + 3).float(),
    }


def _latte_case(
    of: str, module: str, inputs: Callable[[int, int], Values] = _latte_inputs, **config: Any
) -> RealCase:
    return RealCase(
        f"LatteT2V of {of}",
        _build(module, "LatteT2V", **{**_LATTE_CONFIG, **config}),
        inputs,
        module=module,
        lists=LATTE.lists,
        alternating=True,
        after_attention={"temporal_transformer_blocks": "norm3"},
        part="temporal_attention",
        places_first=True,
        fixed_frames=True,
    )


_LATTE_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 4,
    "cross_attention_dim": 16,
    "attention_bias": True,
    "sample_size": 4,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 12,
    "video_length": 3,
}


def _plan_inputs(videos: int, frames: int) -> Values:
    return {
        "hidden_states": randn(videos, 4, frames, 4, 4),
        "attention_mask": torch.ones(videos, frames, 4, 4),
        "encoder_hidden_states": randn(videos, 1, 5, 12),
        "encoder_attention_mask": (
            torch.arange(5)[None, None] < torch.arange(videos)[:, None, None] % 3 + 3
        ).float(),
    }


def _plan_12_case(of: str, module: str, **config: Any) -> RealCase:
    return RealCase(
        f"OpenSoraT2V of {of}",
        _build(
            module,
            "OpenSoraT2V",
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            cross_attention_dim=24,
            attention_bias=True,
            sample_size=(4, 4),
            sample_size_t=3,
            patch_size=2,
            patch_size_t=1,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=12,
            interpolation_scale_h=1.0,
            interpolation_scale_w=1.0,
            interpolation_scale_t=1.0,
            attention_mode="math",
            use_rope=True,
            **config,
        ),
        _plan_inputs,
        module=module,
        after_attention={"transformer_blocks": "attn2"},
        codebook={0.12: 5, 0.25: 4, 0.45: 3, 0.5: 2, 1.0: 1},
    )


def _plan_13_case(of: str, module: str, **config: Any) -> RealCase:
    return RealCase(
        f"OpenSoraT2V_v1_3 of {of}",
        _build(
            module,
            "OpenSoraT2V_v1_3",
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            cross_attention_dim=24,
            sample_size_h=4,
            sample_size_w=4,
            sample_size_t=3,
            patch_size=2,
            patch_size_t=1,
            activation_fn="gelu-approximate",
            caption_channels=12,
            **config,
        ),
        _plan_inputs,
        module=module,
        after_attention={"transformer_blocks": "attn2"},
    )


LATTE_OF_ONE_LIST = RealCase(
    "Latte of Latte",
    _build(
        "models.latte",
        "Latte",
        input_size=4,
        hidden_size=16,
        depth=8,
        num_heads=2,
        num_frames=3,
        num_classes=10,
        extras=2,
    ),
    TWIN.inputs,
    module="models.latte",
    lists=TWIN.lists,
    alternating=True,
    streams=("x",),
    after_attention={"blocks[1::2]": "norm2"},
    part="temporal_attention",
    latents="x",
    time="t",
    options={},
    fixed_frames=True,
    keeps_float32=True,
    places_first=True,
)
_OPEN_SORA = "opensora.models.stdit.stdit3"
_PLAN_11 = "opensora.models.diffusion.latte.modeling_latte"
_PLAN_12 = "opensora.models.diffusion.opensora.modeling_opensora"
_PLAN_13 = "opensora.models.diffusion.opensora_v1_3.modeling_opensora"
_VIDEOSYS = "videosys.models.transformers"

STDIT3 = _stdit3_case("Open-Sora", _OPEN_SORA, _stdit3_inputs)
WINDOWS = _stdit3_case(
    "Open-Sora, windows",
    _OPEN_SORA,
    _stdit3_inputs,
    needs="kernel_size",
    kernel_size=(2, 2, -1),
    use_spatial_rope=True,
)
IMAGES_GIVEN = replace(WINDOWS, inputs=_images_given)
"""As in video extension of Open-Sora 1.3. A block calls cross-attention on two parts of its frames, so tests
cannot hook all tokens after the self-attention."""

COGVIDEOX_OF_VIDEOSYS = RealCase(
    "CogVideoXTransformer3DModel of videosys",
    _build(
        f"{_VIDEOSYS}.cogvideox_transformer_3d",
        "CogVideoXTransformer3DModel",
        **COGVIDEOX_SIZE,
    ),
    COGVIDEOX.inputs,
    module=f"{_VIDEOSYS}.cogvideox_transformer_3d",
    streams=COGVIDEOX.streams,
    after_attention=COGVIDEOX.after_attention,
)
VCHITECT = RealCase(
    "VchitectXLTransformerModel of videosys",
    _build(
        f"{_VIDEOSYS}.vchitect_transformer_3d",
        "VchitectXLTransformerModel",
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=4,
    ),
    lambda videos, frames: {
        "hidden_states": randn(videos, frames, 4, 4, 4),
        "encoder_hidden_states": randn(videos, 5, 12),
        "pooled_projections": randn(videos, 8),
    },
    module=f"{_VIDEOSYS}.vchitect_transformer_3d",
    streams=("hidden_states", "encoder_hidden_states"),
    video_last=True,
    returned=1,
    after_attention={"transformer_blocks": "norm2"},
    one_video=True,
)

LATTE_T2V = _latte_case("Latte", "models.latte_t2v")
PLAN_11 = _latte_case("Open-Sora-Plan 1.1", _PLAN_11, sample_size=(4, 4), attention_mode="math")
PLAN_12 = _plan_12_case("Open-Sora-Plan 1.2", _PLAN_12)
PLAN_13 = _plan_13_case("Open-Sora-Plan 1.3, sparse", _PLAN_13, sparse1d=True, sparse_n=4)

REAL = [
    STDIT3,
    _stdit3_case("Open-Sora, captions whole", _OPEN_SORA, _whole_captions),
    _stdit3_case("Open-Sora, frames given", _OPEN_SORA, _frames_given(_stdit3_inputs)),
    WINDOWS,
    _stdit3_case("videosys", f"{_VIDEOSYS}.open_sora_transformer_3d", _captions_of_a_length),
    _stdit3_case(
        "videosys, frames given",
        f"{_VIDEOSYS}.open_sora_transformer_3d",
        _frames_given(_captions_of_a_length),
    ),
    LATTE_T2V,
    LATTE_OF_ONE_LIST,
    _latte_case("videosys", f"{_VIDEOSYS}.latte_transformer_3d", _with_timesteps(_latte_inputs)),
    PLAN_11,
    _latte_case(
        "Open-Sora-Plan 1.1, rotary", _PLAN_11, sample_size=(4, 4), attention_mode="math", use_rope=True
    ),
    _latte_case(
        "videosys, of Open-Sora-Plan 1.1",
        f"{_VIDEOSYS}.open_sora_plan_v110_transformer_3d",
        _with_timesteps(_plan_inputs),
        sample_size=(4, 4),
        attention_mode="math",
    ),
    PLAN_12,
    _plan_12_case("videosys", f"{_VIDEOSYS}.open_sora_plan_v120_transformer_3d"),
    COGVIDEOX_OF_VIDEOSYS,
    VCHITECT,
    _plan_13_case("Open-Sora-Plan 1.3", _PLAN_13, sparse_n=1),
    PLAN_13,
]


@dataclass(frozen=True)
class RealPipeline(PipelineCase):
    """A pipeline of another repository.

    Attributes:
        of: the case of its transformer.
        module: the module of the pipeline class.
        output: the field of the video in the result, and the output type for latents.
    """

    of: RealCase = LATTE_OF_ONE_LIST
    module: str = ""
    output: tuple[str, str] = ("video", "latents")

    def missing(self) -> str | None:
        return self.of.missing() or replace(self.of, name=str(self), module=self.module, needs="").missing()

    def build(self) -> Any:
        pipeline = getattr(importlib.import_module(self.module), self.name)(**self.parts())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def generate(
        self, pipeline: Any, num_steps: int = 12, prompts: int = 1, seed: int = 0, **more: Any
    ) -> Tensor:
        name, latents = self.output
        result = pipeline(
            **self.call(prompts),
            num_inference_steps=num_steps,
            output_type=latents,
            generator=torch.Generator().manual_seed(seed),
            **more,
        )
        video: Tensor = getattr(result, name)
        return video


class Absent(nn.Module):
    """Replaces text encoder and autoencoder: captions are passed as embeddings, latents are returned."""

    device, dtype = torch.device("cpu"), torch.float32
    vae_scale_factor = (4, 8, 8)
    config = SimpleNamespace(block_out_channels=(8,) * 4)


def _pipeline(
    name: str, title: str, of: RealCase, module: str, output: tuple[str, str], **more: Any
) -> RealPipeline:
    def parts() -> Values:
        from diffusers import DDIMScheduler

        return {
            "tokenizer": None,
            "text_encoder": Absent(),
            "vae": Absent(),
            "transformer": of.model(),
            "scheduler": flow() if of is PLAN_13 else DDIMScheduler(),
        }

    return RealPipeline(
        name,
        parts,
        lambda n: {**two_embeddings(n, 5, 12), **SMALL, "negative_prompt": None, **more},
        title=title,
        of=of,
        module=module,
        output=output,
    )


_WITH_MASKS = {**two_masks(1, 5), "num_frames": 9}

REAL_PIPELINES = [
    _pipeline(
        "LattePipeline",
        "LattePipeline of Latte",
        LATTE_T2V,
        "sample.pipeline_latte",
        ("video", "latents"),
        video_length=3,
        clean_caption=False,
        mask_feature=False,
    ),
    _pipeline(
        "VideoGenPipeline",
        "VideoGenPipeline of Open-Sora-Plan 1.1",
        PLAN_11,
        "opensora.sample.pipeline_videogen",
        ("video", "latents"),
        num_frames=9,
        clean_caption=False,
        mask_feature=False,
    ),
    _pipeline(
        "OpenSoraPipeline",
        "OpenSoraPipeline of Open-Sora-Plan 1.2",
        PLAN_12,
        "opensora.sample.pipeline_opensora",
        ("images", "latent"),
        clean_caption=False,
        use_resolution_binning=False,
        **_WITH_MASKS,
    ),
    _pipeline(
        "OpenSoraPipeline",
        "OpenSoraPipeline of Open-Sora-Plan 1.3",
        PLAN_13,
        "opensora.sample.pipeline_opensora",
        ("videos", "latent"),
        **_WITH_MASKS,
        **{f"{name}_2": value for name, value in {**two_embeddings(1, 4, 8), **two_masks(1, 4)}.items()},
    ),
]
