"""The operations between the matrix products as Triton kernels, one pass over memory each; `torch_ops` says the same.

Legend: M tokens side by side, H hidden size, F MLP size, B rows, G key/value groups of this rank, Q query heads per
group, N = G * Q, T positions that a row has room for, D channels per head, V vocabulary, Z splits of a row's positions.
"""

import functools

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from nemo_aligner.generation.early_launch import early_launch, fetch_into_cache, let_next_begin, wait_for_previous
from nemo_aligner.generation.sampling import NO_TOKEN
from nemo_aligner.generation.weights import Norm
from nemo_aligner.models.nlp.gpt.activation import Activation

# Programs that keep every multiprocessor of a current GPU busy; with fewer, a row's positions are split.
_ENOUGH_PROGRAMS = 512
# Positions that are looked at together, warps and stages of the attention kernel: the best of those tried on an H100,
# for one query head per group and for several.
_ONE_HEAD, _SEVERAL_HEADS = (16, 1, 3), (64, 4, 3)
# Of a row's keys and values so many positions, and of each row of a weight so many bytes, are on their way into the
# cache before the kernel in front has ended.
_POSITIONS_AHEAD, _BYTES_AHEAD = 16, 512
# Stands for minus infinity where the difference of two must be 0.
_LOWEST = -1e30


# ---- residual and norm


