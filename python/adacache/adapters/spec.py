# SPDX-License-Identifier: Apache-2.0
"""How a model class is declared: its block lists, its streams and its sub-layers. See
docs/adding_a_model.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from adacache.fused import BlockProgram, Program
from adacache.rows import Split
from adacache.sites import BlockSites, ModelSites

Arguments = dict[str, Any]
"""Arguments of a call by name."""
Outputs = Mapping[str, Any]
"""What the children of a block returned, by name."""


@dataclass(frozen=True)
class BlockList:
    """One list of blocks of a model.

    Attributes:
        name: attribute of the model, an `nn.ModuleList`.
        kind: distinguishes its blocks from those of other lists by name, such as "temporal".
        layout: of the tokens in the blocks' input: "video" [B, N, C], "spatial" [B*T, S, C], "temporal"
            [B*S, T, C] or "tokens first" [N, B, C].
        every_other: 0 or 1 if only every other block of the attribute belongs here, from that one on.
        outputs: {sub-layer: child of the block whose output can be kept and reused}.
    """

    name: str
    kind: str = ""
    layout: str = "video"
    every_other: int | None = None
    outputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Unique among the lists of the model."""
        return self.name if self.every_other is None else f"{self.name}[{self.every_other}::2]"

    def blocks(self, model: Any) -> list[nn.Module]:
        found = list(getattr(model, self.name))
        return found if self.every_other is None else found[self.every_other :: 2]


@dataclass(frozen=True)
class GatedResidual:
    """Where a block forms a gated residual that can be watched.

    Attributes:
        part: name of the sub-layer, such as "attention".
        list: label of the list whose blocks these are.
        children: children of the block whose outputs `residual` takes; each runs once per call.
        residual: (block, outputs of the children, arguments of the block) -> the residual as the block forms
            it, in the layout of its tokens.
    """

    part: str
    list: str
    children: tuple[str, ...]
    residual: Callable[[Any, Outputs, Arguments], Tensor]


@dataclass(frozen=True)
class Spared:
    """A child of the model that only feeds its blocks, so that it does not run where all of them are skipped.

    Attributes:
        child: its name.
        output: (child, arguments of its call) -> what the model gets instead.
        stream: the stream of the blocks that it makes from its first argument, token by token; None: none.
    """

    child: str
    output: Callable[..., Any]
    stream: int | None = None


def one_token(child: Any, x: Tensor, *args: Any) -> Tensor:
    """In place of embedded tokens [B, L, C] that are an argument of the blocks."""
    return x[:, :1, :1]


def nothing(child: Any, *args: Any) -> None:
    """In place of rotary tables."""


def zero_tokens(child: Any, x: Tensor) -> Tensor:
    """In place of embedded tokens [B, L, C] that are a stream; `child` is a linear layer."""
    return x.new_zeros(*x.shape[:-1], child.out_features)


@dataclass(frozen=True)
class BlockPlace:
    """One block of a model: its position in the order of execution, its number, its list and its module."""

    position: int
    number: int
    list: BlockList
    module: nn.Module


