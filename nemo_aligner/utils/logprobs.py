"""Token log-probabilities and entropy from logits whose vocabulary is split over the tensor-parallel group.

Shapes: B rows, S token positions, V padded vocabulary entries over all TP ranks. TP rank r holds the logits of the ids
[r * V/TP, (r+1) * V/TP). Arithmetic is in float32 (float64 for float64 logits), whatever the logits' dtype.
"""

from collections.abc import Iterator

import torch
from megatron.core import tensor_parallel

from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.ppo_utils import calculate_entropy

# Bounds the float32 copy of the logits that is live at any time: 16 Mi entries are 64 MiB.
MAX_CHUNK_ENTRIES = 2**24


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
        target: [B, S] int64, equal on all TP ranks. Ids outside [0, V), such as an ignore label, are not checked for
            (that would sync the host with the GPU): the result there is finite but meaningless.
        inference_only: save nothing for a backward pass; the result is not differentiable.
        higher_stability: accepted for older callers; the stable form is always used.
        ignore_last: True takes unshifted tokens: position t predicts `target[t + 1]`, and the last position, which has
            no successor, is dropped. False takes labels that are already shifted.

    Returns:
        [B, S-1] if `ignore_last`, else [B, S], in the logits' dtype, equal on all TP ranks.

    Raises:
        ValueError: the shapes of logits and target do not match.
    """
    if not ignore_last:
        return DistributedLogprob.apply(vocab_parallel_logits, target, inference_only, higher_stability)
    # Drop the last position from the small result: slicing the logits would cost a copy of their gradient.
    successors = target.roll(-1, dims=-1)
    return DistributedLogprob.apply(vocab_parallel_logits, successors, inference_only, higher_stability)[:, :-1]


class DistributedLogprob(torch.autograd.Function):
    """`from_parallel_logits_to_logprobs` without the shift: entry t is the log-probability of `target[t]`.

    Forward: (z_y - m) - log sum_v exp(z_v - m), with m the largest logit of the whole vocabulary.
    Backward: g * (1{v = y} - softmax(z)_v), with the softmax recomputed from the logits rather than stored.
    """

    @staticmethod
    def forward(ctx, vocab_parallel_logits, target, inference_only=False, higher_stability=False):
        logits = vocab_parallel_logits
        if target.shape != logits.shape[:-1]:
            raise ValueError(
                f"target {list(target.shape)} must have the shape of the logits {list(logits.shape)} "
                "without their last dimension"
            )
        group = parallel_state.get_tensor_model_parallel_group()
        shard_target = target - parallel_state.get_tensor_model_parallel_rank() * logits.size(-1)

        maxima = logits.amax(-1).to(torch.promote_types(logits.dtype, torch.float32))
        torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX, group=group)
        sums = torch.stack((shard_exp_sums(logits, maxima), shard_target_logits(logits, shard_target, maxima)))
        torch.distributed.all_reduce(sums, group=group)
        exp_sums, target_logits = sums.unbind()

        log_probs = (target_logits - exp_sums.log()).to(logits.dtype)
        if inference_only:
            ctx.mark_non_differentiable(log_probs)
        else:
            ctx.save_for_backward(logits, shard_target, maxima, exp_sums)
        return log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_probs):
        return shard_gradient(*ctx.saved_tensors, grad_log_probs), None, None, None


def shard_exp_sums(logits: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """Sum of exp(logit - maximum) over one shard.

    Args:
        logits: [B, S, V/TP].
        maxima: [B, S] float32, the largest logit over all shards.

    Returns:
        [B, S] float32.
    """
    chunks = _split_positions(logits, maxima.unsqueeze(-1))
    return torch.cat([torch.sub(logit, maximum).exp_().sum(-1) for logit, maximum in chunks], dim=-1)


def shard_target_logits(logits: torch.Tensor, shard_target: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """Target logit - maximum where this shard holds the target, else 0; float32 [B, S].

    `shard_target` [B, S] int64 is the target's index relative to this shard; outside [0, V/TP) it lies in another one.
    """
    here, place = _locate(shard_target, logits.size(-1))
    return torch.where(here, logits.gather(-1, place.unsqueeze(-1)).squeeze(-1) - maxima, 0)


def shard_gradient(
    logits: torch.Tensor,
    shard_target: torch.Tensor,
    maxima: torch.Tensor,
    exp_sums: torch.Tensor,
    grad_log_probs: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the log-probabilities for one shard, [B, S, V/TP] in the logits' dtype.

    Args:
        logits, shard_target, maxima: as above.
        exp_sums: [B, S] float32, sum of exp(logit - maximum) over all shards.
        grad_log_probs: [B, S], gradient of the loss for each log-probability.
    """
    grad_log_probs = grad_log_probs.to(maxima.dtype)
    here, place = _locate(shard_target, logits.size(-1))
    per_position = (maxima, -grad_log_probs / exp_sums, place, grad_log_probs * here)
    gradient = torch.empty_like(logits)
    chunks = _split_positions(gradient, logits, *(tensor.unsqueeze(-1) for tensor in per_position))
    for out, logit, maximum, softmax_weight, column, target_weight in chunks:
        # Not bound to a name, so that a chunk's temporary is freed before the next one is allocated.
        out.copy_(torch.sub(logit, maximum).exp_().mul_(softmax_weight).scatter_add_(-1, column, target_weight))
    return gradient


def _locate(shard_target: torch.Tensor, shard_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask of the targets that lie in this shard, and the indices clamped into it."""
    return (shard_target >= 0) & (shard_target < shard_size), shard_target.clamp(0, shard_size - 1)


def _split_positions(wide: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Split tensors [B, S, ...] along S, so that a chunk of `wide` has at most `MAX_CHUNK_ENTRIES` entries."""
    entries_per_position = max(1, wide.size(0) * wide.size(2))
    num_positions = max(1, MAX_CHUNK_ENTRIES // entries_per_position)
    return zip(*(tensor.split(num_positions, dim=1) for tensor in (wide, *others)), strict=True)


def calculate_distributed_entropy(
    vocab_parallel_logits: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean entropy of the next-token distributions; all ranks of the tensor-parallel group must call it.

    Args:
        vocab_parallel_logits: [B, S, V/TP], this rank's shard. The last position, which has no successor, is dropped.
        mask: [B, S-1]; if given, the mean is over the positions where it is not zero.

    Returns:
        A scalar in the logits' dtype, equal on all TP ranks; each rank's gradient is that of its own shard.
    """
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(vocab_parallel_logits)[:, :-1]
    log_probs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return calculate_entropy(log_probs, mask).to(logits.dtype)
