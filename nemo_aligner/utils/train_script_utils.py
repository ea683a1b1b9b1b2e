"""Set-up of the training script: trainer, process groups, adapters, optimizer, checkpoints, loggers."""

import contextlib
import copy
import functools
import re
import sys
import traceback
import types
import warnings

from megatron.core import parallel_state
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.utils import logging
from nemo.utils.callbacks import NeMoModelCheckpoint
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue
from pytorch_lightning.trainer import call
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.trainer.trainer import Trainer
from pytorch_lightning.utilities import rank_zero_only

from nemo_aligner import compat
from nemo_aligner.compat import adam_step, cpu
from nemo_aligner.models.nlp.gpt.lora import add_adapters_
from nemo_aligner.servers.http_communicator import BadAnswer, NoAnswer
from nemo_aligner.utils.background_save import BackgroundSave
from nemo_aligner.utils.checkpoints import (
    COUNTERS,
    custom_save_ckpt_func,
    damage_named,
    read_run_state,
    write_missing_archive,
)
from nemo_aligner.utils.config_checks import DISTRIBUTED_OPTIMIZER_KEYS, check_rs_config
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.interpolations import resolve_interpolations
from nemo_aligner.utils.peft_checks import check_scheme
from nemo_aligner.utils.run_settings import check_resumed, data_position, tracked_settings
from nemo_aligner.utils.server_utils import RewardError

compat.apply()

# Keys of a parameter group that do not come from the config.
OPTIMIZER_STATE = ("params", "step")


