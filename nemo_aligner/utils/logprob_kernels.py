"""Triton kernels of `target_logprobs` for a piece's logits: one launch each, and every logit is read once.

They compute in the dtype of the maxima and sums. Forward, each program handles one position; the summation order
depends only on the size of the piece.

Legend: R positions, C entries of a piece.
"""

import torch
import triton
import triton.language as tl


def add_piece_(
    maxima_R: torch.Tensor,
    exp_sums_R: torch.Tensor,
    target_logits_R: torch.Tensor,
    logits_RC: torch.Tensor,
    targets_R: torch.Tensor,
    first: int,
) -> None:
    num_positions, size = logits_RC.shape
    _add_piece_kernel[(num_positions,)](
        logits_RC, targets_R, first, maxima_R, exp_sums_R, target_logits_R, size, BLOCK=_block(size), num_warps=4
    )


def piece_gradient(
    logits_RC: torch.Tensor,
    targets_R: torch.Tensor,
    first: int,
    maxima_R: torch.Tensor,
    exp_sums_R: torch.Tensor,
    grad_R: torch.Tensor,
) -> torch.Tensor:
    """Overwrites the logits with the gradient."""
    num_positions, size = logits_RC.shape
    block = _block(size)
    _piece_gradient_kernel[(num_positions, triton.cdiv(size, block))](
        logits_RC, targets_R, first, maxima_R, exp_sums_R, grad_R, size, BLOCK=block, num_warps=4
    )
    return logits_RC


def _block(size: int) -> int:
    """At most sixteen entries per thread, which in half precision are loaded eight at a time."""
    return min(2048, triton.next_power_of_2(size))


@triton.jit(do_not_specialize=["first"])
def _add_piece_kernel(logits, targets, first, maxima, exp_sums, target_logits, size, BLOCK: tl.constexpr):
    position = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = maxima.dtype.element_ty
    row = logits + position * size
    before = tl.load(maxima + position)
    highest = before
    exp_sum = tl.zeros([BLOCK], dtype)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit = tl.load(row + column, mask=column < size, other=-float("inf")).to(dtype)
        now_highest = tl.maximum(highest, tl.max(logit, axis=0))
        exp_sum = exp_sum * tl.exp(highest - now_highest) + tl.exp(logit - now_highest)
        highest = now_highest
    tl.store(maxima + position, highest)
    of_others = tl.load(exp_sums + position) * tl.exp(before - highest)
    tl.store(exp_sums + position, of_others + tl.sum(exp_sum, axis=0))

    place = tl.load(targets + position) - first
    is_here = (place >= 0) & (place < size)
    target_logit = tl.load(row + place, mask=is_here, other=0.0).to(dtype)
    tl.store(target_logits + position, target_logit, mask=is_here)


@triton.jit(do_not_specialize=["first"])
def _piece_gradient_kernel(logits, targets, first, maxima, exp_sums, grad, size, BLOCK: tl.constexpr):
    position = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = maxima.dtype.element_ty
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    at = logits + position * size + column
    of_logprob = tl.load(grad + position).to(dtype)
    softmax_weight = -of_logprob / tl.load(exp_sums + position)
    logit = tl.load(at, mask=inside, other=0.0).to(dtype)
    gradient = tl.exp(logit - tl.load(maxima + position)) * softmax_weight
    gradient += tl.where(column == tl.load(targets + position) - first, of_logprob, 0.0)
    tl.store(at, gradient.to(logits.dtype.element_ty), mask=inside)
