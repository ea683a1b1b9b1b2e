"""Checks of a rejection-sampling configuration before any model is loaded."""

import difflib
import importlib.util
import inspect
import os
from dataclasses import fields

import torch
from nemo.collections.nlp.parts.utils_funcs import torch_dtype_from_precision
from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS
from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS
from nemo.utils import logging
from nemo.utils.dtype import str_to_dtype
from nemo.utils.exp_manager import ExpManagerConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.environments import (
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from nemo_aligner.data.nlp.builders import check_prompt_files, split_rows
from nemo_aligner.generation.rollouts import GenerationSettings
from nemo_aligner.models.nlp.gpt.training_settings import TrainingSettings
from nemo_aligner.rewards.build import check_reward_config
from nemo_aligner.utils.checkpoints import read_run_state
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.nemo_archive import check_archive
from nemo_aligner.utils.parallel_checks import check_parallel
from nemo_aligner.utils.peft_checks import check_peft
from nemo_aligner.utils.step_profile import check_profile
from nemo_aligner.utils.trainer_utils import check_sizes
from nemo_aligner.utils.value_checks import check_values

TOP_LEVEL_KEYS = {"trainer", "exp_manager", "pretrained_checkpoint", "model", "remote_rm", "name"}
TRAINER_RS_KEYS = {
    "max_epochs", "max_steps", "val_check_interval", "save_interval", "gradient_clip_val", "model_gbs", "model_mbs",
    "rollout_batch_seq_length", "val_at_start", "profile",
}  # fmt: skip
MODEL_RS_KEYS = {
    "rollout_micro_batch_size", "num_rollout_samples", "forward_micro_batch_size", "num_rollouts_per_prompt",
    "top_n_rollouts", "val_rollout_micro_batch_size", "num_val_samples", "offload_adam_states", "sampling_params",
    "length_params", "loss_normalization", "reward", "rewards", "generation", "training",
}  # fmt: skip
SAMPLING_KEYS = {
    "use_greedy", "temperature", "top_k", "top_p", "repetition_penalty", "add_BOS", "all_probs", "compute_logprob",
    "end_strings",
}  # fmt: skip
OPTIMIZERS_OF_MEGATRON = ("fused_adam", "distributed_fused_adam", "mcore_distributed_optim")
CLUSTERS = (SLURMEnvironment, TorchElasticEnvironment, LSFEnvironment, MPIEnvironment)
REQUIRED_SECTIONS = ("trainer", "trainer.rs", "model.rs", "model.rs.sampling_params", "model.rs.length_params")
# Sections to which subclasses and scripts may add their own keys.
OPEN_SECTIONS = ("trainer.rs", "model.rs")
# Sections that NeMo reads: (section, whether null means an empty section).
SECTIONS_OF_NEMO = (
    ("exp_manager", False), ("exp_manager.checkpoint_callback_params", False), ("model.data", False),
    ("model.optim", False), ("model.optim.sched", False), ("model.peft", True),
)  # fmt: skip
# Settings of the distributed optimizers that a plain one does not accept.
DISTRIBUTED_OPTIMIZER_KEYS = (
    "bucket_cap_mb", "contiguous_grad_buffer", "contiguous_param_buffer", "overlap_grad_sync", "overlap_param_sync",
    "grad_sync_dtype", "overlap_param_gather", "align_param_gather", "align_grad_reduce", "ddp_bucket_size",
    "average_in_collective", "check_for_nan_in_grad", "overlap_param_gather_with_optimizer_step",
)  # fmt: skip
# Accepted for existing config files, but without effect: (key, the value that needs no warning).
WITHOUT_EFFECT = (
    ("trainer.max_time", None),
    ("trainer.gradient_clip_val", None),
    ("trainer.val_check_interval", None),
    ("trainer.accumulate_grad_batches", 1),
    ("exp_manager.create_early_stopping_callback", False),
    ("model.rampup_batch_size", None),
    ("model.rs.sampling_params.add_BOS", False),
    ("model.rs.sampling_params.all_probs", False),
    ("model.rs.sampling_params.compute_logprob", False),
    ("model.data.dataloader_type", "single"),
    ("model.peft.restore_from_ckpt.checkpoint_dir", None),
    ("model.peft.restore_from_ckpt.checkpoint_name", None),
)


def check_rs_config(cfg: DictConfig) -> None:
    """Refuse a resolved configuration that cannot work, and warn of keys without effect.

    Raises:
        ConfigError: one line with the key or file, its value and the fix.
    """
    _check_keys(cfg)
    check_values(cfg)
    check_machine(cfg)
    _check_exp_manager(cfg)
    _check_trainer(cfg)
    check_archive(cfg.pretrained_checkpoint.restore_from_path)
    if cfg.model.get("reward_model_type") is not None:
        raise ConfigError(
            f"pretrained_checkpoint.restore_from_path={cfg.pretrained_checkpoint.restore_from_path} is a reward model; "
            "give a language model, and serve this one with examples/nlp/gpt/serve_reward_model.py"
        )
    check_peft(cfg)
    _check_unsupported(cfg)
    _check_numbers(cfg)
    check_profile(cfg.trainer.rs.get("profile"))
    check_parallel(cfg)
    _check_lengths(cfg.model)
    _check_pack_size(cfg.model)
    _check_streamed_states(cfg)
    _check_data(cfg.model)
    if cfg.model.rs.offload_adam_states and "distributed" not in cfg.model.optim.name:
        logging.info(
            f"model.rs.offload_adam_states=True does nothing with model.optim.name={cfg.model.optim.name}: only the "
            "state of a distributed optimizer leaves the GPU"
        )
    for warning in check_reward_config(cfg):
        logging.warning(warning)
    for key, silent in WITHOUT_EFFECT:
        value = OmegaConf.select(cfg, key, default=silent)
        if value != silent:
            logging.warning(f"{key}={value} has no effect in rejection sampling")


def _check_keys(cfg: DictConfig) -> None:
    sections = (
        ("trainer", {*inspect.signature(Trainer).parameters, "rs"}),
        ("trainer.rs", TRAINER_RS_KEYS),
        ("model.rs", MODEL_RS_KEYS),
        ("model.rs.sampling_params", SAMPLING_KEYS),
        ("model.rs.length_params", {"max_length", "min_length"}),
        ("model.rs.reward", {"target", "kwargs"}),
        ("model.rs.generation", {field.name for field in fields(GenerationSettings)}),
        ("model.rs.training", {field.name for field in fields(TrainingSettings)}),
    )
    for section, known in sections:
        settings = OmegaConf.select(cfg, section)
        if not OmegaConf.is_dict(settings) and (settings is not None or section in REQUIRED_SECTIONS):
            raise ConfigError(f"{section}={settings!r} must be a section with keys, of {', '.join(sorted(known))}")
        is_open = section in OPEN_SECTIONS
        for key in settings or ():
            if key in known:
                continue
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.8 if is_open else 0.0)
            if near:
                raise ConfigError(f"{section}.{key} is not a known key; did you mean {section}.{near[0]}?")
            logging.warning(f"{section}.{key} is not a key of this library and is ignored, unless your code reads it")
    for key in set(cfg) - TOP_LEVEL_KEYS:  # scripts may add their own sections
        near = difflib.get_close_matches(str(key), TOP_LEVEL_KEYS, n=1, cutoff=0.8)
        if near and near[0] not in cfg:
            raise ConfigError(f"{key} is not a known section; did you mean {near[0]}?")
    for section, may_be_null in SECTIONS_OF_NEMO:
        settings = OmegaConf.select(cfg, section, default={})
        if not (OmegaConf.is_dict(settings) or settings == {} or (settings is None and may_be_null)):
            raise ConfigError(f"{section}={settings!r} must be a section with keys")


