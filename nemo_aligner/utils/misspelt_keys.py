"""Detection of keys in a model's configuration that look misspelt."""

import dataclasses
import difflib

from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf

# Known keys by section, in addition to those of the checkpoint's own config and, in the first, of TransformerConfig.
_KEYS = {
    "": {
        "data", "encoder_seq_length", "global_batch_size", "max_position_embeddings", "megatron_amp_O2",
        "micro_batch_size", "optim", "overwrite_base_config", "peft", "precision", "qkv_bias", "rs", "seed",
        "tokenizer", "transformer_engine", "ub_tp_comm_overlap", "ub_tp_comm_overlap_cfg",
    },
    "data.": {
        "data_impl", "data_prefix", "dataloader_type", "index_mapping_dir", "num_workers", "reset_attention_mask",
        "reset_position_ids", "seq_length", "skip_warmup", "splits_string",
    },
    "optim.": {"betas", "eps", "lr", "name", "sched", "weight_decay"},
    "peft.": {"lora_tuning", "peft_scheme", "restore_from_ckpt", "restore_from_path"},
}  # fmt: skip


def warn_of_misspelt_keys(given: DictConfig, stored: DictConfig) -> None:
    """Warn of each unknown key of the section `model` that resembles a known one.

    Only a warning, because NeMo has no list of the keys that it reads, and ignores all others.

    Args:
        given: overrides of the checkpoint's config, `stored`.
    """
    for section, keys in _KEYS.items():
        path = section.rstrip(".")
        of_given, of_stored = (OmegaConf.select(cfg, path) if path else cfg for cfg in (given, stored))
        known = keys | set(of_stored if OmegaConf.is_dict(of_stored) else ())
        if section == "":
            known |= {field.name for field in dataclasses.fields(TransformerConfig)}
        for key in of_given if OmegaConf.is_dict(of_given) else ():
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.8)
            if key not in known and near:
                logging.warning(f"model.{section}{key} is not a known key; did you mean model.{section}{near[0]}?")
