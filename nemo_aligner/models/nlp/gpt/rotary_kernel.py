"""`rotary.turn_` as a Triton kernel: one launch, and every channel is read and written once."""

import torch
import triton
import triton.language as tl


def turn_(qkv_TGXD: torch.Tensor, angles_TA: torch.Tensor, backwards: bool) -> None:
    num_tokens, num_groups, num_heads, head_dim = qkv_TGXD.shape
    half = angles_TA.size(1) // 2
    _turn_kernel[(num_tokens, num_groups)](
        qkv_TGXD, angles_TA, -1.0 if backwards else 1.0, angles_TA.stride(0), num_heads - 1, head_dim, half,
        BLOCK_X=triton.next_power_of_2(num_heads - 1), BLOCK_A=triton.next_power_of_2(half), num_warps=1,
    )  # fmt: skip


@triton.jit
def _turn_kernel(
    qkv, angles, sign, angle_stride, num_turned, head_dim, half, BLOCK_X: tl.constexpr, BLOCK_A: tl.constexpr
):
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head, a = tl.arange(0, BLOCK_X)[:, None], tl.arange(0, BLOCK_A)[None, :]
    inside = (head < num_turned) & (a < half)
    angle = tl.load(angles + token * angle_stride + a, mask=a < half, other=0.0).to(tl.float32)
    cos, sin = tl.cos(angle), tl.sin(angle) * sign
    start = qkv + (token * tl.num_programs(1) + group) * (num_turned + 1) * head_dim + head * head_dim + a
    first = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(start + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(start, (first * cos - second * sin).to(qkv.dtype.element_ty), mask=inside)
    tl.store(start + half, (second * cos + first * sin).to(qkv.dtype.element_ty), mask=inside)