def _check_exp_manager(cfg: DictConfig) -> None:
    manager = cfg.exp_manager
    try:
        OmegaConf.merge(OmegaConf.structured(ExpManagerConfig), manager)
    except OmegaConfBaseException as error:
        raise ConfigError(f"exp_manager.{error.full_key}: {str(error).splitlines()[0]}") from error
    checkpoint = manager.get("resume_from_checkpoint")
    if checkpoint is not None:
        try:
            read_run_state(checkpoint)
        except ValueError as error:
            raise ConfigError(f"exp_manager.resume_from_checkpoint={checkpoint} is no checkpoint: {error}") from error
    if manager.get("create_wandb_logger") and importlib.util.find_spec("wandb") is None:
        raise ConfigError("exp_manager.create_wandb_logger=True needs the package wandb, which is not installed")


def _check_trainer(cfg: DictConfig) -> None:
    """Lightning's loop, loggers and checkpoints are unused; its limits only set the learning-rate schedule's length."""
    rs = cfg.trainer.rs
    for key, source in (("logger", "makes the loggers"), ("enable_checkpointing", "sees to checkpoints")):
        if cfg.trainer.get(key) is not False:
            raise ConfigError(f"trainer.{key}={cfg.trainer.get(key)!r} must be False (exp_manager {source})")
    for key, limit in (("max_epochs", rs.max_epochs), ("max_steps", rs.get("max_steps", -1))):
        value = cfg.trainer.get(key)
        if value is None:
            raise ConfigError(f"trainer.{key}=None must be {limit} (trainer.rs.{key})")
        if value != limit:
            logging.warning(
                f"trainer.{key}={value} sets the length of the learning-rate schedule alone; the run ends by "
                f"trainer.rs.{key}={limit}"
            )


