# SPDX-License-Identifier: Apache-2.0
"""The training loop of the examples: Muon, AdamW, averaged weights, a schedule by the clock, checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from adacache.files import replacing, write_text
from torch import Tensor, nn

CHECKPOINT, LOG, FORMAT = "checkpoint.pt", "training.jsonl", 1
LONGEST_STEP = 300.0
"""Seconds of a step that count at most, so that a suspended process does not use up its schedule."""


@dataclass(frozen=True)
class Options:
    """The options of the loop; an example adds its own.

    The schedule ends after `steps` or `minutes`, whichever is sooner; with `minutes` the weights also depend
    on the machine's speed.
    """

    steps: int | None = None
    minutes: float | None = None
    """Wall-clock time, without the time between an interruption and its resumption."""
    batch: int = 16
    learning_rate: float = 1.5e-3
    final_learning_rate: float = 1e-5
    warmup: int = 300
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    ema: float = 0.999
    drop_caption: float = 0.1
    seed: int = 0
    bfloat16: bool = True
    """bfloat16 autocast; weights, optimizer and loss are float32."""
    muon_bfloat16: bool = True
    """Muon's iteration in bfloat16, slow on a processor without bfloat16 instructions."""
    compile: bool = True
    """torch.compile of the blocks."""
    log_every: int = 20
    save_minutes: float = 3.0


@dataclass
class State:
    """A training run between two steps."""

    options: Any
    """A subclass of `Options`."""
    model: Any
    """An `nn.Module`."""
    average: dict[str, Tensor]
    """Exponential moving average of the weights, float32."""
    optimizers: tuple[torch.optim.Optimizer, ...]
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0
    """Training time so far, with earlier runs."""

    @property
    def done(self) -> float:
        """The completed part of the schedule, 0 .. 1."""
        steps, minutes = self.options.steps, self.options.minutes
        by_steps = 0.0 if steps is None else self.step / steps
        by_clock = 0.0 if minutes is None else self.seconds / (60 * minutes)
        return min(1.0, max(by_steps, by_clock))


def new_state(options: Options, model: nn.Module, muon_names: Iterable[str]) -> State:
    """A run at step 0.

    Args:
        muon_names: parameters that Muon trains; AdamW trains the others.
    """
    average = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(options.seed)
    return State(options, model, average, _optimizers(model, options, set(muon_names)), generator)


def train(
    state: State,
    loss_of: Callable[[State], Tensor],
    out: str | Path,
    *,
    stop_at: int | None = None,
    progress: bool = True,
) -> State:
    """Trains to the end of the schedule and writes checkpoints and a log to `out`.

    Args:
        state: from `new_state` or `restore`; changed in place.
        loss_of: draws a batch with `state.generator` and returns its loss.
        out: folder of `checkpoint.pt` and `training.jsonl`, created if missing.
        stop_at: stop at this step, like an interruption.
        progress: print each line of the log.

    Raises:
        ValueError: neither steps nor minutes are set.
        FloatingPointError: the loss is not finite; the last checkpoint is kept.
    """
    options = state.options
    if options.steps is None and options.minutes is None:
        raise ValueError("steps, minutes: expected at least one, got neither")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    # Steps after the last checkpoint of an interrupted run are repeated.
    earlier_lines = (
        [line for line in read_log(out) if line.get("step", 0) <= state.step] if state.step else []
    )
    with open(out / LOG, "w") as log:
        for line in earlier_lines:
            _write(log, line)
        _write(log, {"start": state.step, "hardware": hardware(), "options": asdict(options)})
        before = last_save = time.monotonic()
        losses = []
        while state.done < 1 and state.step != stop_at:
            loss, rate = _step(state, loss_of)
            losses.append(loss)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss at step {state.step} is {loss}; lower the learning rate")
            now = time.monotonic()
            state.seconds += min(now - before, LONGEST_STEP)
            before = now
            if state.step % options.log_every == 0 or state.done == 1:
                line = {
                    "step": state.step,
                    "loss": round(sum(losses) / len(losses), 5),
                    "lr": float(f"{rate:.3g}"),
                    "seconds": round(state.seconds, 1),
                }
                losses = []
                _write(log, line)
                if progress:
                    print(json.dumps(line), flush=True)
            if now - last_save >= options.save_minutes * 60:
                save_checkpoint(state, out)
                last_save = now
        save_checkpoint(state, out)
    return state


