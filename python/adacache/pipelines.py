"""AdaCache on a pipeline: one request per call of it, steps and videos as its scheduler and its latents have
them."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from adacache.interpose import interpose, restore
from adacache.trace import Trace

if TYPE_CHECKING:
    from adacache.handle import Handle
    from adacache.request import Request

_ATTRIBUTE = "_adacache_pipeline"
TRANSFORMERS = ("transformer", "transformer_2", "dit", "denoiser", "model")
"""Names that pipelines give their transformers."""


def is_pipeline(thing: Any) -> bool:
    """Whether a thing is no model but holds one, under a name that pipelines use."""
    return not isinstance(thing, nn.Module) and bool(_transformers(thing))


def _transformers(pipeline: Any) -> dict[str, nn.Module]:
    found = {name: getattr(pipeline, name, None) for name in TRANSFORMERS}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


class PipelineHandle:
    """AdaCache at work on a pipeline. Made by `enable`.

    Attributes:
        handles: the handle of each transformer, by its name in the pipeline.
    """

    def __init__(
        self, pipeline: Any, enable: Callable[[nn.Module], Handle], disable: Callable[[nn.Module], None]
    ):
        if _ATTRIBUTE in pipeline.__dict__:
            raise ValueError(
                "model: AdaCache is enabled on it already; call adacache.disable(pipeline) first"
            )
        self.pipeline = pipeline
        self.handles: dict[str, Handle] = {}
        self._disable_model = disable
        try:
            for name, transformer in _transformers(pipeline).items():
                self.handles[name] = enable(transformer)
        except BaseException:
            for handle in self.handles.values():
                disable(handle.model)
            raise
        self._scheduler: Any = None
        self._run: PipelineRun | None = None
        pipeline.__dict__[_ATTRIBUTE] = self
        methods: dict[str, Callable[..., Any]] = {"__call__": self._call}
        if hasattr(pipeline, "prepare_latents"):
            signature = inspect.signature(type(pipeline).prepare_latents)
            methods["prepare_latents"] = functools.partial(self._prepare_latents, signature)
        interpose(pipeline, **methods)

    @classmethod
    def of(cls, pipeline: Any) -> PipelineHandle:
        """The handle of a pipeline.

        Raises:
            ValueError: AdaCache is not enabled on it.
        """
        if _ATTRIBUTE not in pipeline.__dict__:
            raise ValueError("model: AdaCache is not enabled on it")
        handle: PipelineHandle = pipeline.__dict__[_ATTRIBUTE]
        return handle

    @property
    def sites(self) -> list[str]:
        """Names of the places at which residuals are formed, in the order they run."""
        if len(self.handles) == 1:
            return next(iter(self.handles.values())).sites
        return [f"{name}.{site}" for name, handle in self.handles.items() for site in handle.sites]

    @property
    def traces(self) -> dict[str, Trace]:
        """The trace of each transformer that ran in the latest call."""
        run = self._run
        if run is None:
            raise RuntimeError("trace: no generation call has run since AdaCache was enabled")
        return {name: run.requests[h].trace for name, h in self.handles.items() if h in run.requests}

    @property
    def trace(self) -> Trace:
        """The trace of the latest call; of two transformers, one after the other.

        Raises:
            RuntimeError: nothing has run yet.
        """
        traces = list(self.traces.values())
        if not traces:
            raise RuntimeError("trace: the pipeline's call ended before a transformer ran")
        return functools.reduce(Trace.followed_by, traces)

    def disable(self) -> None:
        restore(self.pipeline)
        for handle in self.handles.values():
            self._disable_model(handle.model)
        del self.pipeline.__dict__[_ATTRIBUTE]

    def _call(self, plain: Callable[..., Any], pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        run = PipelineRun(pipeline, list(self.handles.values()))
        self._run = run
        scheduler = pipeline.scheduler
        interpose(scheduler, step=run.note_step)
        try:
            with contextlib.ExitStack() as stack:
                for handle in self.handles.values():
                    stack.enter_context(handle.during(run))
                return plain(pipeline, *args, **kwargs)
        finally:
            restore(scheduler)
            run.close()

    def _prepare_latents(
        self,
        signature: inspect.Signature,
        plain: Callable[..., Any],
        pipeline: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        given = signature.bind(pipeline, *args, **kwargs)
        given.apply_defaults()
        if self._run is not None and isinstance(given.arguments.get("batch_size"), int):
            self._run.num_videos = given.arguments["batch_size"]
        return plain(pipeline, *args, **kwargs)


class PipelineRun:
    """One call of a pipeline.

    Attributes:
        step: steps that the scheduler has taken.
        num_videos: rows of the latents, once they are made.
        requests: the latest request of each transformer.
        seen: the scheduler's step at each transformer's latest call.
    """

    def __init__(self, pipeline: Any, handles: list[Handle]):
        self.pipeline = pipeline
        self.handles = handles
        self.step = 0
        self.num_videos: int | None = None
        self.requests: dict[Handle, Request] = {}
        self.seen: dict[Handle, int] = {}

    def note_step(self, plain: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        self.step += 1
        return plain(scheduler, *args, **kwargs)

    def steps_again(self) -> int:
        """Steps of the pipeline's loop.

        Raises:
            RuntimeError: neither the pipeline nor its scheduler tells.
        """
        steps = getattr(self.pipeline, "_num_timesteps", None)
        if steps is None:
            timesteps = getattr(self.pipeline.scheduler, "timesteps", None)
            steps = None if timesteps is None else len(timesteps)
        if steps is None:
            raise RuntimeError(
                "num_steps: neither the pipeline nor its scheduler tells them; open a request by hand"
            )
        return int(steps)

    def steps_left(self, handle: Handle) -> int:
        """Steps of the loop that one transformer is to run, at its first call."""
        steps = self.steps_again() - self.step
        boundary = getattr(getattr(self.pipeline, "config", None), "boundary_ratio", None)
        if len(self.handles) > 1 and boundary is not None and handle is self.handles[0]:
            # The first of two transformers runs the steps above the boundary. Read before the first step
            # runs.
            scheduler = self.pipeline.scheduler
            threshold = boundary * scheduler.config.num_train_timesteps
            timesteps = scheduler.timesteps[-self.steps_again() :].tolist()
            steps = sum(timestep >= threshold for timestep in timesteps[self.step :])
        return max(1, steps)

    def videos_of(self, rows: int, rows_per_video: int | None) -> int:
        """Videos in a batch of so many rows."""
        if rows_per_video is not None and rows % rows_per_video == 0:
            return rows // rows_per_video
        if self.num_videos is not None and rows % self.num_videos == 0:
            return self.num_videos
        return 1

    def close(self) -> None:
        for request in self.requests.values():
            request.close()
