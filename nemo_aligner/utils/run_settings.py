"""The settings that decide what a run does: a checkpoint carries them, and a run that resumes from it is compared."""

from pathlib import Path

import torch
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf

from nemo_aligner.utils.errors import ConfigError

# Keys and sections of `model`.
DECIDING = (
    "seed", "global_batch_size", "rs.num_rollout_samples", "rs.num_rollouts_per_prompt", "rs.top_n_rollouts",
    "rs.sampling_params", "rs.length_params", "rs.reward", "rs.rewards", "rs.loss_normalization",
    "data.data_prefix", "data.splits_string", "data.seq_length", "optim", "peft.peft_scheme",
)  # fmt: skip
NUM_PROMPTS = "the number of training prompts"
PRETRAINED = "pretrained_checkpoint.restore_from_path"
# A checkpoint's optimizer state or adapters are of use only with these as they were.
FIXED = (
    "model.optim.name", "model.peft.peft_scheme", "model.peft.lora_tuning.target_modules",
    "model.peft.lora_tuning.adapter_dim", "model.peft.lora_tuning.alpha", "model.peft.lora_tuning.layer_selection",
)  # fmt: skip


def deciding_settings(model_cfg: DictConfig, pretrained: str | None, num_prompts: int) -> dict:
    """Dotted key -> plain value, for settings that are set; where a server is counts for nothing.

    Args:
        pretrained: the archive that the run started from.
        num_prompts: rows of the training set.
    """
    has_adapters = OmegaConf.select(model_cfg, "peft.peft_scheme") not in (None, "none")
    chosen = [*DECIDING, "peft.lora_tuning"] if has_adapters else DECIDING
    settings = {PRETRAINED: pretrained, NUM_PROMPTS: num_prompts}
    for key in chosen:
        value = OmegaConf.select(model_cfg, key)
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        settings.update(_leaves(f"model.{key}", plain))
    return {key: value for key, value in settings.items() if value is not None and ".remote_rm." not in key}


def _leaves(key: str, value) -> dict:
    if not isinstance(value, dict):
        return {key: value}
    return {leaf: v for name, part in value.items() for leaf, v in _leaves(f"{key}.{name}", part).items()}


def stored_settings(ckpt_path: str | Path) -> dict | None:
    """The settings of the run that wrote the checkpoint; None in one of the original, or of our first versions."""
    common = Path(ckpt_path, "common.pt")
    if not common.is_file():
        return None
    return torch.load(common, map_location="cpu", weights_only=True).get("rs_settings")


def check_resumed(ckpt_path: str | Path, own: dict) -> None:
    """Say, in one warning, which settings have changed since the checkpoint was written, if it knows its own.

    Raises:
        ConfigError: if it cannot be continued with one of them.
    """
    stored = stored_settings(ckpt_path)
    if stored is None:
        return
    changed = [key for key in {**stored, **own} if stored.get(key) != own.get(key)]
    for key in changed:
        if key in FIXED:
            raise ConfigError(
                f"{key}={own.get(key)}: the checkpoint to resume from was made with {stored.get(key)} and cannot be "
                f"continued with another; set it back, or start anew in another exp_manager.explicit_log_dir "
                f"({ckpt_path})"
            )
    if changed:
        differences = ", ".join(f"{key}={own.get(key)} (was {stored.get(key)})" for key in changed)
        logging.warning(
            f"resuming {ckpt_path} with other settings, which hold from here on; what was trained is the checkpoint's: "
            f"{differences}"
        )
