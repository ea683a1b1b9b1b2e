"""Step arithmetic of a training run: valid sizes, steps per epoch, and what is due after a step."""

from megatron.core import parallel_state

from nemo_aligner.utils.errors import ConfigError


def check_sizes(
    *,
    num_rollouts_per_prompt: int,
    top_n_rollouts: int,
    num_rollout_samples: int,
    rollout_micro_batch_size: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
) -> None:
    """Refuse sizes that are inconsistent.

    Raises:
        ConfigError: naming the keys, their values and what must hold.
    """
    n, k, dp = num_rollouts_per_prompt, top_n_rollouts, data_parallel_size
    if not 1 <= k <= n:
        raise ConfigError(
            f"model.rs.top_n_rollouts={k} must be between 1 and model.rs.num_rollouts_per_prompt={n}, from which the "
            "best are chosen"
        )
    if num_rollout_samples * k % global_batch_size:
        raise ConfigError(
            f"model.rs.num_rollout_samples={num_rollout_samples} * model.rs.top_n_rollouts={k} must be a multiple of "
            f"model.global_batch_size={global_batch_size}, the rows of an optimizer step"
        )
    if global_batch_size % (micro_batch_size * dp):
        raise ConfigError(
            f"model.global_batch_size={global_batch_size} must be a multiple of model.micro_batch_size="
            f"{micro_batch_size} * {dp} data-parallel replicas"
        )
    if num_rollout_samples % (rollout_micro_batch_size * dp):
        raise ConfigError(
            f"model.rs.num_rollout_samples={num_rollout_samples} must be a multiple of "
            f"model.rs.rollout_micro_batch_size={rollout_micro_batch_size} * {dp} data-parallel replicas"
        )


def compute_num_rollout_microbatches(dataloader) -> int:
    """Rollout micro-batches per replica and pass: global batch / (micro-batch * data-parallel size), exactly.

    Raises:
        AssertionError: if that is not a whole number.
    """
    sampler = dataloader.batch_sampler
    per_microbatch = sampler.micro_batch_size * parallel_state.get_data_parallel_world_size()
    assert sampler.global_batch_size % per_microbatch == 0, (
        f"{sampler.global_batch_size} prompts cannot be split into micro-batches of {sampler.micro_batch_size} on "
        f"{parallel_state.get_data_parallel_world_size()} replicas"
    )
    return sampler.global_batch_size // per_microbatch


def compute_limit_batches(number_of_batches: int, limit_batches: int | float | None) -> int:
    """Batches to use out of `number_of_batches`: a fraction (float, truncated), at most so many (int), or all (None).

    Raises TypeError for any other type.
    """
    if limit_batches is None:
        limit_batches = 1.0
    if isinstance(limit_batches, float):
        return int(number_of_batches * limit_batches)
    if isinstance(limit_batches, int):
        return min(number_of_batches, limit_batches)
    raise TypeError(f"a limit of batches is an int, a float or None, not {limit_batches!r}")


def compute_num_steps_per_epoch(sampler, limit_train_batches: int | float | None = 1.0) -> int:
    """Full steps of `sampler.global_batch_size` rows in one pass over `sampler.total_samples` rows, then limited.

    A limit of None or a float above 1.0 counts as 1.0; a negative limit is none. Raises NotImplementedError if the
    sampler keeps an incomplete last step.
    """
    if not sampler.drop_last:
        raise NotImplementedError("training with drop_last=False is not supported; build the dataloader with True")
    num_steps = sampler.total_samples // sampler.global_batch_size
    if limit_train_batches is None or (isinstance(limit_train_batches, float) and limit_train_batches > 1.0):
        limit_train_batches = 1.0
    if isinstance(limit_train_batches, int | float) and limit_train_batches < 0:
        return num_steps
    return compute_limit_batches(num_steps, limit_train_batches)


def check_progress(
    step: int,
    max_steps: int,
    val_check_interval: int,
    save_interval: int,
    limit_val_batches: int | float | None,
    run_time_exceeded: bool = False,
) -> tuple[bool, bool, bool]:
    """What is due after `step` steps: (run validation, save, training is over).

    Validation is enabled by a positive interval and `limit_val_batches` other than 0, saving by a positive interval.
    Each fires on its interval, at the end of training and when the run time is up. Raises AssertionError if validation
    is enabled and `save_interval` is not a multiple of `val_check_interval`: a save would lack its validation metrics.
    """
    validation_enabled = limit_val_batches != 0 and val_check_interval > 0
    saving_enabled = save_interval > 0
    assert not validation_enabled or save_interval % val_check_interval == 0, (
        f"save_interval={save_interval} must be a multiple of val_check_interval={val_check_interval}"
    )
    is_train_end = step == max_steps
    last_chance = is_train_end or run_time_exceeded
    run_validation = validation_enabled and (last_chance or step % val_check_interval == 0)
    save_model = saving_enabled and (last_chance or step % save_interval == 0)
    return run_validation, save_model, is_train_end


def safe_is_divisible(a: int, b: int) -> bool:
    """Whether `b` divides `a`; nothing is divisible by 0."""
    return b != 0 and a % b == 0