def latent_frames(model: Any, arguments: Arguments, latents: str, axis: int) -> int:
    """Latent frames of the blocks' tokens, from the latents and the patch size; 1 if they are unknown."""
    x, config = arguments[latents], getattr(model, "config", None)
    patch = getattr(config, "patch_size", 1)
    patch = patch[0] if isinstance(patch, tuple | list) else getattr(config, "patch_size_t", None) or 1
    return -(-int(x.shape[axis]) // patch) if isinstance(x, Tensor) and x.ndim == 5 else 1


@dataclass(frozen=True)
class ModelSpec:
    """The declaration of a model class.

    Attributes:
        classes: names of the class, any of them; the class itself need not be importable.
        lists: block lists in the order they run.
        alternating: the lists run in turns (one block of each, again and again), not one after another.
        streams: arguments of the blocks that the blocks return, in the order of return; the first holds the
            video's tokens. All are cached.
        reversed_streams: the blocks return them in the opposite order.
        between: the model adds to the tokens between its blocks what a reused step must add too, so one
            residual is stored per block.
        shared: arguments of the blocks without a batch dimension, such as rotary embeddings.
        latents, timestep: names of the model's own arguments.
        frame_axis: dimension of the latents that counts frames.
        residuals: the gated residuals that can be watched.
        default_part: the sub-layer that is watched unless the policy names another.
        frames: (model, arguments) -> latent frames; None: from the latents and the patch size.
        reuse_arguments: arguments of the model to set on a step that reuses the whole stack, to spare work
            between the blocks.
        spared: children of the model that do not run on such a step.
        applies: on such a step, kind of the blocks that still run; None: all.
        select: (name, value, split, arguments) -> the rows of a block argument that compute, or None to use
            the default: by the first dimension.
        requires: (model) -> whether the spec fits an instance of such a class.
        program: runs all blocks on the fused ops, in place of a method of the model.
        block_program: runs wrapped blocks on the fused ops, in place of their forward.
        streams_by_shape: streams are unknown: recognize them by what the blocks return.
        whole_sequence: residuals are those of tokens at certain places of the sequence, so a rank must have
            all tokens.
    """

    classes: tuple[str, ...]
    lists: tuple[BlockList, ...] = (BlockList("transformer_blocks"),)
    alternating: bool = False
    streams: tuple[str, ...] = ("hidden_states",)
    reversed_streams: bool = False
    between: bool = False
    shared: tuple[str, ...] = ()
    latents: str = "hidden_states"
    timestep: str = "timestep"
    frame_axis: int = 2
    residuals: tuple[GatedResidual, ...] = ()
    default_part: str = "attention"
    frames: Callable[[Any, Arguments], int] | None = None
    reuse_arguments: Mapping[str, Any] = field(default_factory=dict)
    spared: tuple[Spared, ...] = ()
    applies: str | None = None
    select: Callable[[str, Any, Split, Arguments], Any] | None = None
    requires: Callable[[Any], bool] = lambda model: True
    program: Program | None = None
    block_program: BlockProgram | None = None
    streams_by_shape: bool = False
    whole_sequence: bool = False

    @property
    def model_class(self) -> str:
        return " | ".join(self.classes)

    def matches(self, name: str, model: object) -> bool:
        """Whether this declares the class called `name`, which is that of the model or one of its bases."""
        lists = (getattr(model, one.name, None) for one in self.lists)
        return (
            name in self.classes
            and all(isinstance(one, nn.ModuleList) for one in lists)
            and self.requires(model)
        )

    def places(self, model: Any) -> list[BlockPlace]:
        """The blocks of a model in the order they run."""
        lists = [(one, one.blocks(model)) for one in self.lists]
        if self.alternating:
            ordered = [
                (i, one, blocks[i])
                for i in range(max(len(blocks) for _, blocks in lists))
                for one, blocks in lists
                if i < len(blocks)
            ]
        else:
            flat = [(one, block) for one, blocks in lists for block in blocks]
            ordered = [(i, one, block) for i, (one, block) in enumerate(flat)]
        return [BlockPlace(position, *place) for position, place in enumerate(ordered)]

    def sites(self, model: Any) -> ModelSites:
        """The sites of a model, for policies.

        Raises:
            ValueError: it has no block.
        """
        places = self.places(model)
        if not places:
            raise ValueError(f"model: {self.model_class} has no block in {[one.name for one in self.lists]}")
        if self.program is not None:
            blocks = tuple(self.program.block_sites(place.number, place.list.kind) for place in places)
            return ModelSites(blocks, self.default_part, self.program.storage, self.program.composites)
        by_list = {
            one.label: tuple(residual.part for residual in self.residuals if residual.list == one.label)
            for one in self.lists
        }
        blocks = tuple(
            BlockSites(place.number, place.list.kind, by_list[place.list.label], tuple(place.list.outputs))
            for place in places
        )
        default = self.default_part if any(self.default_part in parts for parts in by_list.values()) else None
        return ModelSites(blocks, *(() if default is None else (default,)))

    def gated_residual(self, part: str | None, label: str) -> GatedResidual | None:
        """How blocks of a list form the residual of a sub-layer; None if it is that of the whole block."""
        return next((one for one in self.residuals if (one.part, one.list) == (part, label)), None)

    def latent_frames(self, model: Any, arguments: Arguments) -> int:
        if self.frames is not None:
            return self.frames(model, arguments)
        return latent_frames(model, arguments, self.latents, self.frame_axis)

    def rows_of(self, name: str, value: Any, split: Split, arguments: Arguments, sizes: set[int]) -> Any:
        """The rows of a block argument that compute."""
        if self.select is not None:
            chosen = self.select(name, value, split, arguments)
            if chosen is not None:
                return chosen
        return value if name in self.shared else split.of(value, sizes)


def argument_names(module: Any) -> list[str]:
    """Names of the arguments of a module's forward, also of a compiled one; if it was replaced by one that
    takes any, those of its class."""
    module = getattr(module, "_orig_mod", module)
    of_class = [vars(kind)["forward"] for kind in type(module).__mro__ if "forward" in vars(kind)]
    own = inspect.signature(module.forward).parameters
    for parameters in (own, *(inspect.signature(forward).parameters for forward in of_class)):
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = [name for name, one in parameters.items() if one.kind not in variadic]
        names = names if parameters is own else names[1:]
        if names:
            return names
    return list(own)
