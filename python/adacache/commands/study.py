# SPDX-License-Identifier: Apache-2.0
"""`adacache study`: a page on which people compare clips blindly, and the statistics of its results.

The page is one HTML file without a server. It shows two clips of the same name by two methods side by side.
Order and sides are random. A participant chooses left, right or same and downloads the choices as JSON.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

from adacache.checks import refuse, text, whole
from adacache.commands.options import output_file, whole_number
from adacache.commands.table import print_table
from adacache.commands.votes import pair_table, read_results, remarks
from adacache.files import MEBIBYTE, write_text

KINDS = {
    ".gif": ("image/gif", b"GIF8", 0),
    ".webp": ("image/webp", b"WEBP", 8),
    ".png": ("image/png", b"\x89PNG", 0),
    ".mp4": ("video/mp4", b"ftyp", 4),
    ".webm": ("video/webm", b"\x1aE\xdf\xa3", 0),
}
"""Type of each accepted suffix, and bytes at an offset by which such files are recognized."""
MOST_BYTES = 200 * MEBIBYTE
"""Of all clips: browsers limit the size of a page."""
ORDERS = 64
"""Orders in a page. The browser chooses one at random."""
PAGE = "study.html"
QUESTION = "Which clip looks better?"

Clips = Mapping[str, Mapping[str, Path]]
"""By method and file name."""


@dataclass(frozen=True)
class Pair:
    """Two clips of one name. `first` and `second` are methods; equal ones are an attention check."""

    clip: str
    first: str
    second: str


def add(commands: Any) -> None:
    """Adds the command to a parser's commands."""
    command = commands.add_parser(
        "study", help="make a page on which people compare clips blindly, or evaluate its results"
    )
    command.add_argument(
        "directory",
        nargs="?",
        help="folder with DIRECTORY/METHOD/CLIP for two or more methods. Clips have the same names for each "
        f"method; they are {', '.join(KINDS)} files",
    )
    command.add_argument(
        "--evaluate", nargs="+", metavar="RESULTS", help="print the statistics of downloaded results instead"
    )
    command.add_argument("--out", type=output_file, help=f"the page (default: {PAGE})")
    command.add_argument("--against", metavar="METHOD", help="show only pairs with this method")
    command.add_argument(
        "--most",
        type=whole_number(1),
        help="pairs that one participant sees, chosen at random (default: all)",
    )
    command.add_argument(
        "--checks",
        type=whole_number(0),
        default=0,
        help="further pairs of two equal clips, as attention checks (default: %(default)s)",
    )
    command.add_argument(
        "--seed", type=whole_number(), default=0, help="seed of the orders (default: %(default)s)"
    )
    command.add_argument("--question", default=QUESTION, help='shown with each pair (default: "%(default)s")')
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if (options.directory is None) == (options.evaluate is None):
        raise ValueError("expected either a folder of clips or --evaluate RESULTS")
    if options.evaluate is not None:
        return evaluate(options.evaluate)
    clips = read_clips(options.directory)
    pairs = all_pairs(clips, options.against)
    page = make_page(
        clips, pairs, most=options.most, checks=options.checks, seed=options.seed, question=options.question
    )
    out = options.out or Path(PAGE)
    write_text(out, page)
    shown = min(len(pairs), options.most or len(pairs)) + options.checks
    print(f"{len(clips)} methods, {len(pairs)} pairs, {shown} of them for each participant")
    equal = sum(_same_bytes(clips, pair) for pair in pairs)
    if equal:
        print(f"pairs of two equal files: {equal}")
    print(f"written to {out} ({len(page) / MEBIBYTE:.1f} MiB)")
    return 0


def evaluate(paths: Sequence[str | Path]) -> int:
    """Prints the statistics of result files."""
    results = read_results(paths)
    print_table(*pair_table(results))
    print("\n" + "\n".join(remarks(results)))
    return 0


def read_clips(directory: str | Path) -> Clips:
    """The clips in `directory`/METHOD/CLIP.

    Raises:
        ValueError: the layout is wrong; names the folder and the file.
        OSError: a folder cannot be read.
    """
    root = Path(directory)
    if not root.is_dir():
        refuse("directory", "a folder", str(directory))
    entries = _visible(root)
    for entry in entries:
        if entry.is_file() and entry.suffix.lower() in KINDS:
            raise ValueError(f"{root}: expected a folder for each method, got the clip {entry.name}")
    methods = {folder.name: _clips_of(folder) for folder in entries if folder.is_dir()}
    if len(methods) < 2:
        got = ", ".join(methods) or "none"
        raise ValueError(f"{root}: expected folders of two or more methods, got {got}")
    names = sorted({name for clips in methods.values() for name in clips})
    for method, clips in methods.items():
        for name in names:
            if name not in clips:
                other = next(one for one, others in methods.items() if name in others)
                raise ValueError(f"{root / method}: has no {name}, but {root / other} has")
    total = sum(path.stat().st_size for clips in methods.values() for path in clips.values())
    if total > MOST_BYTES:
        raise ValueError(
            f"{root}: expected clips of at most {MOST_BYTES // MEBIBYTE} MiB together, got "
            f"{total / MEBIBYTE:.0f} MiB; a page with more does not open in every browser"
        )
    return methods


