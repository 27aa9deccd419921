# SPDX-License-Identifier: Apache-2.0
"""Runs of a sampler whose outputs are recorded or given, to calibrate planned paths.

The guided outputs are those that the sampler passes to its scheduler's `step`. At a step whose output is
given, the model is not called.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adacache.calibration.runs import Subject
from adacache.integrations.pipelines import transformers
from adacache.interpose import interpose, restore
from adacache.policies import PlannedTimesteps
from adacache.runtime.outputs import flatten

_DRIVE: ContextVar[_Drive | None] = ContextVar("adacache_drive", default=None)

Given = Callable[[int, Sequence[Tensor]], "Tensor | None"]
"""(step, outputs of the steps before it) -> the output of a step, or None: the model computes it."""


@dataclass
class Solver:
    """A scheduler as it is at the start of its loop; runs its steps with given outputs, without a model.

    Attributes:
        scheduler: a copy.
        device: of the latents.
        arguments: per step, the arguments of its `step` besides the output and the latents.
        generators: states of random generators among these, at the start.
    """

    scheduler: Any
    device: torch.device
    arguments: list[dict[str, Any]] = field(default_factory=list)
    generators: dict[int, Tensor] = field(default_factory=dict)

    def run(self, start: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The latents before each step and after the last.

        Args:
            start: latents at the first step.
            outputs: one per step, from the first on.
        """
        scheduler = copy.deepcopy(self.scheduler)
        copies: dict[int, torch.Generator] = {}
        states = [start.to(self.device)]
        for output, arguments in zip(outputs, self.arguments, strict=False):
            own = {name: self._own(value, copies) for name, value in arguments.items()}
            states.append(_latents(scheduler.step(output.to(self.device), sample=states[-1], **own)))
        return [state.cpu() for state in states]

    def _own(self, value: Any, copies: dict[int, torch.Generator]) -> Any:
        if isinstance(value, list):
            return [self._own(one, copies) for one in value]
        if not isinstance(value, torch.Generator):
            return value
        if id(value) not in copies:
            copies[id(value)] = torch.Generator(value.device)
            copies[id(value)].set_state(self.generators[id(value)])
        return copies[id(value)]


@dataclass
class Trajectory:
    """One run.

    Attributes:
        outputs: the guided output of each step, on the CPU.
        states: latents before each step, and after the last, on the CPU.
        result: what the subject's `generate` returned; None if the run was stopped.
        solver: the scheduler.
        forms: per step, the outputs of each call of the model, without values.
    """

    outputs: list[Tensor]
    states: list[Tensor]
    result: Tensor | None
    solver: Solver
    forms: list[list[_Form]]


@dataclass(frozen=True)
class _Form:
    shapes: list[torch.Size]
    likes: list[Tensor]
    rebuild: Callable[[Sequence[Tensor]], Any]

    def zeros(self) -> Any:
        made = [like.new_zeros(shape) for like, shape in zip(self.likes, self.shapes, strict=True)]
        return self.rebuild(made)


class _Stop(BaseException):
    """Ends a run early; no `Exception`, so that a pipeline does not handle it."""


