"""What was measured and decided in one request, step by step; can be saved, loaded, plotted and replayed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adacache.plots import draw_traces

FORMAT = 1


@dataclass
class Trace:
    """The record of one request.

    Attributes:
        num_steps: steps of the schedule.
        num_videos: videos with a decision of their own (1 where one decision held for the whole batch).
        policy: the settings, as the policy describes them.
        computed: per step that ran, per video, whether the block stack was computed.
        timesteps: per step, the timestep if it was known on the host, else None.
        measurements: one record per measured site and step: `step`, `site`, and per video `distance`
            (relative distance to the last computed residual, undivided), `motion`, `factor` (of the motion
            regularisation, with its gradient), `rate` (steps to the next computed one) and `nonfinite`.
            Values that were not finite, or belong to a video that did not compute, are None.
        cache_bytes: bytes of all kept residuals, the metric's included.
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
        """The 1-based steps at which the blocks ran for at least one video."""
        return [step for step, videos in enumerate(self.computed, 1) if any(videos)]

    def steps_of(self, video: int) -> list[int]:
        """The 1-based steps at which the blocks ran for one video."""
        if not 0 <= video < self.num_videos:
            raise ValueError(f"video: expected 0..{self.num_videos - 1}, got {video}")
        return [step for step, videos in enumerate(self.computed, 1) if videos[video]]

    def followed_by(self, later: Trace) -> Trace:
        """One trace of two transformers that run one after the other."""
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
        video."""
        curves: dict[str, list[tuple[int, float]]] = {}
        for record in self.measurements:
            value = record[name][video]
            if value is not None:
                curves.setdefault(record["site"], []).append((record["step"], float(value)))
        return curves

    def save(self, path: str | Path) -> None:
        """Writes the trace as JSON."""
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Reads a saved trace.

        Raises:
            ValueError: the file is no trace, or of another format.
        """
        try:
            values = json.loads(Path(path).read_text())
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"trace: {path} is no saved trace of format {FORMAT} ({error})") from error

    def plot(self, path: str | Path) -> None:
        """Draws the schedule, the distance and the motion per step, one colour per video (needs
        matplotlib)."""
        draw_traces({f"video {video}": (self, video) for video in range(self.num_videos)}, path)
