"""The forward pass of a GPT model over tokens of any rows and positions, with pluggable attention.

Prefill of packed prompts and decode of one token per row differ in attention alone, which is passed as a function.

Legend: M tokens, H hidden size, X columns of QKV or context, F MLP size, V vocabulary; of X and F a tensor-parallel
rank computes its share. Everything is in the parameters' dtype, as in training.
"""

from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch.nn import functional as F

from nemo_aligner.compat.cpu_linear import linear
from nemo_aligner.generation import torch_ops
from nemo_aligner.generation.weights import Linear, Weights
from nemo_aligner.models.nlp.gpt.activation import Activation


def forward(
    weights: Weights,
    tokens_M: torch.Tensor,
    positions_M: torch.Tensor,
    attend: Callable,
    ops,
    hidden_MH: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hidden states [M, H]: after the final norm on the last pipeline stage, for the next stage on others.

    Args:
        tokens_M, positions_M: int64 [M].
        attend: attend(layer number, qkv_MX) -> context [M, heads * channels of this rank]; qkv_MX is the output of the
            layer's fused QKV projection. It also writes keys and values to a cache, where that is wanted.
        ops: the module with `add_norm`, `activate` and the GEMMs for this device.
        hidden_MH: the previous stage's output; unused on the first stage; may be overwritten.
    """
    if weights.embedding is not None:
        hidden_MH = _embed(weights, tokens_M, positions_M)
    delta_MH, bias_H = None, None
    for number, layer in enumerate(weights.layers):
        hidden_MH, normed_MH = ops.add_norm(hidden_MH, delta_MH, bias_H, layer.attention_norm)
        context_MX = attend(number, _column_parallel(layer.qkv, normed_MH, ops))
        delta_MH, bias_H = _row_parallel(layer.proj, context_MX, ops), layer.proj.bias
        hidden_MH, normed_MH = ops.add_norm(hidden_MH, delta_MH, bias_H, layer.mlp_norm)
        activated_MF = _activated(layer.fc1, normed_MH, weights.activation, ops)
        delta_MH, bias_H = _row_parallel(layer.fc2, activated_MF, ops), layer.fc2.bias
    if weights.final_norm is None:
        return torch_ops.add(hidden_MH, delta_MH, bias_H)
    return ops.add_norm(hidden_MH, delta_MH, bias_H, weights.final_norm)[1]


def vocabulary_logits(weights: Weights, hidden_MH: torch.Tensor) -> torch.Tensor:
    """Logits over the whole vocabulary, [M, V], on every tensor-parallel rank."""
    return gather_from_tensor_model_parallel_region(linear(hidden_MH, weights.output))


def _embed(weights: Weights, tokens_M: torch.Tensor, positions_M: torch.Tensor) -> torch.Tensor:
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        hidden_MH = F.embedding(tokens_M, weights.embedding)
    else:
        num_here = weights.embedding.size(0)
        here_M = tokens_M - parallel_state.get_tensor_model_parallel_rank() * num_here
        is_elsewhere_M = (here_M < 0) | (here_M >= num_here)
        hidden_MH = F.embedding(here_M.clamp(0, num_here - 1), weights.embedding)
        hidden_MH = reduce_from_tensor_model_parallel_region(hidden_MH.masked_fill(is_elsewhere_M[:, None], 0.0))
    if weights.positions is not None:
        hidden_MH = hidden_MH + F.embedding(positions_M, weights.positions)
    return hidden_MH


def _column_parallel(layer: Linear, x_MI: torch.Tensor, ops) -> torch.Tensor:
    return _add_adapter(layer, x_MI, ops.biased_product(x_MI, layer.weight, layer.bias))


def _activated(layer: Linear, x_MI: torch.Tensor, activation: Activation, ops) -> torch.Tensor:
    if layer.adapter is None:
        return ops.activated_product(x_MI, layer.weight, layer.bias, activation)
    return ops.activate(_column_parallel(layer, x_MI, ops), activation)


def _row_parallel(layer: Linear, x_MI: torch.Tensor, ops) -> torch.Tensor:
    """Without the bias, which is added once, after the all-reduce."""
    if layer.adapter is None and parallel_state.get_tensor_model_parallel_world_size() == 1:
        return ops.product(x_MI, layer.weight)
    return _add_adapter(layer, x_MI, reduce_from_tensor_model_parallel_region(linear(x_MI, layer.weight)))


def _add_adapter(layer: Linear, x_MI: torch.Tensor, y_MO: torch.Tensor) -> torch.Tensor:
    return y_MO if layer.adapter is None else y_MO + layer.adapter(x_MI[None])[0]
