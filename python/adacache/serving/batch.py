# SPDX-License-Identifier: Apache-2.0
"""One forward call over videos of several requests, each with its own step, schedule and policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from adacache.policies.base import Action, Decider, Keep, Plan, Step, Sums, Watch, What
from adacache.rows import Split, to_device
from adacache.runtime.clock import Tick
from adacache.runtime.request import Branch, Facts, Request
from adacache.serving.pool import Layout, SlotPool
from adacache.serving.store import SlotStore
from adacache.sites import GUIDED, MODEL, ModelSites, Site


def refuse_unsupported(policy: Any, decider: Decider) -> None:
    """Raises ValueError for a method that cannot decide about single videos of a changing batch."""
    keeps, watches = decider.keeps, decider.watches
    reasons = {
        "measures inputs before it plans a step": bool(decider.signals),
        "keeps outputs of sub-layers": any(
            keep.what is What.OUTPUT and site not in (MODEL, GUIDED) for site, keep in keeps.items()
        ),
        "keeps a guided output": GUIDED in keeps,
        "keeps earlier features": any(keep.recurrence is not None for keep in keeps.values()),
        "keeps a residual of the model": any(
            keep.what is What.RESIDUAL and site == MODEL for site, keep in keeps.items()
        ),
        "measures against other steps than the last computed one": any(
            watch.until is not None or watch.age > 1 for watch in watches.values()
        ),
        "measures the model's output": MODEL in watches,
        "reads kept tensors after a step": decider.uses_finished,
    }
    for reason, found in reasons.items():
        if found:
            raise ValueError(
                f"policy: {type(policy).__name__} {reason}, which batches of several requests do not support"
            )


def leaner(site: Site, keep: Keep, dtype: torch.dtype | None) -> Keep:
    """How a site is kept if features in the tokens' dtype or float32 are kept in another dtype."""
    if dtype is None or keep.dtype not in (None, torch.float32):
        return keep
    if dtype == torch.float8_e4m3fn and (keep.factors > 1 or site == MODEL or keep.storage == "sublayer"):
        dtype = torch.bfloat16  # what is extrapolated needs more digits
    return replace(keep, dtype=dtype)


@dataclass(eq=False)
class Member:
    """A video in a call; made after its request has begun the call.

    Attributes:
        request: its own, of one video.
        branch: of its request, for this call.
        rows: its rows of the pool.
        kept_dtype: dtype of kept features whose policy states none or float32; None: theirs.
    """

    request: Request
    branch: Branch
    rows: Sequence[int]
    kept_dtype: torch.dtype | None = None

    @cached_property
    def keeps(self) -> dict[Site, Keep]:
        """What is kept of its blocks."""
        keeps = self.request.decider.keeps.items()
        return {site: self.keep_of(site, keep) for site, keep in keeps if site != MODEL}

    def keep_of(self, site: Site, keep: Keep) -> Keep:
        return leaner(site, keep, self.kept_dtype)

    @cached_property
    def model_keep(self) -> Keep | None:
        """How the model's output is kept, if it is."""
        keep = self.request.decider.keeps.get(MODEL)
        return None if keep is None else self.keep_of(MODEL, keep)

    @property
    def model_action(self) -> Action:
        """What its plan does with the model's own call."""
        return self.request.actions(self.branch, MODEL, MODEL)[0]

    @cached_property
    def computes(self) -> bool:
        """Whether some of its blocks run."""
        return not self.keeps or any(
            Action.COMPUTE in self.request.actions(self.branch, site, site) for site in self.keeps
        )

    @cached_property
    def watches(self) -> Mapping[Site, Watch]:
        """What is measured in this call."""
        return self.request.decider.watches if self.computes else {}


def compatible(members: Sequence[Member], other: Member) -> bool:
    """Whether a video can be in one call with others: blocks are kept in the same way, or not at all, and
    what is measured at a site is measured in the same way."""
    for member in members:
        if member.keeps and other.keeps and member.keeps != other.keeps:
            return False
        outputs = member.model_keep, other.model_keep
        if None not in outputs and outputs[0] != outputs[1]:
            return False
        watches = member.watches
        if any(watches.get(site, watch) != watch for site, watch in other.watches.items()):
            return False
    return True


def batch_order(rows: Sequence[int]) -> list[tuple[int, int]]:
    """(video, copy) of each row of a batch of videos, given the rows of each: conditional rows first."""
    copies = range(max(rows, default=0))
    return [(video, copy) for copy in copies for video, count in enumerate(rows) if copy < count]


