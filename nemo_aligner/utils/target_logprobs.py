"""Log-probabilities of given tokens from hidden states, materializing logits for one vocabulary piece at a time.

A piece is a part of this rank's vocabulary shard; the arithmetic is that of `logprobs`, applied a level deeper. On a
GPU each piece takes one kernel of `logprob_kernels`, forward and backward.
The split is over the vocabulary, not over positions, because the weight gradient of a piece is then one matmul, written
to (or accumulated in) its rows; a split over positions would accumulate into the whole weight's gradient repeatedly.

Legend: R positions, H hidden size, V padded vocabulary over all TP ranks, C entries of a piece.
"""

from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from nemo_aligner.compat.cpu_linear import linear, matmul
from nemo_aligner.compat.float32_accumulation import add_product_
from nemo_aligner.utils import logprobs
from nemo_aligner.utils.weight_gradients import add_to_main_grad, stand_in_gradient


class TargetLogprobs(torch.autograd.Function):
    """`apply(hidden_RH, weight_VH, targets_R, reduce_hidden, fuse_weight)` -> float32 [R], equal on all TP ranks.

    All ranks of the tensor-parallel group must call it. The backward pass recomputes the logits: the output layer costs
    a third more, but only the hidden states and two numbers per position are saved.

    Args:
        hidden_RH: equal on all TP ranks.
        weight_VH: [V/TP, H], this rank's rows of the output layer, in the dtype of `hidden_RH`.
        targets_R: int64 ids in [0, V).
        reduce_hidden: all-reduce the gradient of `hidden_RH` over the TP ranks; otherwise it stays partial.
        fuse_weight: add the weight's gradient to `weight_VH.main_grad`, as megatron-core's linear layers do with
            `gradient_accumulation_fusion`.
    """

    @staticmethod
    def forward(ctx, hidden_RH, weight_VH, targets_R, reduce_hidden, fuse_weight):
        group = parallel_state.get_tensor_model_parallel_group()
        targets_R = targets_R - parallel_state.get_tensor_model_parallel_rank() * weight_VH.size(0)
        dtype = torch.promote_types(hidden_RH.dtype, torch.float32)
        maxima_R, exp_sums_R, target_logits_R = torch.zeros(3, len(targets_R), dtype=dtype, device=hidden_RH.device)
        # Not -inf: where all logits are -inf, the difference of two maxima would be NaN.
        maxima_R.fill_(torch.finfo(dtype).min)
        for piece, logits_RC in _pieces(hidden_RH, weight_VH):
            add_piece_(maxima_R, exp_sums_R, target_logits_R, logits_RC, targets_R, piece.start)

        own_maxima_R, maxima_R = maxima_R, maxima_R.clone()
        torch.distributed.all_reduce(maxima_R, torch.distributed.ReduceOp.MAX, group=group)
        sums = torch.stack((exp_sums_R * (own_maxima_R - maxima_R).exp(), target_logits_R))
        torch.distributed.all_reduce(sums, group=group)
        exp_sums_R, target_logits_R = sums.unbind()

        ctx.save_for_backward(hidden_RH, weight_VH, targets_R, maxima_R, exp_sums_R)
        ctx.reduce_hidden, ctx.fuse_weight = reduce_hidden, fuse_weight
        return target_logits_R - maxima_R - exp_sums_R.log()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_R):
        hidden_RH, weight_VH, targets_R, maxima_R, exp_sums_R = ctx.saved_tensors
        needs_weight, fuses = ctx.needs_input_grad[1], ctx.fuse_weight
        grad_R = grad_R.contiguous()
        grad_hidden_RH = torch.zeros_like(hidden_RH, dtype=maxima_R.dtype)
        grad_weight_VH = torch.empty_like(weight_VH) if needs_weight and not fuses else None
        for piece, logits_RC in _pieces(hidden_RH, weight_VH):
            grad_RC = piece_gradient(logits_RC, targets_R, piece.start, maxima_R, exp_sums_R, grad_R)
            add_product_(grad_hidden_RH, grad_RC, weight_VH[piece])
            if needs_weight and fuses:
                add_to_main_grad(weight_VH.main_grad[piece], grad_RC, hidden_RH)
            elif needs_weight:
                grad_weight_VH[piece] = matmul(grad_RC.t(), hidden_RH)
        grad_hidden_RH = grad_hidden_RH.to(hidden_RH.dtype)
        if ctx.reduce_hidden:
            torch.distributed.all_reduce(grad_hidden_RH, group=parallel_state.get_tensor_model_parallel_group())
        if needs_weight and fuses:
            grad_weight_VH = stand_in_gradient(weight_VH)
        return grad_hidden_RH, grad_weight_VH, None, None, None


def add_piece_(
    maxima_R: torch.Tensor,
    exp_sums_R: torch.Tensor,
    target_logits_R: torch.Tensor,
    logits_RC: torch.Tensor,
    targets_R: torch.Tensor,
    first: int,
) -> None:
    """Online softmax: update each position's running statistics with the logits of a piece, in place.

    Args:
        maxima_R, exp_sums_R, target_logits_R: the largest logit so far, the sum of exp(logit - largest), and the
            target's logit, or 0 before its piece is processed.
        logits_RC: contiguous.
        targets_R: int64, the target's index relative to this shard; it may lie in another one.
        first: index in this shard of the piece's first entry.
    """
    if logits_RC.is_cuda:
        from nemo_aligner.utils import logprob_kernels

        logprob_kernels.add_piece_(maxima_R, exp_sums_R, target_logits_R, logits_RC, targets_R, first)
        return
    before_R = maxima_R.clone()
    torch.maximum(maxima_R, logits_RC.amax(dim=1).to(maxima_R.dtype), out=maxima_R)
    exp_sums_R *= (before_R - maxima_R).exp()
    exp_sums_R += logprobs.shard_exp_sums(logits_RC[None], maxima_R[None])[0]
    place_R, zeros_R = targets_R - first, torch.zeros_like(maxima_R)
    target_logits_R += logprobs.shard_target_logits(logits_RC[None], place_R[None], zeros_R[None])[0]


def piece_gradient(
    logits_RC: torch.Tensor,
    targets_R: torch.Tensor,
    first: int,
    maxima_R: torch.Tensor,
    exp_sums_R: torch.Tensor,
    grad_R: torch.Tensor,
) -> torch.Tensor:
    """The gradient of a piece's logits, [R, C] in their dtype.

    Args:
        logits_RC, targets_R, first: as above. The memory of the logits may be reused for the result.
        maxima_R, exp_sums_R: over the whole vocabulary.
        grad_R: gradient of the log-probabilities, contiguous.
    """
    if logits_RC.is_cuda:
        from nemo_aligner.utils import logprob_kernels

        return logprob_kernels.piece_gradient(logits_RC, targets_R, first, maxima_R, exp_sums_R, grad_R)
    per_position = (targets_R - first, maxima_R, exp_sums_R, grad_R)
    return logprobs.shard_gradient(logits_RC[None], *(tensor[None] for tensor in per_position))[0]


def _pieces(hidden_RH: torch.Tensor, weight_VH: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """For each piece, its slice of this rank's vocabulary and its logits [R, C]; R * C <= `MAX_CHUNK_ENTRIES`."""
    size = max(1, logprobs.MAX_CHUNK_ENTRIES // max(1, len(hidden_RH)))
    if size > 128:
        size -= size % 128  # aligned for tensor cores
    for start in range(0, len(weight_VH), size):
        piece = slice(start, start + size)
        yield piece, linear(hidden_RH, weight_VH[piece])
