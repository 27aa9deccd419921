# SPDX-License-Identifier: Apache-2.0
"""Runs recorded cases of the published AdaCache code again and compares computed steps and final latents.

A directory holds one weights_*.safetensors and, per case, CASE.json (shape, settings, measurements) and
CASE.npz (inputs and results). tests/golden/README.md describes the format.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import adacache_kernels
from adacache.api import disable, enable
from adacache.checks import anything, array, fields, flag, number, text, whole
from adacache.files import MEBIBYTE, read_json
from adacache.models.config import SHAPE, config_of
from adacache.models.rectified_flow import guided_velocity
from adacache.models.stdit3 import STDiT3, STDiT3Config
from adacache.models.weights import check_safetensors
from adacache.policies import AdaCache, MotionRegularization, Policy
from adacache.policies.presets import check_pairs

TOLERANCE = 1e-4
"""Largest mean|a - b| / mean|b| of the final latent in float32."""
TINY = 1e-300
"""Smallest recorded distance that is divided by."""

METRIC_PARTS = {
    "t-attn": "temporal_attention",
    "s-attn": "spatial_attention",
    "ca-mlp": "cross_attention_mlp",
}
"""The published names of the measured residuals, and ours."""

PUBLISHED_DEFAULTS: dict[str, Any] = {
    "cache_loc": [13],
    "cache_res": "t-attn",
    "apply_moreg": False,
    "moreg_strides": [1],
    "moreg_steps": [10, 90],
    "moreg_hyp": [0.385, 8, 1, 2],
    "mograd_mul": 10,
}
"""The published defaults of settings that a case leaves out."""

LARGEST_JSON = 16 * MEBIBYTE
LARGEST_ARRAYS = 256 * MEBIBYTE
"""Bytes of all arrays of a case."""


class GoldenError(ValueError):
    """A recorded case that cannot run: a file or field is missing or wrong, or an array does not fit."""


@dataclass(frozen=True)
class Case:
    """One recorded run."""

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
            codebook=values["codebook"],
            metric_blocks=values["cache_loc"],
            metric_part=METRIC_PARTS[values["cache_res"]],
            motion=motion,
            per_video=False,
            cache=cache,
        )


@dataclass(frozen=True)
class Outcome:
    """The result of one case with one cache kind on one backend ("off": without AdaCache)."""

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
        GoldenError: something in the directory is missing or does not fit; names it.
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
            with torch.device("meta"):  # allocates nothing before the file is known to hold the weights
                check_safetensors(STDiT3(case.config), weights[0])
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
            (
                abs(ours - theirs) / max(theirs, TINY) if ours is not None else np.inf
                for ours, theirs in pairs
            ),
            default=np.nan,
        ),
    )


@torch.no_grad()
def run_case(case: Case, model: STDiT3, device: str = "cpu") -> Tensor:
    """The recorded loop: even timesteps, guidance in one batch; frames that x_mask excludes are kept."""
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
        GoldenError: names the file and the field or array.
    """
    try:
        values = read_json(path, _CASE, LARGEST_JSON)
        steps = values["num_steps"]
        array(whole(1, steps))(values["computed_steps"], "computed_steps")
        config = config_of(values["model"])
    except (OSError, ValueError) as error:
        raise GoldenError(f"{path.name}: {str(error).removeprefix(f'{path}: ')}") from error
    size = (values["frames"], values["latent_height"], values["latent_width"])
    case = Case(
        name=path.stem,
        num_steps=steps,
        videos=values["videos"],
        cfg_scale=values["cfg_scale"],
        step_scale=values["step_scale"],
        fps=values["fps"],
        pixel_height=values["pixel_height"],
        pixel_width=values["pixel_width"],
        config=config,
        settings=values["adacache"],
        computed_steps=values["computed_steps"],
        metric_log=values["metric_log"],
        arrays=_read_arrays(
            path.with_suffix(".npz"), values["videos"], config, size, values["image_conditioned"]
        ),
    )
    try:
        case.policy("stack")
    except ValueError as error:
        raise GoldenError(f"{path.name}: adacache: {error}") from error
    return case


_SIZE = whole(1, 1 << 20)
_CASE = fields(
    {
        "num_steps": whole(1, 10_000),
        "videos": whole(1, 1024),
        "frames": _SIZE,
        "latent_height": _SIZE,
        "latent_width": _SIZE,
        "cfg_scale": number(),
        "step_scale": number(),
        "fps": number(above=0),
        "pixel_height": number(above=0),
        "pixel_width": number(above=0),
        "image_conditioned": flag,
        "model": fields(SHAPE, others=anything),
        "adacache": fields(
            {"codebook": check_pairs},
            {
                "cache_loc": array(whole(0), least=1),
                "cache_res": text(*METRIC_PARTS),
                "apply_moreg": flag,
                "moreg_strides": array(whole(1), least=1),
                "moreg_steps": array(whole(1), 2, 2),
                "moreg_hyp": array(number(), 3, 4),
                "mograd_mul": number(0),
            },
            others=anything,
        ),
        "computed_steps": array(anything, least=1),
        "metric_log": array(fields({"rel_l1": number(0)}, others=anything)),
    },
    others=anything,
)


def _read_arrays(
    path: Path, videos: int, model: STDiT3Config, size: tuple[int, int, int], image_conditioned: bool
) -> dict[str, Tensor]:
    """The arrays of a case. Shapes, types and sizes are checked before an array is read."""
    latent = (videos, model.in_channels, *size)
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "z0": (latent, ("float32",)),
        "y": ((2 * videos, 1, model.model_max_length, model.caption_channels), ("float32",)),
        "mask": ((videos, model.model_max_length), ("bool", "uint8", "int32", "int64")),
        "z_no_cache": (latent, ("float32",)),
        "z_adacache": (latent, ("float32",)),
    }
    if image_conditioned:
        expected["x_mask"] = ((videos, size[0]), ("bool",))
    try:
        bytes_of_all = sum(8 * math.prod(shape) for shape, _ in expected.values())
        if max(bytes_of_all, path.stat().st_size) > LARGEST_ARRAYS:
            raise GoldenError(f"{path.name}: expected arrays and file of at most {LARGEST_ARRAYS} bytes")
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            for name in names:
                if name not in expected:
                    raise GoldenError(f"{path.name}: expected only {list(expected)}, got array {name!r}")
            for name in expected:
                if name not in names:
                    raise GoldenError(f"{path.name}: array {name} is missing")
            return {
                name: _read_array(archive, name, f"{path.name}: array {name}", *expected[name])
                for name in expected
            }
    except FileNotFoundError as error:
        raise GoldenError(f"{path.name}: missing") from error
    except GoldenError:
        raise
    except Exception as error:  # a damaged archive can fail in zipfile, zlib or NumPy
        raise GoldenError(f"{path.name}: not readable as an archive of arrays ({error})") from error


def _read_array(
    archive: zipfile.ZipFile, name: str, label: str, shape: tuple[int, ...], types: tuple[str, ...]
) -> Tensor:
    with archive.open(f"{name}.npy") as file:
        versions = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        found, fortran, dtype = versions[np.lib.format.read_magic(file)](file)
        if found != shape or str(dtype) not in types or fortran:
            order = " in Fortran order" if fortran else ""
            raise GoldenError(
                f"{label}: expected {list(shape)} {' or '.join(types)}, got {list(found)} {dtype}{order}"
            )
        data = file.read(math.prod(shape) * dtype.itemsize)
    array = np.frombuffer(bytearray(data), dtype).reshape(shape)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise GoldenError(f"{label}: contains values that are not finite")
    return torch.from_numpy(array)
