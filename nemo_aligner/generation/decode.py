"""Generate responses token by token with megatron-core's KV cache, through all pipeline stages.

Legend: B rows, split into groups of R, one for each pipeline stage; P longest prompt, W = P + max_length columns, both
of a group or of all rows; L maximum number of generated tokens; t the position that a group samples next, S positions
before it that are not in the cache yet; V vocabulary. Rows are right-padded. A group starts after its shortest prompt:
at position t a row with a longer prompt copies its prompt token, the others sample one (as NeMo's `generate` does;
under greedy decoding the tokens are exactly the same). What a row samples does not depend on its group.
"""

from collections.abc import Callable

import torch
from megatron.core import InferenceParams
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from nemo_aligner.generation.engine import TURNS_BETWEEN_CHECKS
from nemo_aligner.generation.invalid_logits import INVALID_TOKEN, InvalidLogitsError
from nemo_aligner.generation.rows import Decoding
from nemo_aligner.generation.sampling import SamplingParams, sample
from nemo_aligner.generation.stages import Pipeline, ScheduleSlot
from nemo_aligner.utils.masks import attention_mask_and_position_ids


@torch.no_grad()
def generate(
    model,
    prompts_BP: torch.Tensor,
    prompt_lengths_B: torch.Tensor,
    strategy,
    *,
    max_length: int,
    min_length: int,
    end_strings: list[str],
    sampling_params: SamplingParams,
    uniform_BL: torch.Tensor,
    check: Callable[[], object] | None = None,
) -> torch.Tensor:
    """Prompts with their responses, int64 [B, W] on every rank of the replica; a row's tail holds the end-of-text id.

    All ranks of a replica call it together with the same arguments. Only the last stage's strategy is updated at every
    position, group by group, and then knows where each row ended; the others learn it in `get_lengths`.

    Args:
        model: a `MegatronGPTModel`, prepared for inference.
        prompts_BP: int64 [B, at least P] on the device; not modified.
        prompt_lengths_B: int64 [B] on the device.
        strategy: a `TrackLengthGPTModelTextGenerationStrategy` of these rows.
        min_length: number of tokens a row generates before it may end; must be that of the strategy.
        uniform_BL: float64 [B, max_length] on the device: the random numbers to sample by, from `random_streams`.
        check: called every TURNS_BETWEEN_CHECKS positions, between the same ticks on all ranks of the replica, so it
            may run a collective. An exception it raises ends generation.

    Raises:
        InvalidLogitsError: on all ranks of the replica, when the logits of a row are NaN or infinite; it names the
            first such row. The other groups are decoded to their end first.
    """
    eod_id = model.tokenizer.eos_id
    end_ids = tuple(strategy.end_token_ids(eod_id, end_strings))
    decoding = Decoding(sampling_params, max_length, min_length, end_ids, model.tokenizer.vocab_size)
    pipeline = Pipeline(model.model if isinstance(model.model, list) else [model.model])
    num_rows = prompt_lengths_B.numel()
    # dealt round-robin, so that the groups end at about the same time
    shares = [slice(first, None, pipeline.num_stages) for first in range(min(num_rows, pipeline.num_stages))]
    groups = [
        _Group(model, strategy.of_rows(share), prompts_BP[share], uniform_BL[share], decoding, end_strings, pipeline)
        for share in shares
    ]
    _decode(dict(enumerate(groups)), pipeline, check)
    _raise_first_error(groups, shares, num_rows)
    tokens_BW = prompts_BP.new_full((num_rows, max(group.width for group in groups)), eod_id)
    for group, share in zip(groups, shares, strict=True):
        tokens_BW[share, : group.width] = group.tokens_RW
    return tokens_BW


def _decode(at_work: dict[int, "_Group"], pipeline: Pipeline, check: Callable[[], object] | None) -> None:
    """Decode all groups to their ends; finished groups are removed from `at_work`."""
    tick, last_sampling, hidden_SRH = 0, 0, None
    # Stages learn of the last group's end one after another, but stop at the same tick: all call `check` equally often.
    while at_work or tick < last_sampling + pipeline.num_stages:
        sampling = pipeline.sampling_group(tick)
        turn, output = pipeline.turn(tick), None
        group = _unless_done(at_work, turn)
        if group is not None:
            output = group.forward(turn.chunk, hidden_SRH)
            if pipeline.is_last_stage and turn.group == sampling:
                group.sample(output)
                output = None
        hidden_SRH = pipeline.send_recv(output, _shape_of_next(at_work, pipeline, tick + 1))
        if sampling in at_work:
            at_work[sampling].broadcast_tokens()
            last_sampling = tick
        tick += 1
        if check is not None and tick % (TURNS_BETWEEN_CHECKS * pipeline.ticks_per_position) == 0:
            check()


def _unless_done(at_work: dict[int, "_Group"], turn: ScheduleSlot | None) -> "_Group | None":
    """The group whose turn it is, after receiving its newest tokens; None, and it is removed, if they were its last."""
    group = None if turn is None else at_work.get(turn.group)
    if group is None or not group.receive_tokens():
        return group
    del at_work[turn.group]
    return None


def _shape_of_next(at_work: dict[int, "_Group"], pipeline: Pipeline, tick: int) -> tuple[int, int] | None:
    """Positions and rows of the hidden states that this stage needs for its turn in `tick`; None if it needs none."""
    turn = pipeline.turn(tick)
    if turn is None or not pipeline.begins_with_hidden_states(turn):
        return None
    group = _unless_done(at_work, turn)
    return None if group is None else group.shape_of_input(turn.chunk)