def _clips_of(folder: Path) -> dict[str, Path]:
    found = {}
    for path in _visible(folder):
        if not path.is_file() or path.suffix.lower() not in KINDS:
            raise ValueError(f"{folder}: expected only clips ({', '.join(KINDS)}), got {path.name}")
        kind, mark, offset = KINDS[path.suffix.lower()]
        with open(path, "rb") as file:
            if file.read(offset + len(mark))[offset:] != mark:
                raise ValueError(f"{path}: expected a file of type {kind}")
        found[path.name] = path
    if not found:
        raise ValueError(f"{folder}: expected clips ({', '.join(KINDS)}), got none")
    return found


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def all_pairs(clips: Clips, against: str | None = None) -> list[Pair]:
    """Every two methods with every clip; `against`: only pairs with this method.

    Raises:
        ValueError: there is no such method.
    """
    if against is not None:
        text(*clips)(against, "against")
    names = next(iter(clips.values()))
    return [
        Pair(name, first, second)
        for first, second in combinations(clips, 2)
        if against in (None, first, second)
        for name in names
    ]


def make_orders(
    pairs: Sequence[Pair], *, most: int | None = None, count: int = ORDERS, seed: int = 0
) -> list[list[tuple[int, bool]]]:
    """Random orders: each a list of (index of the pair, whether its second clip is on the left).

    In an order, all pairs of methods occur equally often (up to 1), and each method of a pair is on the left
    equally often (up to 1). Attention checks occur in every order. Orders 2k and 2k + 1 have the same pairs,
    in reverse and with sides swapped.

    Args:
        most: largest number of pairs in an order besides attention checks; None: all.
    """
    whole(1)(count, "count")
    found: list[list[tuple[int, bool]]] = []
    for number in range(0, count, 2):
        order = _one_order(pairs, most, random.Random(f"{seed} {number}"))
        found += [order, [(index, not flipped) for index, flipped in reversed(order)]]
    return found[:count]


def _one_order(pairs: Sequence[Pair], most: int | None, source: random.Random) -> list[tuple[int, bool]]:
    groups: dict[tuple[str, str], list[int]] = {}
    checks = []
    for index, pair in enumerate(pairs):
        if pair.first == pair.second:
            checks.append(index)
        else:
            groups.setdefault((pair.first, pair.second), []).append(index)
    wanted = len(pairs) - len(checks) if most is None else most
    for group in groups.values():
        source.shuffle(group)
    chosen: dict[tuple[str, str], list[int]] = {key: [] for key in groups}
    while wanted > 0 and any(groups.values()):
        keys = [key for key, group in groups.items() if group]
        for key in source.sample(keys, min(len(keys), wanted)):
            chosen[key].append(groups[key].pop())
            wanted -= 1
    order = []
    for group in [*chosen.values(), checks]:
        flip = source.random() < 0.5
        order += [(index, flip != bool(place % 2)) for place, index in enumerate(group)]
    source.shuffle(order)
    return order


def make_page(
    clips: Clips,
    pairs: Sequence[Pair],
    *,
    most: int | None = None,
    checks: int = 0,
    seed: int = 0,
    question: str = QUESTION,
) -> str:
    """The page as HTML. It contains the clips, without their names or those of the methods.

    Raises:
        ValueError: there are not enough clips for the attention checks.
        OSError: a clip cannot be read.
    """
    source = random.Random(seed)
    shown = [*pairs, *_checks(clips, checks, source)]
    source.shuffle(shown)
    used = sorted({(method, pair.clip) for pair in shown for method in (pair.first, pair.second)})
    source.shuffle(used)
    ids = {place: f"c{number}" for number, place in enumerate(used)}
    data = {ids[method, name]: _data_uri(clips[method][name]) for method, name in used}
    orders = [
        [2 * index + flipped for index, flipped in order]
        for order in make_orders(shown, most=most, seed=seed)
    ]
    names = [[pair.clip, pair.first, pair.second] for pair in shown]
    identity = hashlib.sha256(json.dumps([names, orders, data, question]).encode()).hexdigest()[:16]
    values = {
        "id": identity,
        "question": question,
        "seed": seed,
        "pairs": [[ids[pair.first, pair.clip], ids[pair.second, pair.clip]] for pair in shown],
        "orders": orders,
        "names": _encoded(names, identity),
    }
    parts = {
        "title": escape(question),
        "clips": "\n".join(
            f'<script type="text/plain" id="{one}">{uri}</script>' for one, uri in data.items()
        ),
        "study": json.dumps(values).replace("<", "\\u003c"),
    }
    page = Path(__file__).with_name("study.html").read_text(encoding="utf-8")
    return re.sub(r"\{(title|clips|study)\}", lambda match: parts[match[1]], page)


def _checks(clips: Clips, count: int, source: random.Random) -> list[Pair]:
    candidates = [Pair(name, method, method) for method, names in clips.items() for name in names]
    whole(0, len(candidates))(count, "checks")
    return source.sample(candidates, count)


def _data_uri(path: Path) -> str:
    kind = KINDS[path.suffix.lower()][0]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _encoded(values: object, key: str) -> str:
    """JSON that is not readable by eye; the page decodes it for the results. This is not encryption."""
    plain = json.dumps(values).encode()
    mixed = bytes(byte ^ ord(key[i % len(key)]) for i, byte in enumerate(plain))
    return base64.b64encode(mixed).decode()


def _same_bytes(clips: Clips, pair: Pair) -> bool:
    first, second = clips[pair.first][pair.clip], clips[pair.second][pair.clip]
    return first.stat().st_size == second.stat().st_size and first.read_bytes() == second.read_bytes()
