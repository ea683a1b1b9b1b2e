"""Restoring models from `.nemo` archives, checkpoint names, batch sizes; re-exports the tensor helpers."""

import contextlib
import inspect
import os

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    reconfigure_num_microbatches_calculator,
)
from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector
from nemo.utils import AppState
from omegaconf import DictConfig, OmegaConf, open_dict
from torch.distributed.checkpoint.api import CheckpointException

from nemo_aligner.compat import extra_states
from nemo_aligner.data.nlp.builders import collate_with_batch_max_sequence_length  # noqa: F401
from nemo_aligner.utils.checkpoints import custom_save_ckpt_func, extract_value_from_ckpt  # noqa: F401
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.misspelt_keys import warn_of_misspelt_keys
from nemo_aligner.utils.nemo_archive import CONFIG_FILE, extract, naming, opened
from nemo_aligner.utils.nemo_weights import check_model, check_weight_sizes, read_weights
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
    """NeMo's connector for untrusted archives, which are extracted and checked by `nemo_archive`, never by NeMo.

    With `load_base_model_only`, a reward model is restored from an archive that has no head.
    """

    def __init__(self, *args, load_base_model_only: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.load_base_model_only = load_base_model_only

    def restore_from(
        self, calling_cls, restore_path, override_config_path=None, map_location=None, strict=True,
        return_config=False, trainer=None, validate_access_integrity=True,
    ):  # fmt: skip
        """Like NeMo's, but `override_config_path` is a config or None.

        Raises:
            ConfigError: naming the member, key or parameter that is wrong, before any weights are loaded.
        """
        if return_config:
            return load_checkpoint_model_config(restore_path)
        without_head = _without_head() if self.load_base_model_only else contextlib.nullcontext()
        with opened(restore_path) as checkpoint, without_head:
            stored_cfg = checkpoint.config()
            cfg = stored_cfg if override_config_path is None else override_config_path
            with naming(checkpoint.where):
                weights = read_weights(checkpoint.folder)
                check_weight_sizes(weights, cfg)
            if weights.format is None:
                weights.shapes = self.modify_state_dict(cfg, weights.shapes)
            wanted_format = cfg.get("dist_ckpt_format", "torch_dist")
            with open_dict(cfg):  # NeMo reads the format that it is configured to write
                cfg.dist_ckpt_format = weights.format or wanted_format

            def check(model):
                extra_states.keep_where_missing(model, weights.objects)
                with naming(checkpoint.where):
                    check_model(weights, model, strict, may_hold_more=self.load_base_model_only)

            is_archive = self.model_extracted_dir is None
            self.model_extracted_dir = str(checkpoint.folder)
            try:
                model = super().restore_from(
                    _CheckedAfterBuilding(calling_cls, check), restore_path, cfg, map_location, strict, False, trainer,
                    validate_access_integrity,
                )  # fmt: skip
            except CheckpointException as error:
                reason = " ".join(str(next(iter(error.failures.values()))[0]).split())[:300]
                raise ConfigError(f"{checkpoint.where}: the weights cannot be loaded ({reason})") from error
            finally:
                if is_archive:  # saving the model extracts its artifacts again
                    self.model_extracted_dir = None
                with open_dict(cfg):
                    cfg.dist_ckpt_format = wanted_format
            del model.sharded_state_dict
            with open_dict(model.cfg):
                model.cfg.dist_ckpt_format = wanted_format
            return model

    @staticmethod
    def _unpack_nemo_file(path2file: str, out_folder: str, members=None) -> str:
        extract(path2file, out_folder, only=None if members is None else {member.name for member in members})
        return out_folder


class _CheckedAfterBuilding:
    """Proxy for a model class in NeMo's restore, which has no hook between building a model and loading weights."""

    def __init__(self, model_class, check):
        self.model_class, self.check = model_class, check
        self._set_model_restore_state = model_class._set_model_restore_state

    def from_config_dict(self, config, trainer):
        model = self.model_class.from_config_dict(config=config, trainer=trainer)
        if not parallel_state.is_initialized():  # as NeMo does later
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.launch(lambda: None, trainer=trainer)
            trainer.strategy.setup_environment()
        self.check(model)
        return model


@contextlib.contextmanager
def _without_head():
    """Context manager in which reward models do not request their head from a checkpoint."""
    from nemo_aligner.models.nlp.gpt.gpt_reward_model import GPTRewardModel

    before = GPTRewardModel.return_rm_head_in_state_dict
    GPTRewardModel.return_rm_head_in_state_dict = False
    try:
        yield
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

    Each process extracts the archive to its own temporary folder, which is removed when this returns or raises.

    Args:
        model_cfg: the config to build the model with; None uses the one in the archive.
        strict: whether the archive must hold nothing but the model's parameters. It must always hold all of them.
        modify_config_fn: called as `f(stored_cfg, model_cfg, add_cfg_to_tree=False)`, or without the last argument if
            it takes only two; returns the config to build the model with.
        load_base_model_only: restore a reward model from an archive without a head.
        return_updated_cfg: also return the config that was used.

    Raises:
        AssertionError: if `restore_path` does not exist.
        ConfigError: if it is not a complete checkpoint, does not match this model, or is unsafe to load.
    """
    assert restore_path is not None and os.path.exists(restore_path), f"restore_path: {restore_path} does not exist"
    if modify_config_fn is not None:
        takes_tree_flag = "add_cfg_to_tree" in inspect.signature(modify_config_fn).parameters
        extra = {"add_cfg_to_tree": False} if takes_tree_flag else {}
        model_cfg = modify_config_fn(load_checkpoint_model_config(restore_path), model_cfg, **extra)
    model_cfg = (load_checkpoint_model_config(restore_path) if model_cfg is None else model_cfg).copy()
    with open_dict(model_cfg):
        model_cfg.pop("target", None)  # NeMo would build the class that wrote the archive instead of `cls`
    destroy_num_microbatches_calculator()  # NeMo requires all models of a process to share batch sizes
    model = cls.restore_from(
        restore_path=restore_path,
        trainer=trainer,
        override_config_path=model_cfg,
        save_restore_connector=CustomSaveRestoreConnector(load_base_model_only=load_base_model_only),
        strict=strict,
    )
    model.restored_from = os.path.realpath(restore_path)
    return (model, model_cfg) if return_updated_cfg else model


def load_checkpoint_model_config(restore_path: str) -> DictConfig:
    """The model config stored in a `.nemo` archive or extracted folder.

    Raises:
        ConfigError: if that is not a complete checkpoint, or no model can be built from its config.
    """
    with opened(restore_path, only={CONFIG_FILE}) as checkpoint:
        return checkpoint.config()


def load_and_override_model_config(
    restore_path: str, model_cfg_to_overwrite: DictConfig, remove_meta_info: bool = True
) -> DictConfig:
    """The stored config, without the fields marked by `overwrite_base_config`, overridden by the given config.

    Raises:
        ConfigError: if the given config is no section, or as in `load_checkpoint_model_config` and
            `remove_overwritten_fields`.
    """
    if not OmegaConf.is_dict(model_cfg_to_overwrite):
        raise ConfigError(f"model={model_cfg_to_overwrite!r} must be a section with keys")
    stored = load_checkpoint_model_config(restore_path)
    with open_dict(stored):
        if remove_meta_info:
            stored.pop("target", None)
            stored.pop("nemo_version", None)
        if "overwrite_base_config" in model_cfg_to_overwrite:
            fields = model_cfg_to_overwrite.overwrite_base_config
            if not OmegaConf.is_dict(fields):
                raise ConfigError(f"model.overwrite_base_config={fields!r} must be a section of true and false")
            remove_overwritten_fields(stored, fields)
    warn_of_misspelt_keys(model_cfg_to_overwrite, stored)
    OmegaConf.set_struct(stored, False)
    merged = OmegaConf.merge(stored, model_cfg_to_overwrite)
    with open_dict(merged):
        merged.pop("overwrite_base_config", None)
    return merged


def remove_overwritten_fields(base_config: DictConfig, overwrite_config: DictConfig) -> None:
    """Delete from `base_config`, in place, every field that is True in `overwrite_config` (nested booleans).

    Raises:
        ConfigError: for a value that is neither a boolean nor a section of booleans.
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


def configure_batch_sizes(mbs: int, gbs: int, dp: int = 1) -> None:
    """Reconfigure Megatron's global micro-batch calculator."""
    reconfigure_num_microbatches_calculator(
        rank=AppState().global_rank,
        rampup_batch_size=None,
        global_batch_size=gbs,
        micro_batch_size=mbs,
        data_parallel_size=dp,
    )


def set_autocast_gpu_dtype(precision) -> None:
    """Set torch's autocast dtype on the GPU; 32-bit precisions change nothing."""
    if str(precision) in ("16", "16-mixed"):
        torch.set_autocast_dtype("cuda", torch.half)
    elif str(precision) in ("bf16", "bf16-mixed"):
        torch.set_autocast_dtype("cuda", torch.bfloat16)