def _raise_first_error(groups: list["_Group"], shares: list[slice], num_rows: int) -> None:
    """Raise the error that would occur first if all rows were decoded in one batch."""
    errors = [
        (group.t, range(num_rows)[share][group.invalid_row], group.error)
        for group, share in zip(groups, shares, strict=True)
        if group.error is not None
    ]
    if errors:
        raise min(errors)[2]


class _Group:
    """This stage's view of a batch of rows that are decoded together.

    Attributes:
        t: the position of the next token; once a row is invalid, of the token that could not be sampled.
        error: that of the first invalid row.
    """

    def __init__(
        self,
        model,
        strategy,
        prompts_RP: torch.Tensor,
        uniform_RL: torch.Tensor,
        decoding: Decoding,
        end_strings: list[str],
        pipeline: Pipeline,
    ):
        self._model, self._strategy, self._uniform_RL = model, strategy, uniform_RL
        self._decoding, self._end_strings, self._pipeline = decoding, end_strings, pipeline
        self._eod_id = model.tokenizer.eos_id
        self._prompt_lengths_R = strategy.context_lengths
        self.t = int(self._prompt_lengths_R.min())
        self.width = int(self._prompt_lengths_R.max()) + decoding.max_length
        num_rows = prompts_RP.size(0)
        self.tokens_RW = prompts_RP.new_full((num_rows, self.width), self._eod_id)
        shared = min(self.width, prompts_RP.size(1))
        self.tokens_RW[:, :shared] = prompts_RP[:, :shared]
        self._is_done_R = torch.zeros_like(self._prompt_lengths_R, dtype=torch.bool)
        # one for each chunk, as attention layers are numbered within their chunk
        self._caches = [
            InferenceParams(max_batch_size=num_rows, max_sequence_length=self.width) for _ in range(pipeline.num_chunks)
        ]
        # the newest tokens, and whether all rows are done after them, int64 [R + 1]; None once processed
        self._sampled = None
        self._pending_broadcast = None
        self.invalid_row, self.error = None, None

    def shape_of_input(self, chunk: int) -> tuple[int, int]:
        """S and R of the chunk's next forward pass."""
        return self.t - self._caches[chunk].sequence_len_offset, self.tokens_RW.size(0)

    def forward(self, chunk: int, hidden_SRH: torch.Tensor | None) -> torch.Tensor:
        """The chunk's output for the positions not in its cache yet, to which their keys and values are added."""
        cache, t = self._caches[chunk], self.t
        seen = cache.sequence_len_offset
        tokens_RT = self.tokens_RW[:, :t]
        mask, position_ids = attention_mask_and_position_ids(tokens_RT, self._eod_id, **self._model.resets)
        mask = None if mask is None else mask[:, :, seen:]
        inputs = (tokens_RT[:, seen:], position_ids[:, seen:], mask)
        output = self._pipeline.run(chunk, hidden_SRH, inputs, inference_params=cache)
        cache.sequence_len_offset = t
        return output

    def sample(self, logits_RSV: torch.Tensor) -> None:
        """Sample the tokens at position t from the last chunk's output; on the last stage."""
        t, decoding = self.t, self._decoding
        generated_R = t - self._prompt_lengths_R
        logits_RV = self._next_logits(logits_RSV)
        logits_RV[:, decoding.num_tokens :] = -torch.inf
        too_short_R = generated_R < decoding.min_length
        logits_RV[:, decoding.end_ids] = logits_RV[:, decoding.end_ids].masked_fill(too_short_R[:, None], -torch.inf)
        uniform_R = self._uniform_RL.gather(1, generated_R.clamp(0, decoding.max_length - 1)[:, None]).squeeze(1)
        drawn_R = sample(logits_RV, self.tokens_RW[:, :t], decoding.sampling, uniform_R)
        drawn_R = torch.where(self._is_done_R, self._eod_id, drawn_R)
        newest_R = torch.where(generated_R >= 0, drawn_R, self.tokens_RW[:, t])
        self.tokens_RW[:, t] = newest_R
        if not (newest_R == INVALID_TOKEN).any():  # INVALID_TOKEN has no text
            is_end_R = self._strategy.end_of_generation_condition(
                self.tokens_RW[:, : t + 1], newest_R, self._eod_id, self._end_strings
            )
            self._is_done_R |= (generated_R >= 0) & (is_end_R | (generated_R + 1 >= decoding.max_length))
        self._sampled = torch.cat((newest_R, self._is_done_R.all()[None]))

    def _next_logits(self, logits_RSV: torch.Tensor) -> torch.Tensor:
        """Next-token logits, float32 [R, V], on every tensor-parallel rank."""
        return gather_from_tensor_model_parallel_region(logits_RSV[:, -1]).float()

    def broadcast_tokens(self) -> None:
        """Start the broadcast of the last stage's tokens; called on all stages."""
        if self._sampled is None:
            self._sampled = self.tokens_RW.new_empty(self.tokens_RW.size(0) + 1)
        self._pending_broadcast = self._pipeline.broadcast(self._sampled)

    def receive_tokens(self) -> bool:
        """Wait for the newest tokens, if any have been sampled, and advance to the next position.

        Returns:
            whether the group has ended, as all rows are done or one is invalid.
        """
        if self._sampled is None:
            return False
        if self._pending_broadcast is not None:
            self._pending_broadcast.wait()
        self.tokens_RW[:, self.t] = self._sampled[:-1]
        *newest, is_done = self._sampled.tolist()
        self._sampled = self._pending_broadcast = None
        if INVALID_TOKEN in newest:
            self.invalid_row = newest.index(INVALID_TOKEN)
            length = int(self._prompt_lengths_R[self.invalid_row])
            self.error = InvalidLogitsError(self.tokens_RW[self.invalid_row, :length].tolist(), self.t - length)
            return True
        self.t += 1
        return bool(is_done)
