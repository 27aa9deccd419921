# SPDX-License-Identifier: Apache-2.0
"""The grammar of the digit model's prompts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from adacache.digits.captions import (
    CHANNELS,
    TOKENS,
    VOCABULARY,
    Prompt,
    all_prompts,
    encode,
    held_out_prompts,
    parse,
    training_prompts,
)


def test_every_prompt_round_trips() -> None:
    prompts = all_prompts()
    assert len(set(prompts)) == 360
    assert [parse(str(prompt)) for prompt in prompts] == prompts


def test_case_spacing_and_digit_names_do_not_matter() -> None:
    expected = Prompt(7, "racing", "left", "striped")
    assert parse("a 7 racing left over a striped background") == expected
    assert parse("  A Seven  racing LEFT over a striped background\n") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a 7 flying left over a plain background",
            "word 3 of .* one of resting, drifting, racing, got 'flying'",
        ),
        ("a 12 racing left over a plain background", "word 2 of .* one of 0, 1, .*nine, got '12'"),
        (
            "a 7 racing sideways over a plain background",
            "word 4 of .* one of left, right, up, down, got 'sideways'",
        ),
        ("a 7 racing left over plain background", "word 6 of .*expected a, got 'plain'"),
        ("a 7 racing left over a red background", "word 7 of .* one of plain, striped, noisy, got 'red'"),
        ("a 7 racing", "expected 8 words, .* ends after 3; next is one of left, right, up, down"),
        ("", "expected 8 words, .* ends after 0; next is a "),
        ("a 7 racing left over a plain background quickly", "expected 8 words, .* goes on with 'quickly'"),
    ],
)
def test_wrong_words_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)
    with pytest.raises(ValueError, match=message):
        encode([text])


def test_encodings_are_distinct_and_fixed() -> None:
    y = encode(all_prompts())
    assert y.shape == (360, 1, TOKENS, CHANNELS)
    assert y.dtype == torch.float32
    assert len({tuple(row) for row in y.flatten(1).tolist()}) == 360
    torch.testing.assert_close(y.square().mean(-1), torch.ones(360, 1, TOKENS))
    words = [VOCABULARY[place] for place in y[5, 0].argmax(-1).tolist()]
    assert " ".join(words) == str(all_prompts()[5])
    assert torch.equal(encode([str(all_prompts()[5])]), y[5:6])


def test_no_prompts_encode_to_no_rows() -> None:
    assert encode([]).shape == (0, 1, TOKENS, CHANNELS)


def test_held_out_prompts_are_fixed_and_evenly_spread() -> None:
    held_out, seen = held_out_prompts(), training_prompts()
    assert len(held_out) == 96
    assert not set(held_out) & set(seen)
    assert set(held_out) | set(seen) == set(all_prompts())
    assert str(held_out[0]) == "a 0 resting left over a plain background"
    for part, least in {"digit": 9, "motion": 32, "direction": 24, "background": 32}.items():
        assert min(Counter(getattr(prompt, part) for prompt in held_out).values()) >= least
