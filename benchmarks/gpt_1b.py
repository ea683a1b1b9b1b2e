"""The model of the benchmarks: a GPT of 1.27 billion random parameters, as an actor with its optimizer."""

from pathlib import Path

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from omegaconf import DictConfig, OmegaConf

from nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor import MegatronGPTRSModel
from nemo_aligner.utils.train_script_utils import init_distributed, init_using_ptl

VOCABULARY = 32_000
SIZES = {
    "num_layers": 24, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 16, "kv_channels": 128,
}  # fmt: skip


def build_actor(tokenizer_dir: Path, *, optimizer: str, precision: str = "bf16", **model_overrides) -> tuple:
    """The actor on this process's GPU, and its raw optimizer.

    Args:
        tokenizer_dir: a Hugging Face tokenizer with at most `VOCABULARY` tokens.
        optimizer: `model.optim.name`.
        precision: "bf16" (with `megatron_amp_O2`) or "32".
        model_overrides: further keys of the section `model`, dotted.
    """
    cfg = _config(tokenizer_dir, optimizer, precision)
    for key, value in model_overrides.items():
        OmegaConf.update(cfg.model, key, value, force_add=True)
    torch.manual_seed(0)
    trainer = MegatronTrainerBuilder(cfg).create_trainer()
    actor = MegatronGPTRSModel(cfg.model, trainer)
    init_distributed(trainer, actor)
    rows_per_replica = cfg.model.global_batch_size // parallel_state.get_data_parallel_world_size()
    prompts = torch.zeros(cfg.model.rs.num_rollout_samples)
    init_using_ptl(trainer, actor, torch.utils.data.DataLoader(prompts, batch_size=rows_per_replica), prompts)
    return actor, actor.optimizers(use_pl_optimizer=False)


def _config(tokenizer_dir: Path, optimizer: str, precision: str) -> DictConfig:
    trainer = {
        "devices": max(torch.cuda.device_count(), 1), "num_nodes": 1, "accelerator": "gpu", "precision": precision,
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
        "overlap_grad_sync": False, "contiguous_grad_buffer": True,
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
