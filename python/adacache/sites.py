# SPDX-License-Identifier: Apache-2.0
"""Sites: where a model forms residuals and outputs. Sub-layer < block < range of blocks < stack < model <
guided output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

BLOCK = "block"
"""The part that means a whole block."""


@dataclass(frozen=True, order=True)
class Site:
    """Blocks [first, last) in the order they run, or one sub-layer (`part`) of the block `first`."""

    first: int
    last: int
    part: str | None = None
    view: str = ""
    """Distinguishes several watches of the same range of blocks."""

    def holds(self, position: int) -> bool:
        """Whether the block at this position belongs to the site."""
        return self.first <= position < self.last


MODEL = Site(0, 0, "model")
"""The output of the model's own call, per guidance branch."""
GUIDED = Site(0, 0, "guided")
"""What a pipeline passes to its scheduler: the guided output of a step."""
LATENTS = Site(0, 0, "latents")
"""Signal: the latents that the model gets."""
TOKENS = Site(0, 0, "tokens")
"""Signal: the tokens that the first block gets."""
MODULATED = Site(0, 0, "modulated")
"""Signal: the input of the first sub-layer of the first block: tokens after its modulated norm."""


@dataclass(frozen=True)
class BlockSites:
    """One block of a model.

    Attributes:
        number: index of the block; a spatial and a temporal block that alternate share it.
        kind: distinguishes block lists by name, such as "temporal"; may be empty.
        residuals: sub-layers whose gated residual can be watched.
        outputs: sub-layers whose output can be kept and reused, in the order they run.
    """

    number: int
    kind: str = ""
    residuals: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSites:
    """The sites of a model, as policies see them.

    Attributes:
        blocks: all blocks in the order they run.
        default_part: the sub-layer that is watched unless the policy names another.
        storage: how the residual of a range can be stored: as one tensor ("stack"), one per block ("block"),
            one per sub-layer ("sublayer").
        composites: sub-layers whose residuals can be watched as one: {name: (sub-layers in order)}.
    """

    blocks: tuple[BlockSites, ...]
    default_part: str = BLOCK
    storage: tuple[str, ...] = ("stack", "block")
    composites: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def stack(self) -> Site:
        """All blocks."""
        return Site(0, len(self.blocks))

    @property
    def depth(self) -> int:
        """Number of blocks; of block pairs where spatial and temporal blocks alternate."""
        return 1 + max(block.number for block in self.blocks)

    @property
    def parts(self) -> tuple[str, ...]:
        """Sub-layers whose residual can be watched, composites, and "block"."""
        parts = dict.fromkeys(part for block in self.blocks for part in block.residuals)
        return (*parts, *self.composites, BLOCK)

    def residuals(self, numbers: Sequence[int], part: str) -> list[Site]:
        """The sites of one part in the blocks with these numbers, in the order they run."""
        needed = () if part == BLOCK else self.composites.get(part, (part,))
        return [
            Site(position, position + 1, None if part == BLOCK else part)
            for number in numbers
            for position, block in enumerate(self.blocks)
            if block.number == number and set(needed) <= set(block.residuals)
        ]

    def outputs(self, part: str) -> list[Site]:
        """The sites of one sub-layer whose output can be kept, in the order they run."""
        return [
            Site(position, position + 1, part)
            for position, block in enumerate(self.blocks)
            if part in block.outputs
        ]

    @property
    def output_parts(self) -> tuple[str, ...]:
        """Sub-layers whose output can be kept."""
        return tuple(dict.fromkeys(part for block in self.blocks for part in block.outputs))

    def stored_parts(self, position: int) -> list[str]:
        """Sub-layers of a block whose residuals are stored one by one with storage "sublayer"; those of a
        composite as one."""
        parts = self.blocks[position].residuals
        joined = {part for composite in self.composites.values() for part in composite}
        return [*(part for part in parts if part not in joined), *self.composites]

    def name(self, site: Site) -> str:
        """Such as "temporal_blocks.3.temporal_attention", "blocks.3.block" or "blocks[1:8]"."""
        if site.last - site.first > 1:
            return f"blocks[{site.first}:{site.last}]"
        block = self.blocks[site.first]
        return f"{block.kind}_blocks.{block.number}.{site.part or BLOCK}".removeprefix("_")

    def names(self) -> list[str]:
        """Names of the sites at which a residual can be watched, in the order they run; of whole blocks where
        not all of their sub-layers are known."""
        whole = () if "sublayer" in self.storage else (BLOCK,)
        return [
            self.name(Site(position, position + 1, None if part == BLOCK else part))
            for position, block in enumerate(self.blocks)
            for part in (*block.residuals, *whole)
        ]
