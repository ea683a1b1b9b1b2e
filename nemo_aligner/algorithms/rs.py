"""Rejection sampling: roll out several responses per prompt, score them, train on the best, repeat.

Legend: B prompts of a rollout micro-batch, N rollouts per prompt, K of them kept, G prompts per RS step over all
replicas, R = G * K / DP rows that a replica trains on per RS step, S padded token width, P padded prompt width.
"""

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from megatron.core import parallel_state
from nemo.utils import AppState, logging
from tqdm import tqdm

from nemo_aligner.algorithms.balancing import balance_over_replicas
from nemo_aligner.algorithms.rollout_metrics import PART_PREFIX, example, global_rollout_metrics, selection_metrics
from nemo_aligner.compat.device import current_device
from nemo_aligner.utils.checkpoints import advance_save, saving_in_background
from nemo_aligner.utils.distributed import ScopedTimer, pad_list, pad_tensors_to_max_global_seq_len
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.parallel_state import get_model_parallel_src_rank
from nemo_aligner.utils.phases import OTHER, PhaseClock
from nemo_aligner.utils.ppo_utils import create_mask, select_topk
from nemo_aligner.utils.rollout_log import RolloutLog
from nemo_aligner.utils.server_utils import RewardError
from nemo_aligner.utils.step_profile import StepProfile
from nemo_aligner.utils.tensors import garbage_of_this_context
from nemo_aligner.utils.termination import StopRequested, TerminationWatch
from nemo_aligner.utils.text_generation_utils import has_content
from nemo_aligner.utils.timers import max_over_ranks
from nemo_aligner.utils.train_utils import clip_gradients
from nemo_aligner.utils.trainer_utils import check_progress, compute_num_steps_per_epoch
from nemo_aligner.utils.unscored_rollouts import NoRolloutFolder, UnscoredRollouts
from nemo_aligner.utils.utils import cpu_dict

MAX_TABLE_ROWS = 100
# First number of the key from which the random stream of a phase is derived.
TRAINING_STREAM, VALIDATION_STREAM = 0, 1
# While one replica waits for rewards, all ranks meet this often: their process groups give up on a rank that stays away
# from a collective for some minutes, and schedulers on a job that does not end soon when asked to.
MEETING_INTERVAL_S = 5.0
# What ends a run on all ranks at the same place.
ENDS_OF_A_RUN = (RewardError, StopRequested)


