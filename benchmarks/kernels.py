# SPDX-License-Identifier: Apache-2.0
"""Times every op against its plain PyTorch chain, the chain under torch.compile, and a copy.

Results are checked first. An op with a wrong result is not timed, and the run fails.
python benchmarks/kernels.py [--device cuda] [--dtype bfloat16 ...] [--shape 720p-2s | 2x15x400x1152 ...]
                             [--ops PATTERN ...] [--backends NAME ...] [--json FILE] [--plot FILE]
python benchmarks/kernels.py --predict      writes predictions for a GPU to benchmarks/README.md
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from cases import CASES, SHAPES, Case, Shape, Values, copy_inputs, make_inputs
from check import expect, find_fault, has_backend, outputs_for
from measure import (
    DTYPES,
    Timing,
    environment,
    graph_milliseconds,
    input_sets,
    measure,
    print_table,
    write_json,
)

import adacache_kernels as ak

EAGER, COMPILED, COPY, FRESH_COPY = "eager", "torch.compile", "copy", "copy into new memory"
BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
METER_COST = ("gated_residual_meter", "gated_residual")
METER_COST_LIMIT = 1.05
DECIDE_LIMIT = 5.0  # microseconds on a GPU
CPU_TIMES_EAGER, CPU_SHARE = 3.0, 0.85  # one of them must be reached


@dataclass(frozen=True)
class Record:
    """One row of the table. A ratio is None if the other candidate was not timed."""

    case: str
    op: str
    shape: list[int]
    frames: int
    dtype: str
    backend: str
    with_out: bool  # writes to existing memory, like the copy
    microseconds: float
    least: float
    most: float
    bytes: int
    gigabytes_per_second: float
    share_of_copy_rate: float
    times_eager: float | None = None
    times_compiled: float | None = None
    times_peer: float | None = None


@dataclass(frozen=True)
class Goal:
    """A speed goal and the measured value. at_most: the goal is an upper limit."""

    case: str
    backend: str
    shape: list[int]
    dtype: str
    what: str
    asked: float
    got: float
    reached: bool
    at_most: bool = False


def main() -> int:
    arguments = parse_arguments()
    if arguments.predict:
        from prediction import write_predictions

        write_predictions()
        return 0
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    # Cases with goals first.
    cases = sorted(filter(has_peer, chosen(CASES, arguments.ops)), key=lambda case: not case.gpu_goals)
    facts = environment(device)
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, commit {facts['commit']}")
    repeat = arguments.repeat or (50 if device.type == "cuda" else 15)
    print(f"medians of {repeat} interleaved rounds; GB/s: minimum bytes over time\n")

    bench = Bench(device, arguments.backends or BACKENDS[device.type], repeat, not arguments.no_compile)
    if not arguments.ops or chosen([DECIDE], arguments.ops):
        bench.decide()
    for shape in arguments.shape or (["480p-2s", "720p-2s"] if device.type == "cuda" else ["cpu"]):
        for dtype in arguments.dtype or (["bfloat16"] if device.type == "cuda" else ["float32"]):
            bench.copies(read_shape(shape), DTYPES[dtype])
            for case in cases:
                print(f"{case.name}, {shape}, {dtype} ...", file=sys.stderr, flush=True)
                bench.run_if_right(case, read_shape(shape), DTYPES[dtype])
                if arguments.json:  # after each case, in case the run is interrupted
                    write_json(arguments.json, bench.figures() | facts | {"repeat": repeat})

    print_records(bench.records)
    print_goals(find_goals(bench.records, device.type))
    for fault in bench.faults:
        print(f"NOT TIMED {fault}")
    if arguments.json:
        write_json(arguments.json, bench.figures() | facts | {"repeat": repeat})
        print(f"\nwritten to {arguments.json}")
    if arguments.plot:
        plot(bench.records, arguments.plot, f"{facts['device']}, torch {facts['torch']}")
    return 1 if bench.faults else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: float32, on cuda bfloat16")
    parser.add_argument(
        "--shape",
        nargs="+",
        help=f"{', '.join(SHAPES)}, or ROWSxFRAMESxPLACESxCHANNELS; default: cpu, on cuda the other two",
    )
    parser.add_argument("--ops", nargs="+", metavar="PATTERN", help="patterns (*, ?) of op or case names")
    parser.add_argument("--backends", nargs="+", choices=ak.BACKENDS)
    parser.add_argument("--repeat", type=int, help="rounds; default: 15, on cuda 50")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile, which takes long")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="bar chart of the share of the copy rate, .png or .svg"
    )
    parser.add_argument("--predict", action="store_true")
    return parser.parse_args()


def read_shape(text: str) -> Shape:
    if text in SHAPES:
        return SHAPES[text]
    if not re.fullmatch(r"\d+x\d+x\d+x\d+", text):
        raise SystemExit(
            f"--shape: expected {', '.join(SHAPES)} or ROWSxFRAMESxPLACESxCHANNELS, got {text!r}"
        )
    return Shape(*map(int, text.split("x")))


def chosen(cases: Iterable[Any], patterns: Sequence[str] | None) -> list[Any]:
    if not patterns:
        return list(cases)
    return [c for c in cases if any(fnmatchcase(c.name, p) or fnmatchcase(c.op, p) for p in patterns)]


def has_peer(case: Case) -> bool:
    return case.peer is None or importlib.util.find_spec(case.peer.package) is not None


class Bench:
    """The measurements on one device."""

    def __init__(self, device: torch.device, backends: Sequence[str], repeat: int, compiling: bool) -> None:
        self.device = device
        self.backends = backends
        self.repeat = repeat
        self.compiling = compiling
        self.records: list[Record] = []
        self.faults: list[str] = []

    def figures(self) -> dict[str, Any]:
        return {
            "benchmark": "kernels",
            "records": [asdict(record) for record in self.records],
            "goals": [asdict(goal) for goal in find_goals(self.records, self.device.type)],
            "faults": self.faults,
        }

    def copies(self, shape: Shape, dtype: torch.dtype) -> None:
        """Times the baseline: a copy into existing memory, and one into new memory."""
        candidates = self.copy_candidates(shape, dtype)
        sources = candidates.pop("sources")
        candidates[FRESH_COPY] = lambda turn: sources[turn % len(sources)].clone()
        timings = measure(candidates, self.device, repeat=self.repeat)
        moved = 2 * sources[0].numel() * sources[0].element_size()
        self.records += [
            self.record(
                name,
                "copy",
                shape,
                dtype,
                "-",
                name == COPY,
                timings[name],
                moved,
                timings[COPY].median / moved,
            )
            for name in (COPY, FRESH_COPY)
        ]

    def copy_candidates(self, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
        target = torch.empty(shape.size, dtype=dtype, device=self.device)
        count = input_sets(2 * target.numel() * target.element_size(), self.device)
        sources = [torch.randn(shape.size, dtype=dtype, device=self.device) for _ in range(count)]
        return {COPY: lambda turn: target.copy_(sources[turn % count]), "sources": sources}

    def run_if_right(self, case: Case, shape: Shape, dtype: torch.dtype) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            self.run(case, shape, dtype)
        except Exception as error:  # the other cases still run
            first_line = (str(error).splitlines() or [""])[0]
            self.faults.append(
                f"{case.name}, {shape}, {name_of(dtype)}: {type(error).__name__}: {first_line}"
            )

    def run(self, case: Case, shape: Shape, dtype: torch.dtype) -> None:
        backends = [name for name in self.backends if has_backend(case.op, name)]
        if not backends:
            return
        shape = case.at(shape)
        first = make_inputs(case, shape, dtype, self.device)
        expected = expect(case, first)
        for backend in list(backends):
            if fault := find_fault(case, expected, first, backend):
                self.faults.append(f"{case.name}, {shape}, {name_of(dtype)}, {backend}: {fault}")
                backends.remove(backend)
        del expected
        if not backends:
            return
        moved = case.bytes(shape, dtype.itemsize)
        held = sum(value.nbytes for value in vars(first).values() if isinstance(value, torch.Tensor))
        count = input_sets(held, self.device)
        sets = [first] + [make_inputs(case, shape, dtype, self.device) for _ in range(count - 1)]
        candidates = self.candidates(case, sets, backends)
        copy = self.copy_candidates(shape, dtype)
        candidates[COPY] = copy[COPY]
        timings = measure(candidates, self.device, repeat=self.repeat, warmup=3)
        torch.compiler.reset()

        copied = 2 * copy["sources"][0].numel() * dtype.itemsize
        for name, timing in timings.items():
            if name in (EAGER, COMPILED, COPY):
                continue
            backend, _, given = name.partition(" ")
            ratios = {
                field: timings[other].median / timing.median if other in timings else None
                for field, other in (
                    ("times_eager", EAGER),
                    ("times_compiled", COMPILED),
                    ("times_peer", case.peer.package if case.peer else ""),
                )
            }
            self.records.append(
                self.record(
                    case.name,
                    case.op,
                    shape,
                    dtype,
                    backend,
                    bool(given),
                    timing,
                    moved,
                    timings[COPY].median / copied,
                    **ratios,
                )
            )

    def candidates(
        self, case: Case, sets: list[Values], backends: list[str]
    ) -> dict[str, Callable[[int], object]]:
        candidates: dict[str, Callable[[int], object]] = {
            EAGER: lambda turn: case.chain(sets[turn % len(sets)])
        }
        if self.compiling:
            compiled = torch.compile(case.chain, dynamic=False)
            candidates[COMPILED] = lambda turn: compiled(sets[turn % len(sets)])
        if case.peer:
            peer = case.peer
            candidates[peer.package] = lambda turn: peer.call(sets[turn % len(sets)])
        for backend in backends:
            candidates[backend] = self.calling(case, sets, backend, {})
            # On CUDA the caching allocator makes out= unnecessary.
            if case.outs and self.device.type == "cpu":
                with ak.use_backend(backend):
                    given = outputs_for(case, copy_inputs(sets[0]))
                candidates[f"{backend} out="] = self.calling(case, sets, backend, given)
        return candidates

    def calling(
        self, case: Case, sets: list[Values], backend: str, given: dict[str, torch.Tensor]
    ) -> Callable[[int], object]:
        def call(turn: int) -> object:
            with ak.use_backend(backend):
                return case.call(ak, sets[turn % len(sets)], given)

        return call

    def decide(self) -> None:
        """Times `decide`; on CUDA in a CUDA graph."""
        for backend in filter(lambda name: has_backend(DECIDE.op, name), self.backends):
            call = self.deciding(backend)
            if self.device.type == "cuda":
                milliseconds = graph_milliseconds(call, self.device)
                timing = Timing(DECIDE.name, milliseconds, milliseconds, milliseconds)
            else:
                timing = measure({"": call}, self.device, repeat=10 * self.repeat)[""]
            nothing = Shape(1, 1, 1, 1)
            self.records.append(
                self.record(DECIDE.name, DECIDE.op, nothing, torch.float64, backend, False, timing, 0, 0.0)
            )

    def deciding(self, backend: str) -> Callable[[int], object]:
        sums = torch.rand(1, len(ak.sum_columns((1,))), dtype=torch.float64, device=self.device)
        state = ak.initial_state(num_videos=1, device=self.device)
        book = torch.tensor([[0.08, 0.16, 1.0], [6, 3, 1]], dtype=torch.float64, device=self.device)

        def call(turn: int) -> None:
            with ak.use_backend(backend):
                ak.decide(sums, state, step=2, num_steps=30, thresholds=book[0], rates=book[1], frames=15)

        return call

    def record(
        self,
        name: str,
        op: str,
        shape: Shape,
        dtype: torch.dtype,
        backend: str,
        given: bool,
        timing: Timing,
        moved: int,
        copy_per_byte: float,
        **ratios: float | None,
    ) -> Record:
        return Record(
            name,
            op,
            list(shape.size),
            shape.frames,
            name_of(dtype),
            backend,
            given,
            *(1e3 * value for value in (timing.median, timing.least, timing.most)),
            moved,
            moved / timing.median / 1e6,
            moved * copy_per_byte / timing.median,
            **ratios,
        )


class DECIDE:
    name = op = "decide"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def find_goals(records: Sequence[Record], device: str) -> list[Goal]:
    """The goals for this device type, with the measured values."""
    goals = []
    asked = {case.name: case.gpu_goals for case in CASES}
    groups: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records:
        key = (record.backend, str(record.shape), record.dtype)
        groups.setdefault(key, {})[record.case + " out=" * record.with_out] = record
    for record in records:
        of_this = (record.case, record.backend, record.shape, record.dtype)
        if device == "cuda":
            for what, least in asked.get(record.case, {}).items():
                got = getattr(record, what)
                if got is not None:
                    goals.append(Goal(*of_this, what, least, got, got >= least))
            if record.case == DECIDE.name:
                got = record.microseconds
                goals.append(Goal(*of_this, "microseconds", DECIDE_LIMIT, got, got < DECIDE_LIMIT, True))
        elif record.times_eager is not None and not record.with_out:
            group = groups[record.backend, str(record.shape), record.dtype]
            share = group.get(record.case + " out=", record).share_of_copy_rate
            if record.times_eager < CPU_TIMES_EAGER and share > 0:
                goals.append(Goal(*of_this, "share_of_copy_rate", CPU_SHARE, share, share >= CPU_SHARE))
            else:
                goals.append(Goal(*of_this, "times_eager", CPU_TIMES_EAGER, record.times_eager, True))
    if device == "cuda":
        for group in groups.values():
            metered, plain = (group.get(name) for name in METER_COST)
            if metered and plain:
                # Time per byte: gated_residual moves fewer bytes.
                cost = plain.gigabytes_per_second / metered.gigabytes_per_second
                goals.append(
                    Goal(
                        metered.case,
                        metered.backend,
                        metered.shape,
                        metered.dtype,
                        "time per byte, relative to gated_residual",
                        METER_COST_LIMIT,
                        cost,
                        cost <= METER_COST_LIMIT,
                        True,
                    )
                )
    return goals


def print_records(records: Sequence[Record]) -> None:
    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    header = ["op", "shape", "dtype", "backend", "us", "GB/s", "% of copy", "x eager", "x compile"]
    peers = any(record.times_peer is not None for record in records)
    rows = []
    for r in records:
        moved = (
            ["-", "-"]
            if r.bytes == 0
            else [f"{r.gigabytes_per_second:.1f}", f"{100 * r.share_of_copy_rate:.0f}"]
        )
        shape = "-" if r.bytes == 0 else str(r.shape)
        backend = r.backend + (" out=" if r.with_out and r.op != "copy" else "")
        row = [r.case, shape, r.dtype, backend, f"{r.microseconds:.1f}", *moved]
        row += [ratio(r.times_eager), ratio(r.times_compiled)] + ([ratio(r.times_peer)] if peers else [])
        rows.append(row)
    print_table(header + (["x peer"] if peers else []), rows)


def print_goals(goals: Sequence[Goal]) -> None:
    if not goals:
        return
    missed = [goal for goal in goals if not goal.reached]
    print(f"\ngoals: {len(goals) - len(missed)} of {len(goals)} reached")
    for goal in missed:
        limit = "at most" if goal.at_most else "at least"
        print(
            f"  missed: {goal.case}, {goal.shape}, {goal.dtype}, {goal.backend}: {goal.what} {goal.got:.3g}, "
            f"goal {limit} {goal.asked:g}"
        )


def plot(records: Sequence[Record], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in records if r.bytes and r.op != "copy"]
    names = list(dict.fromkeys(r.case for r in shown))
    series = list(dict.fromkeys((r.backend, r.with_out, r.dtype, str(r.shape)) for r in shown))
    height = 0.8 / max(len(series), 1)
    figure, axes = pyplot.subplots(
        figsize=(9, 1 + 0.16 * len(names) * (1 + len(series))), layout="constrained"
    )
    for index, (backend, with_out, dtype, shape) in enumerate(series):
        mine = [r for r in shown if (r.backend, r.with_out, r.dtype, str(r.shape)) == series[index]]
        places = [names.index(r.case) + (index - (len(series) - 1) / 2) * height for r in mine]
        label = f"{backend}{' out=' if with_out else ''} {dtype} {shape}"
        axes.barh(places, [100 * r.share_of_copy_rate for r in mine], height, label=label)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.margins(y=0.005)
    axes.invert_yaxis()
    axes.set_xlabel("minimum bytes over time, % of the rate of a copy into existing memory")
    figure.suptitle(title, fontsize="medium")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"plotted to {path}")


if __name__ == "__main__":
    sys.exit(main())
