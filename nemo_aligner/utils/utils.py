"""Restoring models from `.nemo` archives, checkpoint names, batch sizes; and, re-exported, the tensor helpers."""

import inspect
import os
import re
from pathlib import Path

import torch
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    reconfigure_num_microbatches_calculator,
)
from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector
from nemo.utils import AppState
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_aligner.data.nlp.builders import collate_with_batch_max_sequence_length  # noqa: F401
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.nemo_archive import check_archive
from nemo_aligner.utils.optimizer_offload import (  # noqa: F401
    dist_adam_load_state_bucket_into_device,
    offload_distributed_adam,
)
from nemo_aligner.utils.tensors import (  # noqa: F401
    apply_func_to_dict,
    batch_pad_to_fixed_len,
    calculate_response_lengths,
    clear_memory,
    cpu_dict,
    cuda_dict,
    deprecated_in_version,
    masked_mean,
    masked_std,
    move_to_device_if_tensor,
    select_log_probs,
    surpress_user_warnings,
)


class CustomSaveRestoreConnector(NLPSaveRestoreConnector):
    """NeMo's connector; with `load_base_model_only` a reward model is restored from an archive that has no head."""

    def __init__(self, *args, load_base_model_only: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.load_base_model_only = load_base_model_only

    def restore_from(self, *args, **kwargs):
        if not self.load_base_model_only:
            return super().restore_from(*args, **kwargs)
        from nemo_aligner.models.nlp.gpt.gpt_reward_model import GPTRewardModel

        before = GPTRewardModel.return_rm_head_in_state_dict
        GPTRewardModel.return_rm_head_in_state_dict = False
        try:
            return super().restore_from(*args, **kwargs)
        finally:
            GPTRewardModel.return_rm_head_in_state_dict = before


def load_from_nemo(
    cls,
    model_cfg: DictConfig | None,
    trainer,
    strict: bool = True,
    modify_config_fn=None,
    restore_path: str | None = None,
    load_base_model_only: bool = False,
    return_updated_cfg: bool = False,
):
    """Restore a model of class `cls` from a `.nemo` archive or the folder it was extracted to.

    Args:
        model_cfg: the config to build the model with; None takes the one in the archive.
        strict: whether every parameter must be in the archive.
        modify_config_fn: called as `f(stored_cfg, model_cfg, add_cfg_to_tree=False)`, or without the last argument if
            it takes but two; returns the config to build the model with.
        load_base_model_only: restore a reward model from an archive without a head.
        return_updated_cfg: also return the config that was used.

    Raises:
        AssertionError: if `restore_path` does not exist.
        ConfigError: if it is not a complete checkpoint.
    """
    assert restore_path is not None and os.path.exists(restore_path), f"restore_path: {restore_path} does not exist"
    stored_cfg = load_checkpoint_model_config(restore_path)
    stored_format = stored_cfg.get("dist_ckpt_format", "torch_dist")
    if modify_config_fn is not None:
        takes_tree_flag = "add_cfg_to_tree" in inspect.signature(modify_config_fn).parameters
        extra = {"add_cfg_to_tree": False} if takes_tree_flag else {}
        model_cfg = modify_config_fn(stored_cfg, model_cfg, **extra)
    model_cfg = (stored_cfg if model_cfg is None else model_cfg).copy()
    wanted_format = model_cfg.get("dist_ckpt_format", "torch_dist")
    with open_dict(model_cfg):
        model_cfg.pop("target", None)  # NeMo would build the class that wrote the archive instead of `cls`
        model_cfg.dist_ckpt_format = stored_format  # NeMo reads in the format that it is configured to write
    destroy_num_microbatches_calculator()  # NeMo insists that every model of a process has the sizes of the first
    connector = CustomSaveRestoreConnector(load_base_model_only=load_base_model_only)
    model = cls.restore_from(
        restore_path=restore_path,
        trainer=trainer,
        override_config_path=model_cfg,
        save_restore_connector=connector,
        strict=strict,
    )
    for cfg in (model_cfg, model.cfg):
        with open_dict(cfg):
            cfg.dist_ckpt_format = wanted_format
    return (model, model_cfg) if return_updated_cfg else model


def load_checkpoint_model_config(restore_path: str) -> DictConfig:
    """The model config stored in a `.nemo` archive or extracted folder."""
    check_archive(restore_path)
    connector = NLPSaveRestoreConnector()
    if os.path.isdir(restore_path):
        return OmegaConf.load(os.path.join(restore_path, connector.model_config_yaml))
    return connector.restore_from(None, restore_path, return_config=True)


def load_and_override_model_config(
    restore_path: str, model_cfg_to_overwrite: DictConfig, remove_meta_info: bool = True
) -> DictConfig:
    """The stored config, less what `overwrite_base_config` marks, overridden by the given config."""
    stored = load_checkpoint_model_config(restore_path)
    with open_dict(stored):
        if remove_meta_info:
            stored.pop("target", None)
            stored.pop("nemo_version", None)
        if "overwrite_base_config" in model_cfg_to_overwrite:
            remove_overwritten_fields(stored, model_cfg_to_overwrite.overwrite_base_config)
    OmegaConf.set_struct(stored, False)
    merged = OmegaConf.merge(stored, model_cfg_to_overwrite)
    with open_dict(merged):
        merged.pop("overwrite_base_config", None)
    return merged


def remove_overwritten_fields(base_config: DictConfig, overwrite_config: DictConfig) -> None:
    """Delete from `base_config`, in place, every field that is True in `overwrite_config` (nested booleans).

    Raises:
        ConfigError: for a value that is neither a boolean nor a section of such.
    """
    for key, value in overwrite_config.items():
        if key not in base_config:
            continue
        if isinstance(value, DictConfig):
            remove_overwritten_fields(base_config[key], value)
        elif isinstance(value, bool):
            if value:
                base_config.pop(key)
        else:
            raise ConfigError(f"model.overwrite_base_config.{key} is {value!r}; give true or false")


def extract_value_from_ckpt(key: str, ckpt_path: str) -> int:
    """The integer behind `key=` in the last component of a checkpoint's path.

    Raises:
        ValueError: if the name has no such field.
    """
    name = Path(str(ckpt_path).rstrip("/")).name
    found = re.search(rf"(?:^|[^A-Za-z0-9_]){re.escape(key)}=(\d+)(?:\.0+)?(?![\d.]*\d)", name)
    if found is None:
        raise ValueError(f"the checkpoint name {name!r} has no field {key}=<integer>")
    return int(found.group(1))


def configure_batch_sizes(mbs: int, gbs: int, dp: int = 1) -> None:
    """Reset Megatron's global calculator of micro-batches per step."""
    reconfigure_num_microbatches_calculator(
        rank=AppState().global_rank,
        rampup_batch_size=None,
        global_batch_size=gbs,
        micro_batch_size=mbs,
        data_parallel_size=dp,
    )


def set_autocast_gpu_dtype(precision) -> None:
    """Choose what torch's autocast on the GPU computes in; 32-bit spellings change nothing."""
    if str(precision) in ("16", "16-mixed"):
        torch.set_autocast_dtype("cuda", torch.half)
    elif str(precision) in ("bf16", "bf16-mixed"):
        torch.set_autocast_dtype("cuda", torch.bfloat16)


def custom_save_ckpt_func(
    self, trainer, pl_module, monitor_candidates: dict, is_train_end: bool = False, save_top_only: bool = False
) -> None:
    """Save through NeMo's checkpoint callback: the top-k checkpoint, then the last one.

    Args:
        self: the `NeMoModelCheckpoint` callback.
        monitor_candidates: metric name -> tensor; names of checkpoints and the choice of the best come from these.
        is_train_end: also run the callback's end hook, which writes the final `.nemo`.
        save_top_only: leave out the last checkpoint.
    """
    if self.monitor is None or self.monitor in monitor_candidates:
        self._save_topk_checkpoint(trainer, monitor_candidates)
    if not save_top_only:
        self._save_last_checkpoint(trainer, monitor_candidates)
    if is_train_end:
        # With an interval the hook would save once more: it judges by Lightning's step, which does not advance here.
        val_check_interval, trainer.val_check_interval = trainer.val_check_interval, 0
        self.on_train_end(trainer, pl_module)
        trainer.val_check_interval = val_check_interval