class BatchRequest(Request):
    """The requests of the videos of one call, as the runner takes them.

    Args:
        members: the videos.
        sites: of the model.
        pool, layout: of the kept tensors.
        device: of the model.
    """

    def __init__(
        self,
        members: Sequence[Member],
        sites: ModelSites,
        pool: SlotPool,
        layout: Layout,
        device: torch.device,
    ):
        self._device = device
        super().__init__(members[0].request.policy, sites, num_steps=1, num_videos=len(members))
        self.members = list(members)
        self.order = batch_order([len(member.rows) for member in members])
        self._decider = BatchDecider(self)
        rows = [members[video].rows[copy] for video, copy in self.order]
        self.store: SlotStore = SlotStore(pool, layout, rows, self.keep_of, self.keepers, device)
        self._computing = [True] * len(members)

    @property
    def decisions(self) -> int:
        return len(self.members)

    @property
    def lead(self) -> Branch:
        raise NotImplementedError

    def keep_of(self, site: Site) -> Keep:
        """How a range of blocks, or some of its blocks, is kept."""
        found = [keep for member in self.members for keep in [self._keep(member, site)] if keep is not None]
        return found[0]

    def keepers(self, site: Site) -> list[bool]:
        """Per row of the batch, whether its video keeps a range of blocks."""
        own = [self._keep(member, site) is not None for member in self.members]
        return [own[video] for video, _ in self.order]

    @staticmethod
    def _keep(member: Member, site: Site) -> Keep | None:
        if site == MODEL:
            return member.model_keep
        for kept, keep in member.keeps.items():
            if kept.first <= site.first and site.last <= kept.last:
                return keep
        return None

    def computing(self) -> list[bool]:
        """Per video, whether it computes the segment under way."""
        return self._computing

    # What the runner calls.

    def actions(self, branch: Branch, planned: Site, kept: Site) -> list[Action]:
        return [
            member.request.actions(member.branch, planned, kept)[0]
            if self._keep(member, planned) is not None
            else Action.COMPUTE
            for member in self.members
        ]

    def coefficients(self, branch: Branch, planned: Site | None, actions: Sequence[Action]) -> Tensor | None:
        if planned is None or Action.FORECAST not in actions:
            return None
        return self.weights(planned, actions)

    def weights(self, planned: Site, actions: Sequence[Action]) -> Tensor:
        """Of what is kept at a site, float32 [videos, factors]: of the forecast, or (1, 0, ...)."""
        plain: Tensor | None = None
        rows = []
        for member, action in zip(self.members, actions, strict=True):
            own = None
            if action is Action.FORECAST:
                own = member.request.coefficients(member.branch, planned, [action])
            if own is None:
                if plain is None:
                    weights = [1.0] + [0.0] * (self.keep_of(planned).factors - 1)
                    plain = to_device(torch.tensor([weights]), self._device)
                own = plain
            rows.append(own)
        return torch.cat(rows)

    def split(self, branch: Branch, actions: Sequence[Action], device: torch.device) -> Split:
        return Split([actions[video] is Action.COMPUTE for video in branch.videos], device)

    def gaps(self, branch: Branch, site: Site) -> list[int]:
        own = [member.request.gaps(member.branch, site)[0] for member in self.members]
        return [own[video] for video in branch.videos]

    def note_kept(self, branch: Branch, site: Site, actions: Sequence[Action], keys: Sequence[Any]) -> None:
        for member, action in zip(self.members, actions, strict=True):
            if self._keep(member, site) is not None:
                member.request.note_kept(member.branch, site, [action], [])

    def note_computed(self, videos: Sequence[bool]) -> None:
        self._computing = list(videos)
        for member, computed in zip(self.members, videos, strict=True):
            if computed and member.keeps:
                member.request.note_computed([True])


class BatchBranch(Branch):
    """The branch of a call over several requests."""

    @classmethod
    def of(cls, request: BatchRequest, index: int, facts: Facts, known: Branch | None) -> BatchBranch:
        """The branch of a call; `known`: an earlier call of this branch and shape, whose blocks ran in the
        same order."""
        videos = [video for video, _ in request.order]
        branch = cls(index, facts.shape, videos)
        if len(request.members) > 1:
            branch.video_of_row = to_device(torch.tensor(videos, dtype=torch.int32), facts.device)
        if known is not None:
            branch.order, branch.chained = known.order, known.chained
        return branch


class BatchDecider(Decider):
    """Distributes what a call measures to the deciders of its videos."""

    def __init__(self, request: BatchRequest):
        self._request = request
        self.keeps = {site: keep for member in request.members for site, keep in member.keeps.items()}
        self.watches = {site: watch for member in request.members for site, watch in member.watches.items()}

    def plan(self, step: Step) -> Plan:
        return Plan()

    def observe(self, step: Step, site: Site, sums: Sums) -> None:
        request = self._request
        per_row = sums.elements * len(request.members) / sums.rows
        groups: dict[Any, list[int]] = {}
        for video, (member, computes) in enumerate(zip(request.members, request.computing(), strict=True)):
            if not computes or site not in member.watches:
                continue
            decider = member.request.decider
            rule = decider.shared_rule(site)
            key = video if rule is None else (type(decider), rule, len(member.rows))
            groups.setdefault(key, []).append(video)
        for videos in groups.values():
            members = [request.members[video] for video in videos]
            requests = [member.request for member in members]
            rows = len(members[0].rows)
            values = sums.values
            if len(videos) < len(values):
                values = torch.cat([values[video : video + 1] for video in videos])
            own = Sums(values, sums.strides, sums.frames, per_row * rows, rows * len(videos))
            if len(videos) > 1:
                steps = [request.current_step for request in requests]
                deciders = [request.decider for request in requests]
                type(deciders[0]).observe_together(deciders, steps, site, own)
                continue
            plan = requests[0].decider.observe(requests[0].current_step, site, own)
            if plan is not None:
                requests[0].plan = requests[0].plan.revised(plan)


class SlotClock:
    """The clock of a server: each row of a call is a row of a request, which the server states before the
    call."""

    def __init__(self) -> None:
        self.batch: BatchRequest | None = None
        """The videos of the next call."""
        self.index = 0
        """Number of the forward call among those of a step."""
        self._known: dict[Any, Branch] = {}

    def tick(self, facts: Facts) -> Tick:
        batch = self.batch
        assert batch is not None
        if facts.shape[0] != len(batch.order):
            raise ValueError(
                f"rows: expected {len(batch.order)} rows of the latents, one per slot of the call, "
                f"got {facts.shape[0]}"
            )
        key = self.index, facts.shape[1:], tuple(batch.decider.keeps)
        branch = BatchBranch.of(batch, self.index, facts, self._known.get(key))
        self._known[key] = branch
        return Tick(batch, branch)

    def tock(self, tick: Tick) -> None:
        pass