def check_machine(cfg: DictConfig) -> None:
    """Refuse a `trainer` section that asks for GPUs, nodes or processes that do not exist.

    Raises:
        ConfigError: one line with the key, its value and the fix.
    """
    if cfg.trainer.accelerator == "gpu" and torch.cuda.device_count() == 0:
        raise ConfigError("trainer.accelerator=gpu, but this machine has no GPU; set trainer.accelerator=cpu to use it")
    if cfg.trainer.num_nodes > 1 and "MASTER_ADDR" not in os.environ and not any(c.detect() for c in CLUSTERS):
        raise ConfigError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}, but nothing has started processes on other nodes: start the "
            "script with srun or torchrun, or set trainer.num_nodes=1"
        )
    if TorchElasticEnvironment.detect():
        num_started = int(os.environ["LOCAL_WORLD_SIZE"])
        if num_started != cfg.trainer.devices:
            raise ConfigError(
                f"trainer.devices={cfg.trainer.devices} must be {num_started}, as many processes as torchrun has "
                "started on this node (--nproc-per-node)"
            )


def _check_unsupported(cfg: DictConfig) -> None:
    model, precision = cfg.model, cfg.trainer.precision
    dtype = _dtype(precision)
    if dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(f"trainer.precision={precision} is not supported; use bf16 or 32")
    if cfg.trainer.accelerator == "cpu" and dtype != torch.float32 and not model.megatron_amp_O2:
        raise ConfigError(
            f"trainer.precision={precision} is supported on a CPU only with model.megatron_amp_O2=True; "
            "set that, or use precision 32"
        )
    if model.get("precision") is not None and _dtype(model.precision) is None:
        raise ConfigError(f"model.precision={model.precision} must be trainer.precision={precision}")
    if (model.get("context_parallel_size") or 1) > 1:
        raise ConfigError("model.context_parallel_size must be 1: context parallelism is not supported")
    has_te = cfg.trainer.accelerator != "cpu" and importlib.util.find_spec("transformer_engine") is not None
    uses_te = has_te and model.get("transformer_engine", False)
    if model.get("num_moe_experts") and not uses_te:
        raise ConfigError(
            f"model.num_moe_experts={model.num_moe_experts}: a mixture of experts needs Transformer Engine "
            "(model.transformer_engine=True, on a GPU)"
        )
    window = model.get("window_size")
    if window is not None and not uses_te and 0 <= window[0] < model.data.seq_length - 1:
        raise ConfigError(
            f"model.window_size={list(window)} needs Transformer Engine (model.transformer_engine=True, on a GPU); "
            f"without it lower model.data.seq_length={model.data.seq_length} to {window[0] + 1}, which fits in"
        )
    if uses_te and model.data.get("reset_attention_mask"):
        raise ConfigError(
            "model.data.reset_attention_mask=True needs a mask, which Transformer Engine's causal attention does not "
            "read; set it to False, or model.transformer_engine=False"
        )
    _check_optimizer(cfg)


def _dtype(precision) -> torch.dtype | None:
    try:
        return torch_dtype_from_precision(precision)
    except ValueError:
        return None


def _check_optimizer(cfg: DictConfig) -> None:
    optim = cfg.model.optim
    for key, name, known in (
        ("name", optim.name, {*AVAILABLE_OPTIMIZERS, *OPTIMIZERS_OF_MEGATRON}),
        ("sched.name", optim.get("sched", {}).get("name"), set(AVAILABLE_SCHEDULERS) - {"ReduceLROnPlateau"}),
    ):
        if name not in known and not (key == "sched.name" and "sched" not in optim):
            raise ConfigError(f"model.optim.{key}={name} must be one of {', '.join(sorted(known))}")
    if optim.name in ("distributed_fused_adam", "fused_adam") and importlib.util.find_spec("apex") is None:
        raise ConfigError(
            f"model.optim.name={optim.name} needs Apex, which is not installed; use mcore_distributed_optim or adamw"
        )
    if optim.get("overlap_param_gather_with_optimizer_step", False):
        raise ConfigError("model.optim.overlap_param_gather_with_optimizer_step=True is not supported; set it to False")
    if optim.name not in OPTIMIZERS_OF_MEGATRON and "args" not in optim:  # NeMo drops some of their keys
        passed_over = {"name", "sched", *DISTRIBUTED_OPTIMIZER_KEYS}
        _check_taken("model.optim", optim, optim.name, AVAILABLE_OPTIMIZERS[optim.name], passed_over)
    if optim.name == "distributed_fused_adam" and optim.get("contiguous_param_buffer", False):
        _check_buffer_of_parameters(cfg)
    if "sched" in optim:
        _check_schedule(optim.sched, optim.lr)


