"""Rotary positions (arXiv:2104.09864) of a whole query-key-value product, where it is.

Legend: T tokens, G key/value groups, Q query heads of a group, D channels per head, A turned channels, A <= D.
"""

import torch


def turn_(qkv_TGXD: torch.Tensor, angles_TA: torch.Tensor, backwards: bool = False) -> None:
    """Turn the queries and the key of every group, all heads but the last, which is the value.

    Channel i is turned against channel i + A/2, by the same angle.

    Args:
        qkv_TGXD: [T, G, Q + 2, D], contiguous.
        angles_TA: float32, both halves the same.
        backwards: turn by the negative angles, as gradients are.
    """
    if qkv_TGXD.is_cuda:
        from nemo_aligner.models.nlp.gpt import rotary_kernel

        rotary_kernel.turn_(qkv_TGXD, angles_TA, backwards)
        return
    half = angles_TA.size(1) // 2
    cos, sin = (function(angles_TA[:, None, None, :half]) for function in (torch.cos, torch.sin))
    sin = -sin if backwards else sin
    first, second = qkv_TGXD[:, :, :-1, : 2 * half].split(half, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    first.copy_(turned[0])
    second.copy_(turned[1])
