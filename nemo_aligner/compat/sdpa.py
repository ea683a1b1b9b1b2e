"""torch's attention without cuDNN.

On Hopper cards torch prefers cuDNN for attention in half precision. cuDNN makes an execution plan on the host for every
shape that it has not seen, 74 ms each on an H100 (torch 2.11). Rows that are padded to the longest of them have another
shape in nearly every batch, and NeMo's `generate` with every token. torch's own kernels need no plan.

The switch is the process's own. It is put back behind each call, so that what others compute is left as it was, which
takes the host 0.5 us; `torch.nn.attention.sdpa_kernel` takes 9 (both on a CPU, torch 2.13). The backward pass is of the
kernel that the forward pass chose. Removal: when torch does not prefer cuDNN any more for shapes it has not seen.
"""

import torch
from torch.nn import functional as F


def scaled_dot_product_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask=None, enable_gqa=False, **more
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` by any kernel but cuDNN's, where there is another one."""
    options = {"attn_mask": attn_mask, "enable_gqa": enable_gqa, **more}
    # a mask together with grouped queries leaves only the formula, with the scores of all positions in memory
    is_needed = attn_mask is not None and enable_gqa
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(was_enabled and is_needed)
    try:
        return F.scaled_dot_product_attention(query, key, value, **options)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)