def _check_buffer_of_parameters(cfg: DictConfig) -> None:
    sent_as = cfg.model.optim.get("param_sync_dtype")
    own = torch_dtype_from_precision(cfg.trainer.precision) if cfg.model.megatron_amp_O2 else torch.float32
    if sent_as is not None and str_to_dtype(sent_as) != own:
        raise ConfigError(
            f"model.optim.param_sync_dtype={sent_as}: parameters of {own} are sent from a buffer of their own type; "
            "remove it, or set model.optim.contiguous_param_buffer=False"
        )


def _check_schedule(sched: DictConfig, lr: float) -> None:
    if not {"args", "params", "_target_"} & set(sched):  # otherwise the settings are in there
        passed_over = {"name", "monitor", "reduce_on_plateau"}
        _check_taken("model.optim.sched", sched, sched.name, AVAILABLE_SCHEDULERS[sched.name], passed_over)
    min_lr = sched.get("min_lr", 0)
    # With constant steps, NeMo's cosine schedule is Megatron's, which rejects equal rates.
    is_in_megatrons_manner = sched.name == "CosineAnnealing" and bool(sched.get("constant_steps"))
    if min_lr > lr or (min_lr == lr and is_in_megatrons_manner):
        raise ConfigError(f"model.optim.sched.min_lr={min_lr} must be less than model.optim.lr={lr}")


def _check_taken(section: str, settings: DictConfig, name: str, made_by: type, passed_over: set[str]) -> None:
    """Refuse a key that is neither an argument of the class built from the section nor in `passed_over`."""
    known = _arguments(made_by)
    for key in settings:
        if key not in known | passed_over:
            raise ConfigError(
                f"{section}.{key} is not a setting of {name}, which has {', '.join(sorted(known))}; correct it, or "
                f"remove it (~{section}.{key})"
            )


def _arguments(made_by: type) -> set[str]:
    """Keyword arguments of a class, including its base class's if it forwards `**kwargs`."""
    names = set()
    for above in made_by.__mro__:
        if "__init__" not in vars(above):
            continue
        parameters = inspect.signature(above.__init__).parameters.values()
        names |= {parameter.name for parameter in parameters}
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names - {"self", "params", "optimizer", "kwargs", "last_epoch"}


def _check_numbers(cfg: DictConfig) -> None:
    model, rs = cfg.model, cfg.model.rs
    model_parallel_size = model.get("tensor_model_parallel_size", 1) * model.get("pipeline_model_parallel_size", 1)
    num_devices = cfg.trainer.devices * cfg.trainer.num_nodes
    if num_devices % model_parallel_size:
        raise ConfigError(
            f"trainer.devices * trainer.num_nodes = {num_devices} must be a multiple of tensor * pipeline parallel "
            f"size = {model_parallel_size}"
        )
    data_parallel_size = num_devices // model_parallel_size
    check_sizes(
        num_rollouts_per_prompt=rs.num_rollouts_per_prompt,
        top_n_rollouts=rs.top_n_rollouts,
        num_rollout_samples=rs.num_rollout_samples,
        rollout_micro_batch_size=rs.rollout_micro_batch_size,
        global_batch_size=model.global_batch_size,
        micro_batch_size=model.micro_batch_size,
        data_parallel_size=data_parallel_size,
    )
    rows = rs.get("val_rollout_micro_batch_size", rs.rollout_micro_batch_size) * data_parallel_size
    if rs.num_val_samples % rows:
        raise ConfigError(
            f"model.rs.num_val_samples={rs.num_val_samples} must be a multiple of model.rs.val_rollout_micro_batch_size"
            f" * {data_parallel_size} data-parallel replicas = {rows}"
        )
    for key, source in (("model_gbs", "global_batch_size"), ("model_mbs", "micro_batch_size")):
        size = cfg.trainer.rs.get(key, model[source])
        if size != model[source]:
            raise ConfigError(f"trainer.rs.{key}={size} must be model.{source}={model[source]}")
    val_interval, save_interval = cfg.trainer.rs.val_check_interval, cfg.trainer.rs.save_interval
    if val_interval > 0 and save_interval % val_interval:
        raise ConfigError(
            f"trainer.rs.save_interval={save_interval} must be a multiple of trainer.rs.val_check_interval="
            f"{val_interval}, so that every checkpoint has its validation metrics"
        )


