"""Triton kernels for attention: decode attention, and RoPE with KV cache writes for prefill.

Legend: M tokens, B rows, G key/value groups of this rank, Q query heads per group, N = G * Q, T positions per row, D
channels per head, Z splits of a row's positions.
"""

import torch
import triton
import triton.language as tl

from nemo_aligner.generation.triton_launch import (
    early_launch,
    fetch_into_cache,
    let_next_begin,
    shared_memory,
    wait_for_previous,
)

# Programs that keep every SM of a current GPU busy; with fewer, a row's positions are split.
_ENOUGH_PROGRAMS = 512
# Positions per block, warps and stages of the attention kernel, for one query head per group and for several: the best
# of those tried on an H100.
_ONE_HEAD, _SEVERAL_HEADS = (16, 1, 3), (64, 4, 3)
# Positions of a row's keys and values prefetched into the L2 cache before the previous kernel has ended.
_POSITIONS_AHEAD = 16
# Stands for minus infinity where the difference of two must be 0.
_LOWEST = -1e30


def row_attention(
    qkv_BX: torch.Tensor,
    keys_RGTD: torch.Tensor,
    values_RGTD: torch.Tensor,
    positions_B: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    heads_per_group: int,
) -> torch.Tensor:
    """Attention of one new token of each row to the row's filled positions and itself; the token is added to the cache.

    Flash decoding (Dao et al., 2023): if rows and groups are too few to fill the device, a row's positions are split
    and the partial results merged. Only filled positions are read, so the cost follows the lengths, which are known on
    the device alone.

    Args:
        qkv_BX: [B, G * (Q + 2) * D], without RoPE applied.
        positions_B: int64 [B], positions of the new tokens.
        angles: cosine and signed sine [T, rotated channels], or None.

    Returns:
        [B, N * D].
    """
    num_rows, (_, num_groups, capacity, head_dim) = qkv_BX.size(0), keys_RGTD.shape
    num_programs = num_rows * num_groups
    block_t, num_warps, stages = _ONE_HEAD if heads_per_group == 1 else _SEVERAL_HEADS
    block_d = triton.next_power_of_2(head_dim)
    # all stages but one hold keys and values in shared memory, which fits fewer of wide float32 heads
    stages = min(stages, 1 + shared_memory(qkv_BX.device) // (2 * block_t * block_d * keys_RGTD.itemsize))
    splits = min(triton.cdiv(_ENOUGH_PROGRAMS, num_programs), triton.cdiv(capacity, 128), 16)
    splits = 1 << (splits.bit_length() - 1)
    num_heads = num_groups * heads_per_group
    context_BX = qkv_BX.new_empty(num_rows, num_heads * head_dim)
    partial_BNZD = partial_BNZ2 = context_BX
    if splits > 1:
        partial_BNZD = torch.empty(num_rows, num_heads, splits, head_dim, dtype=torch.float32, device=qkv_BX.device)
        partial_BNZ2 = torch.empty(num_rows, num_heads, splits, 2, dtype=torch.float32, device=qkv_BX.device)
    cos_TD, sin_TD = angles if angles is not None else (qkv_BX, qkv_BX)
    _row_attention_kernel[(num_rows, num_groups, splits)](
        qkv_BX, keys_RGTD, values_RGTD, positions_B, cos_TD, sin_TD, context_BX, partial_BNZD, partial_BNZ2,
        capacity, head_dim**-0.5 * 1.4426950408889634,
        Q=heads_per_group, BLOCK_Q=1 if heads_per_group == 1 else max(16, triton.next_power_of_2(heads_per_group)),
        D=head_dim, BLOCK_D=block_d, TURNED=0 if angles is None else cos_TD.size(1), BLOCK_T=block_t, Z=splits,
        STAGES=stages, LOWEST=_LOWEST, POSITIONS_AHEAD=_POSITIONS_AHEAD, num_warps=num_warps,
        **early_launch(qkv_BX.device),
    )  # fmt: skip
    if splits > 1:
        _join_splits_kernel[(num_rows * num_heads,)](
            partial_BNZD, partial_BNZ2, context_BX, D=head_dim, BLOCK_D=block_d, Z=splits, num_warps=1
        )
    return context_BX


@triton.jit
def _turned(start, d, inside, cos, sin, TURNED: tl.constexpr):
    """RoPE of channels `d` at `start`: each is rotated with its partner, TURNED / 2 channels away."""
    x = tl.load(start + d, mask=inside, other=0.0).to(tl.float32)
    if TURNED > 0:
        half: tl.constexpr = TURNED // 2
        partner = tl.where(d < half, d + half, tl.where(d < TURNED, d - half, d))
        x = x * cos + tl.load(start + partner, mask=inside, other=0.0).to(tl.float32) * sin
    return x


@triton.jit
def _row_attention_kernel(
    qkv, keys, values, positions, cos_table, sin_table, context, partial, partial_sums, capacity, scale_log2,
    Q: tl.constexpr, BLOCK_Q: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_T: tl.constexpr, Z: tl.constexpr, STAGES: tl.constexpr, LOWEST: tl.constexpr, POSITIONS_AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    let_next_begin(EARLY)
    row, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_groups = tl.num_programs(1)
    element: tl.constexpr = keys.dtype.element_ty
    position = tl.load(positions + row).to(tl.int32)
    start, end = 0, position
    if Z > 1:
        per_split = tl.cdiv(tl.cdiv(position, Z), BLOCK_T) * BLOCK_T
        start = split * per_split
        end = tl.minimum(start + per_split, position)
    cached = (row.to(tl.int64) * num_groups + group) * capacity * D
    soon = cached + tl.minimum(start + tl.arange(0, POSITIONS_AHEAD), position) * D
    fetch_into_cache(keys + soon, D * element.primitive_bitwidth // 8, EARLY)
    fetch_into_cache(values + soon, D * element.primitive_bitwidth // 8, EARLY)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    cos, sin = d.to(tl.float32), d.to(tl.float32)
    if TURNED > 0:
        cos = tl.load(cos_table + position * TURNED + d, mask=d < TURNED, other=1.0).to(tl.float32)
        sin = tl.load(sin_table + position * TURNED + d, mask=d < TURNED, other=0.0).to(tl.float32)
    wait_for_previous(EARLY)

    group_start = qkv + (row * num_groups + group) * (Q + 2) * D
    q = tl.arange(0, BLOCK_Q)
    is_head = q < Q
    if Q == 1:
        query = _turned(group_start, d, inside, cos, sin, TURNED).to(element)
    else:
        heads, both = group_start + q[:, None] * D, is_head[:, None] & inside[None, :]
        query = _turned(heads, d[None, :], both, cos[None, :], sin[None, :], TURNED).to(element)
    key = _turned(group_start + Q * D, d, inside, cos, sin, TURNED).to(element)
    value = tl.load(group_start + (Q + 1) * D + d, mask=inside, other=0.0)

    # the first split attends to the new token's own key and value, and caches them
    is_first = split == 0
    keys += cached
    values += cached
    if Q == 1:
        mixed, highest, total = _attend_with_one_head(
            query, key, value, is_first, keys, values, start, end, d, scale_log2, D, BLOCK_T, BLOCK_D, STAGES, LOWEST
        )
    else:
        mixed, highest, total = _attend_with_heads(
            query, key, value, is_first, keys, values, start, end, d, scale_log2, D, BLOCK_T, BLOCK_D, BLOCK_Q, STAGES,
            LOWEST,
        )  # fmt: skip
    # last, as the compiler cannot know that no load reads what is stored here, and would not move loads across
    if is_first:
        tl.store(keys + position * D + d, key, mask=inside)
        tl.store(values + position * D + d, value, mask=inside)
    head = (row * num_groups + group) * Q + q
    both = is_head[:, None] & inside[None, :]
    if Z == 1:
        tl.store(context + head[:, None] * D + d[None, :], (mixed / total[:, None]).to(element), mask=both)
    else:
        part = head * Z + split
        tl.store(partial + part[:, None] * D + d[None, :], mixed, mask=both)
        tl.store(partial_sums + part * 2, highest, mask=is_head)
        tl.store(partial_sums + part * 2 + 1, total, mask=is_head)


@triton.jit
def _is_read(is_filled, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mask of positions and channels to load; cheaper per position alone, where D is a whole block."""
    mask = is_filled[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    return mask


@triton.jit
def _attend_with_one_head(
    query, key, value, is_first, keys, values, start, end, d, scale_log2,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Weighted sum of values before normalization [1, D], highest score [1] and total of the weights [1].

    Every lane of a block keeps its own online softmax over every BLOCK_T-th position; they are merged after the loop.
    Within it no lane waits for another, and loads run ahead.
    """
    query = query.to(tl.float32) * scale_log2
    lane = tl.arange(0, BLOCK_T)
    is_own = (lane == 0) & is_first
    highest = tl.where(is_own, tl.sum(query * key.to(tl.float32), axis=0), LOWEST)
    total = tl.where(is_own, 1.0, 0.0)
    mixed = tl.where(is_own[:, None], value.to(tl.float32)[None, :], 0.0)
    for t in tl.range(start, end, BLOCK_T, num_stages=STAGES):
        at = t + lane
        offset = at[:, None] * D + d[None, :]
        is_filled = at < end
        mask = _is_read(is_filled, d, D, BLOCK_D)
        k = tl.load(keys + offset, mask=mask, other=0.0)
        v = tl.load(values + offset, mask=mask, other=0.0)
        score = tl.where(is_filled, tl.sum(k.to(tl.float32) * query[None, :], axis=1), LOWEST)
        new_highest = tl.maximum(highest, score)
        fade = tl.exp2(highest - new_highest)
        weight = tl.where(is_filled, tl.exp2(score - new_highest), 0.0)
        total = total * fade + weight
        mixed = mixed * fade[:, None] + weight[:, None] * v.to(tl.float32)
        highest = new_highest
    top = tl.max(highest, axis=0)
    fade = tl.exp2(highest - top)
    one = tl.zeros([1], tl.float32)
    return tl.sum(mixed * fade[:, None], axis=0)[None, :], top + one, tl.sum(total * fade, axis=0) + one


@triton.jit
def _attend_with_heads(
    query, key, value, is_first, keys, values, start, end, d, scale_log2,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, STAGES: tl.constexpr,
    LOWEST: tl.constexpr,
):  # fmt: skip
    """The same for all heads of a group, which process blocks of positions together."""
    own = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * scale_log2
    highest = tl.where(is_first, own, LOWEST)
    total = tl.where(is_first, 1.0, 0.0) + tl.zeros([BLOCK_Q], tl.float32)
    mixed = tl.where(is_first, value.to(tl.float32), 0.0)[None, :] + tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for t in tl.range(start, end, BLOCK_T, num_stages=STAGES):
        at = t + tl.arange(0, BLOCK_T)
        offset = at[:, None] * D + d[None, :]
        mask = _is_read(at < end, d, D, BLOCK_D)
        k = tl.load(keys + offset, mask=mask, other=0.0)
        v = tl.load(values + offset, mask=mask, other=0.0)
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale_log2
        score = tl.where((at < end)[None, :], score, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(score, axis=1))
        fade = tl.exp2(highest - new_highest)
        weight = tl.exp2(score - new_highest[:, None])
        total = total * fade + tl.sum(weight, axis=1)
        mixed = mixed * fade[:, None] + tl.dot(weight.to(query.dtype), v, input_precision="ieee")
        highest = new_highest
    return mixed, highest, total


@triton.jit
def _join_splits_kernel(
    partial, partial_sums, context, D: tl.constexpr, BLOCK_D: tl.constexpr, Z: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0)
    z, d = tl.arange(0, Z), tl.arange(0, BLOCK_D)
    inside = d < D
    highest = tl.load(partial_sums + (head * Z + z) * 2)
    total = tl.load(partial_sums + (head * Z + z) * 2 + 1)
    weight = tl.exp2(highest - tl.max(highest, axis=0))
    mixed = tl.load(partial + (head * Z + z)[:, None] * D + d[None, :], mask=inside[None, :], other=0.0)
    joined = tl.sum(mixed * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    tl.store(context + head * D + d, joined.to(context.dtype.element_ty), mask=inside)


def rope_and_cache_(
    qkv_MX: torch.Tensor,
    row_U: torch.Tensor,
    position_U: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    query_MND: torch.Tensor,
    key_MGD: torch.Tensor,
    keys_RGTD: torch.Tensor,
    values_RGTD: torch.Tensor,
) -> None:
    """Apply RoPE to queries and keys of packed prompts, for attention, and write keys and values to the cache.

    Args:
        row_U, position_U: int64, row and position in the cache of the first U <= M tokens; the others are skipped.
        query_MND, key_MGD: outputs for attention, which reads the values from `qkv_MX`.
    """
    num_groups, head_dim = key_MGD.size(1), key_MGD.size(2)
    cos_TD, sin_TD = angles if angles is not None else (qkv_MX, qkv_MX)
    _rope_and_cache_kernel[(row_U.numel(), num_groups)](
        qkv_MX, row_U, position_U, cos_TD, sin_TD, query_MND, key_MGD, keys_RGTD, values_RGTD, keys_RGTD.size(2),
        Q=query_MND.size(1) // num_groups, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
        TURNED=0 if angles is None else cos_TD.size(1), num_warps=1,
    )  # fmt: skip


@triton.jit
def _rope_and_cache_kernel(
    qkv, rows, positions, cos_table, sin_table, query, key, keys, values, capacity,
    Q: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    token, group, num_groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, position = tl.load(rows + token), tl.load(positions + token)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    cos, sin = d.to(tl.float32), d.to(tl.float32)
    if TURNED > 0:
        cos = tl.load(cos_table + position * TURNED + d, mask=d < TURNED, other=1.0).to(tl.float32)
        sin = tl.load(sin_table + position * TURNED + d, mask=d < TURNED, other=0.0).to(tl.float32)
    place = token * num_groups + group
    start = qkv + place * (Q + 2) * D
    for head in tl.static_range(Q):
        turned = _turned(start + head * D, d, inside, cos, sin, TURNED).to(query.dtype.element_ty)
        tl.store(query + (place * Q + head) * D + d, turned, mask=inside)
    turned = _turned(start + Q * D, d, inside, cos, sin, TURNED).to(key.dtype.element_ty)
    unturned = tl.load(start + (Q + 1) * D + d, mask=inside, other=0.0)
    cached = ((row * num_groups + group) * capacity + position) * D + d
    tl.store(key + place * D + d, turned, mask=inside)
    tl.store(keys + cached, turned, mask=inside)
    tl.store(values + cached, unturned, mask=inside)
