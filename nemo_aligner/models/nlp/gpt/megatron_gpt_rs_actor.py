"""The rejection-sampling policy: a Megatron GPT model that generates rollouts and is trained on selected ones.

Legend: B rows of a batch, S padded token width, P padded prompt width, V vocabulary, TP/PP/DP parallel sizes.
"""

import contextlib
import functools
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.mixins.nlp_adapter_mixins import NLPAdapterModelMixin
from nemo.utils import logging, logging_mode
from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.trainer.trainer import Trainer

from nemo_aligner import compat
from nemo_aligner.compat import device, mcore_optimizer, virtual_stages
from nemo_aligner.compat.apex_step import step_bucket_by_bucket
from nemo_aligner.compat.device import current_device
from nemo_aligner.generation.ends import check_end_strings
from nemo_aligner.generation.kv_cache import usable_memory
from nemo_aligner.generation.rollouts import GenerationSettings, PromptBatch, RolloutGenerator
from nemo_aligner.generation.sampling import random_streams
from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface
from nemo_aligner.models.nlp.gpt.hf_tokenizer import build_packed_tokenizer
from nemo_aligner.models.nlp.gpt.inference_mode import InferenceMode, fill_missing_keys, switch_off_O2_in_float32
from nemo_aligner.models.nlp.gpt.layer_spec import fuses_all_layers
from nemo_aligner.models.nlp.gpt.lora import adapter_state, sharded_adapters
from nemo_aligner.models.nlp.gpt.packed_forward import packed_forward, unsupported_by_packing
from nemo_aligner.models.nlp.gpt.packing import Pack, pack_batch
from nemo_aligner.models.nlp.gpt.training_settings import TrainingSettings
from nemo_aligner.utils.distributed import from_parallel_logits_to_logprobs
from nemo_aligner.utils.masks import attention_mask_and_position_ids
from nemo_aligner.utils.optimizer_offload import OptimizerOffload, state_tensors
from nemo_aligner.utils.text_generation_utils import verify_is_valid_and_clamp_range_
from nemo_aligner.utils.train_utils import (
    finish_param_sync,
    grad_reductions,
    prepare_for_training_step,
    set_sync_funcs,
)
from nemo_aligner.utils.utils import configure_batch_sizes

compat.apply()


