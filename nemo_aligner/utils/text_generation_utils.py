"""Ends of responses: a generation strategy that tracks final lengths, and checks of finished responses.

Legend: B rows; t the position of the newest token; a row's budget is its `max_length`, the tokens it may generate.
"""

import copy

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.modules.common.text_generation_strategy import GPTModelTextGenerationStrategy

from nemo_aligner.compat.device import current_device
from nemo_aligner.utils.distributed import broadcast_tensor_within_pp


class TrackLengthGPTModelTextGenerationStrategy(GPTModelTextGenerationStrategy):
    """Records where each row ended, and returns its length (prompt, response and ending token) afterwards.

    Args:
        model: the actor.
        context_lengths: prompt lengths, int64 [B].
        max_length: tokens that each row may generate, counted from the end of its own prompt.
        min_length: tokens that each row generates before a token may end it.
    """

    def __init__(self, model, context_lengths: torch.Tensor, max_length: int, min_length: int = 0):
        super().__init__(model)
        self.context_lengths = context_lengths
        self.max_length = max_length
        self.min_length = min_length
        self._end_position = torch.full_like(context_lengths, -1)

    def of_rows(self, rows: slice) -> "TrackLengthGPTModelTextGenerationStrategy":
        """A strategy for these rows alone, which shares its record of where they end with this one."""
        part = copy.copy(self)
        part.context_lengths, part._end_position = self.context_lengths[rows], self._end_position[rows]
        return part

    def end_of_generation_condition(
        self, tokens: torch.Tensor, prev: torch.Tensor, eod_id: int, end_strings: list[str]
    ) -> torch.Tensor:
        """Which rows the token at position t ends, bool [B]. Called on the last pipeline stage, once per position.

        Args:
            tokens: everything up to and including position t, int64 [B, t + 1].
            prev: the ids drawn at t, int64 [B].

        Raises:
            RuntimeError: if `tokens` and `context_lengths` differ in their number of rows.
        """
        if tokens.size(0) != self.context_lengths.size(0):
            raise RuntimeError(f"{tokens.size(0)} rows of tokens, but {self.context_lengths.size(0)} prompt lengths")
        position = tokens.size(1) - 1
        num_generated = position - self.context_lengths
        may_end = (num_generated >= self.min_length) & (num_generated < self.max_length)
        undecided = may_end & (self._end_position < 0)
        is_end = self._ends_with_token_or_string(tokens, prev, undecided, eod_id, end_strings)
        self._end_position.masked_fill_(undecided & is_end, position)
        return is_end

    def get_lengths(self) -> torch.Tensor:
        """Final lengths, int64 [B], on every rank of the replica; all pipeline ranks call it together.

        For a row that ended within its budget, the position after its ending token, else prompt + `max_length`.
        """
        return self._final_state()[0]

    def get_is_end(self) -> torch.Tensor:
        """Which rows ended within their budget, bool [B]; called like `get_lengths`."""
        return self._final_state()[1]

    def _final_state(self) -> tuple[torch.Tensor, torch.Tensor]:
        end_position = None
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            end_position = self._end_position
        end_position = broadcast_tensor_within_pp(end_position)
        is_end = end_position >= 0
        return torch.where(is_end, end_position + 1, self.context_lengths + self.max_length), is_end

    def end_token_ids(self, eod_id: int, end_strings: list[str]) -> list[int]:
        """The ids that end a response on their own."""
        return sorted(self.end_ids_and_strings(eod_id, end_strings)[0])

    def end_ids_and_strings(self, eod_id: int, end_strings: list[str]) -> tuple[set[int], list[str]]:
        """What ends a response: single token ids, and texts of several tokens."""
        if not end_strings:
            return {eod_id}, []
        return self._get_end_of_generation_tokens_and_strings(eod_id, end_strings)

    def _ends_with_token_or_string(self, tokens, prev, undecided, eod_id, end_strings) -> torch.Tensor:
        end_ids, texts = self.end_ids_and_strings(eod_id, end_strings)
        is_end = torch.isin(prev, torch.tensor(sorted(end_ids), device=prev.device))
        if texts:
            for row in (undecided & ~is_end).nonzero().flatten().tolist():
                is_end[row] = any(ends_with_text(tokens[row], text, self.model.tokenizer) for text in texts)
        return is_end


