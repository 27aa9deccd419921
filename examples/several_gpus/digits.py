# SPDX-License-Identifier: Apache-2.0
"""Splits the digit model over processes, with NCCL on GPUs and gloo on CPUs:

torchrun --nproc-per-node 2 examples/several_gpus/digits.py --split frames
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import timedelta

import adacache
import torch
import torch.distributed as dist
from adacache.digits import FPS, SIZE, encode, load, noise, sampler, with_null
from adacache.models.sequence_parallel import SPLITS, SequenceParallel

STEPS = 30


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--split", choices=SPLITS, default="frames")
    parser.add_argument("--prompt", default="a 3 drifting right over a plain background")
    options = parser.parse_args(arguments)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=120))

    model = load().requires_grad_(False).to(device)
    captions = with_null(model, encode([options.prompt]).to(device))
    clips, computed = [], []
    for sequence in (None, SequenceParallel(dist.group.WORLD, options.split)):
        model.sequence = sequence
        handle = adacache.enable(model, "digits/fast", num_steps=STEPS)
        with torch.no_grad():
            flow = sampler(STEPS)
            z = noise([0]).to(device)
            clips.append(flow.sample(model, z, captions, fps=FPS, height=SIZE, width=SIZE))
        computed.append(handle.trace.computed_steps)
        adacache.disable(model)
    assert handle.ranks is not None
    if dist.get_rank() == 0:
        print(f"one process: {computed[0]}")
        print(f"{dist.get_world_size()} processes: {computed[1]}")
        print(f"largest difference: {float((clips[1] - clips[0]).abs().max()):.1e}")
        print(f"messages of the cache: {dict(handle.ranks.traffic)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
