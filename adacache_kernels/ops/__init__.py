"""The public functions: one file per op, with its checks and its dispatch to a backend."""

from ._fake import register_fake_kernels
from .decide import decide
from .gated_residual_meter import gated_residual_meter
from .residual_meter import residual_meter
from .reuse_residual import reuse_residual

__all__ = ["decide", "gated_residual_meter", "residual_meter", "reuse_residual"]

register_fake_kernels()
