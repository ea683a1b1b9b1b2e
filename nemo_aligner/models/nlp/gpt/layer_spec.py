"""Transformer layers in plain torch, for use without Transformer Engine or without a GPU.

The parameters have the names, shapes and tensor-parallel sharding of megatron-core's own layers, and the checkpoint
keys of its Transformer Engine spec, so archives written with either can be restored here and vice versa.

Shapes (Megatron puts the sequence first): hidden_SBH, query_SBND, key_TBGD, value_TBGD with S query positions, T key
positions, B rows, H hidden size, N heads and G key/value groups of this tensor-parallel rank, D channels per head.
"""

import contextlib

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.utils import make_viewless_tensor
from torch.nn import functional as F

from nemo_aligner.compat.sdpa import scaled_dot_product_attention
from nemo_aligner.models.nlp.gpt.fused_layer import fused_layer
from nemo_aligner.models.nlp.gpt.packed_attention import packed_attention


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm (`config.normalization`), computed in float32 and returned in the input's dtype.

    With `config.layernorm_zero_centered_gamma` (NeMo's `layernorm1p`) the stored weight is the scale minus one.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.shape = (hidden_size,)
        self.eps = eps
        self.is_rms = config.normalization == "RMSNorm"
        self.zero_centered = config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        self.bias = None if self.is_rms else torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            # Megatron all-reduces gradients of parameters with this mark over the tensor-parallel ranks.
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.normalize(hidden, self.weight, self.bias)

    def normalize(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Apply the norm with the given parameters instead of its own."""
        dtype = hidden.dtype
        if not self._has_kernel(hidden):
            hidden, weight, bias = (x if x is None else x.float() for x in (hidden, weight, bias))
        if self.zero_centered:
            weight = weight + 1
        if self.is_rms:
            return F.rms_norm(hidden, self.shape, weight, self.eps).to(dtype)
        return F.layer_norm(hidden, self.shape, weight, bias, self.eps).to(dtype)

    def _has_kernel(self, hidden: torch.Tensor) -> bool:
        """Whether torch has a kernel that reads half precision and computes in float32, which saves the casts.

        Its GPU kernels do (statistics, scale and shift are in their accumulation type) if the weight has the input's
        dtype; versions without one for RMSNorm round to half precision before the scale.
        """
        # This accesses every parameter, on which Apex, with `overlap_param_sync`, waits for its values.
        if self.zero_centered or any(parameter.dtype != hidden.dtype for parameter in self.parameters()):
            return False
        if not hidden.is_cuda:
            return False
        return not self.is_rms or hasattr(torch.ops.aten, "_fused_rms_norm")


class ScaledDotProductAttention(MegatronModule):
    """Causal attention through `torch.nn.functional.scaled_dot_product_attention`.

    Without an `attention_mask` attention is causal; a mask, [B or 1, 1, S, T] bool with True = blocked, is applied as
    is and must then be causal itself.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
    ):
        super().__init__(config=config)
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, packed_seq_params=None):
        """Attend from query_SBND to key_TBGD and value_TBGD; returns [S, B, N * D].

        With `attn_mask_type` `no_mask` (decode from a KV cache) every query sees every key. With `packed_seq_params`,
        which are `PackedSequences`, megatron-core omits the dimension B, and attention is causal within each sequence.
        """
        if packed_seq_params is not None:
            with self._dropout_rng():
                dropout = self.dropout if self.training else 0.0
                return packed_attention(query, key, value, packed_seq_params, dropout).flatten(1)
        query_BNSD, key_BGTD, value_BGTD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        is_causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal and attention_mask is None
        with self._dropout_rng():
            context_BNSD = scaled_dot_product_attention(
                query_BNSD,
                key_BGTD,
                value_BGTD,
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=is_causal,
                enable_gqa=query.size(2) != key.size(2),
            )
        return context_BNSD.permute(2, 0, 1, 3).flatten(2)

    def _dropout_rng(self):
        """Heads are split over tensor-parallel ranks, so each rank draws its dropout from its own stream."""
        if self.training and self.dropout > 0:
            return get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()


class Layer(TransformerLayer):
    """megatron-core's layer; over packs it runs as one autograd function where that computes the same."""

    def forward(self, hidden_states, attention_mask, *args, rotary_pos_emb=None, packed_seq_params=None, **kwargs):
        if packed_seq_params is None or not can_fuse(self, hidden_states.dtype):
            return super().forward(
                hidden_states,
                attention_mask,
                *args,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=packed_seq_params,
                **kwargs,
            )
        angles_TA = None if rotary_pos_emb is None else rotary_pos_emb.squeeze(1)
        output_T1H = fused_layer(self, hidden_states.squeeze(1), angles_TA, packed_seq_params).unsqueeze(1)
        # the pipeline schedule deallocates outputs it has sent, which is impossible for a view
        return make_viewless_tensor(output_T1H, requires_grad=output_T1H.requires_grad, keep_graph=True), None


def can_fuse(layer: Layer, dtype: torch.dtype) -> bool:
    """Whether `fused_layer` computes the same as the layer's own modules, given hidden states of this dtype."""
    config, attention, mlp = layer.config, layer.self_attention, layer.mlp
    return (
        parallel_state.get_tensor_model_parallel_world_size() == 1
        and not (layer.training and (config.hidden_dropout or config.attention_dropout))
        and not attention.checkpoint_core_attention
        and dtype == attention.linear_qkv.weight.dtype
        and not torch.is_autocast_enabled(attention.linear_qkv.weight.device.type)
        and _is_untouched(attention, SelfAttention)
        and _is_untouched(mlp, MLP)
        and _is_untouched(attention.core_attention, ScaledDotProductAttention)
        and all(_is_untouched(norm, Norm) for norm in (layer.input_layernorm, layer.pre_mlp_layernorm))
        and all(_is_untouched(linear, ColumnParallelLinear) for linear in (attention.linear_qkv, mlp.linear_fc1))
        and all(_is_untouched(linear, RowParallelLinear) for linear in (attention.linear_proj, mlp.linear_fc2))
    )


def fuses_all_layers(model: torch.nn.Module) -> bool:
    """Whether every layer of megatron-core's `GPTModel` runs fused over packs."""
    dtype = next(model.parameters()).dtype
    is_mixed = getattr(model.config, "enable_autocast", False)
    return not is_mixed and all(type(layer) is Layer and can_fuse(layer, dtype) for layer in model.decoder.layers)


def _is_untouched(module: torch.nn.Module, kind: type) -> bool:
    """Whether it is exactly of that class, not a subclass as adapters create, and has no hooks or patched forward."""
    return type(module) is kind and not (
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def get_block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The spec of this pipeline stage's layers and of the final norm.

    Covers RMSNorm or LayerNorm, grouped queries, RoPE or learned positions and gated or plain MLPs.

    Raises:
        ValueError: for a mixture of experts or context parallelism, which these modules do not support.
    """
    if config.num_moe_experts is not None:
        raise ValueError("model.num_moe_experts: a mixture of experts needs Transformer Engine and a GPU")
    if config.context_parallel_size > 1:
        raise ValueError("model.context_parallel_size: must be 1 without Transformer Engine on a GPU")
    layer = ModuleSpec(
        module=Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=ScaledDotProductAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
            # Transformer Engine fuses a norm into the linear layer after it; checkpoints use its names.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=Norm)
