"""Runs recorded cases of the published AdaCache code again: same computed steps, same final latent?

A directory holds one weights_*.safetensors and, per case, CASE.json (shape, settings, what was measured) and
CASE.npz (inputs and results). See tests/golden/README.md for the format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import adacache_kernels
from adacache.api import disable, enable
from adacache.models.rectified_flow import guided_velocity
from adacache.models.stdit3 import STDiT3, STDiT3Config
from adacache.policies import AdaCache, MotionRegularization, Policy

TOLERANCE = 1e-4
"""Largest mean|a - b| / mean|b| of the final latent in float32."""

METRIC_PARTS = {
    "t-attn": "temporal_attention",
    "s-attn": "spatial_attention",
    "ca-mlp": "cross_attention_mlp",
}
"""The published names of the measured residual, and ours."""

PUBLISHED_DEFAULTS: dict[str, Any] = {
    "cache_loc": [13],
    "cache_res": "t-attn",
    "apply_moreg": False,
    "moreg_strides": [1],
    "moreg_steps": [10, 90],
    "moreg_hyp": [0.385, 8, 1, 2],
    "mograd_mul": 10,
}
"""What the published block takes for a setting that is not given."""


class GoldenError(ValueError):
    """A recorded case that cannot be run: a missing file, a missing field, or an array that does not fit."""


@dataclass(frozen=True)
class Case:
    """One recorded run, ready to be run again."""

    name: str
    num_steps: int
    videos: int
    cfg_scale: float
    step_scale: float
    fps: float
    pixel_height: int
    pixel_width: int
    config: STDiT3Config
    settings: dict[str, Any]
    computed_steps: list[int]
    metric_log: list[dict[str, Any]]
    arrays: dict[str, Tensor]

    def policy(self, cache: str) -> AdaCache:
        """The recorded settings under our names."""
        values, motion = {**PUBLISHED_DEFAULTS, **self.settings}, None
        if values["apply_moreg"]:
            scale, power, divisor = values["moreg_hyp"][:3]
            motion = MotionRegularization(
                strides=tuple(values["moreg_strides"]),
                window=tuple(values["moreg_steps"]),
                scale=scale,
                power=power,
                divisor=divisor,
                gradient_weight=values["mograd_mul"],
            )
        return AdaCache(
            codebook={float(threshold): int(rate) for threshold, rate in values["codebook"]},
            metric_blocks=values["cache_loc"],
            metric_part=METRIC_PARTS[values["cache_res"]],
            motion=motion,
            per_video=False,
            cache=cache,
        )


@dataclass(frozen=True)
class Outcome:
    """How one case came out with one cache kind on one backend ("off": without AdaCache)."""

    case: str
    backend: str
    cache: str
    computed: int
    recorded: int
    steps_match: bool
    latent_error: float
    """mean|a - b| / mean|b| of the final latent."""
    distance_error: float
    """Largest relative difference between a measured distance and the recorded one; NaN without
    measurements."""

    @property
    def passed(self) -> bool:
        return self.steps_match and self.latent_error <= TOLERANCE


def verify(
    directory: str | Path,
    *,
    backends: Sequence[str],
    caches: Sequence[str] = ("stack", "sublayer"),
    device: str = "cpu",
) -> Iterable[Outcome]:
    """Yields one outcome per case, backend and cache kind, and one per case without AdaCache.

    Raises:
        GoldenError: naming what is missing from the directory or does not fit.
    """
    paths = sorted(Path(directory).glob("*.json"))
    if not Path(directory).is_dir():
        raise GoldenError(f"{directory}: no such directory")
    if not paths:
        raise GoldenError(f"{directory}: holds no CASE.json")
    weights = sorted(Path(directory).glob("weights_*.safetensors"))
    if len(weights) != 1:
        raise GoldenError(f"{directory}: expected one weights_*.safetensors, got {[w.name for w in weights]}")
    orphans = sorted(a.name for a in Path(directory).glob("*.npz") if a.with_suffix(".json") not in paths)
    if orphans:
        raise GoldenError(f"{directory}: no CASE.json beside {', '.join(orphans)}")
    cases = [read_case(path) for path in paths]
    for case in cases:
        try:
            model = STDiT3.from_safetensors(case.config, weights[0]).to(device)
        except ValueError as error:
            raise GoldenError(f"{case.name}.json: model: {error}") from error
        plain = run_case(case, model, device)
        yield Outcome(
            case.name,
            "-",
            "off",
            case.num_steps,
            case.num_steps,
            True,
            _error(plain, case, "z_no_cache"),
            np.nan,
        )
        for backend in backends:
            for cache in caches:
                with adacache_kernels.use_backend(backend):
                    yield _verify_case(case, model, backend, cache, device)


def _verify_case(case: Case, model: STDiT3, backend: str, cache: str, device: str) -> Outcome:
    policy: Policy = case.policy(cache)
    handle = enable(model, policy, num_steps=case.num_steps)
    try:
        with handle.request(num_videos=case.videos):
            final = run_case(case, model, device)
        trace = handle.trace
    finally:
        disable(model)
    pairs = [
        (record["distance"][0], log["rel_l1"])
        for record, log in zip(trace.measurements, case.metric_log, strict=False)
    ]
    return Outcome(
        case=case.name,
        backend=backend,
        cache=cache,
        computed=len(trace.computed_steps),
        recorded=len(case.computed_steps),
        steps_match=trace.computed_steps == case.computed_steps,
        latent_error=_error(final, case, "z_adacache"),
        distance_error=max(
            (abs(ours - theirs) / abs(theirs) if ours is not None else np.inf for ours, theirs in pairs),
            default=np.nan,
        ),
    )


@torch.no_grad()
def run_case(case: Case, model: STDiT3, device: str = "cpu") -> Tensor:
    """The recorded loop: even timesteps, guidance in one batch, frames that x_mask excludes kept as given."""
    arrays = {name: value.to(device) for name, value in case.arrays.items()}
    z, x_mask = arrays["z0"], arrays.get("x_mask")
    conditions: dict[str, Any] = {
        "mask": arrays["mask"],
        "fps": case.fps,
        "height": case.pixel_height,
        "width": case.pixel_width,
    }
    if x_mask is not None:
        conditions["x_mask"] = x_mask.repeat(2, 1)
    for i in range(case.num_steps):
        velocity = guided_velocity(
            model, z, (1 - i / case.num_steps) * 1000, arrays["y"], case.cfg_scale, **conditions
        )
        moved = z + case.step_scale * velocity / case.num_steps
        z = moved if x_mask is None else torch.where(x_mask[:, None, :, None, None], moved, z)
    return z


def _error(final: Tensor, case: Case, recorded: str) -> float:
    expected = case.arrays[recorded].double()
    return float((final.cpu().double() - expected).abs().mean() / expected.abs().mean())


def read_case(path: Path) -> Case:
    """Reads and checks CASE.json and the CASE.npz beside it.

    Raises:
        GoldenError: naming the file and the field or array.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise GoldenError(f"{path.name}: not readable as JSON ({error})") from error
    if not isinstance(values, dict):
        raise GoldenError(f"{path.name}: expected an object, got {type(values).__name__}")

    def field(name: str, *kinds: type, of: dict[str, Any] = values) -> Any:
        if name not in of:
            raise GoldenError(f"{path.name}: field {name} is missing")
        if not isinstance(of[name], kinds) or isinstance(of[name], bool) != (bool in kinds):
            raise GoldenError(f"{path.name}: field {name}: expected {kinds[0].__name__}, got {of[name]!r}")
        return of[name]

    model = field("model", dict)
    shape = {item.name: field(item.name, *_kinds(item.name), of=model) for item in fields(STDiT3Config)}
    settings = field("adacache", dict)
    field("codebook", list, of=settings)
    for name, default in PUBLISHED_DEFAULTS.items():
        if name in settings:
            field(name, *((int, float) if name == "mograd_mul" else (type(default),)), of=settings)
    if settings.get("cache_res", "t-attn") not in METRIC_PARTS:
        raise GoldenError(
            f"{path.name}: field cache_res: expected one of {list(METRIC_PARTS)}, "
            f"got {settings['cache_res']!r}"
        )
    size = (field("frames", int), field("latent_height", int), field("latent_width", int))
    case = Case(
        name=path.stem,
        num_steps=field("num_steps", int),
        videos=field("videos", int),
        cfg_scale=field("cfg_scale", float, int),
        step_scale=field("step_scale", float, int),
        fps=field("fps", float, int),
        pixel_height=field("pixel_height", int, float),
        pixel_width=field("pixel_width", int, float),
        config=STDiT3Config(**{**shape, "patch_size": tuple(shape["patch_size"])}),
        settings=settings,
        computed_steps=field("computed_steps", list),
        metric_log=field("metric_log", list),
        arrays=_read_arrays(path.with_suffix(".npz"), values, shape, size, field("image_conditioned", bool)),
    )
    try:
        case.policy("stack")
    except (ValueError, TypeError) as error:
        raise GoldenError(f"{path.name}: field adacache: {error}") from error
    return case


