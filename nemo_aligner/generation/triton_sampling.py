"""Triton kernels for the end of a decode step: sample the next tokens, advance the rows, take a snapshot.

Legend: B rows, R KV cache slots, T positions per row, L maximum number of generated tokens, V vocabulary, K blocks of
it.
"""

import torch
import triton
import triton.language as tl

from nemo_aligner.generation.invalid_logits import INVALID_TOKEN


def advance_(
    tokens_RT: torch.Tensor, position_B: torch.Tensor, prompt_length_B: torch.Tensor, is_done_B: torch.Tensor,
    is_invalid_B: torch.Tensor, sampled_B: torch.Tensor, is_end_V: torch.Tensor, max_length: int,
) -> None:  # fmt: skip
    """`DeviceRows.advance_` in one kernel instead of ten."""
    num_rows = sampled_B.numel()
    _advance_kernel[(1,)](
        tokens_RT, position_B, prompt_length_B, is_done_B, is_invalid_B, sampled_B, is_end_V, num_rows,
        tokens_RT.size(1), max_length, INVALID_TOKEN=INVALID_TOKEN, BLOCK=triton.next_power_of_2(num_rows),
    )  # fmt: skip


@triton.jit
def _advance_kernel(
    tokens, position, prompt_length, is_done, is_invalid, drawn, is_end, num_rows, capacity, max_length,
    INVALID_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK)
    inside = row < num_rows
    at = tl.load(position + row, mask=inside, other=0)
    token = tl.load(drawn + row, mask=inside, other=0)
    was_done = tl.load(is_done + row, mask=inside, other=1) != 0
    has_token = token != INVALID_TOKEN
    breaks = (was_done == 0) & (has_token == 0)
    goes_on = (was_done == 0) & has_token
    at = tl.where(goes_on, at + 1, at)
    tl.store(tokens + row.to(tl.int64) * capacity + at, token, mask=inside & goes_on)
    tl.store(position + row, at, mask=inside)
    ends = tl.load(is_end + token, mask=inside & has_token, other=0) != 0
    used_up = at + 1 - tl.load(prompt_length + row, mask=inside, other=0) >= max_length
    tl.store(is_done + row, was_done | breaks | ends | used_up, mask=inside)
    tl.store(is_invalid + row, breaks, mask=inside & breaks)


def seen(
    tokens_RT: torch.Tensor, position_R: torch.Tensor, is_invalid_R: torch.Tensor, num_rows: int, num_steps: int
) -> torch.Tensor:
    """`DeviceRows.seen` in one kernel instead of eight."""
    seen_BX = torch.empty(num_rows, 2 + num_steps, dtype=torch.int64, device=tokens_RT.device)
    _seen_kernel[(num_rows,)](
        tokens_RT, position_R, is_invalid_R, seen_BX, tokens_RT.size(1), K=num_steps, num_warps=1
    )  # fmt: skip
    return seen_BX


@triton.jit
def _seen_kernel(tokens, position, is_invalid, seen, capacity, K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(position + row)
    start = seen + row * (2 + K)
    tl.store(start, at)
    tl.store(start + 1, tl.load(is_invalid + row).to(tl.int64))
    for k in tl.static_range(K):
        place = tl.maximum(at - (K - 1 - k), 0)
        tl.store(start + 2 + k, tl.load(tokens + row * capacity + place))


def sample_token(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """As `sampling.sample_token`: the same token for the same number, up to float32 rounding of the exponentials.

    Rows may be strided, such as those of the last of several positions; each row is contiguous. The result is a valid
    vocabulary id or INVALID_TOKEN, so callers may index with it.
    """
    return _drawn(logits_BV, uniform_B, 0, logits_BV.size(1), 1.0, None)


def draw_next(
    logits_BV: torch.Tensor, uniform_RL: torch.Tensor, num_tokens: int, temperature: float, min_length: int,
    position_B: torch.Tensor, prompt_length_R: torch.Tensor, is_end_V: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """`sample_token` from softmax(logits / temperature) for each row's token after `position_B`, by its `uniform_RL`.

    Ids from `num_tokens` on are not sampled, nor those of `is_end_V` before `min_length` tokens are generated.
    """
    rows = (position_B, prompt_length_R, is_end_V)
    return _drawn(logits_BV, uniform_RL, min_length, num_tokens, temperature, rows)


def _drawn(logits_BV, uniform, min_length, num_tokens, temperature, rows) -> torch.Tensor:
    """`rows`: positions, prompt lengths and is_end mask of ids; None if `uniform` has one number per row."""
    num_rows, device = logits_BV.size(0), logits_BV.device
    assert logits_BV.stride(1) == 1
    num_blocks = triton.cdiv(num_tokens, _DRAWN_BLOCK)
    top_BK = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=device)
    sum_BK = torch.empty(num_rows, num_blocks, dtype=torch.float64, device=device)
    sampled_B = torch.empty(num_rows, dtype=torch.int64, device=device)
    position, prompt_length, is_end = rows or (sampled_B, sampled_B, sampled_B)
    given = (logits_BV, logits_BV.stride(0), num_tokens, temperature, position, prompt_length, is_end, min_length)
    flags = {"HAS_TEMPERATURE": temperature != 1.0, "HAS_MIN": min_length > 0, "BLOCK": _DRAWN_BLOCK}
    _block_sums_kernel[(num_rows, triton.cdiv(num_blocks, 16))](
        *given, top_BK, sum_BK, num_blocks, NUM_BLOCKS=16, num_warps=4, **flags
    )
    _sample_kernel[(num_rows,)](
        *given, top_BK, sum_BK, num_blocks, uniform, uniform.stride(0), uniform.size(-1), sampled_B,
        INVALID_TOKEN=INVALID_TOKEN, ONE_NUMBER=rows is None, NUM_BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=4, **flags,
    )  # fmt: skip
    return sampled_B


# Tokens whose probabilities are summed at once: only the block that contains the threshold is summed token by token, as
# in `sampling.sample_token`.
_DRAWN_BLOCK = 128


@triton.jit
def _num_generated(row, position, prompt_length):
    return tl.load(position + row) + 1 - tl.load(prompt_length + row)


@triton.jit
def _allowed_logits(
    row, index, logits, row_stride, num_tokens, temperature, position, prompt_length, is_end, min_length,
    HAS_TEMPERATURE: tl.constexpr, HAS_MIN: tl.constexpr,
):  # fmt: skip
    """Logits of tokens `index`, divided by the temperature; minus infinity for tokens that must not be sampled."""
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
    """exp(x - highest) in float64; 0 for minus infinity, even if `highest` is that too; NaN stays NaN."""
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
def _sample_kernel(
    logits, row_stride, num_tokens, temperature, position, prompt_length, is_end, min_length, tops, sums, num_blocks,
    uniform, uniform_stride, uniform_length, drawn, INVALID_TOKEN: tl.constexpr, ONE_NUMBER: tl.constexpr,
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
    # slightly below 1, as in `sampling.sample_token`
    just_below: tl.constexpr = 1.0 - 9.094947017729282e-13
    threshold = tl.load(number) * total * just_below
    behind = tl.cumsum(weight, axis=0)
    block = tl.sum((behind <= threshold).to(tl.int32), axis=0)
    # total and cumulative sum are rounded differently: the latter may stay just below the threshold
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
    # also False for a NaN total
    has_token = (total > 0) & (found < num_tokens)
    tl.store(drawn + row, tl.where(has_token, found, INVALID_TOKEN).to(tl.int64))
