"""What is between the two linear layers of an MLP."""

from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F


def activation_function(config: TransformerConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """What megatron-core's MLP computes: with `bias_activation_fusion` it knows GELU's approximation by tanh only."""
    if config.activation_func is F.gelu and config.bias_activation_fusion:
        return gelu_tanh
    return config.activation_func


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")
