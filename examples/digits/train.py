"""Trains the digit model: `python examples/digits/train.py --out DIR --minutes 75 [--resume]`.

Rectified flow as in Open-Sora 1.2: at timestep 1000 t the input is (1 - t) x0 + t noise and the target is the
velocity x0 - noise. Muon trains the blocks, AdamW the other parameters. `--export` converts a checkpoint to
the files that `adacache.digits.load` reads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from adacache.commands.options import real_number, whole_number
from adacache.digits import FPS, SIZE
from adacache.digits.captions import CHANNELS, TOKENS, encode, training_prompts
from adacache.files import replacing, write_text
from adacache.models.stdit3 import STDiT3, STDiT3Block, STDiT3Config
from clips import draw_clips
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CONFIG = STDiT3Config(
    depth=4,
    hidden_size=128,
    num_heads=4,
    in_channels=1,
    patch_size=(1, 8, 8),
    caption_channels=CHANNELS,
    model_max_length=TOKENS,
    pred_sigma=False,
    input_sq_size=SIZE,
)
"""The shipped network: 2.35 million parameters, 256 tokens per clip of 32x32 pixels, no autoencoder."""

CHECKPOINT, LOG, FORMAT = "checkpoint.pt", "training.jsonl", 1


@dataclass(frozen=True)
class Options:
    """All options that determine the weights.

    The schedule ends after `steps` or `minutes`, whichever is sooner; with `minutes` the weights also depend
    on the machine's speed.
    """

    config: STDiT3Config = field(default_factory=lambda: CONFIG)
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
    t_mean: float = 0.4
    t_std: float = 1.2
    """90 % of the t are the sigmoid of a normal variable with this mean and deviation, 10 % are uniform."""
    seed: int = 0
    bfloat16: bool = True
    """bfloat16 autocast; weights, optimizer and loss are float32."""
    compile: bool = True
    """torch.compile of the blocks."""
    log_every: int = 20
    save_minutes: float = 3.0


@dataclass
class State:
    """A training run between two steps."""

    options: Options
    model: STDiT3
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


def start(options: Options) -> State:
    """A run at step 0. The initial weights depend on `options.seed` only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = STDiT3(options.config)
        model.initialize()
    average = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(options.seed)
    return State(options, model, average, _optimizers(model, options), generator)


def train(state: State, out: str | Path, *, stop_at: int | None = None, progress: bool = True) -> State:
    """Trains to the end of the schedule and writes checkpoints and a log to `out`.

    Args:
        state: from `start` or `load_checkpoint`; changed in place.
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
    run_block: Callable[..., Tensor] = STDiT3Block.forward
    if options.compile:
        run_block = torch.compile(STDiT3Block.forward, fullgraph=True, dynamic=False)
    # Steps after the last checkpoint of an interrupted run are repeated.
    earlier_lines = (
        [line for line in _read_log(out) if line.get("step", 0) <= state.step] if state.step else []
    )
    with open(out / LOG, "w") as log:
        for line in earlier_lines:
            _write(log, line)
        _write(log, {"start": state.step, "hardware": hardware(), "options": asdict(options)})
        began = last_save = time.monotonic()
        earlier, losses = state.seconds, []
        while state.done < 1 and state.step != stop_at:
            loss, rate = _step(state, run_block)
            losses.append(loss)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss at step {state.step} is {loss}; lower the learning rate")
            now = time.monotonic()
            state.seconds = earlier + now - began
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


def load_checkpoint(out: str | Path, minutes: float | None = None) -> State:
    """Loads the run in `out`/checkpoint.pt.

    Args:
        minutes: replaces the run's own limit.

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
        values = dict(content["options"])
        values["config"] = STDiT3Config(**values["config"])
        options = Options(**values)
        state = start(options if minutes is None else replace(options, minutes=minutes))
        state.model.load_state_dict(content["model"])
        state.average = content["average"]
        for optimizer, saved in zip(state.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        state.generator.set_state(content["generator"])
        state.step, state.seconds = content["step"], content["seconds"]
    except Exception as error:
        raise ValueError(f"resume: {path} is not a checkpoint of this script ({error})") from error
    return state


def export(out: str | Path, to: str | Path, every: int = 100) -> tuple[Path, Path, Path]:
    """Writes the shipped files to the folder `to`: averaged weights in float16, config, and a thinned log.

    Args:
        out: folder of a run.
        every: steps between kept lines of the log.

    Returns:
        Paths of digits.safetensors, digits.json and training.jsonl.
    """
    from safetensors.torch import save_file

    state, to = load_checkpoint(out), Path(to)
    to.mkdir(parents=True, exist_ok=True)
    weights, config, log = to / "digits.safetensors", to / "digits.json", to / LOG
    with replacing(weights) as temporary:
        save_file({name: value.half().contiguous() for name, value in state.average.items()}, temporary)
        temporary.chmod(0o644)  # safetensors sets 0600
    state.options.config.to_json(config)
    lines = [line for line in _read_log(Path(out)) if line.get("step", 0) <= state.step]
    kept = [line for line in lines if line.get("step", 0) % every == 0 or line is lines[-1]]
    write_text(log, "".join(json.dumps(line) + "\n" for line in kept))
    return weights, config, log


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


def _optimizers(model: STDiT3, options: Options) -> tuple[torch.optim.Optimizer, ...]:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for the other parameters."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = {
        name for name, p in trained.items() if "_blocks." in name and name.endswith(".weight") and p.ndim == 2
    }
    rest = [p for name, p in trained.items() if name not in inner]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1]},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    rate, decay = options.learning_rate, options.weight_decay
    return (
        torch.optim.AdamW(groups, lr=rate, betas=options.betas, weight_decay=decay, fused=True),
        # Scales the updates like AdamW's, so that both use one learning rate.
        torch.optim.Muon(
            [trained[name] for name in sorted(inner)],
            lr=rate,
            weight_decay=decay,
            adjust_lr_fn="match_rms_adamw",
        ),
    )