def _kinds(name: str) -> tuple[type, ...]:
    if name == "patch_size":
        return (list,)
    return (bool,) if name in ("pred_sigma", "qk_norm") else (float, int) if name == "mlp_ratio" else (int,)


def _read_arrays(
    path: Path,
    values: dict[str, Any],
    model: dict[str, Any],
    size: tuple[int, int, int],
    image_conditioned: bool,
) -> dict[str, Tensor]:
    videos, tokens, latent = (
        values["videos"],
        model["model_max_length"],
        (values["videos"], model["in_channels"], *size),
    )
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        "z0": (latent, "f"),
        "y": ((2 * videos, 1, tokens, model["caption_channels"]), "f"),
        "mask": ((videos, tokens), "biu"),
        "z_no_cache": (latent, "f"),
        "z_adacache": (latent, "f"),
    }
    if image_conditioned:
        expected["x_mask"] = ((videos, size[0]), "b")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise GoldenError(f"{path.name}: missing") from error
    except Exception as error:  # a damaged archive can fail in zipfile, zlib or NumPy
        raise GoldenError(f"{path.name}: not readable as an archive of arrays ({error})") from error
    for name, (shape, kinds) in expected.items():
        if name not in arrays:
            raise GoldenError(f"{path.name}: array {name} is missing")
        array = arrays[name]
        if array.shape != shape or array.dtype.kind not in kinds:
            raise GoldenError(
                f"{path.name}: array {name}: expected {list(shape)} of kind {kinds!r}, "
                f"got {list(array.shape)} {array.dtype}"
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise GoldenError(f"{path.name}: array {name}: holds values that are not finite")
    return {name: torch.from_numpy(arrays[name]) for name in expected}