def save_checkpoint(state: State, out: str | Path) -> Path:
    """Writes `out`/checkpoint.pt: weights, average, optimizers, random state, step, options."""
    path = Path(out) / CHECKPOINT
    content = {
        "format": FORMAT,
        "options": asdict(state.options),
        "model": state.model.state_dict(),
        "average": state.average,
        "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
        "generator": state.generator.get_state(),
        "step": state.step,
        "seconds": state.seconds,
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)
    return path


def restore(out: str | Path, start: Callable[[dict[str, Any]], State]) -> State:
    """Loads the run in `out`/checkpoint.pt.

    Args:
        start: gives a run at step 0 of the saved options.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: the file is not a checkpoint of this script.
    """
    path = Path(out) / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(
            f"resume: no {CHECKPOINT} in {out}; start without --resume, or pass the folder of a run"
        )
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        state = start(dict(content["options"]))
        state.model.load_state_dict(content["model"])
        state.average = content["average"]
        for optimizer, saved in zip(state.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        state.generator.set_state(content["generator"])
        state.step, state.seconds = content["step"], content["seconds"]
    except Exception as error:
        raise ValueError(f"resume: {path} is not a checkpoint of this script ({error})") from error
    return state


def save_average(state: State, path: Path) -> None:
    """Writes the averaged weights to `path` as safetensors, in float16."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({name: value.half().contiguous() for name, value in state.average.items()}, temporary)
        temporary.chmod(0o644)  # safetensors sets 0600


def save_thinned_log(state: State, out: str | Path, path: Path, every: int) -> None:
    """Writes the log of the run in `out` to `path`: one line in `every` steps."""
    lines = [line for line in read_log(Path(out)) if line.get("step", 0) <= state.step]
    kept = [line for line in lines if line.get("step", 0) % every == 0 or line is lines[-1]]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def hardware() -> dict[str, Any]:
    """Processor, threads and torch version of the run."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.partition("+")[0],
    }


class Float32Muon(torch.optim.Optimizer):
    """Muon as `torch.optim.Muon`, but with the iteration in the dtype of the weights."""

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = _orthogonal(weight.grad.lerp(average, group["momentum"]))
                rate = group["lr"]
                weight.mul_(1 - rate * group["weight_decay"])
                # Scales the update like AdamW's.
                weight.add_(update, alpha=-rate * 0.2 * math.sqrt(max(weight.shape)))


def _orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrix, roughly, by the quintic iteration of Jordan et al. 2024."""
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), wide, beta=3.4445)
    return wide.mT if matrix.shape[0] > matrix.shape[1] else wide


def _optimizers(model: nn.Module, options: Options, muon: set[str]) -> tuple[torch.optim.Optimizer, ...]:
    """AdamW, and Muon (Jordan et al. 2024) for the named matrices."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rest = [p for name, p in trained.items() if name not in muon]
    matrices = [trained[name] for name in sorted(muon)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1]},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    rate, decay = options.learning_rate, options.weight_decay
    adam = torch.optim.AdamW(groups, lr=rate, betas=options.betas, weight_decay=decay, fused=True)
    if not options.muon_bfloat16:
        return adam, Float32Muon(matrices, lr=rate, weight_decay=decay)
    # Scales the updates like AdamW's, so that both use one learning rate.
    return adam, torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")


def _step(state: State, loss_of: Callable[[State], Tensor]) -> tuple[float, float]:
    """One update; returns the loss and the learning rate."""
    options, model = state.options, state.model
    rate = _learning_rate(state)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    loss = loss_of(state)
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
    for optimizer in state.optimizers:
        optimizer.step()
    state.step += 1
    # A short memory at first, so that the average is not one of the random start.
    decay = min(options.ema, state.step / (state.step + 10))
    weights = model.state_dict()
    torch._foreach_lerp_(list(state.average.values()), [weights[name] for name in state.average], 1 - decay)
    return loss.item(), rate


def _learning_rate(state: State) -> float:
    """Linear warm-up, then half a cosine over the schedule."""
    options = state.options
    warm = min(1.0, (state.step + 1) / options.warmup)
    low, high = options.final_learning_rate, options.learning_rate
    return warm * (low + (high - low) * 0.5 * (1 + math.cos(math.pi * state.done)))


def read_log(out: Path) -> list[dict[str, Any]]:
    """The lines of the log of the run in `out`."""
    log = out / LOG
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def _write(log: Any, line: dict[str, Any]) -> None:
    log.write(json.dumps(line) + "\n")
    log.flush()
