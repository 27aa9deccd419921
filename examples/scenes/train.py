# SPDX-License-Identifier: Apache-2.0
"""Trains a network on drawn scenes: `python examples/scenes/train.py --model wan --out DIR --minutes 75`.

wan: flow matching, velocity noise - data. latte: noise prediction on a discrete schedule. `--export` converts
a checkpoint to the files that `scenes.models.load` reads.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "digits")]

import torch
import trainer
from adacache.commands.options import real_number, whole_number
from adacache.files import write_json
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from trainer import CHECKPOINT, State, new_state, restore, save_average, save_thinned_log

from scenes.captions import embed, null_captions, training_prompts
from scenes.drawing import draw_scenes
from scenes.models import CLASSES, CONFIGS, noise_schedule


@dataclass(frozen=True)
class Options(trainer.Options):
    """All options that determine the weights."""

    model: str = "wan"
    learning_rate: float = 2e-3
    warmup: int = 100
    ema: float = 0.998
    bfloat16: bool = False
    muon_bfloat16: bool = False
    t_mean: float = 0.4
    t_std: float = 1.2
    """wan: 90 % of the t are the sigmoid of a normal variable (this mean and deviation), 10 % are uniform."""
    largest_weight: float = 30.0
    """latte: the squared error of the noise has the weight min(1 / alpha_bar, this)."""


def start(options: Options) -> State:
    """A run at step 0. The initial weights depend on `options.seed` only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = CLASSES[options.model](**CONFIGS[options.model])
        initialize(model)
    if options.compile:
        for name, block in model.named_modules():
            if name.rpartition(".")[0].endswith("blocks"):
                block.compile(dynamic=False)
    matrices = [
        n for n, p in model.named_parameters() if "blocks." in n and n.endswith("weight") and p.ndim == 2
    ]
    return new_state(options, model, matrices)


@torch.no_grad()
def initialize(model: Any) -> None:
    """Makes the blocks identities and the output the input, which contains most of the target."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith(("attn2.to_out.0", "time_proj", "adaln_single.linear")):
                nn.init.zeros_(module.weight)
    for name, weight in model.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.zeros_(weight)
    if isinstance(model, WanTransformer3DModel):
        _pass_through(model.patch_embedding, model.proj_out)
        _prefer_near_tokens(model)
    else:
        positions = torch.cat((model.pos_embed.pos_embed[0], model.temp_pos_embed[0]))
        # A noise prediction has to be exact where there is little signal, but the last LayerNorm removes the
        # norm of a token. A large constant keeps this norm nearly constant.
        _pass_through(model.pos_embed.proj, model.proj_out, positions, constant=2.0)
        # It also scales and shifts the tokens before proj_out.
        model.adaln_single.emb.timestep_embedder.linear_2.weight.mul_(0.1)


def _pass_through(
    embedding: Any,
    output: nn.Linear,
    positions: Tensor | None = None,
    constant: float = 0.0,
) -> None:
    """Makes `output` the inverse of `embedding`, up to the LayerNorm between them.

    Args:
        positions: vectors that are added to the tokens; the embedding is orthogonal to them.
        constant: root mean square of the embedding's bias, which is orthogonal to its other outputs.
    """
    width, inputs = embedding.weight.flatten(1).shape
    taken = torch.zeros(0, width) if positions is None else positions
    columns = torch.cat((taken.mT, torch.randn(width, width - len(taken))), 1)
    basis = torch.linalg.qr(columns).Q[:, len(taken) :]
    matrix = basis[:, :inputs] * math.sqrt(width / inputs)
    embedding.weight.copy_(matrix.view_as(embedding.weight))
    embedding.bias.copy_(basis[:, inputs] * (constant * math.sqrt(width)))
    square = 1 + constant**2 + (0 if positions is None else 2 * positions.square().mean())
    output.weight.copy_(matrix.mT * (inputs / width) * math.sqrt(square))


def _prefer_near_tokens(model: Any, strength: float = 6.0) -> None:
    """Biases that make attention depend on the distance of two tokens from the start.

    A bias of query and key on a rotary pair of frequency f adds strength^2 cos(f * distance) to the product.
    Heads 0 and 1 prefer the same place in other frames, head 2 the same frame; the others have no preference.
    """
    width = model.rope.attention_head_dim
    first_pair = {"t": 0, "y": model.rope.t_dim, "x": model.rope.t_dim + model.rope.h_dim}
    for head, axes in enumerate(("yx", "yx", "t")):
        for block in model.blocks:
            for projection in (block.attn1.to_q, block.attn1.to_k):
                projection.bias[[head * width + first_pair[axis] for axis in axes]] = strength


def train(state: State, out: str | Path, *, stop_at: int | None = None, progress: bool = True) -> State:
    """Trains to the end of the schedule; see `trainer.train`."""
    loss = {"wan": flow_loss, "latte": noise_loss}[state.options.model]
    return trainer.train(state, loss, out, stop_at=stop_at, progress=progress)


def flow_loss(state: State) -> Tensor:
    """Squared error of the velocity noise - video at t of (1 - t) video + t noise."""
    options, generator = state.options, state.generator
    video, captions, noise = _batch(state)
    count = len(video)
    t = torch.sigmoid(options.t_mean + options.t_std * torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    t = torch.where(torch.rand(count, generator=generator) < 0.1, uniform, t)
    noisy = torch.lerp(video, noise, t[:, None, None, None, None])
    velocity = _output(state, noisy, 1000 * t, captions)
    return (velocity - (noise - video)).square().mean()


def noise_loss(state: State) -> Tensor:
    """Weighted squared error of the noise."""
    options, generator = state.options, state.generator
    video, captions, noise = _batch(state)
    alpha_bar = noise_schedule().alphas_cumprod
    # One timestep in each of as many equal parts of the schedule.
    place = (torch.arange(len(video)) + torch.rand(len(video), generator=generator)) / len(video)
    t = (place * len(alpha_bar)).long()
    signal = alpha_bar[t][:, None, None, None, None]
    noisy = signal.sqrt() * video + (1 - signal).sqrt() * noise
    error = (_output(state, noisy, t, captions) - noise).square().mean((1, 2, 3, 4))
    return (error * (1 / alpha_bar[t]).clamp(max=options.largest_weight)).mean()


def export(out: str | Path, to: str | Path, every: int = 100) -> tuple[Path, Path, Path]:
    """Writes the files of the network to the folder `to`: averaged weights in float16, config, thinned log.

    Args:
        out: folder of a run.
        every: steps between kept lines of the log.
    """
    state, to = load_checkpoint(out), Path(to)
    to.mkdir(parents=True, exist_ok=True)
    name = state.options.model
    weights, config, log = to / f"{name}.safetensors", to / f"{name}.json", to / f"training_{name}.jsonl"
    save_average(state, weights)
    write_json(config, CONFIGS[name])
    save_thinned_log(state, out, log, every)
    return weights, config, log


def load_checkpoint(out: str | Path, minutes: float | None = None) -> State:
    """Loads the run in `out`/checkpoint.pt; `minutes` replaces the run's own limit."""

    def begin(values: dict[str, object]) -> State:
        options = Options(**values)  # type: ignore[arg-type]
        return start(options if minutes is None else replace(options, minutes=minutes))

    return restore(out, begin)


