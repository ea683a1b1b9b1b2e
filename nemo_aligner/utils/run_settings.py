"""The settings that determine a run's results: stored in checkpoints, and compared when a run resumes."""

from pathlib import Path

from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf

from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.peft_checks import TARGETS

# Keys and sections of `model`.
TRACKED_KEYS = (
    "seed", "global_batch_size", "rs.num_rollout_samples", "rs.num_rollouts_per_prompt", "rs.top_n_rollouts",
    "rs.sampling_params", "rs.length_params", "rs.reward", "rs.rewards", "rs.loss_normalization",
    "data.data_prefix", "data.splits_string", "data.seq_length", "optim", "peft.peft_scheme",
)  # fmt: skip
# These change how gradients and parameters are communicated, not what is computed.
UNTRACKED_KEYS = {
    f"model.optim.{key}" for key in (
        "bucket_cap_mb", "contiguous_grad_buffer", "contiguous_param_buffer", "overlap_grad_sync", "overlap_param_sync",
        "overlap_param_gather", "align_param_gather", "align_grad_reduce", "ddp_bucket_size",
    )
}  # fmt: skip
PROMPTS_PER_STEP = "model.rs.num_rollout_samples"
NUM_PROMPTS = "the number of training prompts"
PRETRAINED = "pretrained_checkpoint.restore_from_path"
TARGET_MODULES = "model.peft.lora_tuning.target_modules"
# A checkpoint's optimizer state or adapters are usable only if these are unchanged.
IMMUTABLE_KEYS = (
    "model.optim.name", "model.peft.peft_scheme", TARGET_MODULES,
    "model.peft.lora_tuning.adapter_dim", "model.peft.lora_tuning.layer_selection",
)  # fmt: skip


def tracked_settings(model_cfg: DictConfig, pretrained: str | None, num_prompts: int) -> dict:
    """Dotted key -> plain value of the settings that are set, except the address of a reward server.

    Args:
        pretrained: the archive that the run started from.
        num_prompts: rows of the training set.
    """
    has_adapters = OmegaConf.select(model_cfg, "peft.peft_scheme") not in (None, "none")
    chosen = [*TRACKED_KEYS, "peft.lora_tuning"] if has_adapters else TRACKED_KEYS
    settings = {PRETRAINED: pretrained, NUM_PROMPTS: num_prompts, "model.peft.peft_scheme": "none"}
    for key in chosen:
        value = OmegaConf.select(model_cfg, key)
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        settings.update({leaf: v for leaf, v in _leaves(f"model.{key}", plain).items() if v is not None})
    targets = settings.get(TARGET_MODULES)
    if targets is not None:
        settings[TARGET_MODULES] = sorted({module for target in targets for module in TARGETS[target]})
    return {key: value for key, value in settings.items() if ".remote_rm." not in key}


def _leaves(key: str, value) -> dict:
    if not isinstance(value, dict):
        return {key: value}
    return {leaf: v for name, part in value.items() for leaf, v in _leaves(f"{key}.{name}", part).items()}


def check_resumed(state: dict, own: dict, ckpt_path: str | Path) -> None:
    """Warn once of all settings that changed since the checkpoint was written, if it stores its settings.

    Args:
        state: state of the checkpoint at `ckpt_path`, from `read_run_state`.
        own: this run's settings, from `tracked_settings`.

    Raises:
        ConfigError: if the checkpoint cannot be continued with a changed setting.
    """
    stored = state.get("settings")
    if stored is None:
        return
    changed = [key for key in {**stored, **own} if key not in UNTRACKED_KEYS and stored.get(key) != own.get(key)]
    for key in changed:
        if key in IMMUTABLE_KEYS:
            raise ConfigError(
                f"{key}={own.get(key)}: the checkpoint to resume from was made with {stored.get(key)} and cannot be "
                f"continued with another; set it back, or start anew in another exp_manager.explicit_log_dir "
                f"({ckpt_path})"
            )
    if changed:
        differences = ", ".join(f"{key}={own.get(key)} (was {stored.get(key)})" for key in changed)
        logging.warning(
            f"resuming {ckpt_path} with changed settings, which apply to the steps from here on: {differences}"
        )


def data_position(state: dict, num_prompts: int, prompts_per_step: int) -> tuple[int, int]:
    """Where a run resumes in the stream of prompts over all epochs.

    An epoch consists of whole steps only, so with a different step size or number of prompts the position is
    recomputed: the same number of completed epochs, and the same offset into the current one, rounded up to a whole
    step.

    Args:
        state: a checkpoint's counters and, if present, its `settings`. Checkpoints of the original NeMo-Aligner have
            none, and their `consumed_samples` counts something else; their steps are assumed to be as large as this
            run's.

    Returns:
        The number of prompts before that position, and how many of them are skipped by rounding.
    """
    settings = state.get("settings")
    if settings is None:
        return int(state["step"]) * prompts_per_step, 0
    old_step = settings[PROMPTS_PER_STEP]
    epoch, offset = divmod(int(state["consumed_samples"]), settings[NUM_PROMPTS] // old_step * old_step)
    rows_per_epoch = num_prompts // prompts_per_step * prompts_per_step
    offset = min(offset, rows_per_epoch)
    num_skipped = -offset % prompts_per_step
    return epoch * rows_per_epoch + offset + num_skipped, num_skipped


def has_other_step_size(state: dict, prompts_per_step: int) -> bool:
    """Whether the checkpoint, as in `data_position`, is known to use a different number of prompts per step."""
    return state.get("settings", {}).get(PROMPTS_PER_STEP, prompts_per_step) != prompts_per_step