def _step(state: State, run_block: Callable[..., Tensor]) -> tuple[float, float]:
    """One update; returns the loss and the learning rate."""
    options, model = state.options, state.model
    rate = _learning_rate(state)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    video, y, t, noise = _batch(state)
    noisy = torch.lerp(video, noise, t[:, None, None, None, None])
    with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16), _plain_attention():
        tokens, conditioning = model.embed(noisy, 1000 * t, fps=FPS, height=SIZE, width=SIZE)
        conditioning = model.with_captions(conditioning, y)
        for block, angles in model.stack(conditioning):
            tokens = run_block(block, tokens, conditioning, angles)
        velocity = model.unembed(tokens, conditioning)
    loss = (velocity - (video - noise)).square().mean()
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


def _batch(state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clips [B, 1, 16, 32, 32], captions [B, 1, L, C] (some dropped), t [B] in 0 .. 1, noise as clips."""
    options, generator = state.options, state.generator
    prompts = training_prompts()
    index = torch.randint(len(prompts), (options.batch,), generator=generator).tolist()
    chosen = [prompts[i] for i in index]
    video = draw_clips(chosen, generator).video
    dropped = torch.rand(options.batch, generator=generator) < options.drop_caption
    y = torch.where(dropped[:, None, None, None], state.model.null_captions(options.batch), encode(chosen))
    t = torch.sigmoid(options.t_mean + options.t_std * torch.randn(options.batch, generator=generator))
    uniform = torch.rand(options.batch, generator=generator)
    t = torch.where(torch.rand(options.batch, generator=generator) < 0.1, uniform, t)
    return video, y, t, torch.randn(video.shape, generator=generator)


def _learning_rate(state: State) -> float:
    """Linear warm-up, then half a cosine over the schedule."""
    options = state.options
    warm = min(1.0, (state.step + 1) / options.warmup)
    low, high = options.final_learning_rate, options.learning_rate
    return warm * (low + (high - low) * 0.5 * (1 + math.cos(math.pi * state.done)))


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as two matrix products: over 16 tokens on a CPU, faster to train than the fused kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _read_log(out: Path) -> list[dict[str, Any]]:
    log = out / LOG
    return [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []


def _write(log: Any, line: dict[str, Any]) -> None:
    log.write(json.dumps(line) + "\n")
    log.flush()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python examples/digits/train.py", description=__doc__.partition(":")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run: checkpoint and log")
    parser.add_argument(
        "--minutes",
        type=real_number(above=0),
        help="length of the schedule in wall-clock time, with resumed runs",
    )
    parser.add_argument(
        "--steps",
        type=whole_number(1),
        help="length of the schedule; with --minutes, whichever ends sooner",
    )
    parser.add_argument(
        "--batch", type=whole_number(1), default=Options.batch, help="clips per step (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=Options.seed, help="seed (default: %(default)s)"
    )
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --out, with its options"
    )
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="do not train: export the run in --out to DIR"
    )
    given = parser.parse_args(arguments)
    try:
        if given.export is not None:
            for path in export(given.out, given.export):
                print(f"{path}: {path.stat().st_size:,} bytes")
            return
        if given.resume:
            state = load_checkpoint(given.out, given.minutes)
        elif (given.out / CHECKPOINT).exists():
            raise ValueError(f"out: {given.out} already contains a run; pass --resume or another folder")
        else:
            options = Options(
                steps=given.steps,
                minutes=given.minutes,
                batch=given.batch,
                seed=given.seed,
                bfloat16=not given.float32,
                compile=not given.eager,
            )
            state = start(options)
        train(state, given.out)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
