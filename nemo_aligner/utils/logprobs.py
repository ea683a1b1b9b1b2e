"""Token log-probabilities and entropy from logits whose vocabulary is split over the tensor-parallel group.

Shapes: B rows, S token positions, V padded vocabulary entries over all TP ranks. TP rank r holds the logits of the ids
[r * V/TP, (r+1) * V/TP). Arithmetic is in float32 (float64 for float64 logits), whatever the logits' dtype.
"""

from collections.abc import Iterator

import torch
from megatron.core import parallel_state, tensor_parallel

from nemo_aligner.utils.ppo_utils import calculate_entropy

# Bounds the float32 copy of the logits that is alive at a time: 64 Mi entries are 256 MiB.
MAX_CHUNK_ENTRIES = 2**26


def from_parallel_logits_to_logprobs(
    vocab_parallel_logits: torch.Tensor,
    target: torch.Tensor,
    inference_only: bool = False,
    higher_stability: bool = False,
    ignore_last: bool = True,
) -> torch.Tensor:
    """Log-probabilities of given tokens; all ranks of the tensor-parallel group must call it.

    Args:
        vocab_parallel_logits: [B, S, V/TP], this rank's shard; never modified.
        target: [B, S] int64, equal on all TP ranks. Ids outside [0, V), such as an ignore label, are not looked for
            (that would make the host wait for the GPU): what comes out there is finite and means nothing.
        inference_only: keep nothing for a backward pass; the result then takes part in no gradient.
        higher_stability: accepted for older callers; the stable form is always used.
        ignore_last: True takes unshifted tokens: position t is asked for `target[t + 1]`, and the last position, which
            has no successor, is dropped. False takes labels that are shifted already.

    Returns:
        [B, S-1] if `ignore_last`, else [B, S], in the logits' dtype, equal on all TP ranks.

    Raises:
        ValueError: the shapes of logits and target do not belong together.
    """
    if not ignore_last:
        return DistributedLogprob.apply(vocab_parallel_logits, target, inference_only, higher_stability)
    # The surplus position is cut from the small result: cutting it from the logits would cost a copy of them.
    successors = target.roll(-1, dims=-1)
    return DistributedLogprob.apply(vocab_parallel_logits, successors, inference_only, higher_stability)[:, :-1]


class DistributedLogprob(torch.autograd.Function):
    """`from_parallel_logits_to_logprobs` without the shift: entry t is the log-probability of `target[t]`.

    Forward: z_y - m - log sum_v exp(z_v - m), with m the largest logit of the whole vocabulary.
    Backward: g * (1{v = y} - softmax(z)_v), formed again from the saved logits, so that no softmax is stored.
    """

    @staticmethod
    def forward(ctx, vocab_parallel_logits, target, inference_only=False, higher_stability=False):
        if target.shape != vocab_parallel_logits.shape[:-1]:
            raise ValueError(
                f"target {list(target.shape)} must have the shape of the logits "
                f"{list(vocab_parallel_logits.shape)} without their last dimension"
            )
        group = parallel_state.get_tensor_model_parallel_group()
        shard_target = target - parallel_state.get_tensor_model_parallel_rank() * vocab_parallel_logits.size(-1)

        maxima = vocab_parallel_logits.amax(-1).to(_compute_dtype(vocab_parallel_logits))
        torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX, group=group)
        exp_sums, target_logits = sums = shard_sums(vocab_parallel_logits, shard_target, maxima)
        torch.distributed.all_reduce(sums, group=group)

        if inference_only:
            ctx.set_materialize_grads(False)
        else:
            ctx.save_for_backward(vocab_parallel_logits, shard_target, maxima, exp_sums)
        log_probs = (target_logits - exp_sums.log()).to(vocab_parallel_logits.dtype)
        if inference_only:
            ctx.mark_non_differentiable(log_probs)
        return log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_probs):
        logits, shard_target, maxima, exp_sums = ctx.saved_tensors
        return shard_gradient(logits, shard_target, maxima, exp_sums, grad_log_probs), None, None, None


def shard_sums(
    logits: torch.Tensor, shard_target: torch.Tensor, maxima: torch.Tensor
) -> torch.Tensor:
    """What one shard adds to the two sums of the log-probability.

    Args:
        logits: [B, S, V/TP].
        shard_target: [B, S] int64, the target's position in this shard; outside [0, V/TP) it lies in another shard.
        maxima: [B, S], the largest logit over all shards.

    Returns:
        [2, B, S] in the dtype of `maxima`: sum of exp(logit - maximum); target logit - maximum, 0 if it is not here.
    """
    sums = torch.empty(2, *maxima.shape, dtype=maxima.dtype, device=maxima.device)
    ...
