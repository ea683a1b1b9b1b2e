"""Converts Llama-family Hugging Face models to `.nemo`: language models, and sequence classifiers as reward models."""

import tempfile
from pathlib import Path

import torch
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.nlp_overrides import NLPDDPStrategy
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning import Trainer
from tqdm import tqdm
from transformers import PretrainedConfig

from nemo_aligner import compat
from nemo_aligner.compat import cpu
from nemo_aligner.convert.hf_source import (
    CAUSAL_LM,
    SEQUENCE_CLASSIFICATION,
    check_config,
    open_source,
    require_fast_tokenizer,
)
from nemo_aligner.convert.name_map import hf_names, pack
from nemo_aligner.models.nlp.gpt.hf_tokenizer import build_packed_tokenizer, tokenizer_config
from nemo_aligner.models.nlp.gpt.megatron_gpt_reward_model import MegatronGPTRewardModel
from nemo_aligner.models.nlp.gpt.reward_model_classes import RewardModelType

compat.apply()

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16}
# Settings of the Hugging Face config kept in the archive, because training has its own values of these or none.
KEPT_SETTINGS = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


class ConvertedGPTModel(MegatronGPTModel):
    """`MegatronGPTModel` with the tokenizer's files in its archive."""

    def _build_tokenizer(self):
        self.tokenizer = build_packed_tokenizer(self)


MODEL_CLASSES = {CAUSAL_LM: ConvertedGPTModel, SEQUENCE_CLASSIFICATION: MegatronGPTRewardModel}


def convert(source_path: str | Path, output_path: str | Path, precision: str = "32", dist_ckpt_format="torch_dist"):
    """Convert the model at `source_path` (a folder or a GGUF file) to the archive `output_path`.

    A LlamaForCausalLM becomes a GPT model, a LlamaForSequenceClassification a reward model. Tensors are read one at a
    time into the Megatron model, so memory holds one copy of the weights. `precision` ("32" or "bf16") is the dtype
    they are stored in; a reward model's head stays in float32.

    Raises:
        ValueError: one line, if the source is broken or cannot be represented, naming the file and the setting, or if
            the output cannot be a file.
    """
    output_path = Path(output_path)
    if output_path.is_dir():
        raise ValueError(f"{output_path}: the output is a folder; give a file name ending in .nemo")
    source = open_source(source_path)
    check_config(source.config, source_path)
    require_fast_tokenizer(source.tokenizer)
    cpu.enable()
    output_path.parent.mkdir(parents=True, exist_ok=True)
    # Next to the output, so that a complete archive is renamed into place and an interrupted one leaves nothing behind.
    with tempfile.TemporaryDirectory(dir=output_path.parent) as folder:
        source.tokenizer.save_pretrained(folder)
        cfg = model_config(source.config, tokenizer_config(folder), precision, dist_ckpt_format)
        cfg.hf_config = {key: getattr(source.config, key) for key in KEPT_SETTINGS}
        cfg.hf_generation_config = source.generation_config
        destroy_num_microbatches_calculator()  # NeMo would enforce an earlier model's batch sizes
        model = MODEL_CLASSES[source.config.architectures[0]](cfg, cpu_trainer())
        _copy_weights(source, model.get_model_module_list()[0])
        with open_dict(model.cfg):  # these two settings are for the conversion only
            model.cfg.use_cpu_initialization, model.cfg.perform_initialization = False, True
        model.save_to(str(Path(folder, output_path.name)))
        Path(folder, output_path.name).replace(output_path)


def cpu_trainer() -> Trainer:
    """The trainer that NeMo requires for a model, for one process on the CPU."""
    return Trainer(
        devices=1, num_nodes=1, accelerator="cpu", strategy=NLPDDPStrategy(), logger=False, enable_checkpointing=False
    )


