"""Rejection sampling: roll out several responses per prompt, score them, train on the best, repeat.

Legend: N rollouts per prompt, K of them kept, G prompts per RS step over all replicas, R = G * K / DP rows that a
replica trains on per RS step, S padded token width, P padded prompt width.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from megatron.core import parallel_state
from nemo.utils import AppState, logging
from omegaconf import OmegaConf
from tqdm import tqdm

from nemo_aligner.algorithms.rollout_batches import read_prompts, stored_or_generated, without_stand_ins
from nemo_aligner.algorithms.rollout_metrics import example, global_rollout_metrics, selection_metrics
from nemo_aligner.algorithms.scoring import add_rewards_, request_rewards, wait_on_all_ranks
from nemo_aligner.algorithms.training_batches import count_trained_rows, optimizer_batches, stack_rollouts
from nemo_aligner.compat.device import current_device
from nemo_aligner.utils.checkpoints import advance_save, saving_in_background
from nemo_aligner.utils.distributed import ScopedTimer
from nemo_aligner.utils.errors import ConfigError, PromptError
from nemo_aligner.utils.parallel_state import get_model_parallel_src_rank
from nemo_aligner.utils.phases import OTHER, PhaseClock
from nemo_aligner.utils.ppo_utils import select_topk
from nemo_aligner.utils.rollout_log import RolloutLog
from nemo_aligner.utils.run_settings import data_position, has_other_step_size
from nemo_aligner.utils.server_utils import RewardError
from nemo_aligner.utils.step_profile import StepProfile
from nemo_aligner.utils.tensors import gc_frozen
from nemo_aligner.utils.termination import StopRequested, TerminationWatch
from nemo_aligner.utils.timers import max_over_ranks
from nemo_aligner.utils.train_utils import clip_gradients
from nemo_aligner.utils.trainer_utils import (
    check_progress,
    check_sizes,
    compute_num_rollout_microbatches,
    compute_num_steps_per_epoch,
)
from nemo_aligner.utils.unscored_rollouts import UnscoredRollouts
from nemo_aligner.utils.utils import cpu_dict

MAX_TABLE_ROWS = 100
# First number of the key from which the random stream of a phase is derived.
TRAINING_STREAM, VALIDATION_STREAM = 0, 1
# What ends a run, on all ranks at the same point.
ENDS_OF_A_RUN = (RewardError, PromptError, StopRequested)


class RSTrainer:
    """Runs the rejection-sampling loop over a policy; see `fit`. `cfg` is the section `trainer.rs`.

    Attributes:
        step: RS steps done.
        rs_optimization_step: optimizer steps done, including those skipped because there was nothing to train on.
        consumed_samples: prompts consumed by the whole job.
    """

    def __init__(
        self,
        cfg,
        model,
        optimizer,
        scheduler,
        train_dataloader,
        val_dataloader,
        logger,
        ckpt_callback,
        run_timer,
        num_rollouts_per_prompt: int,
        top_n_rollouts: int,
        rm,
        rollout_dir: Path | None = None,
    ):
        """
        Args:
            rm: scores rollouts: `rm.infer_rm(rollout_batch).result()` gives float32 [rows, 1].
            rollout_dir: where every rollout is written; None takes `rollouts` in the folder that NeMo's exp_manager
                has set up, and writes nothing if there is none.

        Raises:
            ConfigError: if the sizes do not fit each other.
        """
        self.cfg = cfg
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.train_dataloader = train_dataloader
        self.val_dataloader = val_dataloader
        self.logger = logger
        self.ckpt_callback = ckpt_callback
        self.run_timer = run_timer
        self.num_rollouts_per_prompt = num_rollouts_per_prompt
        self.top_n_rollouts = top_n_rollouts
        self.rm = rm
        log_dir = None if AppState().log_dir is None else Path(AppState().log_dir)
        if rollout_dir is None and log_dir is not None:
            rollout_dir = log_dir / "rollouts"
        rank, sampling = get_model_parallel_src_rank(), model._sampling_params
        self.rollout_log = RolloutLog(rollout_dir, model.tokenizer, sampling["end_strings"], rank)
        made_with = {
            "sampling_params": sampling,
            "length_params": model._length_params,
            "num_rollouts_per_prompt": num_rollouts_per_prompt,
            "data_parallel_size": parallel_state.get_data_parallel_world_size(),
            "reward": getattr(rm, "description", None),
            "model.seed": model.cfg.get("seed"),
            "pretrained_checkpoint.restore_from_path": getattr(model, "restored_from", None),
            "model.peft.restore_from_path": OmegaConf.select(model.cfg, "peft.restore_from_path"),
        }
        self.unscored = UnscoredRollouts(rollout_dir, rank, made_with)
        self.rollout_batch_seq_length = cfg.get("rollout_batch_seq_length", None)
        self.timer = ScopedTimer(reduction="mean", sync_cuda=True, buffer_size=1)
        self.phases = PhaseClock()
        self.profile = StepProfile(cfg.get("profile", False), None if log_dir is None else log_dir / "profile")
        self.termination = TerminationWatch()
        self.step = self.rs_optimization_step = self.consumed_samples = self._saved_step = 0
        self._num_steps_before = 0  # prompts consumed, in steps of the present size, minus `step`
        columns = ["step", "prompt", "response", "reward"]
        self.train_df, self.val_df = pd.DataFrame(columns=columns), pd.DataFrame(columns=columns)
        self.num_prompts_per_step = train_dataloader.batch_sampler.global_batch_size
        self._check_sizes()
        self.num_steps_per_epoch = compute_num_steps_per_epoch(train_dataloader.batch_sampler)
        self.set_max_steps()

    def _check_sizes(self) -> None:
        check_sizes(
            num_rollouts_per_prompt=self.num_rollouts_per_prompt,
            top_n_rollouts=self.top_n_rollouts,
            num_rollout_samples=self.num_prompts_per_step,
            rollout_micro_batch_size=self.train_dataloader.batch_sampler.micro_batch_size,
            global_batch_size=self.cfg.model_gbs,
            micro_batch_size=self.cfg.get("model_mbs", 1),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
        )
        num_prompts = self.train_dataloader.batch_sampler.total_samples
        if num_prompts < self.num_prompts_per_step:
            raise ConfigError(
                f"model.data.data_prefix.train: {num_prompts} prompts are fewer than one step of "
                f"model.rs.num_rollout_samples={self.num_prompts_per_step}; lower it or add prompts"
            )

    @property
    def epoch(self) -> int:
        return (self.step + self._num_steps_before) // self.num_steps_per_epoch

    def set_max_steps(self) -> None:
        self.max_steps = self.num_steps_per_epoch * self.cfg.max_epochs - self._num_steps_before
        limit = self.cfg.get("max_steps", -1)
        if limit >= 0:
            self.max_steps = min(self.max_steps, limit)

    # The loop

    def fit(self) -> None:
        """Roll out, score, select, train, validate, save, until the steps, the epochs or the time are used up.

        Raises:
            PromptError, RewardError: if prompts could not be read, or rewards not be had.
            StopRequested: after SIGTERM, which is answered while rollouts are generated or scored, or after the step's
                training. A checkpoint is written before any of these is raised, and the next start resumes with the
                rollouts at hand.
        """
        self._saved_step = self.step
        self.unscored.drop_later(self.step)
        with (
            self.termination.watching(),
            saving_in_background(self.ckpt_callback, ENDS_OF_A_RUN),
            gc_frozen(),
        ):
            self._fit()

    def _fit(self) -> None:
        try:
            self.run_timer.start_time()
            self._catch_up()
            if self.step >= self.max_steps:
                logging.info(
                    f"step {self.step} of {self.max_steps}: nothing left to train; raise trainer.rs.max_steps or "
                    "trainer.rs.max_epochs, or give another exp_manager.explicit_log_dir"
                )
            dataloader_iter = None
            with _progress_bar(total=self.max_steps, initial=self.step, desc="RS steps", unit="step") as progress:
                while self.step < self.max_steps:
                    if dataloader_iter is None or (self.step + self._num_steps_before) % self.num_steps_per_epoch == 0:
                        dataloader_iter = iter(self.train_dataloader)  # of the next epoch, or the rest of one
                    summary, run_time_exceeded = self._run_step(dataloader_iter)
                    progress.update()
                    progress.set_postfix_str(summary)
                    logging.info(f"RS step {self.step}/{self.max_steps}: {summary}")
                    if run_time_exceeded:
                        break
            if self.step < self.max_steps:
                logging.info(
                    f"RS step {self.step}/{self.max_steps}: the time of exp_manager.max_time_per_run is up; the same "
                    "command continues from its last checkpoint"
                )
        except ENDS_OF_A_RUN:
            self.model.finish_inference()
            advance_save(self.ckpt_callback, wait=True)
            if self.step > self._saved_step or getattr(self.ckpt_callback, "has_last_save_failed", False):
                self.save()
            raise
        finally:
            self.profile.close()
            self.logger.finalize()

    def _catch_up(self) -> None:
        """Finish what an earlier start left undone; validate before the first step if configured."""
        if self.step > 0 and self.unscored.is_pending("val", self.step):
            self._finish_step({}, is_validation_pending=True)
        elif self.step >= self.max_steps > 0 and hasattr(self.ckpt_callback, "write_missing_archive"):
            self.ckpt_callback.write_missing_archive()
        elif self.step == 0 and self.cfg.get("val_at_start", False):
            self.log_rollouts(self.run_validation(), "val")

    def _run_step(self, dataloader_iter: Iterator) -> tuple[str, bool]:
        """Run one RS step; returns a one-line summary and whether the run's time is up.

        Every rank takes the same branches, since each of them holds a collective.
        """
        self.phases.start()
        self.model.seed_step(self.step)
        num_microbatches = compute_num_rollout_microbatches(self.train_dataloader)
        with self._traced("rollouts"), self.timer("rollout_time"):
            rollout_data, train_metrics = self.generate_rollouts(dataloader_iter, num_microbatches)
        self.log_rollouts(train_metrics, "train")
        with self._traced("training"), self.timer("train_time"):
            loss, _ = self.run_training(self._optimizer_batches(rollout_data))
        self.step += 1

        run_time_exceeded = self.run_timer.is_finished()
        val_metrics = self._finish_step(train_metrics, run_time_exceeded)
        return _summary(train_metrics, loss, val_metrics), run_time_exceeded

    def _finish_step(
        self, train_metrics: dict, run_time_exceeded: bool = False, is_validation_pending: bool = False
    ) -> dict[str, float]:
        """Validate and save if due, log timings and phases; returns the validation's metrics, if any."""
        run_val, save_model, is_train_end = check_progress(
            self.step, self.max_steps, self.cfg.val_check_interval, self.cfg.save_interval, 1.0, run_time_exceeded
        )
        val_metrics = {}
        if run_val or is_validation_pending:
            with self.timer("validation_time"), self.phases("validation"):
                val_metrics = self.run_validation()
            self.log_rollouts(val_metrics, "val")
        timings = max_over_ranks(self.timer.consume_durations())
        self.logger.log_metrics(timings, step=self.step, prefix="timers/")
        if save_model:
            candidates = {
                **{f"val_{key}": value for key, value in val_metrics.items() if key != "table"},
                **{f"train_{key}": value for key, value in train_metrics.items() if key != "table"},
                **timings,
            }
            self.save({key: torch.tensor(value) for key, value in candidates.items()}, is_train_end)
        phases = self.phases.consume()
        self.logger.log_metrics(max_over_ranks(phases), step=self.step, prefix="timers/phase_")
        self.profile.record(self.step, phases)
        return val_metrics

    # Rollouts

    @torch.no_grad()
    def generate_rollouts(self, dataloader_iter: Iterator, num_microbatches: int) -> tuple[dict, dict]:
        """Roll out one step's prompts and keep the best; returns this replica's training rows (CPU) and metrics."""
        with self.phases("offload"):
            self.model.prepare_for_inference()
        self.model.seed_sampling(TRAINING_STREAM, self.step)
        rollout_batches, metrics = self._run_inference(dataloader_iter, num_microbatches, is_validation=False)
        with self.phases("select"):
            rollout_data, data_metrics = self.generate_rs_data(rollout_batches)
        self.model.finish_inference()
        self.consumed_samples += self.num_prompts_per_step
        return cpu_dict(rollout_data), {**metrics, **data_metrics, "consumed_samples": self.consumed_samples}

    @torch.no_grad()
    def run_validation(self) -> dict:
        """Mean reward and lengths over the validation prompts, one response each; the same on all ranks."""
        self.model.prepare_for_inference()
        self.model.seed_sampling(VALIDATION_STREAM, self.step)
        sampler = self.val_dataloader.batch_sampler
        num_microbatches = min(len(sampler), compute_num_rollout_microbatches(self.val_dataloader))
        _, metrics = self._run_inference(iter(self.val_dataloader), num_microbatches, is_validation=True)
        self.model.finish_inference()
        return metrics

    def _run_inference(
        self, dataloader_iter: Iterator, num_microbatches: int, is_validation: bool
    ) -> tuple[list[dict], dict]:
        """Generate, score and, in training, select.

        Returns:
            Rollout batches (training: the kept rows; validation: all) and the metrics of all rows.

        Raises:
            PromptError: on every rank of the job, if prompts could not be read.
            RewardError: on every rank of the job, if rewards could not be had; the rollouts are on disk.
            StopRequested: on every rank of the job, after SIGTERM; the same.
        """
        split = "val" if is_validation else "train"
        num_rollouts = 1 if is_validation else self.num_rollouts_per_prompt
        batches, records = self._read_prompts(dataloader_iter, num_microbatches, split, num_rollouts)
        stored = self.unscored.load(split, self.step, batches, num_rollouts)
        microbatches: list[_Microbatch] = []
        try:
            self._generate(batches, records, stored, split, num_rollouts, into=microbatches)
            self._score_and_select(microbatches, split)
        except ENDS_OF_A_RUN as error:
            not_reached = [rollouts for rollouts in stored[len(microbatches) :] if rollouts is not None]
            where = self.unscored.save(split, self.step, [each.rollouts for each in microbatches] + not_reached)
            raise type(error)(f"{error}{where}") from error
        except BaseException:
            for each in microbatches:
                if each.kept is None:
                    self._write(each, split)
            raise
        kept = [each.kept for each in microbatches]
        metrics = self.compute_global_rollout_metrics([each.rollouts for each in microbatches])
        if not is_validation:
            metrics.update(selection_metrics(kept))
        metrics["table"] = example({**kept[0], "records": records[0]}, self.model.tokenizer)
        self.unscored.remove(split, self.step)
        return kept, metrics

    def _read_prompts(
        self, dataloader_iter: Iterator, num_microbatches: int, split: str, num_rollouts: int
    ) -> tuple[list[dict], list[list[dict]]]:
        """Collated prompts of each micro-batch, and the records of its rollouts."""
        is_validation = split == "val"
        dataset = (self.val_dataloader if is_validation else self.train_dataloader).dataset
        try:
            batches, records = read_prompts(dataloader_iter, num_microbatches, dataset, num_rollouts)
        except PromptError:
            if is_validation:  # the step counts as done: the next start has to know that this is missing
                self.unscored.save(split, self.step, [])
            raise
        if not batches:
            raise ValueError(f"the {'validation' if is_validation else 'training'} prompts make no micro-batch")
        if is_validation:
            batches = [without_stand_ins(batch) for batch in batches]
        return batches, records

    def _generate(
        self,
        batches: list[dict],
        records: list[list[dict]],
        stored: list[dict | None],
        split: str,
        num_rollouts: int,
        into: list["_Microbatch"],
    ) -> None:
        """Generate the rollouts that are not `stored`, and request each micro-batch's rewards as soon as it is there.

        What was generated before an error is in `into`.
        """
        prefetch = partial(self._prefetch_optimizer_states, beside_rollouts=True) if split == "train" else None
        done = stored_or_generated(self.model, batches, stored, num_rollouts, self._sync, prefetch, self.step)
        done = _progress_bar(done, total=len(batches), desc=f"rollouts ({split})", leave=False)
        with self.phases("rollout"):
            for rollouts, its_records in zip(done, records, strict=True):
                into.append(_Microbatch(rollouts, its_records, is_new="rewards" not in rollouts))
                with self.phases("score"):
                    into[-1].future = request_rewards(self.rm, rollouts, its_records)

    def _score_and_select(self, microbatches: list["_Microbatch"], split: str) -> None:
        """Wait for the rewards of each micro-batch, and in training select its best rows."""
        if split == "train":
            self._prefetch_optimizer_states()  # while the last rollouts are scored
        with self.phases("rollout"):
            wait_on_all_ranks(self._sync)  # replicas that still generate do so, too
        for each in microbatches:
            with self.phases("score"):
                add_rewards_(each.rollouts, each.future, self._sync)
            with self.phases("select"):
                each.kept = each.rollouts if split == "val" else self._select(each.rollouts)
            self._write(each, split, () if split == "val" else each.kept.pop("row").tolist())

    def _write(self, microbatch: "_Microbatch", split: str, kept_rows: Sequence[int] = ()) -> None:
        """To the rollout log, unless an earlier start has."""
        if microbatch.is_new:
            rows = {**microbatch.rollouts, "records": microbatch.records}
            self.rollout_log.write(split, self.step, rows, kept_rows)

    def _prefetch_optimizer_states(self, beside_rollouts: bool = False) -> None:
        with self.phases("load_state"):
            self.model.prefetch_adam_states(beside_rollouts)

    def _select(self, rollouts: dict) -> dict:
        rows = torch.arange(rollouts["rewards"].size(0), device=rollouts["rewards"].device)
        return select_topk({**rollouts, "row": rows}, self.top_n_rollouts)

    def compute_global_rollout_metrics(self, rollout_batches: list[dict]) -> dict:
        """Means over the rows of all replicas, and one row of this rank under `table`.

        Raises:
            ValueError: for an empty list.
        """
        if not rollout_batches:
            raise ValueError("there are no rollouts to report on")
        table = example(rollout_batches[0], self.model.tokenizer)
        return {"table": table, **global_rollout_metrics(rollout_batches)}

    # Training

    def generate_rs_data(self, rollout_batches: list[dict]) -> tuple[dict, dict]:
        """Stack the kept rows of all micro-batches for training.

        Returns:
            CPU tensors `response_tokens` int64 [R, S], `mask` float32 [R, S - 1] and `prompt_tokens` int64 [R, P], as
            `stack_rollouts` says. S is the same on all replicas. And no metrics of its own.
        """
        has_sharded_rows = self.model.trains_with_sequence_parallel
        rollout_data = stack_rollouts(
            rollout_batches,
            pad_id=self.model.tokenizer.eos_id,
            min_width=self.rollout_batch_seq_length,
            width_multiple=parallel_state.get_tensor_model_parallel_world_size() if has_sharded_rows else 1,
        )
        return rollout_data, {}

    def _optimizer_batches(self, rollout_data: dict) -> Iterator[dict]:
        """This replica's rows in batches of gbs / DP rows, balanced over replicas where the loss does not change.

        Raises:
            ValueError: if they are not G * K / DP.
        """
        num_replicas = parallel_state.get_data_parallel_world_size()
        with self.phases("select"):
            batches = optimizer_batches(
                rollout_data,
                num_rows=self.num_prompts_per_step * self.top_n_rollouts // num_replicas,
                rows_per_batch=self.cfg.model_gbs // num_replicas,
                balance=num_replicas > 1
                and self.model.cfg.rs.get("loss_normalization", "global_batch") == "global_batch",
                pad_id=self.model.tokenizer.eos_id,
            )
        return iter(_progress_bar(batches, desc="training", leave=False))

    def run_training(self, dataloader_iter: Iterator[dict]) -> tuple[float, dict]:
        """One optimizer step per batch; returns the last loss and its metrics.

        A batch in which no replica has a token to train on is skipped: it changes neither weights nor learning rate and
        is logged with a loss and a gradient norm of 0.

        Raises:
            ValueError: if there is no batch.
        """
        with self.phases("load_state"):
            self.model.prepare_for_training()
        loss_mean = None
        trained_rows = []  # by batch
        for batch in dataloader_iter:
            start = time.monotonic()
            lr = self.optimizer.param_groups[0]["lr"]
            with self.phases("forward_backward"):
                trained_rows.append(count_trained_rows(batch))
            loss_mean, metrics, grad_norm = self._optimize(batch) if trained_rows[-1] > 0 else self._skip_empty_batch()
            metrics = {**metrics, "lr": lr, "optim_step": self.rs_optimization_step}
            if grad_norm is not None:
                metrics["grad_norm"] = grad_norm
            metrics.update(max_over_ranks({"train_step_time": time.monotonic() - start}))
            self.logger.log_metrics(metrics, step=self.rs_optimization_step, prefix="train_optim/")
            self.rs_optimization_step += 1
            self._advance_save()
        if loss_mean is None:
            raise ValueError("run_training got no batch: there are no rollouts to train on")
        self._warn_of_empty_batches(trained_rows)
        with self.phases("optimizer"):
            self.model.finish_training()
            self.optimizer.zero_grad()
        return loss_mean, metrics

    def _optimize(self, batch: dict) -> tuple[float, dict, float | None]:
        """Forward, backward, optimizer step; returns loss, metrics and the gradient's norm, None without clipping."""
        with self.phases("forward_backward"):
            self.optimizer.zero_grad()
            self.model.prepare_for_training_step()
            loss, metrics = self.model.get_loss_and_metrics(batch=batch, forward_only=False)
        with self.phases("optimizer"):
            self.model.finish_training_step()
            grad_norm = clip_gradients(self.model, self.cfg.gradient_clip_val)
            self.optimizer.step()
            self.scheduler.step()
        return loss, metrics, grad_norm

    def _skip_empty_batch(self) -> tuple[float, dict, float | None]:
        """The result of `_optimize` for a batch without a token to train on; the optimizer is not stepped.

        A step would move the weights by momentum and weight decay.
        """
        clips = self.cfg.gradient_clip_val is not None and self.cfg.gradient_clip_val > 0
        return 0.0, {"loss": 0.0}, 0.0 if clips else None

    def _warn_of_empty_batches(self, trained_rows: list[int]) -> None:
        if all(trained_rows):
            return
        num_steps, num_rows = len(trained_rows), self.cfg.model_gbs * len(trained_rows)
        logging.warning(
            f"RS step {self.step + 1}: {trained_rows.count(0)} of {num_steps} optimizer steps had nothing to train on "
            f"and were left out; {sum(trained_rows)} of {num_rows} kept rollouts were fit for training "
            "(others were cut off, empty, not judged, or of a prompt that was too long)"
        )

    # What the parts of a step share

    def _sync(self, is_done: bool = True) -> bool:
        """Whether all ranks are done. Also answers SIGTERM and advances a background save. Collective over the job."""
        self._advance_save()
        return self.termination.sync(is_done)

    def _advance_save(self) -> None:
        with self.phases("checkpoint"):
            advance_save(self.ckpt_callback)

    @contextlib.contextmanager
    def _traced(self, half: str) -> Iterator[None]:
        """Trace the body if this step is profiled; the time to write the trace counts towards no other phase."""
        with self.phases("trace"), self.profile.trace(half, self.step + 1), self.phases(OTHER):
            yield

    def log_rollouts(self, metrics: dict, split: str) -> None:
        """Log the metrics of a rollout phase and one example of it, under `train_rollouts/` or `val_rollouts/`."""
        scalars = {key: value for key, value in metrics.items() if key != "table"}
        self.logger.log_metrics(scalars, step=self.step, prefix=f"{split}_rollouts/")
        example = pd.DataFrame([{"step": self.step, **metrics["table"]}])
        frame = pd.concat([getattr(self, f"{split}_df"), example], ignore_index=True).tail(MAX_TABLE_ROWS)
        setattr(self, f"{split}_df", frame)
        self.logger.log_table(key=f"table/{split}_rollouts", dataframe=frame, step=self.step)

    # State

    def save(self, extra_candidates: dict | None = None, is_train_end: bool = False) -> None:
        """Write a checkpoint, within `fit` in the background.

        Its name and the choice of the best come from the counters and `extra_candidates`.
        """
        with self.phases("checkpoint"):
            self.model.prepare_for_training()
            self.model.onload_adam_states()  # which belong to the checkpoint
            torch.cuda.synchronize()
            torch.distributed.barrier()
            counters = {key: torch.tensor(value, dtype=torch.int64) for key, value in self.state_dict().items()}
            candidates = {**(extra_candidates or {}), **counters}
            self.ckpt_callback.custom_save(monitor_candidates=candidates, is_train_end=is_train_end)
            self.model.finish_training()
        self._saved_step = self.step

    def state_dict(self) -> dict[str, int]:
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "epoch": self.epoch,
            "rs_optimization_step": self.rs_optimization_step,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from saved counters, which must be the same on all ranks.

        With the `settings` of the run that saved them, the position in the prompts is exact, even if that run took
        another number of prompts a step.

        Raises:
            ValueError: if ranks disagree.
        """
        keys = ("step", "consumed_samples", "rs_optimization_step")
        own = torch.tensor([int(state_dict[key]) for key in keys], dtype=torch.int64, device=current_device())
        first = own.clone()
        torch.distributed.broadcast(first, 0)
        if not torch.equal(own, first):
            raise ValueError(f"the counters {keys} of this rank, {own.tolist()}, differ from rank 0's {first.tolist()}")
        self.step, _, self.rs_optimization_step = own.tolist()
        sampler, num_per_step = self.train_dataloader.batch_sampler, self.num_prompts_per_step
        self.consumed_samples, num_skipped = data_position(state_dict, sampler.total_samples, num_per_step)
        sampler.consumed_samples = self.consumed_samples
        self._num_steps_before = self.consumed_samples // num_per_step - self.step
        self.set_max_steps()
        self._report_other_step_size(state_dict, num_skipped)

    def _report_other_step_size(self, state_dict: dict, num_skipped: int) -> None:
        """Warn if the step size does not fit the checkpoint's position in the prompts."""
        key = f"model.rs.num_rollout_samples={self.num_prompts_per_step}"
        if self.epoch >= self.cfg.max_epochs and has_other_step_size(state_dict, self.num_prompts_per_step):
            logging.warning(
                f"no step of {key} is left in trainer.rs.max_epochs={self.cfg.max_epochs}; lower the one or raise the "
                "other to train further"
            )
        elif num_skipped:
            logging.warning(f"the checkpoint lies inside a step of {key}; {num_skipped} of its prompts are skipped")


@dataclass
class _Microbatch:
    """Rollouts of one micro-batch on their way to rewards and a selection.

    Attributes:
        records: of each row; see `records_of`.
        is_new: no earlier start has scored them and written them to the log.
        future: of the rewards; None if they are there.
        kept: the selected rows, in validation all; None before.
    """

    rollouts: dict
    records: list[dict]
    is_new: bool
    future: object | None = None
    kept: dict | None = None


def _progress_bar(iterable=None, **kwargs) -> tqdm:
    """A progress bar on the first rank, on a terminal only."""
    return tqdm(iterable, disable=None if torch.distributed.get_rank() == 0 else True, **kwargs)


def _summary(train_metrics: dict, loss: float, val_metrics: dict) -> str:
    reward, kept = train_metrics["global_rewards"], train_metrics["selected_rewards_mean"]
    summary = f"reward {reward:.3f}, kept {kept:.3f}, loss {loss:.4f}"
    return f"{summary}, held out {val_metrics['global_rewards']:.3f}" if val_metrics else summary