def with_profile_as_override(arguments: list[str]) -> list[str]:
    """The command line with `--profile`, `--profile=<steps>` and `--profile <steps>` replaced by a Hydra override.

    A word or number after `--profile` can only be its value: overrides have a `=` or a `~`, flags a `-`.
    """
    joined = []
    for argument in arguments:
        if joined[-1:] == ["--profile"] and re.fullmatch(r"\w+|-?\d+(\.\d*)?", argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    spelt_out = ["--profile=true" if argument == "--profile" else argument for argument in joined]
    return [re.sub("^--profile=", "++trainer.rs.profile=", argument) for argument in spelt_out]


@contextlib.contextmanager
def exit_on_config_error():
    """Turn a `ConfigError`, or the error of a key that cannot be read, into one line on stderr and exit code 2."""
    try:
        yield
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (InterpolationResolutionError, MissingMandatoryValue) as error:
        print(f"error: {error.full_key}: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def exit_on_reward_error():
    """Turn a `RewardError` into its one line on rank 0's stderr and exit code 1.

    If a user's function raised, its traceback precedes that line.
    """
    try:
        yield
    except RewardError as error:
        cause = error
        while isinstance(cause, RewardError):
            cause = cause.__cause__
        if rank_zero_only.rank == 0:
            if cause is not None and not isinstance(cause, (NoAnswer, BadAnswer)):
                traceback.print_exception(cause)
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def resolve_and_create_trainer(cfg: DictConfig, pop_trainer_key: str) -> Trainer:
    """Resolve `cfg` in place and build the Lightning trainer from `cfg.trainer` without its key `pop_trainer_key`.

    If that is "rs", the whole configuration is checked first, before anything expensive happens.

    Raises:
        ConfigError: for a mistake in the configuration or in a file it names.
    """
    resolve_interpolations(cfg)
    if OmegaConf.select(cfg, "trainer.accelerator") == "cpu":
        cpu.enable()
        with open_dict(cfg):
            cfg.model.use_cpu_initialization = True
    if pop_trainer_key == "rs":
        check_rs_config(cfg)
    with open_dict(cfg):
        cfg.model.setdefault("gradient_as_bucket_view", True)
    with temp_pop_from_config(cfg.trainer, pop_trainer_key):
        return MegatronTrainerBuilder(cfg).create_trainer()


@contextlib.contextmanager
def temp_pop_from_config(cfg: DictConfig, name_to_temporarily_remove: str):
    """Remove the key from `cfg` within the context."""
    with open_dict(cfg):
        removed = cfg.pop(name_to_temporarily_remove)
    try:
        yield
    finally:
        with open_dict(cfg):
            cfg[name_to_temporarily_remove] = removed


def join_started_processes(ptl_trainer: Trainer) -> None:
    """Initialize the process group now if an external launcher started all processes, so that an error on one ends all.

    Lightning as the launcher starts the others only once rank 0 restores the model.
    """
    if ptl_trainer.strategy.cluster_environment.creates_processes_externally:
        ptl_trainer.strategy.setup_environment()


def init_distributed(ptl_trainer: Trainer, ptl_model, use_te: bool = False) -> None:
    """Initialize the process group and Megatron's parallel groups, unless restoring the model already did."""
    ptl_trainer.state.fn = TrainerFn.FITTING
    ptl_trainer.strategy.connect(ptl_model)
    if not parallel_state.is_initialized():
        if ptl_trainer.strategy.launcher is not None:
            ptl_trainer.strategy.launcher.launch(lambda: None, trainer=ptl_trainer)
        ptl_trainer.strategy.setup_environment()
    if use_te:
        ptl_model.setup_transformer_engine_tp_groups()


def init_peft(ptl_model, updated_cfg: DictConfig) -> None:
    """Add adapters as `updated_cfg.peft` says, fresh or from `peft.restore_from_path`; "none" trains all weights.

    Raises:
        AssertionError: for a scheme other than lora, sdlora and none.
        ConfigError: for sdlora, adapters to restore without a scheme, or an archive that does not hold these adapters.
    """
    peft_cfg = updated_cfg.get("peft", None) or OmegaConf.create({"peft_scheme": "none"})
    scheme = peft_cfg.peft_scheme
    assert scheme in ("lora", "sdlora", "none", None), f"model.peft.peft_scheme={scheme!r} must be lora, sdlora or none"
    if check_scheme(peft_cfg):
        restore_from_path = peft_cfg.get("restore_from_path", None)
        logging.info(f"adding {scheme} adapters" + (f" from {restore_from_path}" if restore_from_path else ""))
        add_adapters_(ptl_model, updated_cfg, restore_from_path)
    ptl_model.setup_complete = True


def init_using_ptl(ptl_trainer: Trainer, ptl_model, train_dataloader, train_ds) -> None:
    """Run Lightning's set-up as `Trainer.fit` would, up to the start of its loop.

    Builds the optimizer and its schedule and, if `ptl_trainer.ckpt_path` is set, restores weights, optimizer state,
    position in the schedule and callbacks from it. The optimizer's settings and the schedule itself are taken from the
    config, even where it has changed since.

    Raises:
        ConfigError: if the checkpoint is damaged, or cannot be continued with a setting that has changed.
    """
    ptl_model._train_dl, ptl_model._train_ds = train_dataloader, train_ds
    disable_data_callbacks(ptl_model)
    resumed_state = retrieve_custom_trainer_state_dict(ptl_trainer)
    _set_schedule_horizon(ptl_trainer, ptl_model.cfg, train_ds, resumed_state)
    if not ptl_model.with_distributed_adam:
        _drop_distributed_optimizer_keys(ptl_model.cfg.optim)
    ptl_model.rs_settings = tracked_settings(ptl_model.cfg, ptl_model.restored_from, len(train_ds))
    if resumed_state is not None:
        check_resumed(resumed_state, ptl_model.rs_settings, ptl_trainer.ckpt_path)
    ptl_trainer.state.fn = TrainerFn.FITTING
    ptl_trainer.strategy.connect(ptl_model)
    ptl_trainer._callback_connector._attach_model_callbacks()
    ptl_trainer._callback_connector._attach_model_logging_functions()
    call._call_setup_hook(ptl_trainer)
    call._call_configure_model(ptl_trainer)
    ptl_trainer.strategy.setup(ptl_trainer)
    for optimizer in ptl_trainer.strategy.optimizers:
        adam_step.restore_on_load(optimizer)
    call._call_callback_hooks(ptl_trainer, "on_fit_start")
    call._call_lightning_module_hook(ptl_trainer, "on_fit_start")
    named = contextlib.nullcontext() if ptl_trainer.ckpt_path is None else damage_named(ptl_trainer.ckpt_path)
    with _keeping_optimizer_settings(ptl_trainer), named:
        ptl_trainer._checkpoint_connector._restore_modules_and_callbacks(ptl_trainer.ckpt_path)
        ptl_trainer._checkpoint_connector.restore_training_state()
        ptl_trainer._checkpoint_connector.resume_end()


def disable_data_callbacks(ptl_model) -> None:
    """Keep the model's set-up from building datasets: the script builds its own."""
    for name in ("build_train_valid_test_datasets", "setup_training_data", "setup_validation_data", "setup_test_data"):
        setattr(ptl_model, name, types.MethodType(lambda self, *args, **kwargs: None, ptl_model))


def _set_schedule_horizon(ptl_trainer: Trainer, model_cfg: DictConfig, train_ds, resumed_state: dict | None) -> None:
    """Set the length of the learning-rate schedule in optimizer steps: those done plus those of all future RS steps."""
    sched = OmegaConf.select(model_cfg, "optim.sched")
    if sched is None:
        return
    if sched.get("max_steps") is None:
        num_prompts, num_per_step = len(train_ds), model_cfg.rs.num_rollout_samples
        done = resumed_state or dict.fromkeys(COUNTERS, 0)
        position, _ = data_position(done, num_prompts, num_per_step)
        rs_steps = num_prompts // num_per_step * ptl_trainer.max_epochs - position // num_per_step
        if ptl_trainer.max_steps >= 0:
            rs_steps = min(rs_steps, ptl_trainer.max_steps - done["step"])
        rows = max(0, rs_steps) * num_per_step * model_cfg.rs.top_n_rollouts
        with open_dict(model_cfg):
            sched.max_steps = done["rs_optimization_step"] + rows // model_cfg.global_batch_size
    # NeMo prefers the limit of Lightning's loop, which does not run here and whose limit counts RS steps.
    ptl_trainer.fit_loop.epoch_loop.max_steps = sched.max_steps


def _drop_distributed_optimizer_keys(optim_cfg: DictConfig) -> None:
    """Drop keys of distributed optimizers, so that changing `optim.name` is enough to switch to a plain one."""
    dropped = [key for key in DISTRIBUTED_OPTIMIZER_KEYS if key in optim_cfg]
    if dropped:
        logging.info(f"model.optim.name={optim_cfg.name} does not use {', '.join(dropped)}")
    with open_dict(optim_cfg):
        for key in dropped:
            optim_cfg.pop(key)


@contextlib.contextmanager
def _keeping_optimizer_settings(ptl_trainer: Trainer):
    """Context manager: restoring sets the optimizers' state and schedules' step counts, but no settings of either."""
    groups = [group for optimizer in ptl_trainer.strategy.optimizers for group in optimizer.param_groups]
    settings = [{key: value for key, value in group.items() if key not in OPTIMIZER_STATE} for group in groups]
    schedules = [config.scheduler for config in ptl_trainer.lr_scheduler_configs]
    beginnings = [copy.deepcopy(schedule.state_dict()) for schedule in schedules]
    yield
    groups = [group for optimizer in ptl_trainer.strategy.optimizers for group in optimizer.param_groups]
    for group, own in zip(groups, settings, strict=True):
        group.update(own)
    for schedule, beginning in zip(schedules, beginnings, strict=True):
        num_steps = schedule.last_epoch
        schedule.load_state_dict(beginning)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # asking to step the optimizer first
            for _ in range(num_steps):  # some schedules compute a rate only from the previous one
                schedule.step()


def retrieve_custom_trainer_state_dict(ptl_trainer: Trainer) -> dict | None:
    """The RS counters of the checkpoint that the trainer resumes from, or None if it starts fresh.

    `settings` holds the settings of the run that wrote it, in the form of `tracked_settings`, if they are known.

    Raises:
        ValueError: if the counters are neither in the checkpoint nor in its name.
    """
    return None if ptl_trainer.ckpt_path is None else read_run_state(ptl_trainer.ckpt_path)


class FakeScheduler:
    """For an optimizer without a learning-rate schedule."""

    def __init__(self):
        self.last_epoch = 0

    def step(self) -> None:
        """Nothing to do."""


class FakeCheckpointCallback:
    """For a run without checkpoints."""

    def custom_save(self, *args, **kwargs) -> None:
        """Nothing to do."""

    def write_missing_archive(self) -> None:
        """Nothing to do."""


def extract_optimizer_scheduler_from_ptl_model(ptl_model):
    """The raw optimizer and the scheduler (a `FakeScheduler` if there is none) that Lightning's set-up made."""
    optimizer = ptl_model.optimizers(use_pl_optimizer=False)
    scheduler = ptl_model.lr_schedulers()
    assert not isinstance(scheduler, list), "a model with several learning-rate schedulers is not supported"
    return optimizer, FakeScheduler() if scheduler is None else scheduler


def add_custom_checkpoint_callback(ptl_trainer: Trainer, ptl_model):
    """NeMo's checkpoint callback with a method `custom_save(monitor_candidates, is_train_end, save_top_only)`."""
    for callback in ptl_trainer.callbacks:
        if isinstance(callback, NeMoModelCheckpoint):
            callback.background_save = BackgroundSave(ptl_trainer)
            callback.custom_save = functools.partial(custom_save_ckpt_func, callback, ptl_trainer, ptl_model)
            callback.write_missing_archive = functools.partial(write_missing_archive, callback, ptl_model)
            return callback
    return FakeCheckpointCallback()


class CustomLoggerWrapper:
    """Several Lightning loggers as one; a method call skips the loggers that lack it.

    A write failure, such as a full disk, is only a warning, because training does not depend on logs.
    """

    def __init__(self, loggers):
        self.loggers = loggers

    def apply_fn(self, name_of_fn: str, *args, **kwargs) -> None:
        for logger in self.loggers:
            if not hasattr(logger, name_of_fn):
                continue
            try:
                getattr(logger, name_of_fn)(*args, **kwargs)
            except OSError as error:
                logging.warning(f"{type(logger).__name__}.{name_of_fn}: {error}")

    def log_hyperparams(self, params) -> None:
        self.apply_fn("log_hyperparams", params)

    def log_metrics(self, metrics: dict, step: int | None = None, prefix: str = "") -> None:
        self.apply_fn("log_metrics", {f"{prefix}{key}": value for key, value in metrics.items()}, step=step)
        self.apply_fn("save")  # so that a killed run does not lose its metrics

    def log_table(self, *args, **kwargs) -> None:
        self.apply_fn("log_table", *args, **kwargs)

    def log_image(self, *args, **kwargs) -> None:
        self.apply_fn("log_image", *args, **kwargs)

    def finalize(self) -> None:
        self.apply_fn("finalize", "success")
