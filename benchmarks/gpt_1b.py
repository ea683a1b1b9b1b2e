"""The benchmarks' models, as actors with their optimizers.

On a GPU the model is a GPT with 1.27 billion random parameters. On a CPU it is SmolLM2-135M, from
models/SmolLM2-135M-Instruct.nemo.
"""

import contextlib
import os
from pathlib import Path
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.core.transformer.dot_product_attention import DotProductAttention
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_aligner.models.nlp.gpt import layer_spec
from nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor import MegatronGPTRSModel
from nemo_aligner.utils.train_script_utils import DISTRIBUTED_OPTIMIZER_KEYS, init_distributed, init_using_ptl
from nemo_aligner.utils.utils import load_checkpoint_model_config, load_from_nemo

SMOLLM2 = Path(__file__).parents[1] / "models/SmolLM2-135M-Instruct.nemo"

VOCABULARY = 32_000
SIZES = {
    "num_layers": 24, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 16, "kv_channels": 128,
}  # fmt: skip


def build_actor(tokenizer_dir: Path, *, optimizer: str, precision: str = "bf16", **model_overrides) -> tuple:
    """The actor on this process's GPU, and its unwrapped optimizer.

    Args:
        tokenizer_dir: folder of a Hugging Face tokenizer with at most `VOCABULARY` tokens.
        optimizer: `model.optim.name`.
        precision: "bf16" (with `megatron_amp_O2`) or "32".
        model_overrides: further keys of the `model` section, dotted.
    """
    cfg = _config(tokenizer_dir, optimizer, precision)
    _update(cfg.model, model_overrides)
    torch.manual_seed(0)
    destroy_num_microbatches_calculator()  # left by an earlier model
    trainer = MegatronTrainerBuilder(cfg).create_trainer()
    return _with_optimizer(MegatronGPTRSModel(cfg.model, trainer), trainer)


def build_smollm2(**model_overrides) -> tuple:
    """As `build_actor`, for SmolLM2-135M in float32 on the CPU with AdamW. Call `compat.cpu.enable` first."""
    cfg = _config(SMOLLM2, "adamw", "32")
    cfg.trainer.accelerator = "cpu"
    for key in DISTRIBUTED_OPTIMIZER_KEYS:
        cfg.model.optim.pop(key, None)
    model = load_checkpoint_model_config(str(SMOLLM2))
    with open_dict(model):
        own = ("rs", "optim", "micro_batch_size", "global_batch_size", "megatron_amp_O2", "precision", "seed")
        model.update({key: cfg.model[key] for key in own})
        model.use_cpu_initialization = True
        model.gradient_as_bucket_view = True
    _update(model, model_overrides)
    cfg.model = model
    destroy_num_microbatches_calculator()
    trainer = MegatronTrainerBuilder(cfg).create_trainer()
    return _with_optimizer(load_from_nemo(MegatronGPTRSModel, model, trainer, restore_path=str(SMOLLM2)), trainer)


def gpt_model(actor: MegatronGPTRSModel) -> GPTModel:
    """The GPT model without the wrappers of the optimizer and of mixed precision."""
    model = actor.get_model_module_list()[0]
    while not isinstance(model, GPTModel):
        model = model.module
    return model


class UnfusedAttention(DotProductAttention):
    """megatron-core's local attention: three steps over [S, S], with the full causal mask that NeMo passes to it."""

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, packed_seq_params=None):
        num_queries, num_keys = query.size(0), key.size(0)
        if num_queries > 1:
            ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            attention_mask = ones.triu(diagonal=1 + num_keys - num_queries)[None, None]
        else:  # a generated token sees the whole cache
            attention_mask = None
        return super().forward(query, key, value, attention_mask, attn_mask_type, packed_seq_params)


@contextlib.contextmanager
def unfused_attention():
    """Models built in this context use `UnfusedAttention`."""
    with mock.patch.object(layer_spec, "ScaledDotProductAttention", UnfusedAttention):
        yield


def _update(model_cfg: DictConfig, overrides: dict) -> None:
    for key, value in overrides.items():
        OmegaConf.update(model_cfg, key, value, force_add=True)


def _with_optimizer(actor: MegatronGPTRSModel, trainer) -> tuple:
    init_distributed(trainer, actor)
    rows_per_replica = actor.cfg.global_batch_size // parallel_state.get_data_parallel_world_size()
    prompts = torch.zeros(actor.cfg.rs.num_rollout_samples)
    init_using_ptl(trainer, actor, torch.utils.data.DataLoader(prompts, batch_size=rows_per_replica), prompts)
    return actor, actor.optimizers(use_pl_optimizer=False)


def _config(tokenizer_dir: Path, optimizer: str, precision: str) -> DictConfig:
    trainer = {
        "devices": int(os.environ.get("WORLD_SIZE", "1")), "num_nodes": 1, "accelerator": "gpu", "precision": precision,
        "logger": False, "enable_checkpointing": False, "use_distributed_sampler": False, "max_epochs": 1,
        "max_steps": 10, "enable_progress_bar": False,
    }  # fmt: skip
    sampling = {
        "use_greedy": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "add_BOS": False,
        "all_probs": False, "compute_logprob": False, "end_strings": ["<|endoftext|>"],
    }  # fmt: skip
    rs = {
        "rollout_micro_batch_size": 64, "num_rollout_samples": 64, "num_rollouts_per_prompt": 1, "top_n_rollouts": 1,
        "forward_micro_batch_size": 64, "offload_adam_states": True, "sampling_params": sampling,
        "length_params": {"max_length": 256, "min_length": 256},
    }  # fmt: skip
    optim = {
        "name": optimizer, "lr": 1e-6, "weight_decay": 0.1, "betas": [0.9, 0.98], "bucket_cap_mb": 200,
        "overlap_grad_sync": False, "contiguous_grad_buffer": True, "contiguous_param_buffer": True,
        "sched": {"name": "CosineAnnealing", "warmup_steps": 0, "constant_steps": 0, "min_lr": 1e-7},
    }  # fmt: skip
    model = {
        **SIZES, "mcore_gpt": True, "transformer_engine": False, "precision": precision,
        "megatron_amp_O2": precision == "bf16", "micro_batch_size": 8, "global_batch_size": 64,
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "encoder_seq_length": 512,
        "max_position_embeddings": 512, "normalization": "layernorm", "activation": "gelu", "bias": True,
        "bias_activation_fusion": False, "bias_dropout_add_fusion": False, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "position_embedding_type": "rope", "rotary_percentage": 1.0,
        "share_embeddings_and_output_weights": True, "override_vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 128, "apply_rope_fusion": False, "gradient_accumulation_fusion": False,
        "gradient_as_bucket_view": True, "seed": 1234,
        "tokenizer": {"library": "huggingface", "type": str(tokenizer_dir), "use_fast": True},
        "data": {"seq_length": 512}, "optim": optim, "rs": rs,
    }  # fmt: skip
    return OmegaConf.create({"trainer": trainer, "model": model})
