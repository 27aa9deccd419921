"""The grammar of the digit model's prompts, and prompts as the word vectors that its network reads.

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
"""Every word of the grammar; a word's place here is the entry of its vector that is not zero."""

_MOTION, _DIRECTION, _BACKGROUND = ("|".join(words) for words in (MOTIONS, DIRECTIONS, BACKGROUNDS))
GRAMMAR = f"a {{0-9}} {{{_MOTION}}} {{{_DIRECTION}}} over a {{{_BACKGROUND}}} background"
TOKENS = 8
"""Words of a prompt, L."""
CHANNELS = 32
"""Entries of a word vector."""
HELD_OUT = 96
"""Prompts that training never sees."""


@dataclass(frozen=True)
class Prompt:
    """One sentence of the grammar, taken apart."""

    digit: int
    motion: str
    direction: str
    background: str

    def __str__(self) -> str:
        return f"a {self.digit} {self.motion} {self.direction} over a {self.background} background"


def parse(text: str) -> Prompt:
    """A prompt as a `Prompt`. Case and spacing do not matter; the digit may be a numeral or its English name.

    Raises:
        ValueError: naming the first word that is not understood, and what is accepted in its place.
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
                f"prompt: {text!r} ends after {place} of {TOKENS} words; "
                f"next is {_one_of(choices)} (grammar: {GRAMMAR})"
            )
        if words[place] not in choices:
            raise ValueError(
                f"prompt: word {place + 1} of {text!r}, {words[place]!r}, is not understood; "
                f"expected {_one_of(choices)} (grammar: {GRAMMAR})"
            )
    if len(words) > TOKENS:
        raise ValueError(
            f"prompt: {text!r} goes on after its {TOKENS} words with {words[TOKENS]!r} (grammar: {GRAMMAR})"
        )
    digit = DIGITS.index(words[1]) if words[1] in DIGITS else DIGIT_NAMES.index(words[1])
    return Prompt(digit, words[2], words[3], words[6])


def encode(prompts: Iterable[str | Prompt]) -> Tensor:
    """Prompts as word vectors, float32 [V, 1, L = 8, 32]: what the network takes as `y`.

    A word is one-hot, times sqrt(32) so that a vector's mean square is 1. No token is padding, so no mask is
    needed.

    Raises:
        ValueError: a prompt does not follow the grammar.
    """
    sentences = [str(parse(prompt) if isinstance(prompt, str) else prompt).split() for prompt in prompts]
    places = [[VOCABULARY.index(word) for word in words] for words in sentences]
    vectors = torch.eye(CHANNELS) * sqrt(CHANNELS)
    return vectors[torch.tensor(places, dtype=torch.int64).reshape(-1, 1, TOKENS)]


def all_prompts() -> list[Prompt]:
    """The grammar's 360 prompts, in a fixed order."""
    return [Prompt(*parts) for parts in product(range(10), MOTIONS, DIRECTIONS, BACKGROUNDS)]


def held_out_prompts() -> list[Prompt]:
    """The 96 prompts that training never sees, evenly of all digits, motions, directions and backgrounds."""
    return [prompt for place, prompt in enumerate(all_prompts()) if _held_out(place)]


def training_prompts() -> list[Prompt]:
    """The other 264."""
    return [prompt for place, prompt in enumerate(all_prompts()) if not _held_out(place)]


def _held_out(place: int) -> bool:
    # 97 has no factor in common with 360, so the products are a permutation: exactly 96 of them lie below 96.
    return place * 97 % 360 < HELD_OUT


def _one_of(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
