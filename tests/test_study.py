# SPDX-License-Identifier: Apache-2.0
"""The user study: layout of the clips, orders, the page, votes and their statistics."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adacache.commands.cli import main
from adacache.commands.report import gif
from adacache.commands.study import Pair, all_pairs, make_orders, make_page, read_clips
from adacache.commands.votes import count_votes, interval, read_results, sign_test

METHODS = ("fastest", "slowest", "uncached")
NAMES = ("a hazel.gif", "a walnut.gif", "an acorn.gif")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    root = tmp_path / "clips"
    source = torch.Generator().manual_seed(0)
    for method in METHODS:
        (root / method).mkdir(parents=True)
        for name in NAMES:
            (root / method / name).write_bytes(gif([torch.rand(3, 8, 8, generator=source)], scale=1))
    return root


def test_layout_is_read(clips: Path) -> None:
    (clips / "notes.txt").write_text("ignored")
    (clips / ".hidden").mkdir()
    (clips / "fastest" / ".hidden").write_text("ignored")
    found = read_clips(clips)
    assert tuple(found) == METHODS
    assert found["slowest"]["a walnut.gif"] == clips / "slowest" / "a walnut.gif"
    assert all(tuple(names) == NAMES for names in found.values())


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: remove(root), "directory: expected a folder, got '.*clips'"),
        (
            lambda root: [remove(root / method) for method in METHODS],
            "clips: expected folders of two or more methods, got none",
        ),
        (lambda root: [remove(root / method) for method in METHODS[1:]], "or more methods, got fastest"),
        (
            lambda root: shutil.copy(root / "fastest" / NAMES[0], root / "alone.gif"),
            "clips: expected a folder for each method, got the clip alone.gif",
        ),
        (
            lambda root: remove(root / "slowest" / NAMES[0]),
            "slowest: has no a hazel.gif, but .*fastest has",
        ),
        (
            lambda root: [remove(root / "slowest" / name) for name in NAMES],
            r"slowest: expected clips \(.*\), got none",
        ),
        (
            lambda root: (root / "fastest" / "a.txt").write_text(""),
            "fastest: expected only clips .*, got a.txt",
        ),
        (
            lambda root: (root / "fastest" / "folder").mkdir(),
            "fastest: expected only clips .*, got folder",
        ),
        (
            lambda root: (root / "fastest" / NAMES[0]).write_text("text"),
            "a hazel.gif: expected a file of type image/gif",
        ),
        (
            lambda root: (root / "fastest" / "a.mp4").write_bytes(b"GIF89a.."),
            "a.mp4: expected a file of type video/mp4",
        ),
    ],
)
def test_wrong_layout_is_named(clips: Path, change: Any, message: str) -> None:
    change(clips)
    with pytest.raises((ValueError, OSError), match=message):
        read_clips(clips)


def test_too_many_bytes(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adacache.commands.study.MOST_BYTES", 100)
    with pytest.raises(ValueError, match="clips: expected clips of at most 0 MiB together"):
        read_clips(clips)


def pairs_of(methods: int, clips: int, checks: int = 0) -> list[Pair]:
    names = {f"m{m}": {f"c{c}": Path() for c in range(clips)} for m in range(methods)}
    return [*all_pairs(names), *(Pair(f"c{i}", "m0", "m0") for i in range(checks))]


def test_every_pair_occurs_once_in_every_order() -> None:
    pairs = pairs_of(3, 5, checks=2)
    assert len(pairs) == 3 * 5 + 2
    orders = make_orders(pairs, count=6)
    for order in orders:
        assert sorted(index for index, _ in order) == list(range(len(pairs)))
    assert len({tuple(order) for order in orders}) == 6
    assert orders == make_orders(pairs, count=6)
    assert orders != make_orders(pairs, count=6, seed=1)
    assert len(make_orders(pairs, count=3)) == 3


@pytest.mark.parametrize("most", [None, 1, 4, 7, 15, 100])
def test_orders_are_balanced(most: int | None) -> None:
    pairs = pairs_of(3, 5, checks=2)
    for order in make_orders(pairs, most=most, count=8):
        shown = [(pairs[index], flipped) for index, flipped in order]
        votes = [(pair, flipped) for pair, flipped in shown if pair.first != pair.second]
        assert len(shown) - len(votes) == 2
        assert len(votes) == min(15, most or 15)
        kinds = Counter((pair.first, pair.second) for pair, _ in votes)
        assert max(kinds.values()) - (min(kinds.values()) if len(kinds) == 3 else 0) <= 1
        for kind, count in kinds.items():
            flipped = sum(flip for pair, flip in votes if (pair.first, pair.second) == kind)
            assert abs(2 * flipped - count) <= 1


def test_neighbouring_orders_are_mirrored() -> None:
    for even, odd in zip(*[iter(make_orders(pairs_of(2, 6), most=4, count=8))] * 2, strict=True):
        assert odd == [(index, not flipped) for index, flipped in reversed(even)]


def test_pairs_against_one_method(clips: Path) -> None:
    found = all_pairs(read_clips(clips), "slowest")
    assert len(found) == 6
    assert all("slowest" in (pair.first, pair.second) for pair in found)
    with pytest.raises(ValueError, match="against: expected one of fastest, slowest, uncached, got 'none'"):
        all_pairs(read_clips(clips), "none")


def test_page_reveals_no_name_and_loads_nothing(clips: Path) -> None:
    found = read_clips(clips)
    question = "Which <b>{clips}</b> & {study}?"
    page = make_page(found, all_pairs(found), checks=2, question=question)
    for word in (*METHODS, "hazel", "walnut", "acorn", str(clips)):
        assert word not in page, word
    assert not re.search(r"(src|href)\s*=\s*[\"']|https?:|@import|import\(|fetch\(", page)
    assert "default-src 'none'" in page
    assert "<title>Which &lt;b&gt;{clips}&lt;/b&gt; &amp; {study}?</title>" in page
    study = json.loads(page.split('<script type="application/json" id="study">')[1].split("</script>")[0])
    assert study["question"] == question
    assert len(study["pairs"]) == 9 + 2
    assert sum(left == right for left, right in study["pairs"]) == 2
    ids = re.findall(r'<script type="text/plain" id="(\w+)">data:image/gif;base64,[\w+/=]+</script>', page)
    assert set(ids) == {one for pair in study["pairs"] for one in pair}
    assert len(ids) == len(set(ids)) == 9
    assert page == make_page(found, all_pairs(found), checks=2, question=question)
    other = make_page(found, all_pairs(found), checks=2, question=question, seed=1)
    assert study["id"] not in other


def answer(left: str, right: str, choice: str, clip: str = "a.gif", seconds: float = 1.0) -> dict[str, Any]:
    return {"pair": 0, "clip": clip, "left": left, "right": right, "choice": choice, "seconds": seconds}


def result(path: Path, answers: list[dict[str, Any]], **others: Any) -> Path:
    values = {"format": 1, "study": "s", "question": "?", "seed": 0, "order": 0, "started": path.name}
    path.write_text(json.dumps({**values, "answers": answers, **others}))
    return path


def test_votes_are_counted_by_method_and_not_by_side(tmp_path: Path) -> None:
    first = [
        answer("a", "b", "left"),
        answer("b", "a", "right"),
        answer("b", "a", "left"),
        answer("a", "b", "same"),
    ]
    second = [answer("a", "b", "right", seconds=9.0), answer("b", "c", "right"), answer("a", "a", "left")]
    results = read_results([result(tmp_path / "1.json", first), result(tmp_path / "2.json", second)])
    ab, bc = count_votes(results)
    assert (ab.first, ab.second, ab.wins, ab.losses, ab.same, ab.participants) == ("a", "b", 2, 2, 1, (1, 1))
    assert (bc.first, bc.second, bc.wins, bc.losses, bc.same, bc.participants) == ("b", "c", 0, 1, 0, (0, 1))
    assert ab.seconds == 1.0


def test_sign_test() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(5, 5) == 1
    assert sign_test(9, 1) == sign_test(1, 9) == pytest.approx(22 / 1024)
    assert sign_test(10, 0) == pytest.approx(2 / 1024)
    assert sign_test(3000, 2800) == pytest.approx(math.erfc(199 / math.sqrt(2 * 5800)), rel=1e-3)


def test_interval_is_that_of_the_exact_test() -> None:
    """The values are those of `scipy.stats.binomtest(wins, wins + losses)`."""
    for wins, losses, p, low, high in (
        (3, 9, 0.14599609375, 0.05486064452799241, 0.5718584618780997),
        (40, 25, 0.08168153394154003, 0.48642973277726587, 0.7334640617050582),
        (900, 1100, 8.45708953550381e-06, 0.42803365593928305, 0.47211314192026055),
    ):
        assert sign_test(wins, losses) == pytest.approx(p)
        assert interval(wins, losses) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    assert interval(0, 0) == (0, 1)
    assert interval(0, 7)[0] == 0
    assert interval(0, 7)[1] == pytest.approx(1 - 0.025 ** (1 / 7))
    for total in range(1, 30):
        for wins in range(total + 1):
            low, high = interval(wins, total - wins)
            assert (sign_test(wins, total - wins) < 0.05) == (not low <= 0.5 <= high)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"x.json: format: expected a whole number in 1..1, got 2"),
        ({"study": "other"}, r"x.json: expected results of the same study as .*first.json"),
        ({"started": "first.json"}, r"x.json: has the same answers as .*first.json"),
        ({"answers": []}, r"x.json: answers: expected a list of 1 or more items"),
        ({"answers": [answer("a", "b", "up")]}, r"answers\[0\].choice: expected one of left, right, same"),
        ({"answers": [answer("a", "b", "left", seconds=-1)]}, r"answers\[0\].seconds: expected a number"),
    ],
)
def test_wrong_results_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = result(tmp_path / "first.json", [answer("a", "b", "left")])
    values = json.loads(good.read_text()) | {"started": "x"} | change
    (tmp_path / "x.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        read_results([good, tmp_path / "x.json"])


def test_command(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(clips / "fastest" / NAMES[0], clips / "slowest" / NAMES[0])
    page = tmp_path / "page.html"
    assert main(["study", str(clips), "--out", str(page), "--most", "4", "--checks", "1"]) == 0
    printed = capsys.readouterr().out
    assert "3 methods, 9 pairs, 5 of them for each participant\npairs of two equal files: 1\n" in printed
    assert page.read_text().startswith("<!doctype html>")
    answers = [answer("a", "b", "left")] * 8 + [answer("b", "a", "left"), answer("a", "a", "same")]
    files = [result(tmp_path / "1.json", answers), result(tmp_path / "2.json", [answer("a", "b", "same")])]
    assert main(["study", "--evaluate", *map(str, files)]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("a : b"))
    assert re.sub(" +", " ", row) == "a : b 9 8 88.9 % 51.8 .. 99.7 % 0.0391 1 1 : 0 1.0"
    assert "1.json: 1 of 1 attention checks answered `same`" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected either a folder of clips or --evaluate RESULTS"),
        (["{clips}", "--evaluate", "x.json"], "expected either a folder of clips or --evaluate RESULTS"),
        (["{clips}", "--checks", "99"], r"checks: expected a whole number in 0..9, got 99"),
        (["{clips}", "--most", "0"], "--most: expected a whole number of at least 1"),
        (["{clips}", "--against", "x"], "against: expected one of fastest"),
        (["{clips}", "--out", "{clips}"], "--out: cannot write"),
        (["--evaluate", "{clips}/none.json"], "No such file"),
    ],
)
def test_wrong_option(
    clips: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(clips.parent)
    try:
        status = main(["study", *(option.format(clips=clips) for option in options)])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert re.search(message, capsys.readouterr().err)
    assert os.listdir(clips.parent) == ["clips"]


@pytest.fixture
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    automation = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    with automation.sync_playwright() as playwright:
        path = next((one for one in found if one), playwright.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip("no chromium on PATH, and playwright installed none")
        rights = ["--no-sandbox"] if os.geteuid() == 0 else []
        with playwright.chromium.launch(executable_path=path, args=rights) as launched:
            yield launched


class Participant:
    """Drives the page with mouse and keyboard."""

    def __init__(self, browser: Any, page: Path, order: int):
        self.context = browser.new_context(viewport={"width": 1000, "height": 700}, accept_downloads=True)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"{page.as_uri()}#order={order}")

    def wait(self) -> None:
        self.page.wait_for_selector(
            "[data-screen=pair] [data-choice=left]:enabled, [data-screen=end] #download"
        )

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)
        self.wait()

    def click(self, selector: str) -> None:
        self.page.click(selector)
        self.wait()

    @property
    def place(self) -> str:
        return self.page.inner_text("#place")

    def sizes(self) -> list[list[float]]:
        """Left, right and width of each clip on the screen."""
        return self.page.evaluate(
            "[...document.querySelectorAll('figure img')].map((clip) => clip.getBoundingClientRect())"
            ".map(({ left, right, width }) => [left, right, width])"
        )


def test_page_in_a_browser(browser: Any, clips: Path, tmp_path: Path) -> None:
    found = read_clips(clips)
    pairs = all_pairs(found)
    path = tmp_path / "study.html"
    path.write_text(make_page(found, pairs, checks=1, question="Which one?"))
    one = Participant(browser, path, order=5)
    assert one.page.inner_text("#intro .question") == "Which one?"
    one.page.keyboard.press("ArrowLeft")  # no pair is shown yet
    one.press("Enter")
    assert one.place == "1 of 10"
    first, second = one.sizes()
    assert first[2] == second[2] > 8  # enlarged
    assert first[1] < second[0]
    one.press("ArrowRight")
    one.click("[data-choice=left]")
    one.press("s")
    assert one.place == "4 of 10"
    one.press("r")
    one.page.reload()
    one.wait()
    assert one.place == "4 of 10"
    one.press("Backspace")
    one.click("#back")
    assert one.place == "2 of 10"
    assert one.page.get_attribute("[data-choice=left]", "aria-pressed") == "true"
    one.press("ArrowDown")
    one.press("s")
    one.page.set_viewport_size({"width": 360, "height": 640})
    one.press("r")
    assert all(0 <= left < right <= 360 for left, right, _ in one.sizes())
    assert one.page.evaluate("document.documentElement.scrollWidth") <= 360
    for _ in range(7):
        assert not one.page.is_visible("#download")
        one.press("ArrowLeft")
    with one.page.expect_download() as download:
        one.page.click("#download")
    download.value.save_as(tmp_path / "result.json")
    assert one.problems == []
    assert {url.split(":")[0] for url in one.requests} == {"file", "blob"}

    saved = tmp_path / "result.json"
    values = json.loads(saved.read_text())
    assert (values["seed"], values["order"], values["question"]) == (0, 5, "Which one?")
    choices = [given["choice"] for given in values["answers"]]
    assert choices == ["right", "same", "same"] + ["left"] * 7
    assert all(given["seconds"] >= 0 for given in values["answers"])
    shown = Counter(
        (given["clip"], *sorted((given["left"], given["right"])))
        for given in values["answers"]
        if given["left"] != given["right"]
    )
    assert shown == Counter((pair.clip, pair.first, pair.second) for pair in pairs)
    assert sum(votes.wins + votes.losses + votes.same for votes in count_votes(read_results([saved]))) == 9

    # The result names the clips that were shown: a second participant gets the first pair again.
    one.page.click("#again")
    one.page.click("#start")
    one.wait()
    assert one.place == "1 of 10"
    given = values["answers"][0]
    pixels = one.page.evaluate(
        """() => Promise.all(["left", "right"].map(async (side) => {
          const clip = document.querySelector(`#${side} img`), canvas = document.createElement("canvas");
          [canvas.width, canvas.height] = [clip.naturalWidth, clip.naturalHeight];
          canvas.getContext("2d").drawImage(clip, 0, 0);
          return [...canvas.getContext("2d").getImageData(0, 0, 1, 1).data].slice(0, 3);
        }))"""
    )
    from PIL import Image

    for side, seen in zip(("left", "right"), pixels, strict=True):
        frames = Image.open(clips / given[side] / given["clip"])
        levels = []
        for frame in range(getattr(frames, "n_frames", 1)):
            frames.seek(frame)
            levels.append(list(frames.convert("RGB").getpixel((0, 0))))
        assert seen in levels
