"""Rollouts for batches of prompts: from the engine, or from NeMo-style decoding as its fallback and reference.

Legend: B rows of a batch, P padded prompt width, S padded width of a result, L maximum number of generated tokens.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state
from nemo.utils import logging, logging_mode

from nemo_aligner.compat.device import current_device
from nemo_aligner.generation.decode import generate
from nemo_aligner.generation.ends import EndStrings
from nemo_aligner.generation.engine import Engine
from nemo_aligner.generation.invalid_logits import InvalidLogitsError
from nemo_aligner.generation.kv_cache import bytes_per_position, min_over_ranks, usable_memory
from nemo_aligner.generation.rows import Decoding, Row
from nemo_aligner.generation.sampling import SamplingParams
from nemo_aligner.generation.weights import unsupported_by_engine
from nemo_aligner.utils.distributed import pad_list
from nemo_aligner.utils.text_generation_utils import TrackLengthGPTModelTextGenerationStrategy

_SHOWN_CHARACTERS = 80  # of a prompt, in an error message


@dataclass(frozen=True)
class GenerationSettings:
    """The section `model.rs.generation`, which existing configurations may lack.

    Attributes:
        backend: `engine`, or `nemo` for NeMo-style decoding.
        max_rows_in_flight: maximum number of rows that the engine decodes concurrently, over all pipeline stages.
    """

    backend: str = "engine"
    max_rows_in_flight: int = 256


@dataclass(frozen=True)
class PromptBatch:
    """Prompts int64 [B, at least P], lengths int64 [B], and random numbers float64 [B, L] to sample by; on the CPU."""

    prompts_BP: torch.Tensor
    lengths_B: torch.Tensor
    uniform_BL: torch.Tensor


class RolloutGenerator:
    """Generates with the current weights of `model`, the actor."""

    def __init__(self, model, settings: GenerationSettings):
        self._model, self._settings = model, settings
        self._engine: Engine | None = None
        self._end_strings: dict[tuple[str, ...], EndStrings] = {}

    def rollouts(
        self,
        batches: Iterable[PromptBatch],
        check: Callable[[], object] | None = None,
        on_last_rows: Callable[[], object] | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the result of `infer` for each batch in order, as soon as the batch is complete.

        NeMo-style decoding with pipeline stages decodes and completes several batches together.

        Args:
            check: called while rows are in flight; see `Engine.generate` and `decode.generate`.
            on_last_rows: called by the engine only; see `Engine.generate`.

        Raises:
            FloatingPointError: on all ranks of the replica, when the logits of a row are NaN or infinite.
        """
        try:
            if self._use_engine():
                yield from self._from_engine(list(batches), check, on_last_rows)
            else:
                yield from self._in_nemos_way(list(batches), check)
        except InvalidLogitsError as error:
            self.release()  # the KV cache may contain NaN as well
            raise FloatingPointError(self._explained(error)) from None

    def release(self) -> None:
        """Free the memory that only generation needs."""
        if self._engine is not None:
            self._engine.release()

    def _explained(self, error: InvalidLogitsError) -> str:
        text = self._model.tokenizer.ids_to_text(error.prompt)
        shown = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
        return (
            f"rollouts: the logits of token {error.num_generated + 1} of a response to {shown!r} are NaN or infinite: "
            "the weights have probably become so; begin again from an earlier checkpoint with a lower model.optim.lr"
        )

    def _use_engine(self) -> bool:
        if self._settings.backend == "nemo":
            return False
        reason = self._why_not_engine()
        if reason is not None:
            logging.warning(
                f"rollouts: the generation engine does not support {reason}; falling back to NeMo's slower decoder",
                mode=logging_mode.ONCE,
            )
        return reason is None

    def _why_not_engine(self) -> str | None:
        """Why the engine cannot be used, or None: the stages agree, although each knows only its own layers."""
        chunks = self._model.get_model_module_list()
        if len(chunks) > 1:
            return "virtual pipeline stages"
        if any(self._model.resets.values()):
            return "model.data.reset_attention_mask or reset_position_ids"
        reason = unsupported_by_engine(chunks[0])
        has_stages = parallel_state.get_pipeline_model_parallel_world_size() > 1
        if has_stages and not min_over_ranks(int(reason is None)):
            return reason or "what another pipeline stage has"
        return reason

    def strategy(self, lengths_B: torch.Tensor) -> TrackLengthGPTModelTextGenerationStrategy:
        lengths = self._model._length_params
        return TrackLengthGPTModelTextGenerationStrategy(
            self._model, lengths_B, lengths["max_length"], lengths["min_length"]
        )

    # The engine

    def _from_engine(
        self,
        batches: list[PromptBatch],
        check: Callable[[], object] | None,
        on_last_rows: Callable[[], object] | None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        if not batches:
            return
        if self._engine is None:
            (gpt_model,) = self._model.get_model_module_list()
            self._engine = Engine(gpt_model, self._settings.max_rows_in_flight)
        decoding, end_strings = self._decoding(batches[0].lengths_B)
        rows_of = [_rows(batch, number) for number, batch in enumerate(batches)]
        num_unfinished = [len(rows) for rows in rows_of]
        complete = 0
        all_rows = [row for rows in rows_of for row in rows]
        for row in self._engine.generate(all_rows, decoding, end_strings, check, on_last_rows):
            num_unfinished[row.batch] -= 1
            while complete < len(batches) and num_unfinished[complete] == 0:
                yield self._result(rows_of[complete])
                rows_of[complete] = None
                complete += 1

    @functools.cached_property
    def _num_tokens(self) -> int:
        """Cached, as a fast tokenizer copies its vocabulary to count it, which takes as long as decoding two tokens."""
        return self._model.tokenizer.vocab_size

    def _decoding(self, lengths_B: torch.Tensor) -> tuple[Decoding, EndStrings]:
        model, strategy = self._model, self.strategy(lengths_B)
        end_ids, texts = strategy.end_ids_and_strings(model.tokenizer.eos_id, model._sampling_params["end_strings"])
        decoding = Decoding(
            sampling=SamplingParams.of(model._sampling_params),
            max_length=strategy.max_length,
            min_length=strategy.min_length,
            end_ids=tuple(sorted(end_ids)),
            num_tokens=self._num_tokens,
        )
        key = tuple(texts)
        return decoding, self._end_strings.setdefault(key, EndStrings(texts, model.tokenizer))

    def _result(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        prompt_lengths_B = torch.tensor([len(row.prompt) for row in rows])
        lengths_B = prompt_lengths_B + torch.tensor([len(row.generated) for row in rows])
        shape = (len(rows), int(lengths_B.max()))
        tokens_BS = np.full(shape, self._model.tokenizer.eos_id, np.int64)  # numpy converts lists far faster than torch
        for tokens, row in zip(tokens_BS, rows, strict=True):
            tokens[: len(row.prompt) + len(row.generated)] = row.prompt + row.generated
        result = {
            "response_tokens": torch.from_numpy(tokens_BS),
            "response_lengths": lengths_B,
            "prompt_lengths": prompt_lengths_B,
            "is_end": torch.tensor([row.is_end for row in rows]),
        }
        return {key: tensor.to(current_device()) for key, tensor in result.items()}

    # NeMo-style decoding

    def _in_nemos_way(
        self, batches: list[PromptBatch], check: Callable[[], object] | None
    ) -> Iterator[dict[str, torch.Tensor]]:
        num_together = self._num_batches_together(batches)
        for first in range(0, len(batches), num_together):
            together = batches[first : first + num_together]
            columns = self._generate(_joined(together, self._model.tokenizer.eos_id), check)
            sizes = [batch.lengths_B.numel() for batch in together]
            for parts in zip(*(column.split(sizes) for column in columns.values()), strict=True):
                result = dict(zip(columns, parts, strict=True))
                width = int(result["response_lengths"].max())
                yield {**result, "response_tokens": result["response_tokens"][:, :width]}

    def _num_batches_together(self, batches: list[PromptBatch]) -> int:
        """One batch per pipeline stage, so that each stage works on the rows of one, if memory allows.

        A stage's KV cache is then as large as the whole model's would be for one batch. Collective over the replica.
        """
        wanted = min(parallel_state.get_pipeline_model_parallel_world_size(), len(batches))
        if wanted <= 1:
            return 1
        chunks = self._model.get_model_module_list()
        config, dtype = chunks[0].config, next(chunks[0].parameters()).dtype
        num_ranks = parallel_state.get_tensor_model_parallel_world_size()
        vocabulary = self._model.cfg.get("override_vocab_size", self._model.padded_vocab_size) // num_ranks
        bytes_per_token = bytes_per_position(
            sum(len(chunk.decoder.layers) for chunk in chunks),
            config.num_query_groups // num_ranks,
            config.kv_channels,
            dtype,
        )
        max_length = self._model._length_params["max_length"]
        num_tokens = max(batch.lengths_B.numel() * (int(batch.lengths_B.max()) + max_length) for batch in batches)
        # megatron-core computes logits for all input positions, in the first step those of a whole prompt
        num_logits = max(batch.lengths_B.numel() * int(batch.lengths_B.min()) for batch in batches) * vocabulary
        memory = usable_memory(current_device()) - num_logits * dtype.itemsize
        num_together = max(1, min(wanted, min_over_ranks(memory // (num_tokens * bytes_per_token))))
        if num_together < wanted:
            logging.warning(
                f"rollouts: memory for keys and values of {num_together} micro-batches at a time instead of {wanted}; "
                "pipeline stages work on smaller groups of rows"
            )
        return num_together

    def _generate(self, batch: PromptBatch, check: Callable[[], object] | None) -> dict[str, torch.Tensor]:
        lengths_B = batch.lengths_B.to(current_device())
        strategy = self.strategy(lengths_B)
        tokens_BW = generate(
            self._model,
            batch.prompts_BP.to(current_device()),
            lengths_B,
            strategy,
            max_length=strategy.max_length,
            min_length=strategy.min_length,
            end_strings=self._model._sampling_params["end_strings"],
            sampling_params=SamplingParams.of(self._model._sampling_params),
            uniform_BL=batch.uniform_BL.to(current_device()),
            check=check,
        )
        return {
            "response_tokens": tokens_BW,
            "response_lengths": strategy.get_lengths(),
            "prompt_lengths": lengths_B,
            "is_end": strategy.get_is_end(),
        }


def _joined(batches: list[PromptBatch], eod_id: int) -> PromptBatch:
    """One batch with the rows of all `batches`."""
    return PromptBatch(
        torch.cat(pad_list([batch.prompts_BP for batch in batches], eod_id)),
        torch.cat([batch.lengths_B for batch in batches]),
        torch.cat([batch.uniform_BL for batch in batches]),
    )


def _rows(batch: PromptBatch, number: int) -> list[Row]:
    return [
        Row(prompt[:length].tolist(), uniform_L, number)
        for prompt, length, uniform_L in zip(batch.prompts_BP, batch.lengths_B.tolist(), batch.uniform_BL, strict=True)
    ]
