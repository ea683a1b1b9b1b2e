"""Checks of each number, switch and choice of a training configuration on its own."""

from omegaconf import DictConfig, ListConfig

from nemo_aligner.utils.timers import Timer
from nemo_aligner.utils.value_rules import (
    COUNT,
    COUNT_OR_NULL,
    NUMBER_FROM_0,
    SWITCH,
    WHOLE,
    WHOLE_FROM_0,
    WHOLE_OR_NULL,
    Rule,
    check_section,
    is_number,
)


def _is_duration(value) -> bool:
    try:
        Timer(value)
    except ValueError:
        return False
    return True


def _are_end_strings(value) -> bool:
    return isinstance(value, ListConfig) and all(isinstance(text, str) and text for text in value)


def _are_betas(value) -> bool:
    return isinstance(value, ListConfig) and len(value) == 2 and all(is_number(b) and 0 <= b < 1 for b in value)


def _is_window_or_null(value) -> bool:
    is_window = isinstance(value, ListConfig) and len(value) == 2 and all(type(number) is int for number in value)
    return value is None or is_window


_RULES = {
    "trainer.devices": COUNT,
    "trainer.num_nodes": COUNT,
    "trainer.accelerator": Rule(lambda value: value in ("gpu", "cpu"), "gpu or cpu"),
    "trainer.rs.max_epochs": COUNT,
    "trainer.rs.val_check_interval": WHOLE,
    "trainer.rs.save_interval": WHOLE,
    "model.global_batch_size": COUNT,
    "model.micro_batch_size": COUNT,
    "model.encoder_seq_length": COUNT,
    "model.data.seq_length": COUNT,
    "model.rs.rollout_micro_batch_size": COUNT,
    "model.rs.num_rollout_samples": COUNT,
    "model.rs.num_rollouts_per_prompt": COUNT,
    "model.rs.top_n_rollouts": COUNT,
    "model.rs.num_val_samples": COUNT,
    "model.rs.offload_adam_states": SWITCH,
    "model.rs.length_params.max_length": COUNT,
    "model.rs.length_params.min_length": WHOLE_FROM_0,
    "model.rs.sampling_params.use_greedy": SWITCH,
    "model.rs.sampling_params.temperature": Rule(
        lambda value: is_number(value) and value >= 1e-6, "above 0; for the most probable token set use_greedy"
    ),
    "model.rs.sampling_params.top_k": Rule(WHOLE_FROM_0.holds, "a whole number, 0 (off) or more"),
    "model.rs.sampling_params.top_p": Rule(lambda value: is_number(value) and 0 <= value <= 1, "between 0 and 1"),
    "model.rs.sampling_params.repetition_penalty": Rule(
        lambda value: is_number(value) and value > 0, "above 0; 1.0 is off"
    ),
    "model.rs.sampling_params.end_strings": Rule(_are_end_strings, "a list of strings, none of them empty"),
    "model.optim.name": Rule(lambda value: isinstance(value, str) and value != "", "the name of an optimizer"),
    "model.optim.lr": NUMBER_FROM_0,
}
_SWITCH_OR_NULL = Rule(lambda value: value is None or SWITCH.holds(value), SWITCH.words)
_WHOLE_FROM_0_OR_NULL = Rule(
    lambda value: value is None or WHOLE_FROM_0.holds(value), "a whole number, 0 or larger, or null"
)
_OURS = Rule(lambda value: value is None, "left out: the library sets it")
_DURATION = Rule(_is_duration, "null, or a time as days:hours:minutes:seconds in quotes")
# Keys with defaults.
_RULES_OF_OPTIONAL_KEYS = {
    "trainer.max_time": _DURATION,
    "trainer.fast_dev_run": Rule(lambda value: value is False, "false: it would train on nothing"),
    **{f"trainer.{key}": _OURS for key in ("strategy", "plugins", "callbacks")},
    "trainer.rs.max_steps": Rule(
        lambda value: value == -1 or WHOLE_FROM_0.holds(value), "a whole number, or -1 for as many as the epochs have"
    ),
    "trainer.max_epochs": WHOLE_OR_NULL,
    "trainer.max_steps": WHOLE_OR_NULL,
    "trainer.rs.val_at_start": SWITCH,
    "trainer.rs.gradient_clip_val": Rule(
        lambda value: value is None or is_number(value), "a number, or null to switch it off"
    ),
    "trainer.rs.rollout_batch_seq_length": COUNT_OR_NULL,
    "exp_manager.max_time_per_run": _DURATION,
    "exp_manager.checkpoint_callback_params.monitor": Rule(
        lambda value: isinstance(value, str) and value != "", "the name of a metric"
    ),
    "exp_manager.checkpoint_callback_params.filename": Rule(
        lambda value: value is None or (isinstance(value, str) and "/" not in value), "a name without a slash, or null"
    ),
    "exp_manager.checkpoint_callback_params.save_weights_only": Rule(
        lambda value: value is False, "false: a run could not go on from such checkpoints"
    ),
    "exp_manager.ema.enable": Rule(lambda value: value is False, "false: averages of weights are not supported"),
    "exp_manager.checkpoint_callback_params.mode": Rule(lambda value: value in ("min", "max"), "min or max"),
    "exp_manager.checkpoint_callback_params.save_top_k": Rule(
        lambda value: type(value) is int and value >= -1, "a whole number, or -1 for all"
    ),
    "model.data.num_workers": WHOLE_FROM_0,
    "model.optim.weight_decay": NUMBER_FROM_0,
    "model.optim.eps": NUMBER_FROM_0,
    "model.optim.sched.max_steps": COUNT_OR_NULL,
    "model.context_parallel_size": COUNT_OR_NULL,
    "exp_manager.resume_from_checkpoint": Rule(
        lambda value: value is None or isinstance(value, str), "the path of a checkpoint, or null"
    ),
    "model.data.data_prefix": Rule(
        lambda value: value is None or isinstance(value, (DictConfig, ListConfig)),
        "{train: [file], validation: [file], test: [file]}",
    ),
    "model.optim.betas": Rule(_are_betas, "a list of two numbers, each at least 0 and less than 1"),
    "model.optim.sched.warmup_steps": _WHOLE_FROM_0_OR_NULL,
    "model.optim.sched.constant_steps": _WHOLE_FROM_0_OR_NULL,
    "model.optim.sched.min_lr": NUMBER_FROM_0,
    "model.dist_ckpt_format": Rule(lambda value: value in ("zarr", "torch_dist"), "zarr or torch_dist"),
    "model.position_embedding_type": Rule(
        lambda value: value in ("learned_absolute", "rope", "none"), "learned_absolute, rope or none"
    ),
    "model.mcore_gpt": Rule(lambda value: value is True, "true: NeMo's own layers are not supported"),
    "model.megatron_amp_O2": _SWITCH_OR_NULL,
    "model.sequence_parallel": _SWITCH_OR_NULL,
    "model.window_size": Rule(_is_window_or_null, "null, or how many tokens to the left and to the right are seen"),
    "model.data.reset_position_ids": _SWITCH_OR_NULL,
    "model.data.reset_attention_mask": _SWITCH_OR_NULL,
    "model.seed": Rule(lambda value: type(value) is int and 0 <= value < 2**32, "a whole number, 0 to 4294967295"),
    "model.tensor_model_parallel_size": COUNT,
    "model.pipeline_model_parallel_size": COUNT,
    "model.virtual_pipeline_model_parallel_size": COUNT_OR_NULL,
    "model.rs.val_rollout_micro_batch_size": COUNT,
    "model.rs.loss_normalization": Rule(
        lambda value: value in ("global_batch", "micro_batch"), "global_batch or micro_batch"
    ),
    "model.rs.generation.backend": Rule(
        lambda value: value in ("engine", "nemo"), "engine, or nemo for Megatron's schedule"
    ),
    "model.rs.generation.max_rows_in_flight": COUNT,
    "model.rs.training.packing": Rule(SWITCH.holds, "true, or false for padded rows"),
    "model.rs.training.max_tokens_per_pack": COUNT_OR_NULL,
    "model.rs.training.stream_adam_states": SWITCH,
}
ALL_RULES = {**_RULES, **_RULES_OF_OPTIONAL_KEYS}


def check_values(cfg: DictConfig) -> None:
    """Check each value of a resolved configuration on its own.

    Raises:
        ConfigError: one line with the key, its value and what it must be.
    """
    check_section(cfg, _RULES, _RULES_OF_OPTIONAL_KEYS)
