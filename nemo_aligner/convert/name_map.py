"""Mapping between Hugging Face Llama tensors and megatron-core parameters, and packing of the fused ones.

Shapes: H hidden size, N query heads, G key/value groups, D channels per head, F FFN size, V vocabulary size.
"""

import re

import torch

# megatron-core name -> Hugging Face names that are packed into it, in this order. {i} is the layer.
LAYER_NAMES = {
    "decoder.layers.{i}.input_layernorm.weight": ("model.layers.{i}.input_layernorm.weight",),
    "decoder.layers.{i}.self_attention.linear_qkv.weight": (
        "model.layers.{i}.self_attn.q_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight",
    ),
    "decoder.layers.{i}.self_attention.linear_proj.weight": ("model.layers.{i}.self_attn.o_proj.weight",),
    "decoder.layers.{i}.pre_mlp_layernorm.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
    "decoder.layers.{i}.mlp.linear_fc1.weight": (
        "model.layers.{i}.mlp.gate_proj.weight",
        "model.layers.{i}.mlp.up_proj.weight",
    ),
    "decoder.layers.{i}.mlp.linear_fc2.weight": ("model.layers.{i}.mlp.down_proj.weight",),
}
MODEL_NAMES = {
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "decoder.final_layernorm.weight": ("model.norm.weight",),
    "output_layer.weight": ("lm_head.weight",),  # LlamaForCausalLM
    "rm_head.weight": ("score.weight",),  # LlamaForSequenceClassification
    "rm_head.bias": (),  # zero: the Hugging Face head has none
}
# Transformer Engine fuses a norm into the linear layer that follows it and names it after that layer.
_TRANSFORMER_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def hf_names(megatron_name: str) -> tuple[str, ...]:
    """The Hugging Face tensors that make up a parameter of megatron-core's GPTModel or of GPTRewardModel.

    Raises:
        KeyError: for a parameter that a Llama-family model does not have.
    """
    for fused, plain in _TRANSFORMER_ENGINE_NAMES.items():
        megatron_name = megatron_name.replace(fused, plain)
    layer = re.search(r"\.layers\.(\d+)\.", megatron_name)
    if layer is None:
        return MODEL_NAMES[megatron_name]
    template = megatron_name.replace(layer.group(0), ".layers.{i}.")
    return tuple(name.format(i=layer.group(1)) for name in LAYER_NAMES[template])


def pack(tensors: list[torch.Tensor], num_groups: int) -> torch.Tensor:
    """Build one megatron-core parameter from the Hugging Face tensors that `hf_names` lists for it.

    Three tensors are query [N*D, H], key [G*D, H] and value [G*D, H], packed group by group; two are the gate and the
    up projection [F, H] of a gated MLP, stacked; a single one is used unchanged.
    """
    if len(tensors) == 3:
        return pack_qkv(*tensors, num_groups)
    return torch.cat(tensors) if len(tensors) == 2 else tensors[0]


def pack_qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[(N + 2 * G) * D, H]: for each group its query heads, then its key head, then its value head."""
    per_group = [x.unflatten(0, (num_groups, -1)) for x in (query, key, value)]
    return torch.cat(per_group, dim=1).flatten(0, 1)


def unpack(packed: torch.Tensor, num_tensors: int, num_heads: int, num_groups: int) -> tuple[torch.Tensor, ...]:
    """The inverse of `pack`: the `num_tensors` Hugging Face tensors of a parameter, as views where possible."""
    if num_tensors == 3:
        return unpack_qkv(packed, num_heads, num_groups)
    return packed.chunk(num_tensors)


def unpack_qkv(
    packed: torch.Tensor, num_heads: int, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `pack_qkv`: query [N*D, H], key [G*D, H] and value [G*D, H]."""
    heads = packed.unflatten(0, (num_groups, num_heads // num_groups + 2, -1))
    per_group = heads.split((num_heads // num_groups, 1, 1), dim=1)
    return tuple(x.flatten(0, 2) for x in per_group)
