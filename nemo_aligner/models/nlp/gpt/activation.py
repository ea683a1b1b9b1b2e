"""The activation between the two linear layers of an MLP, for training and generation.

Legend: M rows, F width of the MLP.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F


@dataclass(frozen=True)
class Activation:
    """The activation of an MLP; if gated, it is applied to the first half, which is multiplied with the second.

    `name` is the name for fused kernels, None if they do not support it.
    """

    name: str | None
    function: Callable[[torch.Tensor], torch.Tensor]
    is_gated: bool


def activation_of(config: TransformerConfig) -> Activation:
    """The activation of megatron-core's MLP, whose GELU is the tanh approximation with `bias_activation_fusion`."""
    function = config.activation_func
    if function is F.gelu and config.bias_activation_fusion:
        function = _gelu_tanh
    names = {F.silu: "silu", F.gelu: "gelu", _gelu_tanh: "gelu_tanh"}
    return Activation(names.get(function), function, config.gated_linear_unit)


def activate(x_MF: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Apply the activation to [M, F], or, if it is gated, to the halves of [M, 2 F]; returns [M, F]."""
    if not activation.is_gated:
        return activation.function(x_MF)
    gate_MF, up_MF = x_MF.chunk(2, dim=-1)
    return activation.function(gate_MF) * up_MF


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")
