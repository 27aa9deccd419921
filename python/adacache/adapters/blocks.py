"""Models whose forward runs lists of blocks: what their adapters state, and how a call runs with caching.

The model's own forward always runs. Only its blocks are stood before: on a computed step they run as they
are, on a reused one they hand their tokens on, and the last adds the residual of all. See
docs/adding_a_model.md.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import adacache_kernels
from adacache.interpose import interpose, plain_class, restore
from adacache.policies import MetricSite, StackInfo
from adacache.policies.adacache import measurable_strides
from adacache.request import Call, Request

if TYPE_CHECKING:
    from adacache.handle import Handle

_PLACE = "_adacache_place"

Arguments = dict[str, Any]
"""Arguments of a call by name."""
Seen = dict[str, Any]
"""What the watched children of a block returned, by name."""


@dataclass(frozen=True)
class BlockList:
    """One list of blocks of a model.

    Attributes:
        name: attribute of the model.
        kind: what tells its blocks from those of other lists by name, such as "temporal".
        fold: how tokens lie in the blocks' input: "video" [B, N, C], "spatial" [B*T, S, C], "temporal"
            [B*S, T, C] or "tokens first" [N, B, C].
        turn: 0 or 1 if these are every other block of the attribute, from that one on.
    """

    name: str
    kind: str = ""
    fold: str = "video"
    turn: int | None = None

    @property
    def label(self) -> str:
        """What tells it from the adapter's other lists."""
        return self.name if self.turn is None else f"{self.name}[{self.turn}::2]"

    def blocks(self, model: Any) -> list[nn.Module]:
        found = list(getattr(model, self.name))
        return found if self.turn is None else found[self.turn :: 2]


@dataclass(frozen=True)
class Watched:
    """Where a block forms a residual.

    Attributes:
        part: what is measured there, such as "attention".
        list: label of the list whose blocks these are.
        children: names of the block's children whose outputs `residual` needs; each runs once a call.
        residual: (block, what the children returned, the block's arguments) -> the residual as the block
            forms it, in the shape of its tokens.
    """

    part: str
    list: str
    children: tuple[str, ...]
    residual: Callable[[Any, Seen, Arguments], Tensor]