class _Drive:
    def __init__(self, given: Given | None, forms: list[list[_Form]], stop: int | None, grid: Any):
        self.given = given
        self.known_forms = forms
        self.stop = stop
        self.grid = grid
        self.outputs: list[Tensor] = []
        self.states: list[Tensor] = []
        self.forms: list[list[_Form]] = [[]]
        self.solver: Solver | None = None
        self.last: Tensor | None = None
        """The latents after the last step so far."""
        self._latest: list[_Form] = []
        self._planned: tuple[int, Tensor | None] = (-1, None)
        self._calls = 0

    @property
    def step(self) -> int:
        return len(self.outputs)

    def output(self) -> Tensor | None:
        """The given output of this step, if any."""
        if self.given is None:
            return None
        if self._planned[0] != self.step:
            self._planned = self.step, self.given(self.step, self.outputs)
        return self._planned[1]

    def call_model(self, compute: Callable[[], Any]) -> Any:
        number, self._calls = self._calls, self._calls + 1
        if self.output() is not None:
            forms = self.known_forms[self.step] if self.step < len(self.known_forms) else self._latest
            if number >= len(forms):
                raise ValueError("model: it was called more often in a step than in the run with all steps")
            return forms[number].zeros()
        result = compute()
        tensors, rebuild = flatten(result)
        likes = [one.new_empty(()) for one in tensors]
        self.forms[-1].append(_Form([one.shape for one in tensors], likes, rebuild))
        return result

    def take_step(self, plain: Callable[..., Any], scheduler: Any, args: Any, kwargs: Any) -> Any:
        signature = inspect.signature(type(scheduler).step)
        bound = dict(signature.bind(scheduler, *args, **kwargs).arguments)
        names = list(signature.parameters)
        first, sample = names[1], "sample"
        if sample not in bound:
            raise ValueError(
                f"scheduler: the step of {type(scheduler).__name__} takes {names[1:]}; expected the model's "
                f"output first and an argument {sample!r}"
            )
        bound.pop(names[0])
        output, state = bound.pop(first), bound.pop(sample)
        bound |= bound.pop("kwargs", {})
        if self.solver is None:
            self.solver = Solver(copy.deepcopy(scheduler), state.device)
            for generator in _generators(bound.values()):
                self.solver.generators[id(generator)] = generator.get_state()
        self.solver.arguments.append(bound)
        given = self.output()
        if given is not None:
            output = given.to(output)
        self.states.append(state.detach().cpu().clone())
        result = plain(scheduler, output, sample=state, **bound)
        self.outputs.append(output.detach().cpu().clone())
        if self.forms[-1]:
            self._latest = self.forms[-1]
        else:
            self.forms[-1] = self._latest
        self.forms.append([])
        self._calls = 0
        self.last = _latents(result).detach().cpu().clone()
        if self.step == self.stop:
            raise _Stop
        return result


def _generators(values: Any) -> Iterator[torch.Generator]:
    for value in values:
        if isinstance(value, torch.Generator):
            yield value
        elif isinstance(value, list):
            yield from _generators(value)


def _latents(result: Any) -> Tensor:
    """The latents that a scheduler's step returned."""
    if isinstance(result, Tensor):
        return result
    latents: Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
    return latents


def networks(model: Any) -> list[nn.Module]:
    """A model, or the models of a pipeline."""
    return [model] if isinstance(model, nn.Module) else list(transformers(model).values())


@torch.no_grad()
def trajectory(
    subject: Subject,
    prompt: Any,
    seed: int,
    *,
    given: Given | None = None,
    forms: list[list[_Form]] | None = None,
    stop: int | None = None,
    grid: PlannedTimesteps | None = None,
) -> Trajectory:
    """Runs a sampler once.

    Args:
        given: outputs of steps at which the model is not called; None: all steps are computed.
        forms: of a run in which all steps were computed; needed if the first step is given.
        stop: end after this many steps.
        grid: the timesteps to take; None: all.

    Raises:
        ValueError: the sampler does not run one loop of the scheduler with the subject's number of steps.
    """
    drive = _Drive(given, forms or [], stop, grid)
    models, scheduler = networks(subject.model), subject.sampler

    def call(plain: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        return drive.call_model(lambda: plain(model, *args, **kwargs))

    methods: dict[str, Callable[..., Any]] = {"step": _step}
    if hasattr(scheduler, "set_timesteps"):
        methods["set_timesteps"] = _set_timesteps
    result = None
    with contextlib.ExitStack() as stack:
        for model in models:
            interpose(model, {"__call__": call})
            stack.callback(restore, model)
        interpose(scheduler, methods, copies=True)
        stack.callback(restore, scheduler)
        token = _DRIVE.set(drive)
        stack.callback(_DRIVE.reset, token)
        with contextlib.suppress(_Stop):
            result = subject.generate(prompt, seed)
    expected = subject.num_steps if grid is None else len(grid.steps)
    if drive.solver is None or (stop is None and drive.step != expected):
        raise ValueError(
            f"model: expected {expected} steps of {type(scheduler).__name__} in one generation, "
            f"got {drive.step}"
        )
    assert drive.last is not None
    drive.states.append(drive.last)
    return Trajectory(drive.outputs, drive.states, result, drive.solver, drive.forms[:-1])


def _step(plain: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    drive = _DRIVE.get()
    if drive is None:
        return plain(scheduler, *args, **kwargs)
    return drive.take_step(plain, scheduler, args, kwargs)


def _set_timesteps(plain: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    result, drive = plain(scheduler, *args, **kwargs), _DRIVE.get()
    if drive is not None and drive.grid is not None:
        drive.grid.select(scheduler)
    return result
