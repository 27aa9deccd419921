# SPDX-License-Identifier: Apache-2.0
"""The grammar of the scenes, its encoding as word vectors, and the split of the prompts.

"{one|two} {digit} {motion} {direction} over {ground} ground, {view} view"
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from math import sqrt

import torch
from torch import Tensor

COUNTS = ("one", "two")
DIGITS = tuple(str(digit) for digit in range(10))
MOTIONS = ("still", "drifting", "walking", "racing")
DIRECTIONS = ("left", "right", "up", "down")
GROUNDS = ("plain", "striped", "crowded")
VIEWS = ("steady", "panning", "barred", "cut")

CHOICES = (COUNTS, DIGITS, MOTIONS, DIRECTIONS, ("over",), GROUNDS, ("ground",), VIEWS, ("view",))
"""The accepted words at each place of a prompt; no word is accepted at two places."""
VOCABULARY = tuple(word for words in CHOICES for word in words)
"""Every word of the grammar; its index is the nonzero entry of its vector."""
TOKENS = len(CHOICES)
"""Words per prompt, L."""
CHANNELS = 32
"""Entries of a word vector, C."""
TEST_SHARE = 10
"""One prompt in ten is held out from training."""


@dataclass(frozen=True)
class Prompt:
    """One sentence of the grammar."""

    count: str
    digit: int
    motion: str
    direction: str
    ground: str
    view: str

    def __str__(self) -> str:
        return (
            f"{self.count} {self.digit} {self.motion} {self.direction} "
            f"over {self.ground} ground, {self.view} view"
        )


def parse(text: str) -> Prompt:
    """Parses a prompt, ignoring case, spacing and commas.

    Raises:
        ValueError: names the first wrong word and the accepted words.
    """
    words = text.lower().replace(",", " ").split()
    for place, accepted in enumerate(CHOICES):
        got = words[place] if place < len(words) else "the end"
        if got not in accepted:
            raise ValueError(
                f"prompt: word {place + 1} of {text!r}: expected {' or '.join(accepted)}, got {got}"
            )
    if len(words) > TOKENS:
        raise ValueError(f"prompt: expected {TOKENS} words, got {len(words)} in {text!r}")
    return Prompt(words[0], int(words[1]), words[2], words[3], words[5], words[7])


def embed(prompts: Iterable[str | Prompt]) -> Tensor:
    """Word vectors of prompts, [V, L = 9, C = 32] float32: `prompt_embeds` of the pipelines.

    A word is one-hot times sqrt(C), so that the mean square of a vector is 1.

    Raises:
        ValueError: a prompt is not in the grammar.
    """
    parsed = [parse(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    sentences = [str(prompt).replace(",", "").split() for prompt in parsed]
    places = [[VOCABULARY.index(word) for word in words] for words in sentences]
    vectors = torch.eye(CHANNELS) * sqrt(CHANNELS)
    return vectors[torch.tensor(places, dtype=torch.int64).reshape(-1, TOKENS)]


def null_captions(count: int) -> Tensor:
    """The unconditional caption, zeros [V, L, C]: `negative_prompt_embeds` of the pipelines."""
    return torch.zeros(count, TOKENS, CHANNELS)


def all_prompts() -> list[Prompt]:
    """The grammar's 3840 prompts, in a fixed order."""
    return [Prompt(*parts) for parts in product(COUNTS, range(10), MOTIONS, DIRECTIONS, GROUNDS, VIEWS)]


def training_prompts() -> list[Prompt]:
    """The 3456 prompts that the models were trained on."""
    return [prompt for place, prompt in enumerate(all_prompts()) if not _held_out(place)]


def held_out_prompts() -> list[Prompt]:
    """The other 384, evenly spread over all words."""
    return [prompt for place, prompt in enumerate(all_prompts()) if _held_out(place)]


def evaluation_prompts(per_class: int = 2) -> list[Prompt]:
    """Held-out prompts: `per_class` of each of the 12 pairs of a motion and a ground, a pair at a time."""
    return _balanced(held_out_prompts(), per_class)


def calibration_prompts(per_class: int = 1) -> list[Prompt]:
    """Training prompts: `per_class` of each of the 12 pairs of a motion and a ground, a pair at a time."""
    return _balanced(training_prompts(), per_class)


def _balanced(prompts: list[Prompt], per_class: int, seed: int = 0) -> list[Prompt]:
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    chosen = []
    for motion, ground in product(MOTIONS, GROUNDS):
        of_class = [p for p in shuffled if (p.motion, p.ground) == (motion, ground)]
        if len(of_class) < per_class:
            raise ValueError(f"per_class: expected at most {len(of_class)}, got {per_class}")
        chosen += of_class[:per_class]
    return chosen


def _held_out(place: int) -> bool:
    # 2377 and 3840 are coprime, so the products are a permutation: exactly 384 of them are below 384.
    return place * 2377 % 3840 < 3840 // TEST_SHARE