class MegatronGPTRSModel(NLPAdapterModelMixin, MegatronGPTModel, AlignableGenerativeInterface):
    """A Megatron GPT model for rejection sampling. `cfg` is the `model` section of the run's configuration."""

    def __init__(self, cfg: DictConfig, trainer: Trainer):
        fill_missing_keys(cfg)
        switch_off_O2_in_float32(cfg)
        virtual_stages.choose_messages(cfg)
        with virtual_stages.built_without_O2(self, cfg):
            super().__init__(cfg, trainer=trainer)
        self.automatic_optimization = False
        self.resets = {
            key: cfg.get("data", {}).get(key, False) for key in ("reset_position_ids", "reset_attention_mask")
        }
        self._length_params = OmegaConf.to_container(cfg.rs.length_params, resolve=True)
        self._sampling_params = OmegaConf.to_container(cfg.rs.sampling_params, resolve=True)
        self.to_offload_adam_states = cfg.rs.offload_adam_states
        self.forward_micro_batch_size = cfg.rs.forward_micro_batch_size
        # Saved here because the config's own key is switched off during inference.
        self.trains_with_sequence_parallel = self.cfg.get("sequence_parallel", False)
        self._optimizer_offload = OptimizerOffload(functools.partial(state_tensors, self))
        self.distributed_adam_offload_manager: contextlib.AbstractContextManager | None = None
        self._is_prefetching_states = False
        self._inference_mode = InferenceMode(self)
        self._rollout_generator = RolloutGenerator(self, GenerationSettings(**(cfg.rs.get("generation") or {})))
        self._training = TrainingSettings(**(cfg.rs.get("training") or {}))
        # what `get_actor_forward_output_and_loss_func`, which takes no arguments, is to know of the global batch: its
        # number of response tokens, and this replica's number of micro-batches
        self._counts_of_batch: tuple[torch.Tensor | None, int] = (None, 1)
        self.seed_sampling()
        self.rs_trainer_state: dict[str, int] | None = None
        self.rs_settings: dict | None = None  # settings that determine the run's results; set by `init_using_ptl`
        self._is_saving_archive = False

    def _build_tokenizer(self):
        if self.cfg.tokenizer.get("files") is None:
            super()._build_tokenizer()
        else:
            self.tokenizer = build_packed_tokenizer(self)
        end_strings = self.cfg.rs.sampling_params.end_strings
        check_end_strings(end_strings, self.tokenizer, key="model.rs.sampling_params.end_strings")

    def setup_mcore_distributed_parallel(self) -> None:
        """NeMo has two names for one option."""
        with open_dict(self.cfg):
            self.cfg.optim.setdefault("overlap_param_gather", self.cfg.optim.get("overlap_param_sync", False))
        super().setup_mcore_distributed_parallel()

    def setup_megatron_optimization(self, optim_config: dict):
        """Configure megatron-core's optimizer; gradients are clipped outside it, as for all other optimizers."""
        settings = super().setup_megatron_optimization(optim_config)
        settings.clip_grad = 0.0
        settings.adam_eps = optim_config.get("eps", settings.adam_eps)
        return settings

    def configure_optimizers(self):
        if device.on_cpu():  # NeMo waits for gradients in flight by synchronizing CUDA only
            with open_dict(self.cfg):
                self.cfg.async_grad_allreduce = False
        optimizers = super().configure_optimizers()
        if self.use_mcore_dist_optim:
            mcore_optimizer.complete(self._optimizer)
        if self._offloads():
            self._optimizer_offload.pin_in_background()
        if self._training.stream_adam_states:
            step_bucket_by_bucket(self._optimizer, self._optimizer_offload)
        return optimizers

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Add the trainer's counters, which the caller has stored in `rs_trainer_state`, and the run's settings."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rs_trainer"] = self.rs_trainer_state
        checkpoint["rs_settings"] = self.rs_settings

    def sharded_state_dict(self, prefix: str = "") -> ShardedStateDict | None:
        """Content of a distributed checkpoint: with adapters, only those; None while an archive of them is written."""
        if not (self.use_peft and self.setup_complete):
            return super().sharded_state_dict(prefix=prefix)
        return None if self._is_saving_archive else sharded_adapters(self)

    def get_peft_state_dict(self) -> dict:
        """NeMo's takes any list of chunks for virtual stages, but megatron-core's optimizer keeps a list of one."""
        return adapter_state(self)

    def save_to(self, save_path: str) -> None:
        """Write a `.nemo` archive: the whole model, or, with adapters, only those, in NeMo's format.

        The write is atomic. Collective over the job.

        Raises:
            OSError: the archive could not be written: on every rank for weights, on rank 0 for the archive itself.
        """
        final = Path(save_path)
        # NeMo writes weights next to the archive, where there must be no leftovers of a process that was killed
        folder = final.with_name(f".partial-{final.name}")
        is_first_rank = torch.distributed.get_rank() == 0
        if is_first_rank:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        torch.distributed.barrier()
        self._is_saving_archive = True
        try:
            super().save_to(str(folder / final.name))
        except OSError:
            if is_first_rank:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self._is_saving_archive = False
        torch.distributed.barrier()
        if is_first_rank:
            (folder / final.name).replace(final)
            shutil.rmtree(folder)
        torch.distributed.barrier()

    # Training

    def get_loss_and_metrics(self, batch: dict, forward_only: bool) -> tuple[float, dict]:
        """Run forward, and backward unless `forward_only`, over this replica's rows of one global batch.

        Args:
            batch: `response_tokens` int64 [rows, S] and `mask` float [rows, S - 1], on the CPU; other keys are ignored.
                The rows are split in order into `get_num_microbatches()` micro-batches of `cfg.micro_batch_size`. With
                packing, unless there are pipeline stages or the loss is per micro-batch, each replica uses as few as
                its tokens need, with at most `_max_tokens_of_a_pack` tokens each.

        Returns:
            The loss over the global batch and {"loss": the same}, equal on all ranks. Gradients are left accumulated.

        Raises:
            ValueError: if the rows do not make up that many micro-batches.
        """
        rows, width = batch["response_tokens"].shape
        num_microbatches = get_num_microbatches()
        if rows != num_microbatches * self.cfg.micro_batch_size:
            raise ValueError(
                f"a batch of {rows} rows cannot be split into {num_microbatches} micro-batches of "
                f"model.micro_batch_size={self.cfg.micro_batch_size}"
            )
        set_sync_funcs(self, forward_only)
        num_loss_tokens = _global_token_count(batch["mask"])
        if self._is_packing():
            microbatches = self._packs(batch, num_microbatches)
            num_microbatches = len(microbatches)
            step = self._packed_forward_output_and_loss_func(num_loss_tokens, num_microbatches)
            width, rows = microbatches[0].tokens_1T.size(1), 1
        else:
            parts = zip(*(batch[key].chunk(num_microbatches) for key in ("response_tokens", "mask")), strict=True)
            microbatches = [{"response_tokens": tokens, "mask": mask} for tokens, mask in parts]
            self._counts_of_batch = num_loss_tokens, num_microbatches
            step = self.get_actor_forward_output_and_loss_func()
            self._counts_of_batch = None, 1
            rows = self.cfg.micro_batch_size
        # Backward in this thread: repeatedly handing over to autograd's GPU thread and back, an H100 host took 0.17 to
        # 0.20 s (medians) to launch what a single thread launches in 0.14 s (torch 2.11).
        with torch.autograd.set_multithreading_enabled(False):
            losses = get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=self._iterator_per_chunk(microbatches),
                model=self.model,
                num_microbatches=num_microbatches,
                forward_only=forward_only,
                seq_length=width,
                micro_batch_size=rows,
            )
        loss = torch.zeros((), dtype=torch.float32, device=current_device())
        if losses:
            loss = torch.stack([part["loss"].reshape(()) for part in losses]).mean()
        loss = _mean_over_replicas(loss)
        torch.distributed.broadcast(loss, torch.distributed.get_world_size() - 1)
        loss = loss.item()
        return loss, {"loss": loss}

    def _is_packing(self) -> bool:
        """Whether to train on packs instead of padded rows; logs once if packing is configured but unsupported."""
        if not self._training.packing:
            return False
        reason = self._why_not_packed()
        if reason is not None:
            message = f"training: packing does not support {reason}; falling back to padded rows, which are slower"
            logging.warning(message, mode=logging_mode.ONCE)
        return reason is None

    def _why_not_packed(self) -> str | None:
        step = "get_actor_forward_output_and_loss_func"
        own_way = getattr(getattr(self, step), "__func__", None)  # overridden by a subclass or on this object
        if own_way is not getattr(MegatronGPTRSModel, step):
            return f"{type(self).__name__}.{step}"
        if any(self.resets.values()):
            return "model.data.reset_attention_mask or reset_position_ids"
        return unsupported_by_packing(self.get_model_module_list()[0])

    def _packs(self, batch: dict, num_microbatches: int) -> list[Pack]:
        """Pack the rows of `batch` into micro-batches; with a loss per micro-batch, rows keep their micro-batch.

        With pipeline stages there are always `num_microbatches`: fewer would enlarge the pipeline bubble, and virtual
        stages need a multiple of the number of stages.
        """
        config = self.model_parallel_config
        has_stages = parallel_state.get_pipeline_model_parallel_world_size() > 1
        return pack_batch(
            batch["response_tokens"].cpu(),
            batch["mask"].cpu(),
            num_microbatches,
            max_tokens=None if has_stages else self._max_tokens_of_a_pack(batch["response_tokens"].size(1)),
            in_order=self._is_loss_per_micro_batch(),
            equal_lengths=has_stages,
            multiple=config.tensor_model_parallel_size if config.sequence_parallel else 1,
        )

    def _max_tokens_of_a_pack(self, width: int) -> int:
        """As configured, else the size of a padded micro-batch of this width, or twice that if all layers are fused.

        With fused layers a token in a pack takes about half of the memory of a padded one, or less if the latter had
        unfused attention or all logits (benchmarks/train_step.py). The layers' own modules save as much per token as
        without packing, and so does full recomputation, which keeps the input of each layer.
        """
        if self._training.max_tokens_per_pack is not None:
            return self._training.max_tokens_per_pack
        gpt_model = get_attr_wrapped_model(self.get_model_module_list()[0], "decoder", return_model_obj=True)
        takes_half = fuses_all_layers(gpt_model) and gpt_model.config.recompute_granularity != "full"
        return self.cfg.micro_batch_size * (2 * width if takes_half else width)

    def _packed_forward_output_and_loss_func(self, num_loss_tokens: torch.Tensor, num_microbatches: int) -> Callable:
        """As `get_actor_forward_output_and_loss_func`, over packs; the last stage's output is log-probabilities [R].

        The reported loss is this replica's share, as the sum is not needed before the last micro-batch.
        """

        def forward_output_and_loss_func(data_iterator: Iterator[Pack], model):
            pack = next(data_iterator).to(current_device())
            output = packed_forward(model, pack)
            if not parallel_state.is_pipeline_last_stage():
                output = output.to(self.model_parallel_config.pipeline_dtype)

            def loss_func(logprobs_R: torch.Tensor):
                total = (logprobs_R * pack.weights_R).sum()
                loss = self._normalized_loss(total, pack.weights_R, num_loss_tokens, num_microbatches)
                return loss, {"loss": loss.detach().clone()}

            return output, loss_func

        return forward_output_and_loss_func

    def get_actor_forward_output_and_loss_func(self) -> Callable:
        """The pipeline step `f(data_iterator, model) -> (output, loss_func)` over one micro-batch.

        The output is vocab-parallel logits [mbs, S, V/TP] on the last stage, hidden states on the others. Called by
        `get_loss_and_metrics`, the loss is normalized over the whole global batch; called by others, over the
        micro-batch, summed over the data-parallel group.
        """
        num_loss_tokens, num_microbatches = self._counts_of_batch

        def forward_output_and_loss_func(data_iterator: Iterator[dict], model):
            batch = self._stage_inputs(next(data_iterator))
            output = model(batch["response_tokens"], batch["position_ids"], batch["attention_mask"], labels=None)
            if not parallel_state.is_pipeline_last_stage():
                output = output.to(self.model_parallel_config.pipeline_dtype)

            def loss_func(logits: torch.Tensor):
                loss = self._loss(logits, batch, num_loss_tokens, num_microbatches)
                return loss, {"loss": _mean_over_replicas(loss.detach().clone())}

            return output, loss_func

        return forward_output_and_loss_func

    def _loss(self, logits, batch, num_loss_tokens, num_microbatches) -> torch.Tensor:
        """Negative masked mean of the response tokens' log-probabilities, as an fp32 scalar."""
        logprobs = from_parallel_logits_to_logprobs(logits, batch["response_tokens"], higher_stability=True).float()
        mask = batch["mask"].float()
        # where, not a product alone: an infinite log-probability outside the mask must not matter
        total = torch.where(mask > 0, logprobs * mask, 0.0).sum()
        return self._normalized_loss(total, mask, num_loss_tokens, num_microbatches)

    def _normalized_loss(self, total, mask, num_loss_tokens, num_microbatches) -> torch.Tensor:
        """The loss of a micro-batch, given the sum `total` of its masked log-probabilities.

        Megatron divides it by the number of micro-batches, and gradients are averaged over the data-parallel ranks; the
        factors here undo both, which leaves one mean over the tokens of the global batch.
        """
        if self._is_loss_per_micro_batch():
            return -total / mask.sum().clamp(min=1)
        if num_loss_tokens is None:
            num_loss_tokens = _global_token_count(mask)
        scale = num_microbatches * parallel_state.get_data_parallel_world_size()
        return -total * scale / num_loss_tokens.clamp(min=1)

    def _is_loss_per_micro_batch(self) -> bool:
        return self.cfg.rs.get("loss_normalization", "global_batch") == "micro_batch"

    def _stage_inputs(self, microbatch: dict) -> dict:
        """The inputs of a micro-batch that this pipeline stage needs, on its device; None for the rest."""
        tokens = microbatch["response_tokens"].to(current_device(), non_blocking=True)
        attention_mask, position_ids = attention_mask_and_position_ids(tokens, self.tokenizer.eos_id, **self.resets)
        is_first, is_last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        return {
            "attention_mask": attention_mask,
            "position_ids": position_ids if is_first else None,
            "response_tokens": tokens if is_first or is_last else None,
            "mask": microbatch["mask"].to(current_device(), non_blocking=True) if is_last else None,
        }

    def _iterator_per_chunk(self, microbatches: list) -> Iterator | list[Iterator]:
        if isinstance(self.model, list) and len(self.model) > 1:
            return [iter(microbatches) for _ in self.model]
        return iter(microbatches)

    def prepare_for_training(self) -> None:
        """Set batch sizes for training and bring the optimizer states back to the device.

        After `prefetch_adam_states` the copies may still be in flight: only `finish_training_step` waits for them, so
        that they overlap with forward and backward. With `rs.training.stream_adam_states` the states stay on the host,
        or are offloaded to it.
        """
        configure_batch_sizes(
            mbs=self.cfg.micro_batch_size,
            gbs=self.cfg.global_batch_size,
            dp=parallel_state.get_data_parallel_world_size(),
        )
        if self._training.stream_adam_states:
            self.offload_adam_states()
        elif self._is_prefetching_states:
            self.prefetch_adam_states()  # retry: there may have been too little memory before
        else:
            self.onload_adam_states()

    def prepare_for_training_step(self) -> None:
        prepare_for_training_step(self, zero_grad=False)

    def finish_training_step(self) -> None:
        grad_reductions(self)
        if not self._training.stream_adam_states:
            self.onload_adam_states()

    def finish_training(self) -> None:
        """Finish parameter synchronization. Optimizer states stay on the device until inference needs the memory."""
        finish_param_sync(self)

    # Inference

    def prepare_for_inference(self) -> None:
        """Switch off what only training needs. A second call before `finish_inference` changes nothing."""
        self._inference_mode.enter()
        self.offload_adam_states()

    def finish_inference(self) -> None:
        """Restore what `prepare_for_inference` switched off, and free the KV caches.

        Optimizer states come back in `prepare_for_training`.
        """
        self._rollout_generator.release()
        self._inference_mode.leave()

    def seed_step(self, step: int) -> None:
        """Reseed every random generator of this process from the model's seed, the step and the rank.

        Dropout uses them, and a user's reward function may. A resumed run thereby draws the same numbers as an
        uninterrupted one, on any number of replicas, without saving generator states.
        """
        stage, replica = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_data_parallel_rank()
        key = np.random.SeedSequence([self.cfg.get("seed", 1234), step, stage, replica])
        for_python, for_numpy, for_torch = key.generate_state(3).tolist()
        random.seed(for_python)
        np.random.seed(for_numpy)
        torch.manual_seed(for_torch)
        tensor_parallel.model_parallel_cuda_manual_seed(for_torch)

    def seed_sampling(self, *key: int) -> None:
        """Reseed the random streams of `infer` from the model's seed and `key`.

        Called with the step, it makes a resumed run sample what an uninterrupted one would have sampled.
        """
        self._sampling_key = (self.cfg.get("seed", 1234), *key)
        self._num_rows_sampled = 0

    def _random_streams(self, inference_batch: dict, length: int) -> torch.Tensor:
        """float64 [B, length] on the CPU, the same on every rank of the replica."""
        num_rows = inference_batch["length"].size(0)
        if "rollout_id" in inference_batch:
            row_ids = inference_batch["rollout_id"].tolist()
        else:
            replica = parallel_state.get_data_parallel_rank()
            row_ids = [(replica, self._num_rows_sampled + row) for row in range(num_rows)]
        self._num_rows_sampled += num_rows
        return random_streams(self._sampling_key, row_ids, length)

    @torch.no_grad()
    def infer(self, inference_batch: dict) -> dict[str, torch.Tensor]:
        """Generate one response for each row. All ranks of a replica call it together with the same batch.

        Args:
            inference_batch: `text` int64 [B, at least P], prompts right-padded with the end-of-document id, and
                `length` int64 [B], on either device and not modified. Optionally `rollout_id` int64 [B, any], which
                determines a row's random stream on whichever rank it is sampled; else a row counter of the replica
                does. Other keys are ignored. Consecutive rows with the same prompt share its prefill.

        Returns:
            On the device of every rank of the replica: `response_tokens` int64 [B, S], each row its prompt, response,
            ending token and padding, S the longest row; `response_lengths` int64 [B], counting all but the padding;
            `prompt_lengths` int64 [B]; `is_end` bool [B], whether the row ended within its own budget of tokens.

        Raises:
            ValueError: if a prompt is empty, or if one and `max_length` more tokens exceed a learned position table.
            FloatingPointError: if a row's logits are NaN or infinite.
        """
        (rollouts,) = self._rollout_generator.rollouts([self._prompt_batch(inference_batch)])
        return rollouts

    def infer_each(
        self,
        inference_batches: Iterable[dict],
        check: Callable[[], object] | None = None,
        on_last_rows: Callable[[], object] | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the result of `infer` for each batch in order, as soon as the batch is complete.

        Rows of later batches take the slots of finished ones, so the cost follows the number of tokens, not the longest
        row of each batch. `check` is called every few dozen tokens; an exception it raises drops unfinished rows.
        `on_last_rows` is called at most once, by the engine, when rows occupy at most half of its slots.
        """
        if type(self).infer is not MegatronGPTRSModel.infer:  # overridden by a subclass
            return (self._with_ends(self.infer(batch)) for batch in inference_batches)
        prompt_batches = [self._prompt_batch(batch) for batch in inference_batches]
        return self._rollout_generator.rollouts(prompt_batches, check, on_last_rows)

    def _with_ends(self, rollouts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The rollouts of an overridden `infer`; if it returns no `is_end`, that is derived from the last tokens."""
        if "is_end" in rollouts:
            return rollouts
        is_end = verify_is_valid_and_clamp_range_(
            rollouts["response_tokens"],
            rollouts["response_lengths"],
            self._rollout_generator.strategy(rollouts["prompt_lengths"]),
            self.tokenizer,
            self._sampling_params["end_strings"],
        )
        return {**rollouts, "is_end": is_end}

    def _prompt_batch(self, inference_batch: dict) -> PromptBatch:
        max_length = self._length_params["max_length"]
        self._check_prompt_lengths(inference_batch["length"], max_length)
        return PromptBatch(
            inference_batch["text"].cpu(),
            inference_batch["length"].cpu(),
            self._random_streams(inference_batch, max_length),
        )

    def _check_prompt_lengths(self, prompt_lengths: torch.Tensor, max_length: int) -> None:
        shortest, longest, context = int(prompt_lengths.min()), int(prompt_lengths.max()), self.cfg.encoder_seq_length
        if shortest < 1:
            raise ValueError("an empty prompt cannot be continued: every prompt needs at least one token")
        has_position_table = self.cfg.get("position_embedding_type", "learned_absolute") == "learned_absolute"
        if has_position_table and longest + max_length > context:
            raise ValueError(
                f"a prompt of {longest} tokens and rs.length_params.max_length={max_length} exceed the model's "
                f"{context} positions; lower max_length or model.data.seq_length"
            )

    def get_ltor_masks_and_position_ids(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attention mask bool [B, 1, S, S] (True = blocked), loss mask of ones [B, S] and position ids int64 [B, S]."""
        mask, position_ids = attention_mask_and_position_ids(tokens, self.tokenizer.eos_id, **self.resets)
        if mask is None:
            width = tokens.size(1)
            causal = torch.ones(width, width, dtype=torch.bool, device=tokens.device).triu(diagonal=1)
            mask = causal.expand(tokens.size(0), 1, width, width)
        return mask, torch.ones_like(tokens, dtype=torch.float32), position_ids

    # Optimizer states

    def offload_adam_states(self) -> None:
        """Offload a distributed optimizer's states to the host. No-op without one, or if they are offloaded already."""
        if self.distributed_adam_offload_manager is None:
            self.distributed_adam_offload_manager = (
                self._optimizer_offload if self._offloads() else contextlib.nullcontext()
            )
        self.distributed_adam_offload_manager.__enter__()
        self._is_prefetching_states = False

    def prefetch_adam_states(self, beside_rollouts: bool = False) -> None:
        """Start copying offloaded optimizer states back to the device.

        To be called when rollouts are complete: the KV caches are freed first. If there still is too little memory, the
        states stay on the host. They must not be read before `onload_adam_states` or `finish_training_step`.

        Args:
            beside_rollouts: rollouts are still in flight; prefetch only if there is memory for both.
        """
        if self._training.stream_adam_states:
            return
        if not beside_rollouts:
            self._rollout_generator.release()
        elif self._optimizer_offload.num_bytes_away > usable_memory(current_device()):
            return
        self._is_prefetching_states = True
        if self.distributed_adam_offload_manager is not None:
            with contextlib.suppress(torch.OutOfMemoryError):
                self._optimizer_offload.start_onload()

    def onload_adam_states(self) -> None:
        """Bring offloaded optimizer states back to the device."""
        if self.distributed_adam_offload_manager is not None:
            self.distributed_adam_offload_manager.__exit__(None, None, None)
            self.distributed_adam_offload_manager = None
        self._is_prefetching_states = False

    def _offloads(self) -> bool:
        return self.to_offload_adam_states and self.with_distributed_adam and self._optimizer is not None


def _mean_over_replicas(value: torch.Tensor) -> torch.Tensor:
    """Mean over the data-parallel group, all of whose ranks must call it; reduces `value` in place."""
    torch.distributed.all_reduce(value, group=parallel_state.get_data_parallel_group())
    return value / parallel_state.get_data_parallel_world_size()


def _global_token_count(mask: torch.Tensor) -> torch.Tensor:
    """Sum of the loss mask over all replicas, fp32 scalar on the device."""
    count = mask.sum(dtype=torch.float64).to(current_device())
    torch.distributed.all_reduce(count, group=parallel_state.get_data_parallel_group())
    return count.float()