def _check_lengths(model: DictConfig) -> None:
    max_length, min_length = model.rs.length_params.max_length, model.rs.length_params.min_length
    seq_length, context = model.data.seq_length, model.encoder_seq_length
    if min_length >= max_length:
        raise ConfigError(
            f"model.rs.length_params: no response could end, as it may only behind min_length={min_length} tokens, but "
            f"is cut off at max_length={max_length}, and none would be trained on; lower min_length"
        )
    if seq_length > context:
        raise ConfigError(
            f"model.data.seq_length={seq_length} (longest prompt + max_length={max_length}) exceeds the model's "
            f"{context} positions (model.encoder_seq_length); lower seq_length"
        )
    if max_length >= seq_length:
        raise ConfigError(
            f"model.rs.length_params.max_length={max_length} leaves no room for a prompt within model.data.seq_length="
            f"{seq_length}; lower max_length"
        )


def _check_pack_size(model: DictConfig) -> None:
    training = model.rs.get("training") or {}
    if training.get("max_tokens_per_pack") is None:
        return
    reasons = {
        "model.rs.training.packing=False": not training.get("packing", True),
        "model.pipeline_model_parallel_size > 1": model.pipeline_model_parallel_size > 1,
        "model.rs.loss_normalization=micro_batch": model.rs.get("loss_normalization") == "micro_batch",
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(
                f"model.rs.training.max_tokens_per_pack={training.max_tokens_per_pack}: with {reason} a pack has the "
                "tokens of a micro-batch; set it to null, and model.micro_batch_size instead"
            )


def _check_streamed_states(cfg: DictConfig) -> None:
    if not (cfg.model.rs.get("training") or {}).get("stream_adam_states", False):
        return
    # Apex's step runs bucket by bucket, and the parameters that it writes must not be part of its state.
    optim = cfg.model.optim
    needed = {
        "model.optim.name=distributed_fused_adam": optim.name == "distributed_fused_adam",
        "model.megatron_amp_O2=True": cfg.model.megatron_amp_O2,
        "trainer.precision=bf16": torch_dtype_from_precision(cfg.trainer.precision) == torch.bfloat16,
        "no model.optim.param_sync_dtype": optim.get("param_sync_dtype") is None,
        "model.rs.offload_adam_states=True": cfg.model.rs.offload_adam_states,
    }
    missing = [setting for setting, is_given in needed.items() if not is_given]
    if missing:
        raise ConfigError(f"model.rs.training.stream_adam_states=True needs {' and '.join(missing)}")


def _check_data(model: DictConfig) -> None:
    if model.data.data_prefix is None:
        raise ConfigError("model.data.data_prefix is not set; give {train: [file], validation: [file], test: [file]}")
    data, num_per_step = model.data, model.rs.num_rollout_samples
    more_sets = [name for name in data.data_prefix if str(name).startswith("validation_")]
    if isinstance(data.data_prefix, DictConfig) and more_sets:
        raise ConfigError(
            f"model.data.data_prefix.{more_sets[0]} is one validation set too many: name all files under validation"
        )
    try:
        counts = check_prompt_files(data.data_prefix, data.data_impl)
        if isinstance(data.data_prefix, DictConfig):
            num_prompts = sum(counts[path] for path in data.data_prefix.train if path in counts)
        else:
            parts = [split_rows(data.splits_string, counts[path]) for path in data.data_prefix if path in counts]
            num_prompts, num_val_prompts = (sum(len(part[split]) for part in parts) for split in (0, 1))
            if num_val_prompts == 0:
                raise ValueError(
                    f"model.data.splits_string={data.splits_string} leaves none of the {sum(counts.values())} prompts "
                    "for validation; give it a larger share"
                )
    except (ValueError, AssertionError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(str(error)) from error
    if num_prompts < num_per_step:
        raise ConfigError(
            f"model.data.data_prefix: the {num_prompts} training prompts are fewer than one step of "
            f"model.rs.num_rollout_samples={num_per_step}; lower it or add prompts"
        )
