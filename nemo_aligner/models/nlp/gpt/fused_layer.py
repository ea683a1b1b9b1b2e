"""A transformer layer over a pack as one autograd function.

Computes the same as megatron-core's `TransformerLayer` with our spec, which takes some hundred Python calls per layer,
forward and backward, that keep a GPU waiting; this takes some thirty. It also saves fewer activations: norms and the
MLP's activation are recomputed in the backward pass, and RoPE is applied in place.

Legend: T tokens, H hidden size, N heads, G key/value groups, X heads of a group in the QKV projection (its queries, its
key, its value), D channels per head, P width of that projection, A rotated channels, F width of the MLP; of a linear
layer I inputs and O outputs.
"""

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from nemo_aligner.compat.cpu_linear import linear, matmul
from nemo_aligner.models.nlp.gpt.activation import activate, activation_of
from nemo_aligner.models.nlp.gpt.layer_ops import ColumnSums, activation_gradient, norm_and_residual, norm_gradient
from nemo_aligner.models.nlp.gpt.packed_attention import PackedSequences, packed_attention_and_gradient
from nemo_aligner.models.nlp.gpt.rotary import apply_rotary_, qkv_gradient
from nemo_aligner.utils.weight_gradients import weight_gradient


def fused_layer(
    layer: TransformerLayer, hidden_TH: torch.Tensor, angles_TA: torch.Tensor | None, sequences: PackedSequences
) -> torch.Tensor:
    """The layer's output [T, H]; `angles_TA` are the tokens' rotary angles, None without RoPE."""
    return _FusedLayer.apply(layer, hidden_TH.contiguous(), angles_TA, sequences, *_parameters(layer))


def _parameters(layer: TransformerLayer) -> list[torch.Tensor | None]:
    """Four matrices and eight vectors, in the order of the gradients from `_FusedLayer.backward`."""
    attention, mlp = layer.self_attention, layer.mlp
    linears = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
    norms = (layer.input_layernorm, layer.pre_mlp_layernorm)
    return [
        *(linear.weight for linear in linears),
        *(linear.bias for linear in linears),
        *(parameter for norm in norms for parameter in (norm.weight, norm.bias)),
    ]


class _FusedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, hidden_TH, angles_TA, sequences, *parameters):
        qkv_w, proj_w, fc1_w, fc2_w, qkv_b, proj_b, fc1_b, fc2_b, *_ = parameters
        # With `overlap_param_sync`, Apex waits for a parameter's values when the parameter is accessed.
        for parameter in parameters:
            if parameter is not None:
                parameter.data_ptr()

        # the bias of each output GEMM is added to the residual before the GEMM is
        normed_TH, middle_TH = norm_and_residual(layer.input_layernorm, hidden_TH, proj_b)
        qkv_TP = linear(normed_TH, qkv_w, qkv_b)
        del normed_TH
        qkv_TGXD = _by_heads(layer, qkv_TP)
        if angles_TA is not None:
            apply_rotary_(qkv_TGXD, angles_TA)
        context_TND, ctx.attention_gradient = packed_attention_and_gradient(*_query_key_value(qkv_TGXD), sequences)
        middle_TH = _add_product(middle_TH, context_TND.flatten(1), proj_w)

        normed_TH, output_TH = norm_and_residual(layer.pre_mlp_layernorm, middle_TH, fc2_b)
        inner_TF = linear(normed_TH, fc1_w, fc1_b)
        del normed_TH
        output_TH = _add_product(output_TH, activate(inner_TF, activation_of(layer.config)), fc2_w)

        ctx.save_for_backward(hidden_TH, middle_TH, inner_TF, context_TND, angles_TA, *parameters)
        ctx.layer = layer
        return output_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TH):
        hidden_TH, middle_TH, inner_TF, context_TND, angles_TA, *parameters = ctx.saved_tensors
        (qkv_w, proj_w, fc1_w, fc2_w), vectors = parameters[:4], parameters[4:]
        layer, attention_gradient = ctx.layer, ctx.attention_gradient
        del ctx.attention_gradient  # it holds queries, keys and values, and the autograd graph lives on

        fuse = layer.config.gradient_accumulation_fusion

        def of_weight(weight, grad_TO, x_TI):
            return weight_gradient(weight, grad_TO, x_TI, fuse) if weight.requires_grad else None

        grad_TH = grad_TH.contiguous()
        sums = ColumnSums(vectors, grad_TH)
        of_qkv_b, of_proj_b, of_fc1_b, of_fc2_b, *of_norms = sums.parts
        of_input_norm, of_mlp_norm = of_norms[:2], of_norms[2:]

        activated_TF, grad_inner_TF = activation_gradient(
            inner_TF, matmul(grad_TH, fc2_w), activation_of(layer.config), of_fc1_b
        )
        of_fc2_w = of_weight(fc2_w, grad_TH, activated_TF)
        del activated_TF
        # the norm's kernel also sums the gradients of the biases after the MLP (fc2) and before it (proj)
        normed_TH, grad_middle_TH = norm_gradient(
            layer.pre_mlp_layernorm, middle_TH, matmul(grad_inner_TF, fc1_w), grad_TH, *of_mlp_norm, of_fc2_b, of_proj_b
        )
        of_fc1_w = of_weight(fc1_w, grad_inner_TF, normed_TH)
        del grad_inner_TF, normed_TH

        of_proj_w = of_weight(proj_w, grad_middle_TH, context_TND.flatten(1))
        of_attention = attention_gradient(matmul(grad_middle_TH, proj_w).view_as(context_TND))
        grad_TP = qkv_gradient(*of_attention, angles_TA, of_qkv_b).flatten(1)
        normed_TH, grad_hidden_TH = norm_gradient(
            layer.input_layernorm, hidden_TH, matmul(grad_TP, qkv_w), grad_middle_TH, *of_input_norm
        )
        of_qkv_w = of_weight(qkv_w, grad_TP, normed_TH)
        return None, grad_hidden_TH, None, None, of_qkv_w, of_proj_w, of_fc1_w, of_fc2_w, *sums.finish(fuse)


def _by_heads(layer: TransformerLayer, qkv_TP: torch.Tensor) -> torch.Tensor:
    """[T, G, Q + 2, D]: each group's queries, its key and its value, as megatron-core lays them out."""
    attention = layer.self_attention
    groups, head_dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    return qkv_TP.view(len(qkv_TP), groups, -1, head_dim)


def _query_key_value(qkv_TGXD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views [T, N, D], [T, G, D] and [T, G, D]."""
    parts = qkv_TGXD.split((qkv_TGXD.size(2) - 2, 1, 1), dim=2)
    return tuple(part.flatten(1, 2) for part in parts)


def _add_product(residual_TH: torch.Tensor, x_TI: torch.Tensor, weight_HI: torch.Tensor) -> torch.Tensor:
    """`residual_TH + x_TI @ weight_HI.T`; may overwrite `residual_TH`."""
    if residual_TH.is_cuda:
        return residual_TH.addmm_(x_TI, weight_HI.t())  # in place, as torch would copy the summand first
    return linear(x_TI, weight_HI).add_(residual_TH)
