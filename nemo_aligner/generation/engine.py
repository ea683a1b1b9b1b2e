"""Generate responses with the weights of a live GPT model: rows join, are decoded side by side, and leave.

What happens, in order: the next prompts are prefilled in one pass into a store, each once, however many rollouts it is
to have; rows join by copying their prompt's keys and values from there into a place of the cache; all rows in flight
are decoded, one token each per step; rows that have ended leave, and waiting ones take their places, or the last rows
in flight close the gaps, so that a step costs what its rows cost.

The host runs ahead of the device: it looks at tokens only after it has queued the steps that follow them. A row may so
be decoded a few tokens beyond its end, which are dropped.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from nemo.utils import logging

from nemo_aligner.generation import torch_ops
from nemo_aligner.generation.attention import PromptAttention, RotaryTable, RowAttention
from nemo_aligner.generation.ends import EndStrings
from nemo_aligner.generation.forward import forward, vocabulary_logits
from nemo_aligner.generation.kv_cache import KVCache, bytes_per_position, usable_memory
from nemo_aligner.generation.rows import Decoding, DeviceRows, Row, Snapshot
from nemo_aligner.generation.weights import find_weights

# Prompts that are prefilled together: few enough for their activations, many enough to fill the device.
MAX_PROMPTS_PER_PREFILL, MAX_TOKENS_PER_PREFILL = 32, 8192
# The cache grows in steps of so many positions, so that batches of about the same length share one.
CAPACITY_STEP = 64


@dataclass
class _Prompt:
    """Neighbouring rows with the same prompt."""

    rows: deque[Row]

    @property
    def tokens(self) -> list[int]:
        return self.rows[0].prompt


class Engine:
    """Decodes rows with the parameters of `model`, a `GPTModel` of which `unsupported_part` has nothing to say.

    Args:
        max_rows: rows in flight at most; memory may lower it.
    """

    def __init__(self, model: torch.nn.Module, max_rows: int):
        self._model, self._max_rows = model, max_rows
        self._cache: KVCache | None = None
        self._prompts: KVCache | None = None

    @torch.no_grad()
    def generate(self, rows: list[Row], decoding: Decoding, end_strings: EndStrings) -> Iterator[Row]:
        """Continue all `rows`, of which the first join first; yields each as it finishes.

        All tensor-parallel ranks call it together with the same rows, and take the same steps.
        """
        self._weights = find_weights(self._model)
        self._make_room(rows, decoding)
        self._device_rows = DeviceRows(self._cache.num_rows, self._cache.capacity, decoding, self._weights.device)
        self._in_flight: list[Row] = []
        waiting = deque(_Prompt(deque(same)) for _, same in groupby(rows, key=lambda row: row.prompt))
        stored: deque[tuple[int, _Prompt]] = deque()
        looks = deque()
        while waiting or stored or self._in_flight:
            self._admit(waiting, stored)
            looks.append(self._decode(self._steps_between_looks))
            if len(looks) > self._looks_behind:
                yield from self._take_in(looks.popleft(), decoding, end_strings)

    def release(self) -> None:
        """Give the memory of keys and values back."""
        self._cache = self._prompts = self._device_rows = self._rotary = None

    # How far the host runs ahead. On a CPU it is the device itself.

    @property
    def _steps_between_looks(self) -> int:
        return 2 if self._weights.device.type == "cuda" else 1

    @property
    def _looks_behind(self) -> int:
        return 1 if self._weights.device.type == "cuda" else 0

    # Memory

    def _make_room(self, rows: list[Row], decoding: Decoding) -> None:
        """Have a cache for as many of `rows` as may be in flight, and a store for prompts."""
        longest = max(len(row.prompt) for row in rows)
        capacity = _round_up(longest + decoding.max_length, CAPACITY_STEP)
        prompt_capacity = _round_up(longest, CAPACITY_STEP)
        wanted = min(len(rows), self._max_rows)
        if self._has_room(wanted, capacity, prompt_capacity):
            return
        self.release()
        weights = self._weights
        size = (len(weights.layers), weights.num_groups, weights.head_dim, weights.dtype)
        num_prompts = max(1, min(len(rows), MAX_PROMPTS_PER_PREFILL, MAX_TOKENS_PER_PREFILL // prompt_capacity))
        memory = usable_memory(weights.device) - num_prompts * prompt_capacity * bytes_per_position(*size)
        num_rows = max(1, min(wanted, memory // (capacity * bytes_per_position(*size))))
        num_rows = _least_of_all_ranks(num_rows, weights.device)
        if num_rows < wanted:
            logging.warning(
                f"rollouts: memory for keys and values of {num_rows} rows in flight instead of {wanted}; "
                "the others wait for their turn"
            )
        num_layers, num_groups, head_dim, dtype = size
        self._cache = KVCache(num_layers, num_rows, num_groups, capacity, head_dim, dtype, weights.device)
        self._prompts = KVCache(num_layers, num_prompts, num_groups, prompt_capacity, head_dim, dtype, weights.device)
        self._rotary = RotaryTable(weights, capacity)
        logging.info(
            f"rollouts: {(self._cache.num_bytes + self._prompts.num_bytes) / 2**20:.0f} MiB for keys and values of "
            f"{num_rows} rows in flight, {capacity} tokens each, and of {num_prompts} prompts"
        )

    def _has_room(self, num_rows: int, capacity: int, prompt_capacity: int) -> bool:
        cache, prompts = self._cache, self._prompts
        return cache is not None and (
            cache.num_rows >= num_rows and cache.capacity >= capacity and prompts.capacity >= prompt_capacity
        )

    # Rows join

    def _admit(self, waiting: deque[_Prompt], stored: deque[tuple[int, _Prompt]]) -> None:
        """Let waiting rows join while there are places for them."""
        places, joining = [], []
        while len(self._in_flight) < self._cache.num_rows and (stored or waiting):
            if not stored:
                self._prefill(waiting, stored)
            number, prompt = stored[0]
            length, place = len(prompt.tokens) - 1, len(self._in_flight)
            row = prompt.rows.popleft()
            self._cache.copy_row_(place, self._prompts, number, length)
            places.append(place)
            joining.append(row)
            self._in_flight.append(row)
            if not prompt.rows:
                stored.popleft()
        if joining:
            self._device_rows.put_(places, joining)

    def _prefill(self, waiting: deque[_Prompt], stored: deque[tuple[int, _Prompt]]) -> None:
        """Fill the store, which nobody needs any more, with the keys and values of the next prompts.

        A prompt's last token is left out: it is the first that the prompt's rows decode.
        """
        num_tokens = 0
        while waiting and len(stored) < self._prompts.num_rows:
            num_tokens += len(waiting[0].tokens)
            if stored and num_tokens > MAX_TOKENS_PER_PREFILL:
                break
            stored.append((len(stored), waiting.popleft()))
        # prompts of one token have nothing to prefill; the others take the first rows of the store
        filled = [prompt for _, prompt in stored if len(prompt.tokens) > 1]
        if not filled:
            return
        empty = [prompt for _, prompt in stored if len(prompt.tokens) == 1]
        in_order = {id(prompt): number for number, prompt in enumerate(filled + empty)}
        for index, (_, prompt) in enumerate(stored):
            stored[index] = (in_order[id(prompt)], prompt)
        attention = PromptAttention(
            self._weights, self._rotary, self._prompts, [len(prompt.tokens) - 1 for prompt in filled]
        )
        tokens_M = torch.tensor([token for prompt in filled for token in prompt.tokens[:-1]])
        forward(
            self._weights, tokens_M.to(self._weights.device, non_blocking=True), attention.position_M, attention,
            torch_ops,
        )  # fmt: skip

    # Rows are decoded

    def _decode(self, num_steps: int) -> Snapshot:
        for _ in range(num_steps):
            self._step(len(self._in_flight))
        return Snapshot(self._device_rows, self._in_flight, num_steps)

    def _step(self, num_rows: int) -> None:
        """One token for each row in flight."""
        num_looked_at = max(len(row.prompt) + len(row.generated) for row in self._in_flight)
        logits_BV = self._next_logits(num_rows, num_looked_at)
        self._device_rows.advance_(self._device_rows.draw(logits_BV, num_looked_at))

    def _next_logits(self, num_rows: int, num_looked_at: int) -> torch.Tensor:
        """Logits of the next token of the first rows, float32 [B, V]."""
        tokens_B, positions_B = self._device_rows.newest_tokens(num_rows)
        attention = RowAttention(self._weights, self._rotary, self._cache, positions_B, num_looked_at)
        hidden_BH = forward(self._weights, tokens_B, positions_B, attention, torch_ops)
        return vocabulary_logits(self._weights, hidden_BH)

    # Rows leave

    def _take_in(self, look: Snapshot, decoding: Decoding, end_strings: EndStrings) -> Iterator[Row]:
        """Tell the rows what they have generated; those that have ended leave."""
        finished = []
        for row, tokens in look.news():
            row.extend(tokens, decoding, end_strings.are_completed_by)
            if row.is_finished:
                finished.append(row)
        if finished:
            self._close_gaps()
        yield from finished

    def _close_gaps(self) -> None:
        """Move the last rows in flight to the places of those that have finished."""
        place = 0
        while place < len(self._in_flight):
            while self._in_flight and self._in_flight[-1].is_finished:
                self._in_flight.pop()
            if place < len(self._in_flight) and self._in_flight[place].is_finished:
                last = self._in_flight.pop()
                source = len(self._in_flight)
                length = len(last.prompt) + len(last.generated)
                self._cache.copy_row_(place, self._cache, source, length)
                self._device_rows.move_(place, source)
                self._in_flight[place] = last
            place += 1


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _least_of_all_ranks(number: int, device: torch.device) -> int:
    """The smallest `number` among the tensor-parallel ranks, which must have the same rows in flight."""
    from megatron.core import parallel_state

    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return number
    least = torch.tensor(number, device=device)
    torch.distributed.all_reduce(
        least, torch.distributed.ReduceOp.MIN, group=parallel_state.get_tensor_model_parallel_group()
    )
    return int(least)
