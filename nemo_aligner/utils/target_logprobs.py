"""Log-probabilities of given tokens straight from hidden states, with logits of a piece of the vocabulary at a time.

A piece of the vocabulary is to a shard what a shard is to the vocabulary, so the arithmetic is that of `logprobs`. On a
GPU it is one kernel of `logprob_kernels` for each piece, forward and backward.
Pieces, not positions, because the gradient of a piece's weights then is one product, written (or added) where it
belongs: pieces of positions would have to be summed into a matrix of the whole weight's size again and again.

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

    All ranks of the tensor-parallel group must call it. The logits are formed again in the backward pass: that costs a
    third more in the output layer, and nothing is kept but the hidden states and two numbers per position.

    Args:
        hidden_RH: equal on all TP ranks.
        weight_VH: [V/TP, H], this rank's rows of the output layer, in the dtype of `hidden_RH`.
        targets_R: int64 ids in [0, V).
        reduce_hidden: sum the gradient of `hidden_RH` over the TP ranks; otherwise each has its own shard's part.
        fuse_weight: add the weight's gradient to `weight_VH.main_grad`, as megatron-core's linear layers do with
            `gradient_accumulation_fusion`.
    """

    @staticmethod
    def forward(ctx, hidden_RH, weight_VH, targets_R, reduce_hidden, fuse_weight):
        group = parallel_state.get_tensor_model_parallel_group()
        targets_R = targets_R - parallel_state.get_tensor_model_parallel_rank() * weight_VH.size(0)
        dtype = torch.promote_types(hidden_RH.dtype, torch.float32)
        maxima_R, exp_sums_R, target_logits_R = torch.zeros(3, len(targets_R), dtype=dtype, device=hidden_RH.device)
        # not -inf: where all logits are -inf, two maxima must have a difference
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
    """Bring what is known of each position's logits up to date with those of a piece.

    Args:
        maxima_R, exp_sums_R, target_logits_R: the largest logit so far, the sum of exp(logit - largest), and the
            target's logit, or 0 before its piece has come.
        logits_RC: contiguous.
        targets_R: int64, the target's place in this shard; it may lie in another one.
        first: the place of the piece's first entry.
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
        logits_RC, targets_R, first: as above. The memory of the logits is used again.
        maxima_R, exp_sums_R: of the whole vocabulary.
        grad_R: of the log-probabilities, contiguous.
    """
    if logits_RC.is_cuda:
        from nemo_aligner.utils import logprob_kernels

        return logprob_kernels.piece_gradient(logits_RC, targets_R, first, maxima_R, exp_sums_R, grad_R)
    per_position = (targets_R - first, maxima_R, exp_sums_R, grad_R)
    return logprobs.shard_gradient(logits_RC[None], *(tensor[None] for tensor in per_position))[0]


def _pieces(hidden_RH: torch.Tensor, weight_VH: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """A piece's entries of this rank's vocabulary and its logits [R, C], of at most `MAX_CHUNK_ENTRIES` entries."""
    size = max(1, logprobs.MAX_CHUNK_ENTRIES // max(1, len(hidden_RH)))
    if size > 128:
        size -= size % 128  # as matrix units like it
    for start in range(0, len(weight_VH), size):
        piece = slice(start, start + size)
        yield piece, linear(hidden_RH, weight_VH[piece])
