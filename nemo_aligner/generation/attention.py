"""Prefill attention of packed prompts, and decode attention of each row's newest token to its KV cache.

Both take the output of a layer's fused QKV projection, whose columns are, group by group, the query heads, the key head
and the value head; both apply RoPE to queries and keys and write keys and values to a cache.

Legend: M tokens, B rows, G key/value groups of this rank, Q query heads per group, T positions per row, t of them
attended to, D channels per head; of M prompt tokens, U are not padding.
"""

from dataclasses import replace

import torch

from nemo_aligner.generation import torch_ops
from nemo_aligner.generation.kv_cache import KVCache
from nemo_aligner.generation.weights import Weights
from nemo_aligner.models.nlp.gpt.packed_attention import PackedSequences, packed_attention
from nemo_aligner.utils.tensors import to_device_async


class RotaryTable:
    """Cosine and signed sine of each position's angles, [T, rotated channels], in the model's dtype; None without RoPE.

    The first half of a head's rotated channels is paired with the second; the sine of the first half is negated.
    """

    def __init__(self, weights: Weights, capacity: int):
        self.capacity = capacity
        self.cos_TD = self.sin_TD = None
        if weights.rotary is not None:
            angles_TD = weights.rotary(capacity)[:, 0, 0].to(weights.device)
            sign_D = torch.ones_like(angles_TD[0])
            sign_D[: sign_D.numel() // 2] = -1
            self.cos_TD = angles_TD.cos().to(weights.dtype)
            self.sin_TD = (angles_TD.sin() * sign_D).to(weights.dtype)

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if self.cos_TD is None else (self.cos_TD, self.sin_TD)

    def at(self, positions_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if self.cos_TD is None else (self.cos_TD[positions_M], self.sin_TD[positions_M])


class PrefillAttention:
    """Causal attention of packed prompts, each to itself; keys and values are written to rows 0, 1, ... of `cache`.

    Args:
        lengths: lengths of the packed prompts; not all are 0.
        num_padding: tokens after them, which attend to each other and are not cached.

    Attributes:
        position_M: int64, each token's position in its prompt; 0 for padding.
    """

    def __init__(self, weights: Weights, rotary: RotaryTable, cache: KVCache, lengths: list[int], num_padding: int):
        self.weights, self.cache = weights, cache
        device = weights.device
        row_U = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        position_M = torch.cat([*map(torch.arange, lengths), torch.zeros(num_padding, dtype=torch.int64)])
        self.row_U, self.position_M = to_device_async(row_U, device), to_device_async(position_M, device)
        self.position_U = self.position_M[: len(row_U)]
        self.angles = rotary.at(self.position_M)
        sequences = PackedSequences.of([length for length in (*lengths, num_padding) if length > 0])
        self.sequences = replace(sequences, cu_seqlens=to_device_async(sequences.cu_seqlens, device))

    def __call__(self, number: int, qkv_MX: torch.Tensor) -> torch.Tensor:
        qkv = self._rope_and_cache(qkv_MX, self.cache.keys_LRGTD[number], self.cache.values_LRGTD[number])
        return packed_attention(*qkv, self.sequences, dropout=0.0).flatten(1)

    def _rope_and_cache(self, qkv_MX, keys_RGTD, values_RGTD) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [M, N, D], keys and values [M, G, D]; keys and values are also written to the cache."""
        query_MND, key_MGD, value_MGD = _split(qkv_MX, self.weights, self.angles)
        num_placed = len(self.row_U)
        for cached_RGTD, new_MGD in ((keys_RGTD, key_MGD), (values_RGTD, value_MGD)):
            cached_RGTD.transpose(1, 2)[self.row_U, self.position_U] = new_MGD[:num_placed]
        return query_MND, key_MGD, value_MGD


class FusedPrefillAttention(PrefillAttention):
    """`PrefillAttention` with RoPE and cache writes in one kernel."""

    def __init__(self, weights: Weights, rotary: RotaryTable, cache: KVCache, lengths: list[int], num_padding: int):
        super().__init__(weights, rotary, cache, lengths, num_padding)
        self.tables = rotary.tables
        num_heads = weights.num_groups * weights.heads_per_group
        # the kernel leaves padding at 0 in all layers
        self.query_MND, self.key_MGD = (
            torch.zeros(len(self.position_M), heads, weights.head_dim, dtype=weights.dtype, device=weights.device)
            for heads in (num_heads, weights.num_groups)
        )

    def _rope_and_cache(self, qkv_MX, keys_RGTD, values_RGTD) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from nemo_aligner.generation import triton_attention

        triton_attention.rope_and_cache_(
            qkv_MX, self.row_U, self.position_U, self.tables, self.query_MND, self.key_MGD, keys_RGTD, values_RGTD
        )
        return self.query_MND, self.key_MGD, _heads(qkv_MX, self.weights)[:, :, -1]


class DecodeAttention:
    """Attention of one new token of each of the first B rows of `cache`, each at its own position.

    Args:
        positions_B: int64 [B], positions of the newest tokens; all earlier positions are filled.
        max_context: exclusive upper bound of the positions.
    """

    def __init__(
        self, weights: Weights, rotary: RotaryTable, cache: KVCache, positions_B: torch.Tensor, max_context: int
    ):
        self.weights, self.cache, self.positions_B = weights, cache, positions_B
        self.row_B = torch.arange(positions_B.numel(), device=positions_B.device)
        self.max_context = max_context
        self.is_filled_Bt = torch.arange(max_context, device=positions_B.device) <= positions_B[:, None]
        self.angles = rotary.at(positions_B)

    def __call__(self, number: int, qkv_BX: torch.Tensor) -> torch.Tensor:
        query_BND, key_BGD, value_BGD = _split(qkv_BX, self.weights, self.angles)
        keys_RGTD, values_RGTD = self.cache.keys_LRGTD[number], self.cache.values_LRGTD[number]
        keys_RGTD.transpose(1, 2)[self.row_B, self.positions_B] = key_BGD
        values_RGTD.transpose(1, 2)[self.row_B, self.positions_B] = value_BGD
        num_rows, t = self.positions_B.numel(), self.max_context
        return torch_ops.decode_attention(
            query_BND.unflatten(1, (self.weights.num_groups, -1)),
            keys_RGTD[:num_rows, :, :t],
            values_RGTD[:num_rows, :, :t],
            self.is_filled_Bt,
        )


class FusedDecodeAttention:
    """`DecodeAttention` in one kernel, which reads filled positions only and so needs no bound from the host."""

    def __init__(self, weights: Weights, rotary: RotaryTable, cache: KVCache, positions_B: torch.Tensor):
        self.weights, self.rotary, self.cache, self.positions_B = weights, rotary, cache, positions_B

    def __call__(self, number: int, qkv_BX: torch.Tensor) -> torch.Tensor:
        from nemo_aligner.generation import triton_attention

        return triton_attention.row_attention(
            qkv_BX,
            self.cache.keys_LRGTD[number],
            self.cache.values_LRGTD[number],
            self.positions_B,
            self.rotary.tables,
            self.weights.heads_per_group,
        )


def _split(qkv_MX: torch.Tensor, weights: Weights, angles) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [M, G * Q, D] and keys [M, G, D] with RoPE applied, and values [M, G, D]."""
    heads_MGKD = _heads(qkv_MX, weights)
    query_MND = heads_MGKD[:, :, :-2].flatten(1, 2)
    key_MGD, value_MGD = heads_MGKD[:, :, -2], heads_MGKD[:, :, -1]
    if angles is not None:
        query_MND, key_MGD = (torch_ops.rotate(x, *angles) for x in (query_MND, key_MGD))
    return query_MND, key_MGD, value_MGD


def _heads(qkv_MX: torch.Tensor, weights: Weights) -> torch.Tensor:
    """[M, G, Q + 2, D]: each group's queries, its key and its value."""
    return qkv_MX.view(len(qkv_MX), weights.num_groups, weights.heads_per_group + 2, weights.head_dim)
