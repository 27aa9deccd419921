# SPDX-License-Identifier: Apache-2.0
"""The declared models."""

from __future__ import annotations

import importlib
import pkgutil
import warnings

from torch import nn

import adacache.adapters
from adacache.adapters.generic import generic_spec, spec_without_blocks
from adacache.adapters.spec import ModelSpec
from adacache.interpose import plain_class


def declared() -> list[ModelSpec]:
    """All declarations: the `ModelSpec`s at the top level of the modules of this package."""
    found: list[ModelSpec] = []
    for module in sorted(pkgutil.iter_modules(adacache.adapters.__path__), key=lambda one: one.name):
        for value in vars(importlib.import_module(f"adacache.adapters.{module.name}")).values():
            if isinstance(value, ModelSpec) and value not in found:
                found.append(value)
    return found


def known_models() -> list[str]:
    """Names of the declared classes. Other models are enabled if their block lists can be found."""
    return [spec.model_class for spec in declared()]


def declared_spec(model: object) -> ModelSpec | None:
    """The declaration of a model, if its class is declared."""
    # A fused program first: classes of other repositories may have the same name.
    specs = sorted(declared(), key=lambda one: one.program is None)
    for kind in plain_class(model).__mro__:
        for spec in specs:
            if spec.matches(kind.__name__, model):
                return spec
    return None


def spec_for(model: object, blocks: bool = True) -> tuple[ModelSpec, bool]:
    """The declaration of a model, and whether it is declared; if not, one is made from its block lists (with
    a warning).

    Args:
        blocks: whether block lists are needed.

    Raises:
        ValueError: it has none.
    """
    found = declared_spec(model)
    if found is not None:
        return found, True
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module or a pipeline, got {type(model).__qualname__}")
    if not blocks:
        return spec_without_blocks(model), False
    spec = generic_spec(model)
    warnings.warn(
        f"AdaCache: {plain_class(model).__name__} is not a known model; its blocks were detected in "
        f"{[one.name for one in spec.lists]}, and the residual of the middle block is measured",
        stacklevel=5,
    )
    return spec, False