def add_norm(
    hidden_MH: torch.Tensor, delta_MH: torch.Tensor | None, bias_H: torch.Tensor | None, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `torch_ops.add_norm`, but `hidden_MH` is updated in place, and `delta_MH` may come in parts to be summed."""
    num_tokens, size = hidden_MH.shape
    num_parts = 0 if delta_MH is None else 1 if delta_MH.dim() == 2 else delta_MH.size(0)
    normed_MH = torch.empty_like(hidden_MH)
    block = triton.next_power_of_2(size)
    _add_norm_kernel[(num_tokens,)](
        hidden_MH, delta_MH, bias_H, norm.weight, norm.bias, normed_MH, size, norm.eps,
        NUM_PARTS=num_parts, HAS_BIAS=bias_H is not None, HAS_NORM_BIAS=norm.bias is not None,
        IS_RMS=norm.is_rms, ZERO_CENTERED=norm.zero_centered, BLOCK=block, num_warps=min(16, max(1, block // 256)),
        **early_launch(hidden_MH.device),
    )  # fmt: skip
    return hidden_MH, normed_MH


@triton.jit
def _add_norm_kernel(
    hidden, delta, bias, weight, norm_bias, normed, size, eps,
    NUM_PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, IS_RMS: tl.constexpr,
    ZERO_CENTERED: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_begin(EARLY)
    start = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        scale += 1.0
    shift, added = tl.zeros_like(scale), tl.zeros_like(scale)
    if HAS_NORM_BIAS:
        shift = tl.load(norm_bias + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(EARLY)
    x = tl.load(hidden + start + column, mask=inside, other=0.0).to(tl.float32)
    if NUM_PARTS > 0:
        for part in tl.static_range(NUM_PARTS):
            from_here = delta + part * tl.num_programs(0) * size + start
            x += tl.load(from_here + column, mask=inside, other=0.0).to(tl.float32)
        rounded = (x + added).to(hidden.dtype.element_ty)
        tl.store(hidden + start + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if not IS_RMS:
        x = tl.where(inside, x - tl.sum(x, axis=0) / size, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps) * scale + shift
    tl.store(normed + start + column, y.to(normed.dtype.element_ty), mask=inside)


# ---- activation


def activate(x_MF: torch.Tensor, activation: Activation) -> torch.Tensor:
    """As `torch_ops.activate`; functions that have no kernel here are called as they are."""
    if activation.name is None:
        return _activate_unfused(x_MF, activation)
    num_tokens, size = x_MF.size(0), x_MF.size(1) // (1 + activation.is_gated)
    activated_MF = x_MF.new_empty(num_tokens, size)
    _activate_kernel[(num_tokens, triton.cdiv(size, 1024))](
        x_MF,
        activated_MF,
        size,
        NAME=activation.name,
        IS_GATED=activation.is_gated,
        BLOCK=1024,
        num_warps=4,
    )
    return activated_MF


def _activate_unfused(x_MF: torch.Tensor, activation: Activation) -> torch.Tensor:
    from nemo_aligner.generation import torch_ops

    return torch_ops.activate(x_MF, activation)


@triton.jit
def _activation(gate, NAME: tl.constexpr):
    if NAME == "silu":
        y = gate * tl.sigmoid(gate)
    elif NAME == "gelu":
        y = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:  # 0.5 (1 + tanh(a)) = sigmoid(2 a)
        y = gate * tl.sigmoid(1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate))
    return y


@triton.jit
def _activate_kernel(
    x, activated, size, NAME: tl.constexpr, IS_GATED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    start = x + row * size * (2 if IS_GATED else 1)
    y = _activation(tl.load(start + column, mask=inside, other=0.0).to(tl.float32), NAME)
    if IS_GATED:
        y *= tl.load(start + size + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(activated + row * size + column, y.to(activated.dtype.element_ty), mask=inside)


# ---- products with few rows
#
# They cost what reading the weight costs, for which each multiprocessor should have one tile of it. What cuBLAS does as
# fast, and what does not fit these tiles, is left to it.


def product(x_MI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x_MI @ weight_OI.T for `add_norm`: [M, O], or, for a few rows, float32 parts of it, [2, M, O].

    A narrow matrix has too few tiles to occupy every multiprocessor, unless its input is split too. cuBLAS sums such
    parts in a kernel of their own.
    """
    (num_tokens, size_in), size_out = x_MI.shape, weight_OI.size(0)
    if not _fits(x_MI, size_out, _TILE_O, _NUM_PARTS):
        return F.linear(x_MI, weight_OI)
    parts_ZMO = torch.empty(_NUM_PARTS, num_tokens, size_out, dtype=torch.float32, device=x_MI.device)
    _product_kernel[(size_out // _TILE_O, _NUM_PARTS)](
        x_MI, weight_OI, parts_ZMO, num_tokens, size_out, size_in, TILE_O=_TILE_O, NUM_PARTS=_NUM_PARTS,
        **_options(x_MI, size_in // _NUM_PARTS, _TILE_O),
    )  # fmt: skip
    return parts_ZMO


# The best of those tried on an H100, for 64 rows of 2048 channels: output channels of a tile, where the input is split
# and where it is not, input channels at a time, parts of the input, and how many pieces of them are on their way.
_TILE_O, _WIDE_TILE_O, _TILE_I, _NUM_PARTS, _STAGES = 32, 64, 128, 2, 5


def _fits(x_MI: torch.Tensor, size_out: int, tile: int, num_parts: int = 1) -> bool:
    """Whether there are few rows, and whole tiles of the weight but, in all parts, no more than multiprocessors."""
    num_tokens, size_in = x_MI.shape
    is_whole = size_out % tile == 0 and size_in % (num_parts * _TILE_I) == 0
    is_few = num_tokens <= 64 and num_parts * size_out // tile <= _num_multiprocessors(x_MI.device)
    return is_whole and is_few and x_MI.dtype.itemsize == 2


def _options(x_MI: torch.Tensor, size_in: int, num_channels: int) -> dict[str, int | bool]:
    """What the kernels have in common; of `num_channels` output channels a tile reads `size_in` inputs each."""
    block_m = max(16, triton.next_power_of_2(x_MI.size(0)))
    piece_bytes = (block_m + num_channels) * _TILE_I * x_MI.itemsize
    return {
        "BLOCK_M": block_m,
        "TILE_I": _TILE_I,
        "STAGES": max(1, min(_STAGES, _shared_memory(x_MI.device) // piece_bytes)),
        "BYTES_AHEAD": min(_BYTES_AHEAD, size_in * x_MI.itemsize),
        "num_warps": 4,
        **early_launch(x_MI.device),
    }


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of its own that a program may have at most."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@triton.jit
def _product_kernel(
    x, weight, parts, num_tokens, size_out, size_in, BLOCK_M: tl.constexpr, TILE_O: tl.constexpr, TILE_I: tl.constexpr,
    NUM_PARTS: tl.constexpr, STAGES: tl.constexpr, BYTES_AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_begin(EARLY)
    part = tl.program_id(1)
    m, o = tl.arange(0, BLOCK_M), tl.program_id(0) * TILE_O + tl.arange(0, TILE_O)
    inside = (m < num_tokens)[:, None]
    per_part = size_in // NUM_PARTS
    fetch_into_cache(weight + o * size_in + part * per_part, BYTES_AHEAD, EARLY)
    wait_for_previous(EARLY)
    summed = tl.zeros([BLOCK_M, TILE_O], tl.float32)
    for start in tl.range(0, per_part, TILE_I, num_stages=STAGES):
        i = part * per_part + start + tl.arange(0, TILE_I)
        x_tile = tl.load(x + m[:, None] * size_in + i[None, :], mask=inside, other=0.0)
        weight_tile = tl.load(weight + o[:, None] * size_in + i[None, :])
        summed = tl.dot(x_tile, tl.trans(weight_tile), summed)
    tl.store(parts + (part * num_tokens + m[:, None]) * size_out + o[None, :], summed, mask=inside)


def biased_product(x_MI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x_MI @ weight_OI.T + bias_O, [M, O]."""
    if not _fits(x_MI, weight_OI.size(0), _WIDE_TILE_O):
        return F.linear(x_MI, weight_OI, bias_O)
    return _wide_product(x_MI, weight_OI, bias_O, "none", is_gated=False)


def activated_product(
    x_MI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, activation: Activation
) -> torch.Tensor:
    """As `torch_ops.activated_product`; for a few rows in one kernel."""
    fits = _fits(x_MI, weight_OI.size(0) // (1 + activation.is_gated), _WIDE_TILE_O)
    if activation.name is None or not fits:
        return activate(F.linear(x_MI, weight_OI, bias_O), activation)
    return _wide_product(x_MI, weight_OI, bias_O, activation.name, activation.is_gated)


def _wide_product(x_MI, weight_OI, bias_O, name: str, is_gated: bool) -> torch.Tensor:
    (num_tokens, size_in), size = x_MI.shape, weight_OI.size(0) // (1 + is_gated)
    activated_MF = x_MI.new_empty(num_tokens, size)
    _wide_product_kernel[(size // _WIDE_TILE_O,)](
        x_MI, weight_OI, bias_O, activated_MF, num_tokens, size, size_in, TILE_F=_WIDE_TILE_O, NAME=name,
        IS_GATED=is_gated, HAS_BIAS=bias_O is not None, **_options(x_MI, size_in, (1 + is_gated) * _WIDE_TILE_O),
    )  # fmt: skip
    return activated_MF


@triton.jit
def _wide_product_kernel(
    x, weight, bias, activated, num_tokens, size, size_in, BLOCK_M: tl.constexpr, TILE_F: tl.constexpr,
    TILE_I: tl.constexpr, STAGES: tl.constexpr, NAME: tl.constexpr, IS_GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BYTES_AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_begin(EARLY)
    m, f = tl.arange(0, BLOCK_M), tl.program_id(0) * TILE_F + tl.arange(0, TILE_F)
    inside = (m < num_tokens)[:, None]
    element: tl.constexpr = activated.dtype.element_ty
    fetch_into_cache(weight + f * size_in, BYTES_AHEAD, EARLY)
    if IS_GATED:
        fetch_into_cache(weight + (size + f) * size_in, BYTES_AHEAD, EARLY)
    wait_for_previous(EARLY)
    gate, up = tl.zeros([BLOCK_M, TILE_F], tl.float32), tl.zeros([BLOCK_M, TILE_F], tl.float32)
    for start in tl.range(0, size_in, TILE_I, num_stages=STAGES):
        i = start + tl.arange(0, TILE_I)
        x_tile = tl.load(x + m[:, None] * size_in + i[None, :], mask=inside, other=0.0)
        gate_tile = tl.load(weight + f[:, None] * size_in + i[None, :])
        gate = tl.dot(x_tile, tl.trans(gate_tile), gate)
        if IS_GATED:
            up_tile = tl.load(weight + (size + f)[:, None] * size_in + i[None, :])
            up = tl.dot(x_tile, tl.trans(up_tile), up)
    if HAS_BIAS:
        gate += tl.load(bias + f).to(tl.float32)[None, :]
        if IS_GATED:
            up += tl.load(bias + size + f).to(tl.float32)[None, :]
    # rounded as the product alone would be
    y = gate.to(element).to(tl.float32)
    if NAME != "none":
        y = _activation(y, NAME)
    if IS_GATED:
        y *= up.to(element).to(tl.float32)
    tl.store(activated + m[:, None] * size + f[None, :], y.to(element), mask=inside)


# ---- attention


def row_attention(
    qkv_BX: torch.Tensor,
    keys_RGTD: torch.Tensor,
    values_RGTD: torch.Tensor,
    positions_B: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    heads_per_group: int,
) -> torch.Tensor:
    """One new token of each row attends to the row's filled positions and to itself, and is put into the cache.

    Flash decoding (Dao et al., 2023): where rows and groups are too few to fill the device, a row's positions are split
    and the parts put together. Only what is filled is read, so the lengths on the device alone decide what it costs.

    Args:
        qkv_BX: [B, G * (Q + 2) * D], not yet turned by position.
        positions_B: int64 [B], the new tokens'.
        angles: cosine and signed sine [T, turned channels], or None.

    Returns:
        [B, N * D].
    """
    num_rows, (_, num_groups, capacity, head_dim) = qkv_BX.size(0), keys_RGTD.shape
    num_programs = num_rows * num_groups
    block_t, num_warps, stages = _ONE_HEAD if heads_per_group == 1 else _SEVERAL_HEADS
    block_d = triton.next_power_of_2(head_dim)
    # all stages but one are in shared memory, keys and values; of wide heads in float32 it holds fewer
    stages = min(stages, 1 + _shared_memory(qkv_BX.device) // (2 * block_t * block_d * keys_RGTD.itemsize))
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
    """Channels `d` at `start`, each turned against the channel half the turned ones away."""
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

    # the first split takes the new token's own key and value in and keeps them
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
    # only now: the compiler cannot know that nothing above reads what is written, and would keep loads behind it
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
    """Of the channels of some positions; a mask for all of a position's channels together costs less."""
    mask = is_filled[:, None]
    if D < BLOCK_D:
        mask = mask & (d < D)[None, :]
    return mask


@triton.jit
def _attend_with_one_head(
    query, key, value, is_first, keys, values, start, end, d, scale_log2,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Values mixed, before they are divided by the weights' total, the highest score and that total; [1, D] and [1].

    Every lane of a block keeps a softmax of its own over every BLOCK_T-th position, and they are put together behind
    the loop. Within it no lane waits for another, and loads run ahead.
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
    """The same of each of a group's heads, which look at blocks of positions together."""
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


def turn_and_place_(
    qkv_MX: torch.Tensor,
    row_U: torch.Tensor,
    position_U: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    query_MND: torch.Tensor,
    key_MGD: torch.Tensor,
    keys_RGTD: torch.Tensor,
    values_RGTD: torch.Tensor,
) -> None:
    """Turn queries and keys of packed prompts by position, for attention, and put keys and values into the cache.

    Args:
        row_U, position_U: int64, row and position of the first U <= M tokens in the cache; the others are left alone.
        query_MND, key_MGD: what attention reads beside the values, which it finds in `qkv_MX`.
    """
    num_groups, head_dim = key_MGD.size(1), key_MGD.size(2)
    cos_TD, sin_TD = angles if angles is not None else (qkv_MX, qkv_MX)
    _turn_and_place_kernel[(row_U.numel(), num_groups)](
        qkv_MX, row_U, position_U, cos_TD, sin_TD, query_MND, key_MGD, keys_RGTD, values_RGTD, keys_RGTD.size(2),
        Q=query_MND.size(1) // num_groups, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
        TURNED=0 if angles is None else cos_TD.size(1), num_warps=1,
    )  # fmt: skip


@triton.jit
def _turn_and_place_kernel(
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


# ---- sampling


def advance_(
    tokens_RT: torch.Tensor, position_B: torch.Tensor, prompt_length_B: torch.Tensor, is_done_B: torch.Tensor,
    is_broken_B: torch.Tensor, drawn_B: torch.Tensor, is_end_V: torch.Tensor, max_length: int,
) -> None:  # fmt: skip
    """What `DeviceRows.advance_` does, in one kernel instead of ten."""
    num_rows = drawn_B.numel()
    _advance_kernel[(1,)](
        tokens_RT, position_B, prompt_length_B, is_done_B, is_broken_B, drawn_B, is_end_V, num_rows, tokens_RT.size(1),
        max_length, NO_TOKEN=NO_TOKEN, BLOCK=triton.next_power_of_2(num_rows),
    )  # fmt: skip


@triton.jit
def _advance_kernel(
    tokens, position, prompt_length, is_done, is_broken, drawn, is_end, num_rows, capacity, max_length,
    NO_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK)
    inside = row < num_rows
    at = tl.load(position + row, mask=inside, other=0)
    token = tl.load(drawn + row, mask=inside, other=0)
    was_done = tl.load(is_done + row, mask=inside, other=1) != 0
    has_token = token != NO_TOKEN
    breaks = (was_done == 0) & (has_token == 0)
    goes_on = (was_done == 0) & has_token
    at = tl.where(goes_on, at + 1, at)
    tl.store(tokens + row.to(tl.int64) * capacity + at, token, mask=inside & goes_on)
    tl.store(position + row, at, mask=inside)
    ends = tl.load(is_end + token, mask=inside & has_token, other=0) != 0
    used_up = at + 1 - tl.load(prompt_length + row, mask=inside, other=0) >= max_length
    tl.store(is_done + row, was_done | breaks | ends | used_up, mask=inside)
    tl.store(is_broken + row, breaks, mask=inside & breaks)


def seen(
    tokens_RT: torch.Tensor, position_R: torch.Tensor, is_broken_R: torch.Tensor, num_rows: int, num_steps: int
) -> torch.Tensor:
    """What `DeviceRows.seen` returns, in one kernel instead of eight."""
    seen_BX = torch.empty(num_rows, 2 + num_steps, dtype=torch.int64, device=tokens_RT.device)
    _seen_kernel[(num_rows,)](
        tokens_RT, position_R, is_broken_R, seen_BX, tokens_RT.size(1), K=num_steps, num_warps=1
    )  # fmt: skip
    return seen_BX


@triton.jit
def _seen_kernel(tokens, position, is_broken, seen, capacity, K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(position + row)
    start = seen + row * (2 + K)
    tl.store(start, at)
    tl.store(start + 1, tl.load(is_broken + row).to(tl.int64))
    for k in tl.static_range(K):
        place = tl.maximum(at - (K - 1 - k), 0)
        tl.store(start + 2 + k, tl.load(tokens + row * capacity + place))


def draw(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """As `sampling.draw`: the same token for the same number, but for the rounding of exponentials in float32.

    Rows may lie apart, as those of the last of several positions do; a row itself is contiguous. A token is one of the
    vocabulary, or NO_TOKEN: whoever takes it may read where it points.
    """
    return _drawn(logits_BV, uniform_B, 0, logits_BV.size(1), 1.0, None)


def draw_next(
    logits_BV: torch.Tensor, uniform_RL: torch.Tensor, num_tokens: int, temperature: float, min_length: int,
    position_B: torch.Tensor, prompt_length_R: torch.Tensor, is_end_V: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """`draw` from softmax(logits / temperature) of each row's token behind `position_B`, by its number of `uniform_RL`.

    Ids from `num_tokens` on are not drawn, nor those of `is_end_V` as long as fewer than `min_length` are generated.
    """
    rows = (position_B, prompt_length_R, is_end_V)
    return _drawn(logits_BV, uniform_RL, min_length, num_tokens, temperature, rows)


def _drawn(logits_BV, uniform, min_length, num_tokens, temperature, rows) -> torch.Tensor:
    """`rows`: positions, prompt lengths, and the ids that end one; None where each row has one number."""
    num_rows, device = logits_BV.size(0), logits_BV.device
    assert logits_BV.stride(1) == 1
    num_blocks = triton.cdiv(num_tokens, _DRAWN_BLOCK)
    top_BK = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=device)
    sum_BK = torch.empty(num_rows, num_blocks, dtype=torch.float64, device=device)
    drawn_B = torch.empty(num_rows, dtype=torch.int64, device=device)
    position, prompt_length, is_end = rows or (drawn_B, drawn_B, drawn_B)
    given = (logits_BV, logits_BV.stride(0), num_tokens, temperature, position, prompt_length, is_end, min_length)
    flags = {"HAS_TEMPERATURE": temperature != 1.0, "HAS_MIN": min_length > 0, "BLOCK": _DRAWN_BLOCK}
    _block_sums_kernel[(num_rows, triton.cdiv(num_blocks, 16))](
        *given, top_BK, sum_BK, num_blocks, NUM_BLOCKS=16, num_warps=4, **flags
    )
    _draw_kernel[(num_rows,)](
        *given, top_BK, sum_BK, num_blocks, uniform, uniform.stride(0), uniform.size(-1), drawn_B, NO_TOKEN=NO_TOKEN,
        ONE_NUMBER=rows is None, NUM_BLOCKS=triton.next_power_of_2(num_blocks), num_warps=4, **flags,
    )  # fmt: skip
    return drawn_B


# Tokens whose probabilities are summed at once, so that only those of the one block in which the threshold lies are
# summed one by one, as in `sampling.draw`.
_DRAWN_BLOCK = 128


@triton.jit
def _num_generated(row, position, prompt_length):
    return tl.load(position + row) + 1 - tl.load(prompt_length + row)


@triton.jit
def _allowed_logits(
    row, index, logits, row_stride, num_tokens, temperature, position, prompt_length, is_end, min_length,
    HAS_TEMPERATURE: tl.constexpr, HAS_MIN: tl.constexpr,
):  # fmt: skip
    """Those of tokens `index`, divided by the temperature; minus infinity for what must not be drawn."""
    inside = index < num_tokens
    x = tl.load(logits + row.to(tl.int64) * row_stride + index, mask=inside, other=-float("inf")).to(tl.float32)
    if HAS_TEMPERATURE:
        x = x / temperature
    if HAS_MIN:
        is_short = _num_generated(row, position, prompt_length) < min_length
        x = tl.where(tl.load(is_end + index, mask=inside & is_short, other=0) != 0, -float("inf"), x)
    return x


@triton.jit
def _weight(x, highest):
    """exp(x - highest) in float64; 0 for minus infinity, also if nothing is higher; NaN remains NaN."""
    return tl.where(x == -float("inf"), 0.0, tl.exp(x - highest)).to(tl.float64)


@triton.jit
def _block_sums_kernel(
    logits, row_stride, num_tokens, temperature, position, prompt_length, is_end, min_length, tops, sums, num_blocks,
    NUM_BLOCKS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_MIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, k = tl.program_id(0), tl.program_id(1) * NUM_BLOCKS + tl.arange(0, NUM_BLOCKS)
    index = k[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = _allowed_logits(
        row, index, logits, row_stride, num_tokens, temperature, position, prompt_length, is_end, min_length,
        HAS_TEMPERATURE, HAS_MIN,
    )  # fmt: skip
    top = tl.max(x, axis=1)
    tl.store(tops + row * num_blocks + k, top, mask=k < num_blocks)
    tl.store(sums + row * num_blocks + k, tl.sum(_weight(x, top[:, None]), axis=1), mask=k < num_blocks)


@triton.jit
def _draw_kernel(
    logits, row_stride, num_tokens, temperature, position, prompt_length, is_end, min_length, tops, sums, num_blocks,
    uniform, uniform_stride, uniform_length, drawn, NO_TOKEN: tl.constexpr, ONE_NUMBER: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_MIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, k = tl.program_id(0), tl.arange(0, NUM_BLOCKS)
    number = uniform + row * uniform_stride
    if not ONE_NUMBER:
        number += tl.minimum(_num_generated(row, position, prompt_length), uniform_length - 1)
    top = tl.load(tops + row * num_blocks + k, mask=k < num_blocks, other=-float("inf"))
    highest = tl.max(top, axis=0)
    weight = tl.load(sums + row * num_blocks + k, mask=k < num_blocks, other=0.0) * _weight(top, highest)
    total = tl.sum(weight, axis=0)
    # a little less than 1, as in `sampling.draw`
    just_below: tl.constexpr = 1.0 - 9.094947017729282e-13
    threshold = tl.load(number) * total * just_below
    behind = tl.cumsum(weight, axis=0)
    block = tl.sum((behind <= threshold).to(tl.int32), axis=0)
    # the two sums are rounded differently: that in steps may just miss what the other one passes
    block = tl.minimum(block, tl.max(tl.where(weight > 0, k, 0), axis=0))
    before = tl.sum(tl.where(k == block - 1, behind, 0.0), axis=0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    x = _allowed_logits(
        row, index, logits, row_stride, num_tokens, temperature, position, prompt_length, is_end, min_length,
        HAS_TEMPERATURE, HAS_MIN,
    )  # fmt: skip
    weight = _weight(x, highest)
    behind = before + tl.cumsum(weight, axis=0)
    threshold = tl.minimum(threshold, tl.max(behind, axis=0) * just_below)
    found = tl.min(tl.where((behind > threshold) & (weight > 0), index, num_tokens), axis=0)
    # a total that is NaN is not larger either
    has_token = (total > 0) & (found < num_tokens)
    tl.store(drawn + row, tl.where(has_token, found, NO_TOKEN).to(tl.int64))