def _batch(state: State) -> tuple[Tensor, Tensor, Tensor]:
    """Clips [B, 1, 16, 32, 32], captions [B, L, C] (some dropped), noise as clips."""
    options, generator = state.options, state.generator
    prompts = training_prompts()
    index = torch.randint(len(prompts), (options.batch,), generator=generator).tolist()
    chosen = [prompts[i] for i in index]
    video = draw_scenes(chosen, generator).video
    dropped = torch.rand(options.batch, generator=generator) < options.drop_caption
    captions = torch.where(dropped[:, None, None], null_captions(options.batch), embed(chosen))
    return video, captions, torch.randn(video.shape, generator=generator)


def _output(state: State, noisy: Tensor, t: Tensor, captions: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=state.options.bfloat16):
        return state.model(
            hidden_states=noisy, timestep=t, encoder_hidden_states=captions, return_dict=False
        )[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python examples/scenes/train.py", description=__doc__.partition(":")[0]
    )
    parser.add_argument("--model", choices=sorted(CLASSES), help="the network; needed for a new run")
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
    parser.add_argument("--threads", type=whole_number(1), help="threads of torch")
    parser.add_argument("--bfloat16", action="store_true", help="bfloat16 autocast and Muon")
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --out, with its options"
    )
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="do not train: export the run in --out to DIR"
    )
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    try:
        if given.export is not None:
            for path in export(given.out, given.export):
                print(f"{path}: {path.stat().st_size:,} bytes")
            return
        if given.resume:
            state = load_checkpoint(given.out, given.minutes)
        elif (given.out / CHECKPOINT).exists():
            raise ValueError(f"out: {given.out} already contains a run; pass --resume or another folder")
        elif given.model is None:
            raise ValueError("model: expected wan or latte for a new run")
        else:
            state = start(
                Options(
                    model=given.model,
                    steps=given.steps,
                    minutes=given.minutes,
                    batch=given.batch,
                    seed=given.seed,
                    bfloat16=given.bfloat16,
                    muon_bfloat16=given.bfloat16,
                    compile=not given.eager,
                )
            )
        train(state, given.out)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