def model_config(
    hf: PretrainedConfig, tokenizer: dict, precision: str, dist_ckpt_format: str = "torch_dist"
) -> DictConfig:
    """The NeMo model config that describes the Hugging Face config `hf`."""
    kv_channels = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return OmegaConf.create(
        {
            "mcore_gpt": True,
            # Without Transformer Engine, this library's own layers replace it under the same checkpoint keys.
            "transformer_engine": True,
            "megatron_amp_O2": precision == "bf16",
            "precision": precision if precision == "bf16" else int(precision),
            "micro_batch_size": 1,
            "global_batch_size": 1,
            "tensor_model_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "virtual_pipeline_model_parallel_size": None,
            "use_cpu_initialization": True,
            "perform_initialization": False,
            "encoder_seq_length": hf.max_position_embeddings,
            "max_position_embeddings": hf.max_position_embeddings,
            "num_layers": hf.num_hidden_layers,
            "hidden_size": hf.hidden_size,
            "ffn_hidden_size": hf.intermediate_size,
            "num_attention_heads": hf.num_attention_heads,
            "num_query_groups": hf.num_key_value_heads,
            "kv_channels": kv_channels,
            "init_method_std": hf.initializer_range,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "ffn_dropout": 0.0,
            "normalization": "rmsnorm",
            "layernorm_epsilon": hf.rms_norm_eps,
            "activation": "fast-swiglu",
            "bias": False,
            "bias_activation_fusion": False,
            "bias_dropout_add_fusion": False,
            "position_embedding_type": "rope",
            "rotary_percentage": 1.0,
            "rotary_base": hf.rope_theta,
            "override_vocab_size": hf.vocab_size,
            "make_vocab_size_divisible_by": 128,
            "apply_query_key_layer_scaling": False,
            "apply_rope_fusion": False,
            "gradient_accumulation_fusion": False,
            "gradient_as_bucket_view": True,
            "sequence_parallel": False,
            "activations_checkpoint_granularity": None,
            "activations_checkpoint_method": None,
            "activations_checkpoint_num_layers": None,
            "activations_checkpoint_layers_per_pipeline": None,
            "seed": 1234,
            "dist_ckpt_format": dist_ckpt_format,
            "tokenizer": tokenizer,
            "data": {"seq_length": hf.max_position_embeddings},
            "optim": {"name": "adamw", "lr": 1e-6},
            **_head_config(hf),
        }
    )


def _head_config(hf: PretrainedConfig) -> dict:
    """Config of the model's head: a vocabulary, or one score per label."""
    if hf.architectures[0] == CAUSAL_LM:
        return {"share_embeddings_and_output_weights": hf.tie_word_embeddings}
    if hf.num_labels == 1:
        kind = {"reward_model_type": RewardModelType.BINARY_RANKING.value}
    else:
        kind = {
            "reward_model_type": RewardModelType.REGRESSION.value,
            "regression": {"num_attributes": hf.num_labels},
        }
    return {"share_embeddings_and_output_weights": False, **kind}


@torch.no_grad()
def _copy_weights(source, gpt_model: torch.nn.Module) -> None:
    num_groups = source.config.num_key_value_heads
    parameters = [(name, hf_names(name), parameter) for name, parameter in gpt_model.named_parameters()]
    # lm_head is not left over: if tied, it equals the embeddings; a reward model does not use it
    left = source.tensors_beside({hf_name for _, taken, _ in parameters for hf_name in taken} | {"lm_head.weight"})
    if left:
        raise ValueError(f"{source.path}: a Llama model has no tensor {left[0]!r} ({len(left)} such); it would be lost")
    for name, taken, parameter in tqdm(parameters, desc="converting", unit="tensor"):
        tensors = [source.tensor(hf_name) for hf_name in taken]
        for hf_name, tensor in zip(taken, tensors, strict=True):
            if not tensor.isfinite().all():
                raise ValueError(f"{source.path}: the tensor {hf_name!r} has values that are NaN or infinite")
        packed = pack(tensors, num_groups) if tensors else torch.zeros_like(parameter)
        if packed.shape != parameter.shape:
            raise ValueError(f"{source.path}: {name} has shape {tuple(packed.shape)}, not {tuple(parameter.shape)}")
        parameter.copy_(packed)
