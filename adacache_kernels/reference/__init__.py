"""The ops in plain PyTorch: the specification that the other backends are tested against. Sums are float64
throughout."""

from .decide import decide
from .gated_residual_meter import gated_residual_meter
from .residual_meter import residual_meter
from .reuse_residual import reuse_residual

__all__ = ["decide", "gated_residual_meter", "residual_meter", "reuse_residual"]