def ends_with_text(tokens: torch.Tensor, text: str, tokenizer) -> bool:
    """Whether the decoded row `tokens` [T] ends with `text`; decodes only as much of its tail as needed."""
    window = len(text.encode()) + 8  # a token may decode to part of a character, or to nothing
    tail = tokenizer.ids_to_text(tokens[-window:].tolist())
    if len(tail) <= len(text) and window < tokens.numel():
        tail = tokenizer.ids_to_text(tokens.tolist())
    return tail.endswith(text)


def tokenize_batch(
    sentences: list[str], tokenizer, max_len: int, add_BOS: bool = False, add_EOS: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, max_len], right-padded with `eos_id`, and lengths after truncation [B]; int64, on the device.

    BOS and EOS, if requested, are added before truncation to `max_len`.
    """
    rows = [
        [tokenizer.bos_id] * add_BOS + list(tokenizer.text_to_ids(sentence)) + [tokenizer.eos_id] * add_EOS
        for sentence in sentences
    ]
    rows = [row[:max_len] for row in rows]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    tokens = torch.full((len(rows), max_len), tokenizer.eos_id, dtype=torch.int64)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return tokens.to(current_device()), lengths.to(current_device())


def verify_is_valid_and_clamp_range_(
    response_tokens: torch.Tensor,
    response_lengths: torch.Tensor,
    strategy,
    tokenizer,
    end_strings: list[str] | None = None,
) -> torch.Tensor:
    """Which rows end properly and contain only ids of the vocabulary, bool [B].

    A row ends properly if its token at `response_lengths - 1`, or the text up to there, is an end by the strategy's
    rule. Ids outside [0, vocab_size) are clamped into that range in place.

    Args:
        response_tokens: prompt, response and padding, int64 [B, S]. Modified in place.
        response_lengths: int64 [B].
    """
    end_ids, texts = strategy.end_ids_and_strings(tokenizer.eos_id, end_strings or [])
    in_range = ((response_tokens >= 0) & (response_tokens < tokenizer.vocab_size)).all(dim=-1)
    response_tokens.clamp_(0, tokenizer.vocab_size - 1)
    last_tokens = response_tokens.gather(1, (response_lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    is_end = torch.isin(last_tokens, torch.tensor(sorted(end_ids), device=last_tokens.device))
    for row in (~is_end).nonzero().flatten().tolist() if texts else []:
        ended = response_tokens[row, : int(response_lengths[row])]
        is_end[row] = any(ends_with_text(ended, text, tokenizer) for text in texts)
    return is_end & in_range & (response_lengths > 0)


def has_content(
    response_tokens: torch.Tensor,
    prompt_lengths: torch.Tensor,
    response_lengths: torch.Tensor,
    tokenizer,
    end_strings: list[str],
) -> torch.Tensor:
    """Which ended rows contain more than the token or string that ended them, bool [B].

    Args:
        response_tokens: prompt, response with its ending, padding; int64 [B, S].
        prompt_lengths, response_lengths: int64 [B], both from the first prompt token.
    """
    longer_than_end_token = response_lengths - prompt_lengths > 1
    for row in longer_than_end_token.nonzero().flatten().tolist() if end_strings else []:
        ids = response_tokens[row, int(prompt_lengths[row]) : int(response_lengths[row])].tolist()
        if len(ids) <= max(len(text.encode()) for text in end_strings):
            longer_than_end_token[row] = tokenizer.ids_to_text(ids) not in end_strings
    return longer_than_end_token