class RSTrainer:
    """Runs the rejection-sampling loop over a policy; see `fit`. `cfg` is the section `trainer.rs`.

    Attributes:
        step: RS steps done.
        rs_optimization_step: optimizer steps done.
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
        if rollout_dir is None and AppState().log_dir is not None:
            rollout_dir = Path(AppState().log_dir, "rollouts")
        self.rollout_log = self.unscored = NoRolloutFolder()
        if rollout_dir is not None:
            rank, sampling = get_model_parallel_src_rank(), model._sampling_params
            self.rollout_log = RolloutLog(rollout_dir, model.tokenizer, sampling["end_strings"], rank)
            made_with = {
                "sampling_params": sampling,
                "length_params": model._length_params,
                "num_rollouts_per_prompt": num_rollouts_per_prompt,
                "data_parallel_size": parallel_state.get_data_parallel_world_size(),
                "reward": getattr(rm, "description", None),
            }
            self.unscored = UnscoredRollouts(rollout_dir, rank, made_with)
        self.rollout_batch_seq_length = cfg.get("rollout_batch_seq_length", None)
        self.timer = ScopedTimer(reduction="mean", sync_cuda=True, buffer_size=1)
        self.phases = PhaseClock()
        log_dir = AppState().log_dir
        self.profile = StepProfile(cfg.get("profile", False), None if log_dir is None else Path(log_dir, "profile"))
        self.termination = TerminationWatch()
        self.step = self.rs_optimization_step = self.consumed_samples = self._saved_step = 0
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
        return self.step // self.num_steps_per_epoch

    def set_max_steps(self) -> None:
        self.max_steps = self.num_steps_per_epoch * self.cfg.max_epochs
        limit = self.cfg.get("max_steps", -1)
        if limit >= 0:
            self.max_steps = min(self.max_steps, limit)

    # The loop

    def fit(self) -> None:
        """Roll out, score, select, train, validate, save, until the steps, the epochs or the time are used up.

        Raises:
            RewardError: if rewards could not be had.
            StopRequested: after SIGTERM. Before both a checkpoint is written, and the next start begins with the
                rollouts that were left.
        """
        self._saved_step = self.step
        with (
            self.termination.watching(),
            saving_in_background(self.ckpt_callback, ENDS_OF_A_RUN),
            garbage_of_this_context(),
        ):
            self._fit()

    def _fit(self) -> None:
        try:
            self.run_timer.start_time()
            if self.step > 0 and self._is_validation_pending():
                _, is_save_due, is_train_end = check_progress(
                    self.step, self.max_steps, self.cfg.val_check_interval, self.cfg.save_interval, 1.0
                )
                self._finish_step({}, True, is_save_due, is_train_end)
            elif self.step >= self.max_steps > 0 and hasattr(self.ckpt_callback, "write_missing_archive"):
                self.ckpt_callback.write_missing_archive()
            elif self.step == 0 and self.cfg.get("val_at_start", False):
                self.log_rollouts(self.run_validation(), "val")
            dataloader_iter = None
            with _progress_bar(total=self.max_steps, initial=self.step, desc="RS steps", unit="step") as progress:
                while self.step < self.max_steps:
                    if dataloader_iter is None or self.step % self.num_steps_per_epoch == 0:
                        dataloader_iter = iter(self.train_dataloader)  # of the next epoch, or the rest of one
                    summary, run_time_exceeded = self._run_step(dataloader_iter)
                    progress.update()
                    progress.set_postfix_str(summary)
                    logging.info(f"RS step {self.step}/{self.max_steps}: {summary}")
                    if run_time_exceeded:
                        return
        except ENDS_OF_A_RUN:
            self.model.finish_inference()
            advance_save(self.ckpt_callback, wait=True)
            if self.step > self._saved_step or getattr(self.ckpt_callback, "has_last_save_failed", False):
                self.save()
            raise
        finally:
            self.profile.close()
            self.logger.finalize()

    def _is_validation_pending(self) -> bool:
        """Whether an earlier start left this step's validation unfinished, on any replica. Collective over the job."""
        is_pending = self._load_unscored("val") is not None
        verdict = torch.tensor([is_pending], dtype=torch.int64, device=current_device())
        torch.distributed.all_reduce(verdict, torch.distributed.ReduceOp.MAX)
        return bool(verdict.item())

    def _run_step(self, dataloader_iter: Iterator) -> tuple[str, bool]:
        """One RS step: its summary in a line, and whether the run's time is up.

        Every rank takes the same branches, since each of them holds a collective.
        """
        self.phases.start()
        self.model.seed_step(self.step)
        num_microbatches = compute_num_rollout_microbatches(self.train_dataloader)
        with self._traced("rollouts"), self.timer("rollout_time"):
            rollout_data, train_metrics = self.generate_rollouts(dataloader_iter, num_microbatches)
        self.log_rollouts(train_metrics, "train")
        with self._traced("training"), self.timer("train_time"):
            self.run_training(self._optimizer_batches(rollout_data))
        self.step += 1

        run_time_exceeded = self.run_timer.is_finished()
        run_val, save_model, is_train_end = check_progress(
            self.step, self.max_steps, self.cfg.val_check_interval, self.cfg.save_interval, 1.0, run_time_exceeded
        )
        val_metrics = self._finish_step(train_metrics, run_val, save_model, is_train_end)
        return _summary(train_metrics, val_metrics), run_time_exceeded

    @contextlib.contextmanager
    def _traced(self, half: str) -> Iterator[None]:
        """Trace the body if it is to be; writing the trace counts in no other phase."""
        with self.phases("trace"), self.profile.trace(half, self.step + 1), self.phases(OTHER):
            yield

    def _finish_step(
        self, train_metrics: dict, run_val: bool, save_model: bool, is_train_end: bool = False
    ) -> dict[str, float]:
        """Validate, log timings, save, and log the phases, as asked for; returns the validation's metrics."""
        val_metrics = {}
        if run_val:
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

    def log_rollouts(self, metrics: dict, split: str) -> None:
        """Log the metrics of a rollout phase and one example of it, under `train_rollouts/` or `val_rollouts/`."""
        scalars = {key: value for key, value in metrics.items() if key != "table"}
        self.logger.log_metrics(scalars, step=self.step, prefix=f"{split}_rollouts/")
        example = pd.DataFrame([{"step": self.step, **metrics["table"]}])
        frame = pd.concat([getattr(self, f"{split}_df"), example], ignore_index=True).tail(MAX_TABLE_ROWS)
        setattr(self, f"{split}_df", frame)
        self.logger.log_table(key=f"table/{split}_rollouts", dataframe=frame, step=self.step)

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
            RewardError: on every rank of the job, if rewards could not be had; the rollouts are on disk.
            StopRequested: on every rank of the job, after SIGTERM; the same.
        """
        split = "val" if is_validation else "train"
        num_rollouts = 1 if is_validation else self.num_rollouts_per_prompt
        dataset = (self.val_dataloader if is_validation else self.train_dataloader).dataset
        stored = iter(self._load_unscored(split) or ())
        microbatches = islice(dataloader_iter, num_microbatches)
        batches = [(batch, self._take_stored(stored, batch, num_rollouts)) for batch in microbatches]
        under_way, scored, kept = [], [], []
        try:
            done = self._rollouts(batches, num_rollouts)
            done = _progress_bar(done, total=num_microbatches, desc=f"rollouts ({split})", leave=False)
            with self.phases("rollout"):
                for batch, rollouts in done:
                    under_way.append((rollouts, self._ask_for_rewards(rollouts, batch, dataset)))
            if not is_validation:
                with self.phases("load_state"):
                    self.model.prefetch_adam_states()  # while the last rollouts are scored
            with self.phases("rollout"):
                self._wait_on_all_ranks()  # those of the replicas that still generate meet meanwhile
            while under_way:
                rollouts, future = under_way[0]
                with self.phases("score"):
                    self._add_rewards(rollouts, future)
                under_way.pop(0)
                scored.append(rollouts)
                with self.phases("select"):
                    kept.append(rollouts if is_validation else self._select(rollouts))
                kept_rows = () if is_validation else kept[-1].pop("row").tolist()
                if future is not None:  # else an earlier start wrote them
                    self._write_to_log(split, rollouts, kept_rows)
        except ENDS_OF_A_RUN as error:
            made = scored + [rollouts for rollouts, _ in under_way]
            not_reached = [found for _, found in batches[len(made) :] if found is not None]
            kept_in = self._keep_for_next_start(split, made + not_reached)
            raise type(error)(f"{error}{kept_in}") from error
        except BaseException:
            for rollouts, _ in under_way:
                self._write_to_log(split, rollouts)
            raise
        metrics = self.compute_global_rollout_metrics(scored)
        if not is_validation:
            metrics.update(selection_metrics(kept))
            metrics["table"] = example(kept[0], self.model.tokenizer)
        self.unscored.remove(split, self.step)
        return kept, metrics

    def _load_unscored(self, split: str) -> list[dict] | None:
        """What an earlier start left of this step. Collective over the job.

        Raises:
            RewardError: on every rank of the job, if a replica could not read it.
        """
        found = failure = None
        try:
            found = self.unscored.load(split, self.step)
        except RewardError as error:
            failure = error
        failure = _failure_of_any_replica(failure)
        if failure is not None:
            raise failure
        return found

    def _take_stored(self, stored: Iterator[dict], batch: dict, num_rollouts: int) -> dict | None:
        """The next of the rollouts that an earlier start could not have scored, if they answer these prompts."""
        rollouts = next(stored, None)
        if rollouts is None:
            return None
        if not torch.equal(rollouts["prompt_tokens"], batch["text"].repeat_interleave(num_rollouts, dim=0)):
            logging.warning(f"unscored rollouts of step {self.step} answer other prompts; rolling out anew")
            return None
        return {key: value.to(current_device()) for key, value in rollouts.items()}

    def _ask_for_rewards(self, rollouts: dict, batch: dict, dataset):
        """The future of a micro-batch's rewards, or None if it has them from an earlier start."""
        if "rewards" in rollouts:
            return None
        with self.phases("score"):
            return self.rm.infer_rm({**rollouts, "records": _records(dataset, batch, len(rollouts["prompt_index"]))})

    def _add_rewards(self, rollouts: dict, future) -> None:
        """Wait for a micro-batch's `rewards` [rows], and its parts if it is a sum; without a future it has them.

        Collective over the job, so that a replica may have taken up scored rollouts where another has not.

        Raises:
            RewardError: on every rank of the job.
        """
        self._wait_on_all_ranks(future)
        failure = None
        try:
            rewards = None if future is None else future.result()
        except RewardError as error:
            failure = error
        failure = _failure_of_any_replica(failure)
        if failure is not None:
            raise failure
        if future is None:
            return
        for name, part in {"rewards": rewards, **_parts(future)}.items():
            rollouts[name] = part.flatten().to(rollouts["response_tokens"].device)
        rollouts["is_fit"] &= ~rollouts["rewards"].isnan()

    def _wait_on_all_ranks(self, future=None) -> None:
        """Return when every replica has its reward, or the failure. Futures of foreign kinds wait in `result()`.

        Without a future: when every replica has come here, however often it has met on the way.
        """
        wait = getattr(future, "wait", lambda timeout_s: True)
        while not self._meet(is_done=wait(MEETING_INTERVAL_S)):
            pass

    def _meet(self, is_done: bool = True) -> bool:
        """Whether all ranks are done; also where they answer SIGTERM and follow a save. Collective over the job."""
        self._advance_save()
        return self.termination.meet(is_done)

    def _advance_save(self) -> None:
        with self.phases("checkpoint"):
            advance_save(self.ckpt_callback)

    def _keep_for_next_start(self, split: str, rollout_batches: list[dict]) -> str:
        """Put the phase's rollouts on disk; returns what there is to say about that."""
        path = self.unscored.save(split, self.step, [cpu_dict(rollouts) for rollouts in rollout_batches])
        return "" if path is None else f"; the rollouts are in {path}; the same command started again scores them first"

    def _rollouts(self, batches: list[tuple[dict, dict | None]], num_rollouts: int) -> Iterator[tuple[dict, dict]]:
        """Each micro-batch and its rollouts, as soon as they exist: the stored ones beside it, or else new ones.

        The ranks meet before each, and also while it is generated, some replicas more often than others.

        Raises:
            StopRequested: on every rank of the job, after SIGTERM.
        """
        new = self._generate([batch for batch, found in batches if found is None], num_rollouts)
        for batch, found in batches:
            self._meet(is_done=False)
            yield batch, next(new) if found is None else found

    def _generate(self, batches: list[dict], num_rollouts: int) -> Iterator[dict]:
        """Rollouts of the prompts of each batch, `num_rollouts` neighbouring rows for each prompt.

        The model gets them all at once, so that rows of a batch take the place of those of an earlier one that end.

        Raises:
            FloatingPointError: if the model's weights give no finite logits.
        """
        repeated = [_repeated(batch, num_rollouts) for batch in batches]
        outputs = self.model.infer_each(repeated, check=partial(self._meet, is_done=False))
        try:
            for batch, output in zip(repeated, outputs, strict=True):
                yield self._with_inputs(output, batch, num_rollouts)
        except FloatingPointError as error:
            raise FloatingPointError(f"RS step {self.step}: {error}") from error

    def _with_inputs(self, output: dict, repeated: dict, num_rollouts: int) -> dict:
        """What was generated, with what scoring and selection want to know of its prompts."""
        device = output["response_tokens"].device
        num_rows = repeated["length"].size(0)
        rows = {
            **output,
            "prompt_tokens": repeated["text"].to(device),
            "prompt_index": repeated.get("prompt_index", _group_numbers(num_rows, num_rollouts)).to(device),
            "is_padding": repeated.get("is_padding", torch.zeros(num_rows, dtype=torch.bool)).to(device),
        }
        may_train = repeated.get("loss_multiplier", torch.ones(num_rows, dtype=torch.bool)).to(device)
        ended_with_content = output["is_end"] & has_content(
            output["response_tokens"],
            output["prompt_lengths"],
            output["response_lengths"],
            self.model.tokenizer,
            self.model._sampling_params["end_strings"],
        )
        rows["is_fit"] = ended_with_content & may_train
        return rows

    def _select(self, rollouts: dict) -> dict:
        rows = torch.arange(rollouts["rewards"].size(0), device=rollouts["rewards"].device)
        return select_topk({**rollouts, "row": rows}, self.top_n_rollouts)

    def _write_to_log(self, split: str, rollouts: dict, kept_rows=()) -> None:
        self.rollout_log.write(split, self.step, cpu_dict(rollouts), kept_rows)

    def compute_global_rollout_metrics(self, rollout_batches: list[dict]) -> dict:
        """Means over the rows of all replicas, and one row of this rank under `table`.

        Raises:
            ValueError: for an empty list.
        """
        if not rollout_batches:
            raise ValueError("there are no rollouts to report on: the dataset gave no micro-batch")
        table = example(rollout_batches[0], self.model.tokenizer)
        return {"table": table, **global_rollout_metrics(rollout_batches)}

    # Training

    def generate_rs_data(self, rollout_batches: list[dict]) -> tuple[dict, dict]:
        """Stack the kept rows of all micro-batches for training.

        Returns:
            CPU tensors `response_tokens` int64 [R, S], padded with the end-of-document id; `mask` float32 [R, S - 1],
            1 where the prediction of a response token is trained on, all 0 in rows unfit for training; `prompt_tokens`
            int64 [R, P]. S is the same on all replicas. And no metrics of its own.
        """
        eos_id = self.model.tokenizer.eos_id
        columns = {key: [batch[key] for batch in rollout_batches] for key in rollout_batches[0]}
        rows = [row.to(current_device()) for tokens in columns["response_tokens"] for row in tokens]
        tokens = pad_tensors_to_max_global_seq_len(
            rows, eos_id, parallel_state.get_data_parallel_group(), self.rollout_batch_seq_length
        )
        if self.model.trains_with_sequence_parallel:
            tokens = _round_up_width(tokens, parallel_state.get_tensor_model_parallel_world_size(), eos_id)
        lengths = {key: torch.cat(columns[key]).to(tokens.device) for key in ("prompt_lengths", "response_lengths")}
        mask = create_mask(torch.zeros(tokens.size(0), tokens.size(1) - 1, device=tokens.device), **lengths)
        if "is_fit" in columns:
            mask *= torch.cat(columns["is_fit"]).to(tokens.device)[:, None]
        prompts = torch.cat(pad_list(columns["prompt_tokens"], eos_id))
        return cpu_dict({"response_tokens": tokens, "mask": mask, "prompt_tokens": prompts}), {}

    def _optimizer_batches(self, rollout_data: dict) -> Iterator[dict]:
        """This replica's rows, in batches of gbs / DP rows.

        Where it makes no difference to the loss, the replicas first exchange rows of each global batch, so that all of
        them have as many tokens to train on.

        Raises:
            ValueError: if they are not G * K / DP. Replicas with other numbers of batches would wait for each other.
        """
        num_replicas = parallel_state.get_data_parallel_world_size()
        rows, expected = len(rollout_data["mask"]), self.num_prompts_per_step * self.top_n_rollouts // num_replicas
        if rows != expected:
            raise ValueError(f"this replica has {rows} rollouts to train on, but each replica must have {expected}")
        rows_per_batch = self.cfg.model_gbs // num_replicas
        if num_replicas > 1 and self.model.cfg.rs.get("loss_normalization", "global_batch") == "global_batch":
            with self.phases("select"):
                rollout_data = balance_over_replicas(
                    rollout_data, rows_per_batch, pad_value=self.model.tokenizer.eos_id
                )
        parts = {key: value.split(rows_per_batch) for key, value in rollout_data.items()}
        num_batches = len(parts["mask"])
        batches = ({key: value[i] for key, value in parts.items()} for i in range(num_batches))
        return iter(_progress_bar(batches, total=num_batches, desc="training", leave=False))

    def run_training(self, dataloader_iter: Iterator[dict]) -> tuple[float, dict]:
        """One optimizer step per batch; returns the last loss and its metrics.

        Raises:
            ValueError: if there is no batch.
        """
        with self.phases("load_state"):
            self.model.prepare_for_training()
        loss_mean = None
        for batch in dataloader_iter:
            start = time.monotonic()
            with self.phases("forward_backward"):
                self.optimizer.zero_grad()
                self.model.prepare_for_training_step()
                loss_mean, metrics = self.model.get_loss_and_metrics(batch=batch, forward_only=False)
            with self.phases("optimizer"):
                self.model.finish_training_step()
                grad_norm = clip_gradients(self.model, self.cfg.gradient_clip_val)
                lr = self.optimizer.param_groups[0]["lr"]
                self.optimizer.step()
                self.scheduler.step()
            metrics = {**metrics, "lr": lr, "optim_step": self.rs_optimization_step}
            if grad_norm is not None:
                metrics["grad_norm"] = grad_norm
            metrics["train_step_time"] = max_over_ranks({"train_step_time": time.monotonic() - start})[
                "train_step_time"
            ]
            self.logger.log_metrics(metrics, step=self.rs_optimization_step, prefix="train_optim/")
            self.rs_optimization_step += 1
            self._advance_save()
        if loss_mean is None:
            raise ValueError("run_training got no batch: there are no rollouts to train on")
        with self.phases("optimizer"):
            self.model.finish_training()
            self.optimizer.zero_grad()
        return loss_mean, metrics

    # State

    def save(self, extra_candidates: dict | None = None, is_train_end: bool = False) -> None:
        """Write a checkpoint, within `fit` in the background.

        Its name and the choice of the best come from the counters and `extra_candidates`.
        """
        with self.phases("checkpoint"):
            self.model.prepare_for_training()  # optimizer states belong to the checkpoint
            torch.cuda.synchronize()
            torch.distributed.barrier()
            counters = {key: torch.tensor(value, dtype=torch.int64) for key, value in self.state_dict().items()}
            self.ckpt_callback.custom_save({**(extra_candidates or {}), **counters}, is_train_end=is_train_end)
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
        # Checkpoints of the original counted selected responses here; prompts are what the data position goes by.
        self.consumed_samples = self.step * self.num_prompts_per_step
        self.train_dataloader.batch_sampler.consumed_samples = self.consumed_samples
        self.set_max_steps()


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
    """Refuse sizes that do not fit each other.

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


def _progress_bar(iterable=None, **kwargs) -> tqdm:
    """A bar with the time left, on the first rank and on a terminal only."""
    return tqdm(iterable, disable=None if torch.distributed.get_rank() == 0 else True, **kwargs)


def _summary(train_metrics: dict, val_metrics: dict) -> str:
    rewards = f"reward {train_metrics['global_rewards']:.3f}, kept {train_metrics['selected_rewards_mean']:.3f}"
    return f"{rewards}, held out {val_metrics['global_rewards']:.3f}" if val_metrics else rewards


def _group_numbers(num_rows: int, rows_per_group: int) -> torch.Tensor:
    return torch.arange(num_rows) // rows_per_group


def _repeated(batch: dict, num_rollouts: int) -> dict:
    """The batch with `num_rollouts` neighbouring rows for each of its own, and an id for each that is the same in any
    batch.
    """
    repeated = {
        key: value.repeat_interleave(num_rollouts, dim=0)
        for key, value in batch.items()
        if isinstance(value, torch.Tensor) and value.size(0) == batch["length"].size(0)
    }
    if "prompt_index" in batch:
        repeated["rollout_id"] = _rollout_ids(batch["prompt_index"], num_rollouts)
    return repeated


def _rollout_ids(prompt_index: torch.Tensor, num_rollouts: int) -> torch.Tensor:
    """int64 [B * N, 2]: each rollout's prompt in the dataset, and its number among those of the prompt."""
    number = torch.arange(num_rollouts).repeat(len(prompt_index))
    return torch.stack([prompt_index.repeat_interleave(num_rollouts), number], dim=1)


def _records(dataset, batch: dict, num_rows: int) -> list[dict]:
    """Each row's line of the prompt file; rollouts of a prompt share one. Foreign datasets have none: empty dicts."""
    if "prompt_index" not in batch or not hasattr(dataset, "record"):
        return [{}] * num_rows
    records = [dataset.record(index) for index in batch["prompt_index"].tolist()]
    return [record for record in records for _ in range(num_rows // len(records))]


def _parts(future) -> dict[str, torch.Tensor]:
    return {f"{PART_PREFIX}{name}": part for name, part in getattr(future, "parts", {}).items()}


def _failure_of_any_replica(failure: RewardError | None) -> RewardError | None:
    """The first replica's failure, on every rank, so that all of them stop. Collective over the job."""
    messages = [None] * parallel_state.get_data_parallel_world_size()
    group = parallel_state.get_data_parallel_group()
    torch.distributed.all_gather_object(messages, None if failure is None else str(failure), group=group)
    message = next((message for message in messages if message is not None), None)
    return failure or (None if message is None else RewardError(message))


def _round_up_width(tokens: torch.Tensor, multiple: int, pad_value: int) -> torch.Tensor:
    return torch.nn.functional.pad(tokens, (0, -tokens.size(1) % multiple), value=pad_value)
