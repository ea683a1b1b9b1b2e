"""References to the parameters of a live megatron-core `GPTModel`, whichever layer spec it was built from.

Nothing is copied: generation reads the tensors that training writes. Our own layer spec keeps a norm in its own module,
Transformer Engine's keeps its parameters in the linear layer after it; both are mapped to the same records.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from nemo.collections.nlp.modules.common.megatron.adapters.parallel_adapters import AdapterName

from nemo_aligner.models.nlp.gpt.activation import Activation, activation_of
from nemo_aligner.models.nlp.gpt.lora import LINEARS


@dataclass(frozen=True)
class Norm:
    """LayerNorm, or RMSNorm where `is_rms`; with `zero_centered` the weight is the scale minus one."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    is_rms: bool
    zero_centered: bool


@dataclass(frozen=True)
class Linear:
    """This rank's shard of a linear layer, and the adapter, if any, that adds to its output."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    adapter: torch.nn.Module | None = None


@dataclass(frozen=True)
class Layer:
    attention_norm: Norm
    qkv: Linear
    proj: Linear
    mlp_norm: Norm
    fc1: Linear
    fc2: Linear


@dataclass(frozen=True)
class Weights:
    """A GPT model, or this pipeline stage's part of it, or this tensor-parallel rank's shard of that.

    `embedding` and `positions` are the first stage's, `final_norm` and `output` the last stage's; None elsewhere.
    This rank has `num_groups` key/value groups with `heads_per_group` query heads each, of `head_dim` channels.
    `rotary(n)` returns the angles of the first n positions; None without RoPE.
    """

    embedding: torch.Tensor | None
    positions: torch.Tensor | None
    rotary: torch.nn.Module | None
    layers: tuple[Layer, ...]
    activation: Activation
    final_norm: Norm | None
    output: torch.Tensor | None
    num_groups: int
    heads_per_group: int
    head_dim: int

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].qkv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0].qkv.weight.device

    def pointers(self) -> tuple[int, ...]:
        """Addresses of all parameters: a captured graph may be replayed only while these do not change."""
        return tuple(tensor.data_ptr() for tensor in self._tensors())

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from (tensor for tensor in (self.embedding, self.positions, self.output) if tensor is not None)
        norms = [norm for layer in self.layers for norm in (layer.attention_norm, layer.mlp_norm)]
        for norm in norms if self.final_norm is None else (*norms, self.final_norm):
            yield from (tensor for tensor in (norm.weight, norm.bias) if tensor is not None)
        for linear in (x for layer in self.layers for x in (layer.qkv, layer.proj, layer.fc1, layer.fc2)):
            yield from (tensor for tensor in (linear.weight, linear.bias) if tensor is not None)
            if linear.adapter is not None:
                yield from linear.adapter.parameters()


def find_weights(model: GPTModel) -> Weights:
    """The current parameters of `model`, for which `unsupported_by_engine` must return None."""
    config, tp_size = model.config, parallel_state.get_tensor_model_parallel_world_size()
    layers = tuple(_layer(layer, config) for layer in model.decoder.layers)
    has_learned_positions = model.pre_process and model.position_embedding_type == "learned_absolute"
    return Weights(
        embedding=model.embedding.word_embeddings.weight if model.pre_process else None,
        positions=model.embedding.position_embeddings.weight if has_learned_positions else None,
        rotary=model.rotary_pos_emb if model.position_embedding_type == "rope" else None,
        layers=layers,
        activation=activation_of(config),
        final_norm=_norm(model.decoder.final_layernorm, config) if model.post_process else None,
        output=_output(model) if model.post_process else None,
        num_groups=config.num_query_groups // tp_size,
        heads_per_group=config.num_attention_heads // config.num_query_groups,
        head_dim=config.kv_channels,
    )


def unsupported_by_engine(model: torch.nn.Module) -> str | None:
    """What in `model` the engine does not support, in a few words; None if it supports all of it."""
    if not isinstance(model, GPTModel):
        return "a model that is not megatron-core's GPTModel"
    config = model.config
    for key in ("rotary_interleaved", "fp32_residual_connection", "apply_residual_connection_post_layernorm"):
        if getattr(config, key):
            return f"the setting {key}"
    if getattr(config, "enable_autocast", False):
        return "mixed precision without model.megatron_amp_O2"
    if getattr(config, "fp8", None):
        return "fp8"
    if getattr(config, "window_size", None) is not None:
        return "attention within a window"
    if model.position_embedding_type not in ("rope", "learned_absolute", "none"):
        return f"position_embedding_type {model.position_embedding_type}"
    if model.pre_process and model.embedding.forward.__func__ is not LanguageModelEmbedding.forward:
        return f"the embedding {type(model.embedding).__name__}"
    for layer in model.decoder.layers:
        if not (isinstance(layer.self_attention, SelfAttention) and isinstance(layer.mlp, MLP)):
            return f"the layer {type(layer).__name__} with {type(layer.mlp).__name__}"
        for module in (layer.self_attention, layer.mlp):
            unknown = sorted({AdapterName(name).value for name in getattr(module, "adapter_layer", ())} - set(LINEARS))
            if unknown:
                return f"the adapter {unknown[0]}"
    known = {id(tensor) for tensor in find_weights(model)._tensors()}
    unknown = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
    return f"the parameter {unknown[0]}" if unknown else None


def _output(model: GPTModel) -> torch.Tensor:
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def _layer(layer: torch.nn.Module, config) -> Layer:
    attention, mlp = layer.self_attention, layer.mlp
    return Layer(
        attention_norm=_norm(layer.input_layernorm, config, attention.linear_qkv),
        qkv=_linear(attention, "linear_qkv"),
        proj=_linear(attention, "linear_proj"),
        mlp_norm=_norm(layer.pre_mlp_layernorm, config, mlp.linear_fc1),
        fc1=_linear(mlp, "linear_fc1"),
        fc2=_linear(mlp, "linear_fc2"),
    )


def _norm(norm: torch.nn.Module, config, linear: torch.nn.Module | None = None) -> Norm:
    """`linear` is the layer after the norm, into which Transformer Engine may have fused it."""
    holder, prefix = (linear, "layer_norm_") if hasattr(linear, "layer_norm_weight") else (norm, "")
    return Norm(
        weight=getattr(holder, f"{prefix}weight"),
        bias=_unless_empty(getattr(holder, f"{prefix}bias", None)),
        eps=config.layernorm_epsilon,
        is_rms=config.normalization == "RMSNorm",
        zero_centered=config.layernorm_zero_centered_gamma,
    )


def _linear(parent: torch.nn.Module, name: str) -> Linear:
    linear = getattr(parent, name)
    return Linear(linear.weight, _unless_empty(linear.bias), _adapter(parent, name))


def _adapter(parent: torch.nn.Module, linear: str) -> torch.nn.Module | None:
    for name, module in getattr(parent, "adapter_layer", {}).items():
        if LINEARS.get(AdapterName(name).value) == linear and parent.adapter_cfg[name]["enabled"]:
            return module
    return None


def _unless_empty(bias: torch.Tensor | None) -> torch.Tensor | None:
    """Transformer Engine gives a layer without a bias an empty one."""
    return None if bias is None or bias.numel() == 0 else bias
