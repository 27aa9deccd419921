# SPDX-License-Identifier: Apache-2.0
"""The parts of ComfyUI that a node uses: a model patcher, its wrappers, a guider, samplers, and Wan's network
with its arguments there."""

from __future__ import annotations

import uuid
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from twins.parts import Attention, mlp, norm


class Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.self_attn, self.cross_attn, self.ffn = Attention(dim), Attention(dim), mlp(dim)
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.modulation = nn.Parameter(torch.randn(1, 3, dim) * 0.2)

    def forward(
        self, x: Tensor, e: Tensor, freqs: Tensor, context: Tensor, transformer_options: Any = None
    ) -> Tensor:
        shift, scale, gate = (self.modulation + e).chunk(3, dim=1)
        x = x + self.self_attn(self.norm1(x + freqs) * (1 + scale) + shift) * gate
        x = x + self.cross_attn(x, context)
        return x + self.ffn(self.norm2(x)) * gate


class WanModel(nn.Module):
    """Latents [B, 4, T, H, W], timestep [B], context [B, L, 12]."""

    def __init__(self, dim: int = 12, layers: int = 4):
        super().__init__()
        self.patch_embedding, self.text_embedding = nn.Linear(4, dim), nn.Linear(12, dim)
        self.time_embedding = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.blocks = nn.ModuleList([Block(dim) for _ in range(layers)])
        self.head = nn.Linear(dim, 4)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        transformer_options: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        tokens = self.patch_embedding(x.flatten(2).transpose(1, 2))
        e = self.time_embedding(timestep[:, None] / 1000).unflatten(-1, (3, -1))
        freqs = torch.linspace(0, 1, tokens.shape[1])[None, :, None]
        text = self.text_embedding(context)
        for block in self.blocks:
            tokens = block(tokens, e=e, freqs=freqs, context=text, transformer_options=transformer_options)
        return self.head(tokens).transpose(1, 2).view(x.shape)


class Executor:
    """Wrappers around a function, outermost first."""

    def __init__(self, original: Any, owner: Any, wrappers: list[Any]):
        self.original, self.class_obj, self.wrappers = original, owner, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)


class BaseModel(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.diffusion_model = network

    def apply_model(self, x: Tensor, t: Tensor, c_crossattn: Tensor, transformer_options: Any) -> Tensor:
        wrappers = transformer_options["wrappers"].get("apply_model", {}).values()
        executor = Executor(self._apply_model, self, [one for group in wrappers for one in group])
        return executor(x, t, None, c_crossattn, None, transformer_options)

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: None,
        c_crossattn: Tensor,
        control: None,
        transformer_options: Any,
    ) -> Tensor:
        sigma = t.view(-1, 1, 1, 1, 1)
        options = {"control": control, "transformer_options": transformer_options}
        return x - sigma * self.diffusion_model(x, t * 1000, context=c_crossattn, **options)


class ModelPatcher:
    """Clones share the model and have wrappers of their own."""

    def __init__(self, model: BaseModel):
        self.model = model
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.attachments: dict[str, Any] = {}

    def clone(self) -> ModelPatcher:
        found = ModelPatcher(self.model)
        for kind, groups in self.wrappers.items():
            found.wrappers[kind] = {key: list(group) for key, group in groups.items()}
        found.attachments = dict(self.attachments)
        return found

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def set_attachments(self, key: str, attachment: Any) -> None:
        self.attachments[key] = attachment

    def executor(self, kind: str, original: Any, owner: Any) -> Executor:
        groups = self.wrappers.get(kind, {}).values()
        return Executor(original, owner, [one for group in groups for one in group])


class Guider:
    """Classifier-free guidance.

    Args:
        batched: per evaluation, whether both conditionings are in one batch; it depends on free memory.
    """

    def __init__(self, patcher: ModelPatcher, conds: list[Tensor], batched: Any, cfg: float = 3.0):
        self.model_patcher, self.cfg, self.batched = patcher, cfg, batched
        self.conds = [(uuid.uuid4(), cond) for cond in conds]
        self.evaluations = 0

    def sample(self, noise: Tensor, sigmas: Tensor, sampler: Any) -> Tensor:
        executor = self.model_patcher.executor("outer_sample", self.outer_sample, self)
        return executor(noise, torch.zeros_like(noise), sampler, sigmas, None, None, True, 0)

    def outer_sample(
        self, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, *others: Any, **kwargs: Any
    ) -> Tensor:
        return sampler(self.predict, noise * sigmas[0], sigmas)

    def predict(self, x: Tensor, sigma: Tensor) -> Tensor:
        executor = self.model_patcher.executor("calc_cond_batch", self.calc_cond_batch, None)
        options = {"transformer_options": {"wrappers": self.model_patcher.wrappers}}
        cond, uncond = executor(self.model_patcher.model, self.conds, x, sigma.expand(len(x)), options)
        return uncond + self.cfg * (cond - uncond)

    def calc_cond_batch(
        self, model: BaseModel, conds: list[Any], x: Tensor, timestep: Tensor, model_options: Any
    ) -> list[Tensor]:
        together = self.batched(self.evaluations)
        self.evaluations += 1
        found: dict[int, Tensor] = {}
        for chunk in [[1, 0]] if together else [[0], [1]]:
            options = dict(model_options["transformer_options"])
            options |= {"cond_or_uncond": chunk, "uuids": [conds[i][0] for i in chunk], "sigmas": timestep}
            texts = torch.cat([conds[i][1].expand(len(x), -1, -1) for i in chunk])
            count = len(chunk)
            output = model.apply_model(
                torch.cat([x] * count), torch.cat([timestep] * count), texts, transformer_options=options
            )
            found |= dict(zip(chunk, output.chunk(count), strict=True))
        return [found[0], found[1]]


def euler(predict: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    for sigma, after in pairwise(sigmas):
        x = x + (x - predict(x, sigma)) / sigma * (after - sigma)
    return x


def heun(predict: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """Two evaluations per step, one in the last."""
    for sigma, after in pairwise(sigmas):
        slope = (x - predict(x, sigma)) / sigma
        there = x + slope * (after - sigma)
        if after > 0:
            slope = (slope + (there - predict(there, after)) / after) / 2
        x = x + slope * (after - sigma)
    return x
