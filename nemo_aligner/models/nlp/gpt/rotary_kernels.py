"""`rotary` as Triton kernels: one launch each, every channel is read and written once."""

import torch
import triton
import triton.language as tl


def apply_rotary_(qkv_TGXD: torch.Tensor, angles_TA: torch.Tensor) -> None:
    num_tokens, num_groups, num_heads, head_dim = qkv_TGXD.shape
    num_turned, half = num_groups * (num_heads - 1), angles_TA.size(1) // 2
    _turn_kernel[(num_tokens,)](
        qkv_TGXD, angles_TA, angles_TA.stride(0), num_turned, num_groups * num_heads * head_dim, head_dim, half,
        TURNED_HEADS=num_heads - 1, BLOCK_N=triton.next_power_of_2(num_turned), BLOCK_A=triton.next_power_of_2(half),
    )  # fmt: skip


@triton.jit
def _turn_kernel(
    qkv, angles, angle_stride, num_turned, width, head_dim, half,
    TURNED_HEADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    n, a = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_A)[None, :]
    inside = (n < num_turned) & (a < half)
    angle = tl.load(angles + token * angle_stride + a, mask=a < half, other=0.0).to(tl.float32)
    cos, sin = tl.cos(angle), tl.sin(angle)
    head = n // TURNED_HEADS * (TURNED_HEADS + 1) + n % TURNED_HEADS  # skip the value heads of earlier groups
    start = qkv + token * width + head * head_dim + a
    first = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(start + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(start, (first * cos - second * sin).to(qkv.dtype.element_ty), mask=inside)
    tl.store(start + half, (second * cos + first * sin).to(qkv.dtype.element_ty), mask=inside)


def qkv_gradient(
    query_TND: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
    angles_TA: torch.Tensor,
    of_bias_ZP: torch.Tensor | None = None,
) -> torch.Tensor:
    query_TND, key_TGD, value_TGD = (part.contiguous() for part in (query_TND, key_TGD, value_TGD))
    num_tokens, num_groups, head_dim = key_TGD.shape
    num_queries = query_TND.size(1) // num_groups
    grad_TGXD = query_TND.new_empty(num_tokens, num_groups, num_queries + 2, head_dim)
    has_bias = of_bias_ZP is not None
    _qkv_gradient_kernel[(of_bias_ZP.size(0) if has_bias else num_tokens,)](
        query_TND, key_TGD, value_TGD, angles_TA, grad_TGXD, of_bias_ZP, num_tokens, angles_TA.stride(0),
        of_bias_ZP.stride(0) if has_bias else 0, num_groups, head_dim, angles_TA.size(1) // 2, Q=num_queries,
        BLOCK_N=triton.next_power_of_2(num_groups * num_queries), BLOCK_G=triton.next_power_of_2(num_groups),
        BLOCK_D=triton.next_power_of_2(head_dim),
    )  # fmt: skip
    return grad_TGXD


@triton.jit(do_not_specialize=["num_tokens"])
def _qkv_gradient_kernel(
    query, key, value, angles, grad, of_bias, num_tokens, angle_stride, bias_stride, num_groups, head_dim, half,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)[None, :]
    is_turned = d < 2 * half
    partner = tl.where(is_turned, tl.where(d < half, d + half, d - half), d)
    n, g = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_G)[:, None]
    is_query, is_group = (n < num_groups * Q) & (d < head_dim), (g < num_groups) & (d < head_dim)
    # offsets in the QKV projection
    at_query = (n // Q * (Q + 2) + n % Q) * head_dim + d
    at_key = (g * (Q + 2) + Q) * head_dim + d
    at_value = at_key + head_dim
    of_queries = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    of_keys, of_values = tl.zeros([BLOCK_G, BLOCK_D], tl.float32), tl.zeros([BLOCK_G, BLOCK_D], tl.float32)

    for step in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        token = tl.cast(step, tl.int64)
        angle = tl.load(angles + token * angle_stride + d, mask=is_turned, other=0.0).to(tl.float32)
        cos = tl.cos(angle)
        sin = tl.where(d < half, tl.sin(angle), -tl.sin(angle))  # inverse rotation
        queries = _turned(query + (token * num_groups * Q + n) * head_dim, d, partner, is_query, cos, sin)
        keys = _turned(key + (token * num_groups + g) * head_dim, d, partner, is_group, cos, sin)
        values = tl.load(value + (token * num_groups + g) * head_dim + d, mask=is_group, other=0.0).to(tl.float32)
        out = grad + token * num_groups * (Q + 2) * head_dim
        tl.store(out + at_query, queries.to(grad.dtype.element_ty), mask=is_query)
        tl.store(out + at_key, keys.to(grad.dtype.element_ty), mask=is_group)
        tl.store(out + at_value, values.to(grad.dtype.element_ty), mask=is_group)
        of_queries += queries
        of_keys += keys
        of_values += values

    if of_bias is not None:
        out = of_bias + tl.program_id(0) * bias_stride
        tl.store(out + at_query, of_queries, mask=is_query)
        tl.store(out + at_key, of_keys, mask=is_group)
        tl.store(out + at_value, of_values, mask=is_group)


@triton.jit
def _turned(start, d, partner, inside, cos, sin):
    own = tl.load(start + d, mask=inside, other=0.0).to(tl.float32)
    return own * cos + tl.load(start + partner, mask=inside, other=0.0).to(tl.float32) * sin
