"""Rotary position embedding (arXiv:2104.09864) of a whole QKV projection, and its gradient.

Legend: T tokens, N heads, G key/value groups, Q query heads of a group, N = G * Q, X = Q + 2 heads of a group in the
projection (its queries, its key, its value), D channels per head, A rotated channels, A <= D, P = G * X * D, Z partial
sums.
"""

import torch

from nemo_aligner.models.nlp.gpt.layer_ops import put_column_sums_


def apply_rotary_(qkv_TGXD: torch.Tensor, angles_TA: torch.Tensor) -> None:
    """Apply RoPE to the queries and the key of every group in place.

    Channel i is rotated with channel i + A/2, by the same angle.

    Args:
        qkv_TGXD: contiguous.
        angles_TA: float32, both halves equal.
    """
    if qkv_TGXD.is_cuda:
        from nemo_aligner.models.nlp.gpt import rotary_kernels

        rotary_kernels.apply_rotary_(qkv_TGXD, angles_TA)
    else:
        _turn_(qkv_TGXD, angles_TA)


def qkv_gradient(
    query_TND: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
    angles_TA: torch.Tensor | None,
    of_bias_ZP: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient [T, G, X, D] of the QKV projection, from those of rotated queries and keys, and of values.

    `of_bias_ZP` receives its sums over tokens, for `layer_ops.ColumnSums`.
    """
    if query_TND.is_cuda and angles_TA is not None:
        from nemo_aligner.models.nlp.gpt import rotary_kernels

        return rotary_kernels.qkv_gradient(query_TND, key_TGD, value_TGD, angles_TA, of_bias_ZP)
    query_TGQD = query_TND.unflatten(1, (key_TGD.size(1), -1))
    grad_TGXD = torch.cat([query_TGQD, key_TGD.unsqueeze(2), value_TGD.unsqueeze(2)], dim=2)
    if angles_TA is not None:
        _turn_(grad_TGXD, -angles_TA)
    put_column_sums_(of_bias_ZP, grad_TGXD.flatten(1))
    return grad_TGXD


def _turn_(qkv_TGXD: torch.Tensor, angles_TA: torch.Tensor) -> None:
    half = angles_TA.size(1) // 2
    cos, sin = (function(angles_TA[:, None, None, :half]) for function in (torch.cos, torch.sin))
    first, second = qkv_TGXD[:, :, :-1, : 2 * half].split(half, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    first.copy_(turned[0])
    second.copy_(turned[1])
