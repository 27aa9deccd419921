"""Strict loading of weights from safetensors files, the only format that is read."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


def read_safetensors(*files: str | Path) -> dict[str, Tensor]:
    """All tensors of some safetensors files.

    Raises:
        ValueError: a file is no safetensors file, or two files hold the same key.
        FileNotFoundError: a file does not exist.
    """
    state: dict[str, Tensor] = {}
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"weights: no file {file}")
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    if key in state:
                        raise ValueError(
                            f"weights: {key} stands in two of the files {[str(f) for f in files]}"
                        )
                    state[key] = tensors.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"weights: {file} is no readable safetensors file ({error})") from error
    return state


def load_safetensors(model: nn.Module, *files: str | Path) -> None:
    """Loads every parameter and buffer of `model`, strictly; nothing is changed if anything does not fit.

    Raises:
        ValueError: naming the missing, unexpected or wrongly shaped keys.
    """
    state = read_safetensors(*files)
    expected = model.state_dict()
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    problems += [
        f"{key}: expected {list(value.shape)}, got {list(state[key].shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"weights: {', '.join(str(f) for f in files)} do not fit the model: {shown}")
    model.load_state_dict(state)
