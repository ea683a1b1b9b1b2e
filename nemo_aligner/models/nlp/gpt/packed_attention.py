"""Causal attention within each sequence of a pack.

Legend: T tokens of the pack, Q sequences, L tokens of one sequence, N heads, G key/value groups, D channels per head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from nemo_aligner.compat import varlen_attention
from nemo_aligner.compat.sdpa import scaled_dot_product_attention


@dataclass(frozen=True)
class PackedSequences:
    """Sequence boundaries of a pack, passed through megatron-core in place of its `PackedSeqParams`.

    Attributes:
        lengths: tokens of each sequence, in order; on the host, so that reading them needs no synchronization.
        cu_seqlens: their cumulative sum, starting with 0, int32 [Q + 1].
    """

    lengths: list[int]
    cu_seqlens: torch.Tensor

    # megatron-core would apply rotary positions per sequence if it found these; they are already per token.
    cu_seqlens_q = cu_seqlens_kv = None

    @classmethod
    def of(cls, lengths: list[int]) -> "PackedSequences":
        return cls(lengths, F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int())


def packed_attention(
    query_TND: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
    sequences: PackedSequences,
    dropout: float,
) -> torch.Tensor:
    """Causal attention within each sequence, [T, N, D].

    One kernel for all sequences where torch has one (half precision on a GPU, no dropout), else one call per sequence.
    Both are deterministic under `torch.use_deterministic_algorithms(True)`.
    """
    if dropout == 0 and varlen_attention.can_compute(query_TND):
        return varlen_attention.causal(query_TND, key_TGD, value_TGD, sequences.cu_seqlens, max(sequences.lengths))
    of_each = zip(*(_sequences(x, sequences.lengths) for x in (query_TND, key_TGD, value_TGD)), strict=True)
    options = {"dropout_p": dropout, "is_causal": True, "enable_gqa": query_TND.size(1) != key_TGD.size(1)}
    contexts = [scaled_dot_product_attention(*qkv, **options).transpose(1, 2) for qkv in of_each]
    return torch.cat(contexts, dim=1).squeeze(0)


def packed_attention_and_gradient(
    query_TND: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, sequences: PackedSequences
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]]:
    """Attention without dropout, for use in a custom autograd function.

    Returns:
        The context [T, N, D], detached, and a function from its gradient to those of query, key and value.
    """
    if varlen_attention.can_compute(query_TND):
        # avoids a nested autograd call in the backward pass: 7 % of a layer's host time, by cProfile
        cu_seqlens, longest = sequences.cu_seqlens, max(sequences.lengths)
        return varlen_attention.causal_and_gradient(query_TND, key_TGD, value_TGD, cu_seqlens, longest)
    with torch.enable_grad():
        qkv = [x.detach().requires_grad_() for x in (query_TND, key_TGD, value_TGD)]
        context_TND = packed_attention(*qkv, sequences, dropout=0.0)
    return context_TND.detach(), lambda grad_TND: torch.autograd.grad(context_TND, qkv, grad_TND)


def _sequences(x_TND: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, ...]:
    """Each sequence's [1, N, L, D]."""
    return x_TND.transpose(0, 1).unsqueeze(0).split(lengths, dim=2)