class BlockAdapter:
    """A class of models, told by name. Subclasses state what differs.

    Attributes:
        classes: names of the model's class.
        lists: the block lists in the order they run.
        alternating: whether the lists run by turns (one block of each, again and again) rather than one after
            another.
        streams: names of the block's arguments that the block also returns, in the order it returns them; the
            first holds the video's tokens.
        video_last: whether the block returns them in the opposite order; None: told by their shapes.
        between: whether the model is known to work between its blocks in a way that no residual for all may
            replace, so that one is kept per block.
        shared: arguments of the blocks that have no batch dimension, such as rotary embeddings.
        latents, timestep: names of the model's own arguments.
        frame_axis: dimension of the latents that counts frames.
        parts: what can be measured: where its residual is formed.
        default_part: what is measured if the policy does not say.
    """

    classes: tuple[str, ...] = ()
    lists: tuple[BlockList, ...] = (BlockList("transformer_blocks"),)
    alternating: bool = False
    streams: tuple[str, ...] = ("hidden_states",)
    video_last: bool | None = False
    between: bool = False
    shared: tuple[str, ...] = ()
    latents: str = "hidden_states"
    timestep: str = "timestep"
    frame_axis: int = 2
    parts: tuple[Watched, ...] = ()
    default_part: str = "attention"

    @property
    def model_class(self) -> str:
        return " | ".join(self.classes)

    def matches(self, model: object) -> bool:
        names = {kind.__name__ for kind in plain_class(model).__mro__}
        return bool(names & set(self.classes)) and all(
            isinstance(getattr(model, one.name, None), nn.ModuleList) for one in self.lists
        )

    def frames(self, model: Any, given: Arguments) -> int:
        """Latent frames of the blocks' tokens, from the model's arguments; 1 if nothing tells."""
        latents, config = given[self.latents], getattr(model, "config", None)
        patch = getattr(config, "patch_size", 1)
        patch = patch[0] if isinstance(patch, tuple | list) else getattr(config, "patch_size_t", None) or 1
        return -(-int(latents.shape[self.frame_axis]) // patch) if latents.ndim == 5 else 1

    def when_reusing(self, given: Arguments) -> Arguments:
        """Arguments of the model to change on a step that reuses all, to spare it work between its blocks."""
        return {}

    def applies(self, order: Sequence[Place]) -> Place:
        """The block in whose place the residual of all is added on a reused step; the last that is called
        then."""
        return order[-1]

    def select(self, name: str, value: Any, rows: Rows, given: Arguments) -> Any:
        """The rows of one argument of a block, for rows that compute while others reuse."""
        return value if name in self.shared else rows.of(value)

    # What follows is the same for all.

    def watched(self, part: str, label: str) -> Watched | None:
        """Where blocks of a list form the residual of a part; None if it is that of the whole block."""
        return next((one for one in self.parts if (one.part, one.list) == (part, label)), None)

    def places(self, model: Any) -> list[tuple[int, BlockList, nn.Module]]:
        """Blocks in the order they run, each with its number and its list."""
        lists = [(one, one.blocks(model)) for one in self.lists]
        if self.alternating:
            return [
                (i, one, blocks[i])
                for i in range(max(len(blocks) for _, blocks in lists))
                for one, blocks in lists
                if i < len(blocks)
            ]
        flat = [(one, block) for one, blocks in lists for block in blocks]
        return [(i, one, block) for i, (one, block) in enumerate(flat)]

    def stack(self, model: Any) -> StackInfo:
        places = self.places(model)
        kinds: dict[str, tuple[str, ...]] = {}
        for part in dict.fromkeys(watched.part for watched in self.parts):
            lists = {watched.list for watched in self.parts if watched.part == part}
            kinds[part] = tuple(dict.fromkeys(one.kind for one in self.lists if one.label in lists))
        kinds["block"] = tuple(dict.fromkeys(one.kind for one in self.lists))
        default = self.default_part if self.default_part in kinds else "block"
        return StackInfo(
            depth=1 + places[-1][0] if places else 0, parts=tuple(kinds), kinds=kinds, default_part=default
        )

    def sites(self, model: Any) -> list[str]:
        return [
            str(MetricSite(number, one.kind, part))
            for number, one, _ in self.places(model)
            for part in (*(watched.part for watched in self.parts if watched.list == one.label), "block")
        ]

    def install(self, model: Any, handle: Handle, wrapper: Any = None) -> None:
        """Stands before the model and its blocks, and before what torch.compile has wrapped the model in,
        which knows the model's call from before."""
        places = self.places(model)
        if not places:
            raise ValueError(f"model: {self.model_class} has no block in {[one.name for one in self.lists]}")
        run = functools.partial(_uncompiled(_run_model), self, handle)
        forward = functools.partial(run, inspect.signature(type(model).forward))
        methods: dict[str, Callable[..., Any]] = {"__call__": forward}
        if wrapper is not None:
            interpose(wrapper, **methods)
        if hasattr(model, "forward_with_cfg"):
            # Samplers call this, which calls the model's forward, or that forward, past the model's __call__.
            methods["forward"] = forward
            methods["forward_with_cfg"] = functools.partial(
                run, inspect.signature(type(model).forward_with_cfg)
            )
        if hasattr(model, "cache_context"):
            methods["cache_context"] = functools.partial(_note_context, handle)
        interpose(model, **methods)
        for number, one, block in places:
            names = list(inspect.signature(block.forward).parameters)
            block.__dict__[_PLACE] = Place(handle, block, number, one, names)
            interpose(block, __call__=_uncompiled(_run_block))

    def uninstall(self, model: Any, wrapper: Any = None) -> None:
        if wrapper is not None:
            restore(wrapper)
        for _, _, block in self.places(model):
            block.__dict__.pop(_PLACE).forget()
            restore(block)
        restore(model)


@dataclass(eq=False)
class Place:
    """One block of a model on which AdaCache is enabled."""

    handle: Handle
    block_module: nn.Module
    number: int
    blocks: BlockList
    names: list[str]
    """The block's arguments in order."""
    returns_tuple: bool | None = None
    """What the block returned when it last ran."""
    video_last: bool | None = None
    """Whether it returned its streams in the opposite order."""
    watched: dict[str, tuple[nn.Module, Any]] = field(default_factory=dict)
    """Children that are looked at, with the handle of the hook."""
    seen: Seen = field(default_factory=dict)
    awaited: Callable[[], None] | None = None
    """Asked after each of them has run, while the block is measured."""

    def stream(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        position = self.names.index(name) if name in self.names else len(args)
        return args[position] if position < len(args) else None

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        return dict(zip(self.names, args, strict=False)) | dict(kwargs)

    def watch(self, children: Sequence[str]) -> None:
        """Has the outputs of children put into `seen`. LoRA may have replaced a child since, so this is asked
        for at each call."""
        for name in children:
            child = self.block_module.get_submodule(name)
            if name in self.watched and self.watched[name][0] is child:
                continue
            if name in self.watched:
                self.watched[name][1].remove()

            def note(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                if self.awaited is not None:
                    self.seen[name] = output
                    self.awaited()

            self.watched[name] = (child, child.register_forward_hook(note))

    def forget(self) -> None:
        for _, hook in self.watched.values():
            hook.remove()
        self.watched.clear()
        self.seen.clear()


class Rows:
    """Some rows of a batch, for tensors whose first dimension is the batch or holds it as its slowest
    part."""

    def __init__(self, rows: Sequence[int], batch: int, device: torch.device):
        self.rows = list(rows)
        self.batch = batch
        self.folded: set[int] = {batch}
        """Sizes of a first dimension that holds the batch."""
        first, last = self.rows[0], self.rows[-1]
        self.index: slice | Tensor = slice(first, last + 1)
        if self.rows != list(range(first, last + 1)):
            self.index = to_device(torch.tensor(self.rows), device)

    def of(self, value: Any) -> Any:
        """These rows of a tensor, or of tensors in tuples, lists and dicts; other things stay as they are."""
        if isinstance(value, Tensor):
            return self.take(value) if value.ndim and value.shape[0] in self.folded else value
        if isinstance(value, tuple | list):
            return type(value)(self.of(v) for v in value)
        if isinstance(value, dict):
            return {key: self.of(v) for key, v in value.items()}
        return value

    def take(self, value: Tensor) -> Tensor:
        if value.shape[0] == self.batch:
            return value[self.index]
        return value.unflatten(0, (self.batch, -1))[self.index].flatten(0, 1)

    def put(self, into: Tensor, value: Tensor) -> Tensor:
        """Writes these rows of a tensor that has all."""
        whole = into.unflatten(0, (self.batch, -1)) if into.shape[0] != self.batch else into
        part = value.unflatten(0, (len(self.rows), -1)) if into.shape[0] != self.batch else value
        if isinstance(self.index, slice):
            whole[self.index].copy_(part)
        else:
            whole.index_copy_(0, self.index, part.to(whole.dtype))
        return into


class Pass:
    """One forward call of the model under way."""

    def __init__(
        self,
        adapter: BlockAdapter,
        request: Request,
        call: Call,
        batch: int,
        frames: int,
        device: torch.device,
    ):
        self.adapter = adapter
        self.request = request
        self.call = call
        self.batch = batch
        self.frames = frames
        self.device = device
        self.rows = Rows(call.computing, batch, device) if call.computing and call.reusing else None
        self.order: list[Place] = []
        """Blocks called so far."""
        self.before: list[Tensor] = []
        """The streams as the first block got them."""
        self.after: list[Tensor] = []
        self.apply_at: Place | None = None
        known = request.orders.get(call.branch)
        if call.reusing and not request.keeps_blocks:
            assert known is not None, "a branch is computed before it is reused"
            self.apply_at = known[-1] if call.computing else adapter.applies(known)
        self.applied = False
        self.measured: set[int] = set()
        self.sites = {}
        if call.measures and call.computing:
            self.sites = {(s.block, s.kind): (i, s.part) for i, s in enumerate(request.schedule.sites)}

    def run(self, place: Place, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a block returns in this call."""
        found = [place.stream(name, args, kwargs) for name in self.adapter.streams]
        streams = [stream for stream in found if isinstance(stream, Tensor)]
        first = not self.order
        if first:
            self.before = [self.to_video(x, place) for x in streams]
        elif self.after and not self.adapter.alternating and streams[0] is not self.after[0]:
            self.works_between()
        self.order.append(place)
        if not self.call.computing:
            return self.reuse(place, streams)
        outputs, rest = self.compute(place, plain, args, kwargs)
        if self.request.keeps_blocks:
            outputs = self.keep_block(place, streams, outputs)
        elif place is self.apply_at:
            outputs = [self.finish_mixed(place, k, out) for k, out in enumerate(outputs)]
        elif self.rows is not None:
            outputs = [
                self.put(place, torch.empty_like(x), out) for x, out in zip(streams, outputs, strict=False)
            ]
        self.after = outputs
        return self.as_returned(place, outputs, rest)

    def as_returned(self, place: Place, outputs: list[Tensor], rest: Sequence[Any] = ()) -> Any:
        """Streams, and what the block returned besides, in the way that it returns them."""
        if not place.returns_tuple:
            return outputs[0]
        whole = (*outputs, *rest)
        return whole[::-1] if place.video_last else whole

    def compute(
        self, place: Place, plain: Callable[..., Any], args: Any, kwargs: Any
    ) -> tuple[list[Tensor], list[Any]]:
        """Runs a block on the rows that compute, measures it if it is a metric site, and returns its streams
        and what it returned besides."""
        block = place.block_module
        site, part = self.sites.get((place.number, place.blocks.kind), (None, ""))
        watched = self.adapter.watched(part, place.blocks.label)
        if self.rows is not None:
            if place.blocks.fold in ("spatial", "temporal"):
                self.rows.folded.add(place.stream(self.adapter.streams[0], args, kwargs).shape[0])
            given = place.arguments(args, kwargs)
            chosen = {
                name: self.adapter.select(name, value, self.rows, given) for name, value in given.items()
            }
            args = tuple(chosen.pop(name) for name in place.names[: len(args)])
            kwargs = chosen
        if site is not None and watched is not None:
            returned = self.measure_within(place, site, watched, args, kwargs)
        else:
            returned = plain(block, *args, **kwargs)
        whole = [returned] if isinstance(returned, Tensor) else list(returned)
        place.video_last = self.adapter.video_last
        if place.video_last is None:
            x = place.stream(self.adapter.streams[0], args, kwargs)
            shapes = [getattr(one, "shape", None) for one in whole]
            place.video_last = shapes[0] != x.shape == shapes[-1]
        if place.video_last:
            whole.reverse()
        place.returns_tuple = not isinstance(returned, Tensor)
        outputs = whole[: len(self.adapter.streams)]
        while outputs and not isinstance(outputs[-1], Tensor):
            outputs.pop()
        if not outputs:
            raise TypeError(
                f"model: {type(block).__name__} returned {type(returned).__name__}, expected a tensor or a "
                f"tuple that begins with {list(self.adapter.streams)}"
            )
        if site is not None and watched is None:
            x = place.stream(self.adapter.streams[0], args, kwargs)
            self.measure(site, place.blocks.fold, outputs[0] - x)
        return outputs, whole[len(outputs) :]

    def measure_within(self, place: Place, site: int, watched: Watched, args: Any, kwargs: Any) -> Any:
        """Runs a block and measures a residual as soon as it can be formed; returns what the block
        returns."""
        block, given = place.block_module, place.arguments(args, kwargs)

        def form() -> None:
            if len(place.seen) == len(watched.children):
                self.measure(site, place.blocks.fold, watched.residual(block, place.seen, given))

        place.watch(watched.children)
        place.awaited = form
        try:
            # Not as it may have been compiled, which can have been before its children were looked at.
            returned = _call_uncompiled()(block, *args, **kwargs)
        finally:
            place.awaited = None
            missing = [name for name in watched.children if name not in place.seen]
            place.seen.clear()
        if missing:
            raise RuntimeError(
                f"metric_part: {type(block).__name__} did not run its {missing}, so {watched.part!r} cannot "
                "be "
                'measured; metric_part="block" works for all blocks'
            )
        return returned

    def reuse(self, place: Place, streams: list[Tensor]) -> Any:
        outputs, keeps_blocks = streams, self.request.keeps_blocks
        if keeps_blocks or place is self.apply_at:
            outputs = []
            for k, x in enumerate(streams):
                residual = self.request.caches.get((self.call.branch, place if keeps_blocks else "stack", k))
                if residual is None:  # a stream that the last block does not return
                    outputs.append(x)
                elif keeps_blocks:
                    outputs.append(_add(x, residual))
                else:
                    outputs.append(self.from_video(_add(self.before[k], residual), place))
            self.applied = True
        return self.as_returned(place, outputs)

    def finish_mixed(self, place: Place, k: int, computed: Tensor) -> Tensor:
        """A whole stream at the end of the stack: rows that computed and rows that reused."""
        assert self.rows is not None
        before, key = self.before[k], (self.call.branch, "stack", k)
        rows = self.to_video(computed, place, len(self.rows.rows))
        residual = self.request.caches[key]
        self.rows.put(residual, rows - self.rows.take(before))
        # The rows that computed are written over: adding their residual again would round once more.
        whole = self.rows.put(_add(before, residual), rows)
        self.applied = True
        return self.from_video(whole, place)

    def keep_block(self, place: Place, streams: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        """Keeps the residual of one block; returns whole streams."""
        whole = []
        for k, (x, out) in enumerate(zip(streams, outputs, strict=False)):
            key = (self.call.branch, place, k)
            if self.rows is None:
                self.store(key, out, x)
                whole.append(out)
                continue
            residual = self.request.caches[key]
            self.put(place, residual, out - self.take(place, x))
            whole.append(self.put(place, _add(x, residual), out))
        self.applied = True
        return whole

    def take(self, place: Place, value: Tensor) -> Tensor:
        """The rows that compute of tokens in a block's layout."""
        assert self.rows is not None
        if place.blocks.fold == "tokens first":
            return self.rows.take(value.transpose(0, 1)).transpose(0, 1)
        return self.rows.take(value)

    def put(self, place: Place, into: Tensor, value: Tensor) -> Tensor:
        """Writes the rows that compute into tokens in a block's layout."""
        assert self.rows is not None
        if place.blocks.fold == "tokens first":
            self.rows.put(into.transpose(0, 1), value.transpose(0, 1))
            return into
        return self.rows.put(into, value)

    def works_between(self) -> None:
        """The model does something of its own between two blocks, so their residuals do not add up."""
        if not self.request.keeps_blocks:
            if self.request.step > 1 and self.call.reusing:
                raise RuntimeError("model: its forward changed between two steps of one request")
            self.request.keeps_blocks = self.request.between = True
            # The blocks before this one were not kept.
            self.request.forget_kept(self.call.branch)

    def finish(self) -> None:
        """What is left when the model's forward has returned.

        Raises:
            RuntimeError: the model did not run the blocks that were expected.
        """
        request, branch = self.request, self.call.branch
        if not self.order:
            raise RuntimeError(
                f"model: its forward ran no block of {[one.name for one in self.adapter.lists]}"
            )
        if self.call.reusing and not self.applied:
            raise RuntimeError(
                "model: its forward ran other blocks than at the step whose residual it reuses"
            )
        if not self.call.computing:
            return
        request.orders[branch] = self.order
        if request.keeps_blocks or self.rows is not None:
            return
        last = self.order[-1]
        for k, (x, out) in enumerate(zip(self.before, self.after, strict=False)):
            after = self.to_video(out, last)
            if after.shape != x.shape:
                request.keeps_blocks = request.between = True
                request.forget_kept(branch)
                return
            self.store((branch, "stack", k), after, x)

    def store(self, key: object, after: Tensor, before: Tensor) -> None:
        """Keeps after - before for reuse, in the memory of the last one if it fits."""
        dtype = self.request.policy.cache_dtype or before.dtype
        old = self.request.caches.get(key)
        if old is not None and old.dtype == dtype == after.dtype == before.dtype:
            torch.sub(after, before, out=old)
        else:
            self.request.keep(key, (after - before).to(dtype).contiguous())

    def measure(self, site: int, fold: str, residual: Tensor) -> None:
        """Measures a residual against that of the last computed step, and keeps it in its place."""
        request, schedule, call = self.request, self.request.schedule, self.call
        self.measured.add(site)
        count = self.batch if self.rows is None else len(self.rows.rows)
        frames, video_of_row = self.frames, call.video_of_row
        if fold == "spatial":
            residual = residual.unflatten(0, (count, -1)).flatten(1, 2)
        elif fold == "tokens first":
            residual = residual.transpose(0, 1).contiguous()
        if residual.shape[1] % frames:
            frames = 1
        residual = residual if residual.stride(-1) == 1 else residual.contiguous()
        if video_of_row is not None:
            if self.rows is not None:
                video_of_row = video_of_row[self.rows.index]
            video_of_row = video_of_row.repeat_interleave(residual.shape[0] // count)
        key = ("metric", site)
        whole = request.caches.get(key)
        if whole is None:
            whole = request.keep(key, torch.zeros_like(residual, memory_format=torch.contiguous_format))
        old = whole if self.rows is None else self.rows.take(whole)
        sums = adacache_kernels.residual_meter(
            residual,
            old,
            frames=frames,
            strides=measurable_strides(schedule.strides, frames),
            video_of_row=video_of_row,
            num_videos=request.decisions,
            metric=schedule.metric,
        )
        elements = request.rows_per_decision * (residual.numel() // count)
        schedule.measured(site, call.step, sums, frames=frames, elements=elements)
        if self.rows is None:
            request.caches[key] = residual
        else:
            self.rows.put(whole, residual)

    def to_video(self, x: Tensor, place: Place, count: int | None = None) -> Tensor:
        """Tokens as [B, N, C], frame-major."""
        count = self.batch if count is None else count
        fold = place.blocks.fold
        if fold == "video" or x.ndim != 3:
            return x
        if fold == "tokens first":
            return x.transpose(0, 1)
        rows = x.unflatten(0, (count, -1))
        return (rows if fold == "spatial" else rows.transpose(1, 2)).flatten(1, 2)

    def from_video(self, x: Tensor, place: Place) -> Tensor:
        fold = place.blocks.fold
        if fold == "video" or x.ndim != 3:
            return x
        if fold == "tokens first":
            return x.transpose(0, 1).contiguous()
        frames = x.unflatten(1, (self.frames, -1))
        return (frames if fold == "spatial" else frames.transpose(1, 2)).flatten(0, 1)


def _add(x: Tensor, residual: Tensor) -> Tensor:
    """x + residual for tokens of any layout."""
    if residual.numel() != x.numel():
        return x + residual  # a block has repeated them, for each frame of a video
    flat = x if x.ndim == 3 and x.stride(2) == 1 else x.reshape(x.shape[0], -1, x.shape[-1]).contiguous()
    return adacache_kernels.reuse_residual(flat, residual.reshape(flat.shape)).reshape(x.shape)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, without waiting for it."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def warn_between(model: object) -> None:
    warnings.warn(
        f"AdaCache: {type(model).__name__} does work of its own between its blocks, so one residual is kept "
        "per block and not one for all; an adapter of its own would save that memory "
        "(docs/adding_a_model.md)",
        stacklevel=2,
    )


def _run_model(
    adapter: BlockAdapter,
    handle: Handle,
    signature: inspect.Signature,
    plain: Callable[..., Any],
    model: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The model's `__call__` with caching."""
    # A wrapper of the model has called before, or one that was made while AdaCache was on calls after it.
    if handle.passing is not None or not handle.on:
        return plain(model, *args, **kwargs)
    given = dict(signature.bind(model, *args, **kwargs).arguments)
    given.update(given.pop("kwargs", {}))
    latents = given[adapter.latents]
    with handle.call(latents, given[adapter.timestep]) as (request, call):
        frames = adapter.frames(model, given)
        request.keeps_blocks = request.keeps_blocks or adapter.between
        now = Pass(adapter, request, call, latents.shape[0], frames, latents.device)
        if not call.computing and not request.keeps_blocks:
            changed = adapter.when_reusing(given)
            names = list(signature.parameters)[1:]
            args = tuple(changed.pop(name, value) for name, value in zip(names, args, strict=False))
            kwargs = {**kwargs, **changed}
        with handle.passing_through(now):
            output = plain(model, *args, **kwargs)
        now.finish()
        if request.between and not handle.warned_between:
            handle.warned_between = True
            warn_between(model)
    return output


def _run_block(plain: Callable[..., Any], block: Any, *args: Any, **kwargs: Any) -> Any:
    place: Place | None = block.__dict__.get(_PLACE)
    now = None if place is None else place.handle.passing
    return (
        plain(block, *args, **kwargs) if place is None or now is None else now.run(place, plain, args, kwargs)
    )


def _note_context(handle: Handle, plain: Callable[..., Any], model: Any, name: str, **kwargs: Any) -> Any:
    return handle.in_context(name, plain(model, name, **kwargs))


@functools.cache
def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which torch.compile leaves alone, though not what it calls."""
    return torch.compiler.disable(function, recursive=False)


@functools.cache
def _call_uncompiled() -> Callable[..., Any]:
    """`nn.Module.__call__` that takes no compiled code."""
    return torch.compiler.disable(nn.Module._call_impl)
