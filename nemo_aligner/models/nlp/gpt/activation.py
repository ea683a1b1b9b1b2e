"""What is between the two linear layers of an MLP, for training and generation.

Legend: M rows, F width of the MLP.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F


@dataclass(frozen=True)
class Activation:
    """What is between the two linear layers of an MLP; gated, it acts on the first half, which scales the second.

    `name` is one that a fused kernel knows, or None.
    """

    name: str | None
    function: Callable[[torch.Tensor], torch.Tensor]
    is_gated: bool


def activation_of(config: TransformerConfig) -> Activation:
    """That of megatron-core's MLP: with `bias_activation_fusion` it knows GELU's approximation by tanh only."""
    function = config.activation_func
    if function is F.gelu and config.bias_activation_fusion:
        function = _gelu_tanh
    names = {F.silu: "silu", F.gelu: "gelu", _gelu_tanh: "gelu_tanh"}
    return Activation(names.get(function), function, config.gated_linear_unit)


def activate(x_MF: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The activation of [M, F], or, where it is gated, of the halves of [M, 2 F]; [M, F]."""
    if not activation.is_gated:
        return activation.function(x_MF)
    gate_MF, up_MF = x_MF.chunk(2, dim=-1)
    return activation.function(gate_MF) * up_MF


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")
