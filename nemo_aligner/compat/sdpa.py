"""torch's attention without cuDNN.

On Hopper GPUs torch prefers cuDNN for attention in half precision. cuDNN builds an execution plan on the host for every
new shape, 74 ms each on an H100 (torch 2.11). Rows padded to the longest of them have a new shape in nearly every
batch, and in NeMo's `generate` with every token. torch's own kernels need no plan.

The switch is process-wide. It is restored after each call, so that other code is unaffected; this takes 0.5 us of host
time, against 9 us for `torch.nn.attention.sdpa_kernel` (both on a CPU, torch 2.13). The backward pass uses the kernel
that the forward pass chose. Removal: when torch no longer prefers cuDNN for new shapes.
"""

import torch
from torch.nn import functional as F


def scaled_dot_product_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask=None, enable_gqa=False, **more
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` without cuDNN, where another fused kernel applies."""
    options = {"attn_mask": attn_mask, "enable_gqa": enable_gqa, **more}
    # With a mask and grouped queries, the only alternative is the math backend, which materializes all scores.
    is_needed = attn_mask is not None and enable_gqa
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(was_enabled and is_needed)
    try:
        return F.scaled_dot_product_attention(query, key, value, **options)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)
