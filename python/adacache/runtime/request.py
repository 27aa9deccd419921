# SPDX-License-Identifier: Apache-2.0
"""One generation: its decider, its kept tensors, its guidance branches, and its trace. Never shared."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adacache.checks import whole
from adacache.policies.base import Action, Decider, Plan, Policy, Step, Sums, What
from adacache.rows import Split, to_device
from adacache.runtime.ranks import Ranks, Share
from adacache.runtime.store import Store
from adacache.sites import MODEL, ModelSites, Site
from adacache.trace import Trace


@dataclass(frozen=True)
class Facts:
    """What a forward call shows of itself before it runs.

    Attributes:
        shape, device: of the latents.
        timestep: of any shape; a tensor is not read.
        context: name of the guidance branch, if the pipeline states it.
        must_compute: the call has side effects, such as keys and values that the model caches itself.
    """

    shape: tuple[int, ...]
    device: torch.device
    timestep: Tensor | float | None = None
    context: str | None = None
    must_compute: bool = False

    def read_timestep(self) -> float | None:
        """The mean timestep; of a device tensor, this synchronizes."""
        if isinstance(self.timestep, Tensor):
            # The mean, because the first tokens' timestep is always 0 where an image is given.
            return float(self.timestep.double().mean())
        return None if self.timestep is None else float(self.timestep)


@dataclass(eq=False)
class Branch:
    """One forward call of each step: a guidance branch, or a part of the clip.

    Attributes:
        index: 0 is the branch that is measured; the others follow its decisions.
        videos: decision of each row of its batch.
        video_of_row: the same as int32 [B] on the device; None if there is one decision.
        frames: latent frames of its tokens.
        order: positions of the blocks that ran at its last computed step; None before the first.
        chained: positions of blocks whose input was the very output of the block before.
        kept_at: per kept site, the step at which each decision's rows were kept (0: never).
        off_plan: sites and decisions whose rows were kept at a step that the plan did not compute; with a
            recurrence, for all further steps.
        shares: per measured site, what all ranks have of it.
        inputs: shapes and dtypes of the model's arguments when it last computed as one graph.
    """

    index: int
    shape: tuple[int, ...] = ()
    videos: list[int] = field(default_factory=list)
    video_of_row: Tensor | None = None
    frames: int = 1
    order: list[int] | None = None
    chained: set[int] = field(default_factory=set)
    kept_at: dict[Site, list[int]] = field(default_factory=dict)
    off_plan: set[tuple[Site, int]] = field(default_factory=set)
    shares: dict[Site, Share] = field(default_factory=dict)
    inputs: list[Any] | None = None

    def forget(self) -> None:
        """Makes the branch compute at its next call."""
        self.order = self.inputs = None
        self.chained = set()
        self.kept_at.clear()
        self.off_plan.clear()


class Request:
    """The state of one generation on one model.

    Args:
        policy: the settings.
        sites: of the model.
        num_steps: steps of the schedule.
        num_videos: videos in the batch.
        video_of_row: video of each row of the batch; None: row b belongs to video b % num_videos, as guidance
            in one batch orders rows (conditional rows first).
        branches: forward calls per step: 1 with guidance in one batch, 2 with guidance in two calls.
        may_restart: the first step may turn out to have had calls of another generation, so that what every
            call of it measured is kept until the third step.
        ranks: the processes that run the same calls, each with a part; None: there is one.

    Raises:
        ValueError: an argument does not fit, or the policy does not fit the model or the schedule.
    """

    def __init__(
        self,
        policy: Policy,
        sites: ModelSites,
        *,
        num_steps: int,
        num_videos: int,
        video_of_row: Sequence[int] | None = None,
        branches: int = 1,
        may_restart: bool = False,
        ranks: Ranks | None = None,
    ):
        whole(1)(num_videos, "num_videos")
        whole(1)(branches, "branches")
        if video_of_row is not None:
            for row, video in enumerate(video_of_row):
                whole(0, num_videos - 1)(video, f"video_of_row[{row}]")
        self.policy = policy
        self.sites = sites
        self.num_steps = num_steps
        self.num_videos = num_videos
        self.branches_per_step = branches
        self.may_restart = may_restart
        self.ranks = ranks
        self.step = 0
        self.ended_by: str | None = None
        self.closed = False
        self.store = Store()
        self.plan = Plan()
        self.output_forms: dict[Any, Any] = {}
        """Per branch and site, the form of a kept output (see `runtime.outputs`)."""
        self.guided: dict[str, Branch] = {}
        """What is kept of guided outputs (see `runtime.guided`)."""
        self._video_of_row = None if video_of_row is None else list(video_of_row)
        self._branches: dict[Hashable, Branch] = {}
        self._decider: Decider | None = None
        self._computed: list[list[bool]] = []
        self._timesteps: list[Tensor | float | None] = []

    @property
    def decisions(self) -> int:
        """Rows of the decision state: one per video, or one for all."""
        return self.num_videos if self.policy.per_video else 1

    @property
    def decider(self) -> Decider:
        assert self._decider is not None, "no call has begun"
        return self._decider

    def alike(self) -> dict[str, int]:
        """What this request has in common with those of the other ranks, as whole numbers."""
        settings = json.dumps(self.policy.describe(), sort_keys=True, default=repr)
        return {
            "settings": zlib.crc32(settings.encode()),
            "num_steps": self.num_steps,
            "step": self.step,
            "decisions": self.decisions,
        }

    @property
    def current_step(self) -> Step:
        """The step under way, without its timestep."""
        return Step(self.step, self.num_steps)

    @property
    def caches(self) -> Store:
        """The kept tensors; empty (false) after the request has ended."""
        return self.store

    def fits(self, rows: int) -> bool:
        """Whether a batch of so many rows can hold this request's videos."""
        if self._video_of_row is not None:
            return rows == len(self._video_of_row)
        return rows % self.num_videos == 0

    def begin_call(self, facts: Facts, new_step: bool, key: Hashable) -> Branch:
        """Begins a forward call.

        Args:
            facts: of the call.
            new_step: whether it is the first call of a step.
            key: identifies the branch among the calls of a step.

        Raises:
            RuntimeError: all steps have run, or an error has ended the request.
            ValueError: the rows do not fit the videos.
        """
        if self.ended_by is not None:
            raise RuntimeError(
                f"request: ended at step {self.step} by an error ({self.ended_by}); open a new request"
            )
        if new_step and self.step >= self.num_steps:
            raise RuntimeError(
                f"num_steps: this request was opened for {self.num_steps} steps and all have run; open a new "
                "request, or enable AdaCache with the number of steps that the sampler runs"
            )
        rows = facts.shape[0]
        if self._video_of_row is not None and len(self._video_of_row) != rows:
            raise ValueError(
                f"video_of_row: expected {rows} entries, one per row of the latents, "
                f"got {len(self._video_of_row)}"
            )
        if not self.fits(rows):
            raise ValueError(
                f"num_videos: expected a divisor of the {rows} rows of the latents, got {self.num_videos}"
            )
        if self._decider is None:
            with torch.inference_mode(False):
                self._device = facts.device
                self._decider = self.policy.start(self.sites, self.num_steps, self.decisions, self._device)
        branch = self._branches.get(key)
        if branch is None:
            branch = self._branches[key] = Branch(len(self._branches))
        if branch.shape != facts.shape:
            self.reshape(branch, facts)
        if new_step:
            self.step += 1
            self.store.step = self.step
            if self.step == 3:
                self.store.forget_first()
            self._computed.append([False] * self.decisions)
            self._timesteps.append(facts.timestep)
            timestep = facts.read_timestep() if self.decider.needs_timestep else None
            self.plan = self.decider.plan(Step(self.step, self.num_steps, timestep))
            keeps = self.decider.keeps
            if MODEL not in keeps and not any(keep.what is What.RESIDUAL for keep in keeps.values()):
                self.note_computed([True] * self.decisions)
        return branch

    def reshape(self, branch: Branch, facts: Facts) -> None:
        """A branch's first call, or its first of a new shape: nothing that it kept fits."""
        rows = facts.shape[0]
        videos = self._video_of_row or [row % self.num_videos for row in range(rows)]
        branch.videos = videos if self.policy.per_video else [0] * rows
        branch.shape = facts.shape
        branch.shares.clear()
        branch.video_of_row = None
        if self.decisions > 1:
            branch.video_of_row = to_device(torch.tensor(branch.videos, dtype=torch.int32), facts.device)
        branch.forget()
        self.store.drop(branch.index)
        self.output_forms = {key: form for key, form in self.output_forms.items() if key[0] != branch.index}

    def actions(self, branch: Branch, planned: Site, kept: Site) -> list[Action]:
        """Per decision, what a call of this branch does at a site.

        A branch that has nothing valid to reuse computes: it never ran, or it was left out at the last
        computed step.

        Args:
            planned: the site that the plan names; kept: the site under which its tensors are kept.
        """
        actions = self.plan.actions.get(planned, [Action.COMPUTE] * self.decisions)
        own = branch.kept_at.get(kept, [0] * self.decisions)
        newest = self.lead.kept_at.get(kept, own)
        return [
            Action.COMPUTE if mine < 1 or mine < latest else action
            for action, mine, latest in zip(actions, own, newest, strict=True)
        ]

    def coefficients(self, branch: Branch, planned: Site | None, actions: Sequence[Action]) -> Tensor | None:
        """Of the forecast at a site, float32 [decisions, factors]. None: nothing is forecast.

        They are (1, 0, ...) for a decision to reuse, and where the branch computed the site at a step that
        the plan did not: the plan's forecast counts from another step."""
        if planned is None or Action.FORECAST not in actions:
            return None
        given = self.plan.coefficients[planned]
        forecasts = [
            action is Action.FORECAST and (planned, video) not in branch.off_plan
            for video, action in enumerate(actions)
        ]
        if all(forecasts):
            return given
        plain = torch.zeros_like(given)
        plain[:, 0] = 1.0
        chosen = to_device(torch.tensor(forecasts)[:, None], given.device)
        return torch.where(chosen, given, plain)

    def split(self, branch: Branch, actions: Sequence[Action], device: torch.device) -> Split:
        """The rows of a branch's batch that compute and those that do not."""
        return Split([actions[video] is Action.COMPUTE for video in branch.videos], device)

    def gaps(self, branch: Branch, site: Site) -> list[int]:
        """Per row of a branch's batch, steps since the site was last kept (1 before the first time)."""
        kept = branch.kept_at.get(site, [0] * self.decisions)
        return [max(1, self.step - kept[video]) if kept[video] else 1 for video in branch.videos]

    def note_kept(self, branch: Branch, site: Site, actions: Sequence[Action], keys: Sequence[Any]) -> None:
        """Notes that a site's features, which are stored under these keys, are of this step for the videos
        that computed it."""
        kept = branch.kept_at.setdefault(site, [0] * self.decisions)
        keep = self.decider.keeps.get(site)
        recurs = keep is not None and keep.recurrence is not None
        for video, action in enumerate(actions):
            if action is Action.COMPUTE:
                kept[video] = self.step
                planned = self.plan.actions.get(site)
                # A feature of a new shape lacks the earlier steps that the plan's forecasts count on.
                rows = [row for row, own in enumerate(branch.videos) if own == video]
                lost = recurs and self.step > 1 and any(self.store.kept_once(key, rows) for key in keys)
                if lost or (planned is not None and planned[video] is not Action.COMPUTE):
                    branch.off_plan.add((site, video))
                elif not recurs:
                    branch.off_plan.discard((site, video))

    def note_computed(self, videos: Sequence[bool]) -> None:
        """Notes in the trace which videos computed blocks whose residual is kept."""
        latest = self._computed[-1]
        for video, computed in enumerate(videos):
            latest[video] = latest[video] or computed

    @property
    def lead(self) -> Branch:
        """The branch that is measured."""
        return next(iter(self._branches.values()))

    def restart(self, calls: int, measure: Callable[[Site, Tensor], Sums]) -> None:
        """Takes only the last `calls` calls of the first step for its branches, and decides the first two
        steps again.

        Args:
            measure: (site, old) -> the sums of the last watched residual of a site against an old one.
        """
        first = len(self._branches) - calls
        with torch.inference_mode(False):
            decider = self.policy.start(self.sites, self.num_steps, self.decisions, self._device)
            for number in (1, 2):
                step = Step(number, self.num_steps)
                decider.plan(step)
                for site in decider.watches:
                    old = self.store.first_watched(first, site)
                    if old is not None:
                        decider.observe(step, site, measure(site, old))
        self._decider = decider
        for site in decider.signals:
            self.store.forget_watched(site)
        for key in list(self._branches)[calls:]:
            self.store.drop(self._branches.pop(key).index)

    def free(self) -> None:
        """Frees the kept tensors; a further call of this step computes."""
        self.store.clear()
        for branch in [*self._branches.values(), *self.guided.values()]:
            branch.forget()

    def end(self, reason: str) -> None:
        """Ends the request after an error: frees its tensors and accepts no further call."""
        self.ended_by = reason
        self.store.clear()

    def close(self) -> None:
        """Frees the kept tensors; the trace stays readable."""
        self.closed = True
        self.store.clear()

    @property
    def trace(self) -> Trace:
        """What was measured and decided so far (waits for the device)."""
        return Trace(
            num_steps=self.num_steps,
            num_videos=self.decisions,
            policy=self.policy.describe(),
            computed=[list(videos) for videos in self._computed],
            timesteps=[float(t.double().mean()) if isinstance(t, Tensor) else t for t in self._timesteps],
            measurements=[] if self._decider is None else self._decider.records(),
            cache_bytes=self.store.bytes,
        )
