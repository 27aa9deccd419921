# SPDX-License-Identifier: Apache-2.0
"""The grammar of the digit model's prompts, and their encoding as word vectors.

"a {digit} {resting|drifting|racing} {left|right|up|down} over {a plain|a striped|a noisy} background"
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import sqrt

import torch
from torch import Tensor

DIGITS = tuple(str(digit) for digit in range(10))
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOTIONS = ("resting", "drifting", "racing")
DIRECTIONS = ("left", "right", "up", "down")
BACKGROUNDS = ("plain", "striped", "noisy")
VOCABULARY = ("a", "over", "background", *DIGITS, *MOTIONS, *DIRECTIONS, *BACKGROUNDS)
"""Every word of the grammar; its index is the nonzero entry of its vector."""

_MOTION, _DIRECTION, _BACKGROUND = ("|".join(words) for words in (MOTIONS, DIRECTIONS, BACKGROUNDS))
GRAMMAR = f"a {{0-9}} {{{_MOTION}}} {{{_DIRECTION}}} over a {{{_BACKGROUND}}} background"
TOKENS = 8
"""Words per prompt, L."""
CHANNELS = 32
"""Entries of a word vector."""
HELD_OUT = 96
"""Number of prompts held out from training."""


@dataclass(frozen=True)
class Prompt:
    """One parsed sentence of the grammar."""

    digit: int
    motion: str
    direction: str
    background: str

    def __str__(self) -> str:
        return f"a {self.digit} {self.motion} {self.direction} over a {self.background} background"


def parse(text: str) -> Prompt:
    """Parses a prompt, ignoring case and spacing; the digit is a numeral or its English name.

    Raises:
        ValueError: names the first wrong word and the accepted words.
    """
    accepted: tuple[tuple[str, ...], ...] = (
        ("a",),
        (*DIGITS, *DIGIT_NAMES),
        MOTIONS,
        DIRECTIONS,
        ("over",),
        ("a",),
        BACKGROUNDS,
        ("background",),
    )
    words = text.lower().split()
    for place, choices in enumerate(accepted):
        if place == len(words):
            raise ValueError(
                f"prompt: expected {TOKENS} words, {text!r} ends after {place}; "
                f"next is {_one_of(choices)} (grammar: {GRAMMAR})"
            )
        if words[place] not in choices:
            raise ValueError(
                f"prompt: word {place + 1} of {text!r}: expected {_one_of(choices)}, got {words[place]!r} "
                f"(grammar: {GRAMMAR})"
            )
    if len(words) > TOKENS:
        raise ValueError(
            f"prompt: expected {TOKENS} words, {text!r} goes on with {words[TOKENS]!r} (grammar: {GRAMMAR})"
        )
    digit = DIGITS.index(words[1]) if words[1] in DIGITS else DIGIT_NAMES.index(words[1])
    return Prompt(digit, words[2], words[3], words[6])


def encode(prompts: Iterable[str | Prompt]) -> Tensor:
    """Word vectors of prompts, float32 [V, 1, L = 8, 32]: the argument `y` of the network.

    A word is one-hot times sqrt(32), so that the mean square of a vector is 1. There is no padding.

    Raises:
        ValueError: a prompt is not in the grammar.
    """
    sentences = [str(parse(prompt) if isinstance(prompt, str) else prompt).split() for prompt in prompts]
    places = [[VOCABULARY.index(word) for word in words] for words in sentences]
    vectors = torch.eye(CHANNELS) * sqrt(CHANNELS)
    return vectors[torch.tensor(places, dtype=torch.int64).reshape(-1, 1, TOKENS)]


def all_prompts() -> list[Prompt]:
    """The grammar's 360 prompts, in a fixed order."""
    return [Prompt(*parts) for parts in product(range(10), MOTIONS, DIRECTIONS, BACKGROUNDS)]


def held_out_prompts() -> list[Prompt]:
    """The 96 prompts held out from training, evenly spread over all words."""
    return [prompt for place, prompt in enumerate(all_prompts()) if _held_out(place)]


def training_prompts() -> list[Prompt]:
    """The other 264."""
    return [prompt for place, prompt in enumerate(all_prompts()) if not _held_out(place)]


def _held_out(place: int) -> bool:
    # 97 and 360 are coprime, so the products are a permutation: exactly 96 of them are below 96.
    return place * 97 % 360 < HELD_OUT


def _one_of(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
