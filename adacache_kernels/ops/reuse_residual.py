"""x + residual for the videos that reuse, the others untouched: all that is left of a reused step."""

from __future__ import annotations

import torch

from .. import reference
from .._arguments import check_reuse_residual, explain_refusal, refuse_grad
from .._backend import choose_backend


def reuse_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    *,
    video_of_row: torch.Tensor | None = None,
    reuse: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add a cached residual to the rows whose video reuses it, and copy the other rows.

    The sum is taken in float32 and rounded once to x's dtype, as eager PyTorch does for x + residual of one
    dtype.

    Args:
        x: the stream, float32, bfloat16 or float16 [B, N, C]. Contiguous in C, any other strides.
        residual: [B, N, C] on the same device, float32, bfloat16 or float16 whatever x's dtype. Contiguous in
            C.
        video_of_row: int32 [B], the video that each row belongs to.
        reuse: bool [num_videos] on x's device, which videos reuse; None: all. Without video_of_row it holds
            one entry for all rows, or B entries (row b is video b).
        out: [B, N, C] for the result, may be x itself; None allocates.

    Returns:
        x_out [B, N, C].

    Raises:
        ValueError: an argument does not fit; the message names it. Rows with a video outside 0..num_videos-1
            raise on the CPU; on a GPU, where looking would stop the stream, they are filled with NaN.

    Source: AdaCache (arXiv 2411.02397); that one tensor can stand for a whole stack's residuals
    follows from all blocks sharing one schedule.
    """
    if torch.is_grad_enabled():
        refuse_grad(x=x, residual=residual, out=out)
    backend = choose_backend(x.device)
    if backend == "cpu" or backend == "cuda":
        try:
            if out is None:
                return torch.ops.adacache.reuse_residual(x, residual, video_of_row, reuse)
            torch.ops.adacache.reuse_residual_out(x, residual, video_of_row, reuse, out)
            return out
        except (RuntimeError, ValueError):  # which of the two depends on the version of torch
            explain_refusal(check_reuse_residual, x, residual, video_of_row, reuse, out)
            raise
    check_reuse_residual(x, residual, video_of_row, reuse, out)
    if backend == "triton":
        from .. import triton

        return triton.reuse_residual(x, residual, video_of_row, reuse, out)
    return reference.reuse_residual(x, residual, video_of_row, reuse, out)
