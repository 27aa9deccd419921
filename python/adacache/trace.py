# SPDX-License-Identifier: Apache-2.0
"""The measurements and decisions of one request, step by step: saved, loaded, plotted, replayed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adacache.checks import anything, array, fields, flag, number, optional, text, whole
from adacache.files import MEBIBYTE, read_json, replacing, write_json
from adacache.plots import draw_traces

FORMAT = 1
SERIES = ("distance", "motion", "factor", "rate")
"""Names that `Trace.series` accepts."""
LARGEST = 64 * MEBIBYTE
"""Largest file in bytes that `Trace.load` reads."""


@dataclass
class Trace:
    """The record of one request.

    Attributes:
        num_steps: steps of the schedule.
        num_videos: videos with separate decisions (1: one decision for the whole batch).
        policy: the settings, from the policy's `describe`.
        computed: per step that ran, per video, whether the block stack was computed.
        timesteps: per step, the timestep, or None if the host does not know it.
        measurements: one record per measured site and step: `step`, `site`, and per video `distance`
            (relative distance to the last computed residual, not divided by the rate), `motion`, `factor`
            (of the motion regularisation, with its gradient), `rate` (steps to the next computed one) and
            `nonfinite`.
            Values that are not finite, and those of videos that did not compute, are None.
        cache_bytes: bytes of all cached residuals, with those of the metric.
    """

    num_steps: int
    num_videos: int
    policy: dict[str, Any]
    computed: list[list[bool]] = field(default_factory=list)
    timesteps: list[float | None] = field(default_factory=list)
    measurements: list[dict[str, Any]] = field(default_factory=list)
    cache_bytes: int = 0

    @property
    def computed_steps(self) -> list[int]:
        """The 1-based steps that ran the blocks for at least one video."""
        return [step for step, videos in enumerate(self.computed, 1) if any(videos)]

    def steps_of(self, video: int) -> list[int]:
        """The 1-based steps that ran the blocks for one video."""
        whole(0, self.num_videos - 1)(video, "video")
        return [step for step, videos in enumerate(self.computed, 1) if videos[video]]

    def followed_by(self, later: Trace) -> Trace:
        """The joint trace of two transformers that run one after the other."""
        gone = len(self.computed)
        moved = [{**record, "step": record["step"] + gone} for record in later.measurements]
        return Trace(
            num_steps=self.num_steps + later.num_steps,
            num_videos=self.num_videos,
            policy=self.policy,
            computed=[*self.computed, *later.computed],
            timesteps=[*self.timesteps, *later.timesteps],
            measurements=[*self.measurements, *moved],
            cache_bytes=self.cache_bytes + later.cache_bytes,
        )

    def series(self, name: str, video: int = 0) -> dict[str, list[tuple[int, float]]]:
        """Per measured site, the (step, value) pairs of "distance", "motion", "factor" or "rate" of one
        video; empty if the policy does not measure it."""
        text(*SERIES)(name, "name")
        whole(0, self.num_videos - 1)(video, "video")
        curves: dict[str, list[tuple[int, float]]] = {}
        for record in self.measurements:
            value = record[name][video] if name in record else None
            if value is not None:
                curves.setdefault(record["site"], []).append((record["step"], float(value)))
        return curves

    def save(self, path: str | Path) -> None:
        """Writes the trace as JSON."""
        write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Reads a saved trace.

        Raises:
            ValueError: the file is not a trace of this format; names the field.
            OSError: the file cannot be read.
        """
        try:
            values = read_json(path, _saved, LARGEST)
        except ValueError as error:
            raise ValueError(f"trace: not a saved trace: {error}") from error
        del values["format"]
        return cls(**values)

    def plot(self, path: str | Path) -> None:
        """Draws the schedule, the distance and the motion per step, one colour per video (needs
        matplotlib)."""
        with replacing(path) as temporary:
            draw_traces({f"video {video}": (self, video) for video in range(self.num_videos)}, temporary)


def _saved(value: Any, name: str) -> dict[str, Any]:
    """The check of a saved trace."""
    values: dict[str, Any] = _FIELDS(value, name)
    videos, steps = values["num_videos"], len(values["computed"])
    array(array(flag, videos, videos), 0, values["num_steps"])(values["computed"], "computed")
    array(anything, steps, steps)(values["timesteps"], "timesteps")
    per_video = array(_measured, videos, videos)
    measurement = fields({"step": whole(1, steps), "site": text()}, others=per_video)
    values["measurements"] = array(measurement)(values["measurements"], "measurements")
    return values


def _measured(value: Any, name: str) -> Any:
    return value if isinstance(value, bool) else optional(number())(value, name)


_FIELDS = fields(
    {
        "format": whole(FORMAT, FORMAT),
        "num_steps": whole(1),
        "num_videos": whole(1),
        "policy": fields({}, others=anything),
        "computed": array(anything),
        "timesteps": array(optional(number())),
        "measurements": array(anything),
        "cache_bytes": whole(0),
    }
)
