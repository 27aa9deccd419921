# SPDX-License-Identifier: Apache-2.0
"""How much could a budget per video gain? An upper bound, from runs.

    python benchmarks/budget_choice.py wan_unipc --paths examples/scenes/wan_unipc_paths.json --shared 1,6

An adaptive rule must compute some steps before it can choose a video's budget. Paths of all budgets
therefore share their first computed steps (`--shared`); each computes the last step, as those of
`adacache calibrate --adaptive` do. Each clip is run once per budget. With the errors of all runs known, the
best choice of budgets at a given mean is an upper bound of every rule that chooses after the shared steps.
"fixed" gives each clip the same budget. The correlations are between the logarithms of a signal at the last
shared step and of the final squared error, per budget.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adacache.calibration.adaptive import paths_from
from adacache.calibration.clips import Clip, cached_run, forecast, projected
from adacache.calibration.trajectory import trajectory
from adacache.calibration.windows import Doubles, Windows, path_windows
from adacache.commands.calibrate import whole_numbers
from adacache.commands.options import input_file, whole_number
from adacache.commands.table import print_table
from adacache.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 18
"""Most skipped steps of a window, plus 1."""


def run(subject: Any, clip: Clip, path: Sequence[int], factors: Sequence[float], shared: int) -> Any:
    """Squared error of the final latents of a path, and the signals at the last shared step."""
    found = cached_run(subject, clip, path, factors)
    h, i, j = path_windows(path, subject.num_steps)[shared - 2]
    error = found.outputs[j] - forecast(found.outputs, h, i, j, factors[shared - 2])
    final = found.states[-1].double() - clip.full.states[-1].double()
    return [float((one.double() ** 2).mean()) for one in (final, error, found.outputs[j])]


def best_choice(errors: Doubles, budgets: Sequence[int], mean: float) -> list[int]:
    """Per clip the budget (its index) with which the sum of the errors [clips, budgets] is smallest, at this
    mean budget or less (dynamic programming over the steps of all clips)."""
    most = int(mean * len(errors))
    least = np.zeros(most + 1)  # sum of the clips so far, by the steps that they may use
    choices = []
    for row in errors:
        sums = np.full((len(budgets), most + 1), np.inf)
        for k, budget in enumerate(budgets):
            sums[k, budget:] = least[: most + 1 - budget] + row[k]
        choices.append(sums.argmin(0))
        least = sums.min(0)
    if least[most] == np.inf:
        raise ValueError(f"mean: expected at least the smallest budget {min(budgets)}, got {mean}")
    found = []
    for choice in reversed(choices):
        found.append(int(choice[most]))
        most -= budgets[found[-1]]
    return found[::-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=["wan_euler", "wan_unipc", "latte"], help="of examples/scenes")
    parser.add_argument(
        "--paths", type=input_file, required=True, help="its calibrated file: the sensitivity is used"
    )
    parser.add_argument("--shared", type=whole_numbers, default=[1, 6], help="the first computed steps")
    parser.add_argument("--budgets", type=whole_numbers, default=[8, 9, 10, 11, 12, 13, 14, 17, 21, 25])
    parser.add_argument("--means", type=whole_numbers, default=[10, 12, 14], help="mean budgets")
    parser.add_argument("--clips", type=whole_number(1), default=24)
    parser.add_argument("--fit", type=whole_number(1), default=8, help="clips from which the paths are found")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)

    sys.path.insert(0, str(ROOT / "examples"))
    scenes = importlib.import_module("scenes.subjects")
    values = read_json(options.paths, lambda value, _: value)
    subject, tests, _, _ = scenes.benchmark(options.model, options.clips, values["num_steps"])
    _, prompts = scenes.subject(options.model, values["num_steps"])
    fitting = [
        Clip(prompt, seed, trajectory(subject, prompt, seed))
        for seed, prompt in enumerate(prompts[: options.fit])
    ]
    windows = Windows(projected(fitting), np.array(values["sensitivity"]), LONGEST)
    shared = [step - 1 for step in options.shared]
    middle = round(float(np.median(options.budgets)))
    plans = list(zip(*paths_from(windows, shared, options.budgets, middle), strict=True))

    results = []
    for number, (prompt, _, seed) in enumerate(tests):
        clip = Clip(prompt, seed, trajectory(subject, prompt, seed))
        results.append([run(subject, clip, path, factors, len(shared)) for path, factors in plans])
        print(f"clip {number + 1} of {len(tests)}", flush=True)
    found = np.array(results)  # [clips, budgets, 3]
    errors, budgets, peak = found[:, :, 0], options.budgets, 2.0

    def figures(squares: Doubles) -> dict[str, float]:
        psnrs = 10 * np.log10(peak**2 / squares)
        return {
            "PSNR of the mean error": float(10 * np.log10(peak**2 / squares.mean())),
            "mean PSNR": float(psnrs.mean()),
            "10th percentile": float(np.percentile(psnrs, 10)),
            "worst clip": float(psnrs.min()),
        }

    table = {f"fixed, {b}": figures(errors[:, k]) for k, b in enumerate(options.budgets)}
    for mean in options.means:
        chosen = best_choice(errors, budgets, mean)
        table[f"best choice, mean {mean}"] = figures(errors[np.arange(len(errors)), chosen])
    signals = {"forecast error": found[:, 0, 1], "norm": found[:, 0, 2]}
    correlations = {
        name: [float(np.corrcoef(np.log(signal), np.log(errors[:, k]))[0, 1]) for k in range(len(budgets))]
        for name, signal in signals.items()
    }
    columns = list(next(iter(table.values())))
    print_table(
        ["budget", *columns], [[name, *(f"{row[c]:.1f}" for c in columns)] for name, row in table.items()]
    )
    for name, values_ in correlations.items():
        print(f"correlation with {name}: " + ", ".join(f"{c:.2f}" for c in values_))
    if options.json:
        write_json(
            options.json,
            {
                "model": options.model,
                "shared": options.shared,
                "paths": {str(len(path)): [step + 1 for step in path] for path, _ in plans},
                "rows": table,
                "correlations": correlations,
            },
        )


if __name__ == "__main__":
    main()
