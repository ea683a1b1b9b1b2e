"""A transformer layer over a pack as one differentiable function.

It computes what megatron-core's `TransformerLayer` with our spec does. There a layer is some hundred calls in Python,
forward and backward, and a GPU waits for them; here it is some thirty. And fewer activations are kept: norms and the
MLP's activation are computed again in the backward pass, and rotary positions are turned in place.

Legend: T tokens, H hidden size, N heads, G key/value groups, X heads of a group in the query-key-value product (its
queries, its key, its value), D channels per head, P width of that product, A channels that are turned, F width of the
MLP; of a linear layer I inputs and O outputs.
"""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from nemo_aligner.compat.cpu_linear import linear, matmul
from nemo_aligner.models.nlp.gpt.activation import activate, activation_of
from nemo_aligner.models.nlp.gpt.packed_attention import PackedSequences, packed_attention
from nemo_aligner.models.nlp.gpt.rotary import apply_rotary_, qkv_gradient
from nemo_aligner.utils.weight_gradients import weight_gradient


def fused_layer(
    layer: TransformerLayer, hidden_TH: torch.Tensor, angles_TA: torch.Tensor | None, sequences: PackedSequences
) -> torch.Tensor:
    """The layer's output [T, H]; `angles_TA` are the rotary positions of its tokens, if it has any."""
    return _FusedLayer.apply(layer, hidden_TH, angles_TA, sequences, *_parameters(layer))


def _parameters(layer: TransformerLayer) -> list[torch.Tensor | None]:
    """In the order of what `_FusedLayer.backward` returns."""
    attention, mlp = layer.self_attention, layer.mlp
    linears = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
    norms = (layer.input_layernorm, layer.pre_mlp_layernorm)
    return [parameter for module in (*linears, *norms) for parameter in (module.weight, module.bias)]


class _FusedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, hidden_TH, angles_TA, sequences, *parameters):
        qkv_w, qkv_b, proj_w, proj_b, fc1_w, fc1_b, fc2_w, fc2_b, *_ = parameters
        # Apex, with `overlap_param_sync`, waits for a parameter's values when it is asked something.
        for parameter in parameters:
            if parameter is not None:
                parameter.data_ptr()

        qkv_TP = linear(layer.input_layernorm(hidden_TH), qkv_w, qkv_b)
        qkv_TGXD = _by_heads(layer, qkv_TP)
        if angles_TA is not None:
            apply_rotary_(qkv_TGXD, angles_TA)
        with torch.enable_grad():
            qkv = [part.detach().requires_grad_() for part in _query_key_value(qkv_TGXD)]
            context_TND = packed_attention(*qkv, sequences, dropout=0.0)
        middle_TH = _add_linear(hidden_TH, context_TND.detach().flatten(1), proj_w, proj_b)

        inner_TF = linear(layer.pre_mlp_layernorm(middle_TH), fc1_w, fc1_b)
        output_TH = _add_linear(middle_TH, activate(inner_TF, activation_of(layer.config)), fc2_w, fc2_b)

        ctx.save_for_backward(hidden_TH, middle_TH, inner_TF, angles_TA, *parameters)
        ctx.layer, ctx.attention = layer, (qkv, context_TND)
        return output_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TH):
        hidden_TH, middle_TH, inner_TF, angles_TA, *parameters = ctx.saved_tensors
        layer, (qkv, context_TND) = ctx.layer, ctx.attention
        qkv_w, qkv_b, proj_w, proj_b, fc1_w, fc1_b, fc2_w, fc2_b, *norms = parameters
        input_norm, mlp_norm = norms[:2], norms[2:]
        del ctx.attention  # the layer's graph lives on with its tensors' last reference

        def parameter_gradients(weight, bias, grad_TO, x_TI):
            fuse = layer.config.gradient_accumulation_fusion
            of_weight = weight_gradient(weight, grad_TO, x_TI, fuse) if weight.requires_grad else None
            return of_weight, grad_TO.sum(0) if bias is not None and bias.requires_grad else None

        grad_TH = grad_TH.contiguous()
        activated_TF, grad_of_inner = _with_gradient(
            partial(activate, activation=activation_of(layer.config)), inner_TF
        )
        of_fc2 = parameter_gradients(fc2_w, fc2_b, grad_TH, activated_TF)
        (grad_TF,) = grad_of_inner(matmul(grad_TH, fc2_w))
        del activated_TF
        normed_TH, grad_of_norm = _with_gradient(layer.pre_mlp_layernorm.normalize, middle_TH, *mlp_norm)
        of_fc1 = parameter_gradients(fc1_w, fc1_b, grad_TF, normed_TH)
        grad_middle_TH, *of_mlp_norm = grad_of_norm(matmul(grad_TF, fc1_w))
        grad_middle_TH += grad_TH
        del grad_TF, normed_TH

        of_proj = parameter_gradients(proj_w, proj_b, grad_middle_TH, context_TND.detach().flatten(1))
        grad_context_TND = matmul(grad_middle_TH, proj_w).view_as(context_TND)
        of_attention = torch.autograd.grad(context_TND, qkv, grad_context_TND)
        grad_TP = qkv_gradient(*of_attention, angles_TA).flatten(1)
        normed_TH, grad_of_norm = _with_gradient(layer.input_layernorm.normalize, hidden_TH, *input_norm)
        of_qkv = parameter_gradients(qkv_w, qkv_b, grad_TP, normed_TH)
        grad_hidden_TH, *of_input_norm = grad_of_norm(matmul(grad_TP, qkv_w))
        grad_hidden_TH += grad_middle_TH
        return None, grad_hidden_TH, None, None, *of_qkv, *of_proj, *of_fc1, *of_fc2, *of_input_norm, *of_mlp_norm


def _by_heads(layer: TransformerLayer, qkv_TP: torch.Tensor) -> torch.Tensor:
    """[T, G, Q + 2, D]: each group's queries, its key and its value, as megatron-core lays them out."""
    attention = layer.self_attention
    groups, head_dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
    return qkv_TP.view(len(qkv_TP), groups, -1, head_dim)


def _query_key_value(qkv_TGXD: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[T, N, D] and twice [T, G, D]."""
    parts = qkv_TGXD.split((qkv_TGXD.size(2) - 2, 1, 1), dim=2)
    return tuple(part.flatten(1, 2) for part in parts)


def _add_linear(residual_TH, x_TI, weight_HI, bias_H) -> torch.Tensor:
    if residual_TH.is_cuda:
        output_TH = torch.addmm(residual_TH, x_TI, weight_HI.t())
        return output_TH if bias_H is None else output_TH.add_(bias_H)
    return linear(x_TI, weight_HI, bias_H).add_(residual_TH)


def _with_gradient(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor | None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], list[torch.Tensor | None]]]:
    """`function(*inputs)`, and what takes a gradient of it to those of the inputs."""
    with torch.enable_grad():
        inputs = [x if x is None else x.detach().requires_grad_() for x in inputs]
        y = function(*inputs)

    def gradients(grad: torch.Tensor) -> list[torch.Tensor | None]:
        found = iter(torch.autograd.grad(y, [x for x in inputs if x is not None], grad))
        return [x if x is None else next(found) for x in inputs]

    return y.detach(), gradients
