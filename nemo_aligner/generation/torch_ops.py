"""The operations of a layer in plain torch: for the CPU, for prefill, and as the kernels' reference.

Legend: M tokens, H hidden size, F MLP size, B rows, G key/value groups, Q query heads per group, T positions of the
cache, t of them attended to, D channels per head.
"""

import torch
from torch.nn import functional as F

from nemo_aligner.compat.cpu_linear import linear
from nemo_aligner.generation.weights import Norm
from nemo_aligner.models.nlp.gpt.activation import Activation, activate


def add_norm(
    hidden_MH: torch.Tensor, delta_MH: torch.Tensor | None, bias_H: torch.Tensor | None, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream with `delta_MH` and `bias_H` added, and its norm, computed in float32; both [M, H]."""
    if delta_MH is not None:
        hidden_MH = add(hidden_MH, delta_MH, bias_H)
    weight_H = norm.weight.float() + 1 if norm.zero_centered else norm.weight.float()
    if norm.is_rms:
        normed_MH = F.rms_norm(hidden_MH.float(), weight_H.shape, weight_H, norm.eps)
    else:
        bias = None if norm.bias is None else norm.bias.float()
        normed_MH = F.layer_norm(hidden_MH.float(), weight_H.shape, weight_H, bias, norm.eps)
    return hidden_MH, normed_MH.to(hidden_MH.dtype)


def add(hidden_MH: torch.Tensor, delta_MH: torch.Tensor, bias_H: torch.Tensor | None) -> torch.Tensor:
    """The sum of all three, [M, H]; `delta_MH` may be given as float32 partial sums, [Z, M, H]."""
    if delta_MH.dim() == 3:
        delta_MH = delta_MH.sum(0)
    return (hidden_MH + (delta_MH if bias_H is None else delta_MH + bias_H)).to(hidden_MH.dtype)


def product(x_MI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x_MI @ weight_OI.T for `add_norm`, [M, O]."""
    return linear(x_MI, weight_OI)


def biased_product(x_MI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    """x_MI @ weight_OI.T + bias_O, [M, O]."""
    return linear(x_MI, weight_OI, bias_O)


def activated_product(
    x_MI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, activation: Activation
) -> torch.Tensor:
    """The activation of x_MI @ weight_OI.T + bias_O, [M, F]; O is F, or 2 F if the activation is gated."""
    return activate(linear(x_MI, weight_OI, bias_O), activation)


def rotate(x_BND: torch.Tensor, cos_BD: torch.Tensor, sin_BD: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [B, heads, D], with the cosine and signed sine of `RotaryTable`."""
    half = cos_BD.size(-1) // 2
    if cos_BD.size(-1) < x_BND.size(-1):
        rotated = rotate(x_BND[..., : 2 * half], cos_BD, sin_BD)
        return torch.cat((rotated, x_BND[..., 2 * half :]), dim=-1)
    swapped_BND = torch.cat((x_BND[..., half:], x_BND[..., :half]), dim=-1)
    return x_BND * cos_BD[:, None] + swapped_BND * sin_BD[:, None]


def decode_attention(
    query_BGQD: torch.Tensor, keys_BGtD: torch.Tensor, values_BGtD: torch.Tensor, is_filled_Bt: torch.Tensor
) -> torch.Tensor:
    """Attention of one new token of each row to the filled positions of its own cache, [B, G * Q * D].

    Two GEMMs, keys first: for so few queries faster on a CPU than torch's fused attention.
    """
    scores_BGtQ = keys_BGtD @ (query_BGQD * query_BGQD.size(-1) ** -0.5).transpose(2, 3)
    scores_BGQt = scores_BGtQ.transpose(2, 3).masked_fill(~is_filled_Bt[:, None, None, :], -torch.inf)
    return (scores_BGQt.softmax(dim=-1) @ values_BGtD).flatten(1)
