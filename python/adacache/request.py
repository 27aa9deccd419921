"""One generation call: its schedule, its caches, where it stands, and its trace. Never shared, never left
over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adacache.policies import Policy, Schedule, StackInfo
from adacache.trace import Trace


@dataclass(frozen=True)
class Call:
    """What one forward call has to do: `computing` and `reusing` hold the rows of the batch, in order."""

    step: int
    branch: int
    computing: list[int]
    reusing: list[int]
    video_of_row: Tensor | None
    """[B] int32 decision of each row, or None if there is only one."""

    @property
    def measures(self) -> bool:
        """Whether this call's residuals decide: those of the first guidance branch do, later branches
        follow."""
        return self.branch == 0


class Request:
    """The state of one generation call on one model.

    Args:
        policy: the settings.
        stack: the model's block stack.
        num_steps: steps of the schedule.
        num_videos: videos in the batch.
        video_of_row: video of each row of the batch; None: row b belongs to video b % num_videos, as guidance
            in one batch has it (conditional rows first).
        branches: forward calls a step: 1 with guidance in one batch, 2 with guidance in two calls.
    """

    def __init__(
        self,
        policy: Policy,
        stack: StackInfo,
        *,
        num_steps: int,
        num_videos: int,
        video_of_row: list[int] | None = None,
        branches: int = 1,
    ):
        if num_videos < 1:
            raise ValueError(f"num_videos: expected at least 1, got {num_videos}")
        if branches < 1:
            raise ValueError(f"branches: expected at least 1, got {branches}")
        if video_of_row is not None:
            outside = [video for video in video_of_row if not 0 <= video < num_videos]
            if outside:
                raise ValueError(f"video_of_row: expected videos in 0..{num_videos - 1}, got {outside}")
        policy.check(num_steps, stack)
        self.policy = policy
        self.stack = stack
        self.num_steps = num_steps
        self.num_videos = num_videos
        self.branches = branches
        self.step = 0
        self.branch = branches - 1
        self.ended_by: str | None = None
        self.shape: tuple[int, ...] | None = None
        self.caches: dict[Any, Tensor] = {}
        self.orders: dict[int, list[Any]] = {}
        """Per guidance branch, the blocks in the order they ran."""
        self.keeps_blocks = policy.cache == "sublayer"
        """Whether one residual is kept per block (or sub-layer), and not one for the stack."""
        self.between = False
        """Whether the model was found to work between its blocks, so that one for the stack would not do."""
        self.cache_bytes = 0
        """Bytes of all kept residuals, the metric's included."""
        self._video_of_row = video_of_row
        self._rows: list[int] = []
        self._rows_on_device: Tensor | None = None
        self._schedule: Schedule | None = None
        self._computed: list[list[bool]] = []
        self._names: list[str] = []
        self._names_of_step: set[str] = set()
        self._kept_at: dict[int, list[int]] = {}
        """Per guidance branch and decision, the step that its residuals are of."""
        self._timesteps: list[Tensor | float] = []

    @property
    def decisions(self) -> int:
        """Rows of the decision state: one per video, or one for all."""
        return self.num_videos if self.policy.per_video else 1

    @property
    def schedule(self) -> Schedule:
        assert self._schedule is not None, "no call has begun"
        return self._schedule

    def begin_call(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        timestep: Tensor | float,
        same_step: bool | None = None,
        context: str | None = None,
    ) -> Call:
        """Advances to the next call and says what it has to do.

        Args:
            shape: [B, ...] of the model's input, the same at every step.
            timestep: of this call, for the trace (a tensor is not read here).
            same_step: whether this is a further guidance branch of the step before; None: known by `context`,
                or else by counting.
            context: name of the guidance branch ("cond", "uncond"), where the pipeline tells; a name that
                comes again begins a step.

        Raises:
            RuntimeError: all steps have run, or the request was ended by an error.
            ValueError: another shape than at the first call, or rows that do not fit the videos.
        """
        if self.ended_by is not None:
            raise RuntimeError(
                f"request: ended at step {self.step} by an error ({self.ended_by}); open a new request"
            )
        if same_step is None:
            same_step = self.same_step(context)
        if self.step >= self.num_steps and not same_step:
            raise RuntimeError(
                f"num_steps: this request was opened for {self.num_steps} steps and all have run; "
                "open a new request, or enable AdaCache with the number of steps that the sampler runs"
            )
        if self._schedule is None:
            self._start(shape, device)
        elif shape != self.shape:
            raise ValueError(f"x: expected the shape of this request's first call {self.shape}, got {shape}")
        if same_step:
            self.branch += 1
        else:
            self.branch = 0
            self.step += 1
            self._names_of_step.clear()
            self._computed.append(self.schedule.computes(self.step))
            self._timesteps.append(timestep)
        branch = self.branch
        if context is not None:
            self._names_of_step.add(context)
            if context not in self._names:
                self._names.append(context)
            branch = self._names.index(context)
        # A branch that sat out the last computed step has nothing to reuse that belongs to it.
        kept = self._kept_at.setdefault(branch, [0] * self.decisions)
        latest = self._kept_at.get(0, kept)
        due = self._computed[-1]
        for video in range(self.decisions):
            due[video] = due[video] or kept[video] < latest[video] or kept[video] < 1
            if due[video]:
                kept[video] = self.step
        return Call(
            step=self.step,
            branch=branch,
            computing=[row for row, video in enumerate(self._rows) if due[video]],
            reusing=[row for row, video in enumerate(self._rows) if not due[video]],
            video_of_row=self._rows_on_device,
        )

    def same_step(self, context: str | None = None) -> bool:
        """Whether the next call is a further guidance branch of this step, from its name or by counting."""
        if context is not None:
            return bool(self._names_of_step) and context not in self._names_of_step
        return self.branch < self.branches - 1

    def forget_kept(self, branch: int) -> None:
        """Has a branch computed at its next call, whatever is due."""
        self._kept_at[branch] = [0] * self.decisions

    def _start(self, shape: tuple[int, ...], device: torch.device) -> None:
        batch = shape[0]
        if self._video_of_row is None and batch % self.num_videos:
            raise ValueError(
                f"num_videos: expected a divisor of the {batch} rows of x, got {self.num_videos}"
            )
        if self._video_of_row is not None and len(self._video_of_row) != batch:
            raise ValueError(
                f"video_of_row: expected {batch} entries as x has rows, got {len(self._video_of_row)}"
            )
        rows = (
            [b % self.num_videos for b in range(batch)] if self._video_of_row is None else self._video_of_row
        )
        self._rows = rows if self.policy.per_video else [0] * batch
        if self.decisions > 1:
            self._rows_on_device = torch.tensor(self._rows, dtype=torch.int32).to(device, non_blocking=True)
        self._schedule = self.policy.start(self.num_steps, self.decisions, self.stack, device)
        self.shape = shape

    @property
    def rows_per_decision(self) -> float:
        """Rows of the batch that one decision is about."""
        return len(self._rows) / self.decisions

    def keep(self, key: Any, value: Tensor) -> Tensor:
        """Puts a new cache under `key`."""
        self.caches[key] = value
        self.cache_bytes = sum(cache.numel() * cache.element_size() for cache in self.caches.values())
        return value

    def end(self, reason: str) -> None:
        """Ends the request after an error: its caches are freed, and it takes no further call."""
        self.ended_by = reason
        self.caches.clear()

    def close(self) -> None:
        """Frees the caches; the trace stays readable."""
        self.caches.clear()

    @property
    def trace(self) -> Trace:
        """What was measured and decided so far (waits for the device)."""
        return Trace(
            num_steps=self.num_steps,
            num_videos=self.decisions,
            policy=self.policy.describe(),
            computed=[list(videos) for videos in self._computed],
            timesteps=[float(t.double().mean()) if isinstance(t, Tensor) else t for t in self._timesteps],
            measurements=[] if self._schedule is None else self._schedule.measurements(),
            cache_bytes=self.cache_bytes,
        )
