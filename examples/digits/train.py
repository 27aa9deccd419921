# SPDX-License-Identifier: Apache-2.0
"""Trains the digit model: `python examples/digits/train.py --out DIR --minutes 75 [--resume]`.

Rectified flow as in Open-Sora 1.2: at timestep 1000 t the input is (1 - t) x0 + t noise and the target is the
velocity x0 - noise. Muon trains the blocks, AdamW the other parameters. `--export` converts a checkpoint to
the files that `adacache.digits.load` reads.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import torch
import trainer
from adacache.commands.options import real_number, whole_number
from adacache.digits import FPS, SIZE
from adacache.digits.captions import CHANNELS, TOKENS, encode, training_prompts
from adacache.models.stdit3 import STDiT3, STDiT3Block, STDiT3Config
from clips import draw_clips
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainer import CHECKPOINT, LOG, State, new_state, restore, save_average, save_thinned_log

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


@dataclass(frozen=True)
class Options(trainer.Options):
    """All options that determine the weights."""

    config: STDiT3Config = field(default_factory=lambda: CONFIG)
    t_mean: float = 0.4
    t_std: float = 1.2
    """90 % of the t are the sigmoid of a normal variable with this mean and deviation, 10 % are uniform."""


def start(options: Options) -> State:
    """A run at step 0. The initial weights depend on `options.seed` only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = STDiT3(options.config)
        model.initialize()
    matrices = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and "_blocks." in name and name.endswith(".weight") and p.ndim == 2
    ]
    return new_state(options, model, matrices)


def train(state: State, out: str | Path, *, stop_at: int | None = None, progress: bool = True) -> State:
    """Trains to the end of the schedule; see `trainer.train`."""
    run_block: Callable[..., Tensor] = STDiT3Block.forward
    if state.options.compile:
        run_block = torch.compile(STDiT3Block.forward, fullgraph=True, dynamic=False)
    return trainer.train(state, partial(_loss, run_block=run_block), out, stop_at=stop_at, progress=progress)


def load_checkpoint(out: str | Path, minutes: float | None = None) -> State:
    """Loads the run in `out`/checkpoint.pt.

    Args:
        minutes: replaces the run's own limit.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: the file is not a checkpoint of this script.
    """

    def begin(values: dict[str, Any]) -> State:
        options = Options(**values | {"config": STDiT3Config(**values["config"])})
        return start(options if minutes is None else replace(options, minutes=minutes))

    return restore(out, begin)


def export(out: str | Path, to: str | Path, every: int = 100) -> tuple[Path, Path, Path]:
    """Writes the shipped files to the folder `to`: averaged weights in float16, config, and a thinned log.

    Args:
        out: folder of a run.
        every: steps between kept lines of the log.

    Returns:
        Paths of digits.safetensors, digits.json and training.jsonl.
    """
    state, to = load_checkpoint(out), Path(to)
    to.mkdir(parents=True, exist_ok=True)
    weights, config, log = to / "digits.safetensors", to / "digits.json", to / LOG
    save_average(state, weights)
    state.options.config.to_json(config)
    save_thinned_log(state, out, log, every)
    return weights, config, log


def _loss(state: State, run_block: Callable[..., Tensor]) -> Tensor:
    """Squared error of the velocity on a new batch."""
    model = state.model
    video, y, t, noise = _batch(state)
    noisy = torch.lerp(video, noise, t[:, None, None, None, None])
    with torch.autocast("cpu", torch.bfloat16, enabled=state.options.bfloat16), _plain_attention():
        tokens, conditioning = model.embed(noisy, 1000 * t, fps=FPS, height=SIZE, width=SIZE)
        conditioning = model.with_captions(conditioning, y)
        for block, angles in model.stack(conditioning):
            tokens = run_block(block, tokens, conditioning, angles)
        velocity = model.unembed(tokens, conditioning)
    return (velocity - (video - noise)).square().mean()


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


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as two matrix products: over 16 tokens on a CPU, faster to train than the fused kernel."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


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
