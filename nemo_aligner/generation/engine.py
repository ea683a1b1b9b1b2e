"""Generate responses with the weights of a live GPT model: rows join, are decoded side by side, and leave.

What happens, in order: the next prompts are prefilled in one pass into a store, each once, however many rollouts it is
to have; rows join by copying their prompt's keys and values from there into a place of the cache; all rows in flight
are decoded, one token each per step; rows that have ended leave, and waiting ones take their places, or the last rows
in flight close the gaps, so that a step costs what its rows cost.

The host runs ahead of the device: it looks at tokens only after it has queued the steps that follow them. A row may so
be decoded a few tokens beyond its end, which are dropped.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from megatron.core import parallel_state
from nemo.utils import logging

from nemo_aligner.generation import torch_ops
from nemo_aligner.generation.attention import (
    FusedPromptAttention,
    FusedRowAttention,
    PromptAttention,
    RotaryTable,
    RowAttention,
)
from nemo_aligner.generation.cuda_graph import StepGraphs, graph_size
from nemo_aligner.generation.ends import EndStrings
from nemo_aligner.generation.forward import forward, vocabulary_logits
from nemo_aligner.generation.kv_cache import KVCache, bytes_per_position, least_of_all_ranks, usable_memory
from nemo_aligner.generation.no_token import NoTokenError
from nemo_aligner.generation.rows import Decoding, DeviceRows, Row, Snapshot
from nemo_aligner.generation.weights import find_weights
from nemo_aligner.utils.tensors import sent

# Prompts that are prefilled together: few enough for their activations, many enough to fill the device.
MAX_PROMPTS_PER_PREFILL, MAX_TOKENS_PER_PREFILL = 32, 8192
# A prefill on a GPU has a multiple of so many tokens, the last ones padding. cuBLAS has another kernel for nearly every
# number of tokens, and to load one the host waits for all copies under way: 0.2 s, if they are the optimizer's state.
# The same number of prompts comes to a few sizes, which are loaded in the first steps. On average 128 tokens are
# padding, 2 % of 6144; below 256 it is a larger share, but there a product takes as long as reading its weights.
PREFILL_STEP = 256
# The cache grows in steps of so many positions, so that batches of about the same length share one.
CAPACITY_STEP = 64
# These are 64 tokens of each row on a GPU, 32 on a CPU: well below the half minute that schedulers wait behind SIGTERM.
LOOKS_BETWEEN_CHECKS = 32


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
        self._device = next(model.parameters()).device
        self._on_gpu = self._device.type == "cuda"
        self._ops = _kernels() if self._on_gpu else torch_ops
        # How far the host runs ahead, in steps. On a CPU it is the device itself.
        self._steps_between_looks, self._looks_behind = (2, 1) if self._on_gpu else (1, 0)
        self._prefill_step = PREFILL_STEP if self._on_gpu else 1
        self._in_flight: list[Row] = []
        self._rotary: RotaryTable | None = None
        self._device_rows: DeviceRows | None = None
        self._graphs: StepGraphs | None = None
        self._warm_sizes: dict[tuple[int, Decoding], set[int]] = {}
        self._last_made: tuple[tuple | None, int] = (None, 0)  # what was asked for, and rows that memory held
        self.release()

    @torch.no_grad()
    def generate(
        self,
        rows: list[Row],
        decoding: Decoding,
        end_strings: EndStrings,
        check: Callable[[], object] | None = None,
        on_last_rows: Callable[[], object] | None = None,
    ) -> Iterator[Row]:
        """Continue all `rows`, of which the first join first; yields each as it finishes.

        All tensor-parallel ranks call it together with the same rows, and take the same steps.

        Args:
            check: called every LOOKS_BETWEEN_CHECKS looks, between the same steps on all of them: it may hold a
                collective. What it raises ends the generation.
            on_last_rows: called at most once, when no row waits any more and at most half of the places are taken.

        Raises:
            NoTokenError: on all of them, when the logits of a row in flight are NaN or infinite.
            torch.OutOfMemoryError: on all of them, when there is no memory for the keys and values of a single row.
        """
        waiting = deque(_Prompt(deque(same)) for _, same in groupby(rows, key=lambda row: row.prompt))
        self._weights = find_weights(self._model)
        self._make_room(len(rows), waiting, decoding)
        self._in_flight = []
        stored: deque[tuple[int, _Prompt]] = deque()
        looks, num_looks = deque(), 0
        while waiting or stored or self._in_flight:
            self._admit(waiting, stored)
            are_last = not (waiting or stored) and 2 * len(self._in_flight) <= self._cache.num_rows
            if on_last_rows is not None and are_last:
                on_last_rows()
                on_last_rows = None
            ahead = self._steps_between_looks * len(looks)
            are_needed = any(len(row.generated) + ahead < decoding.max_length for row in self._in_flight)
            if are_needed:
                looks.append(self._decode(self._steps_between_looks))
            if len(looks) > self._looks_behind or not are_needed:
                yield from self._take_in(looks.popleft(), decoding, end_strings)
            num_looks += 1
            if check is not None and num_looks % LOOKS_BETWEEN_CHECKS == 0:
                check()

    def release(self) -> None:
        """Give the memory of keys and values back.

        The graphs stay, with the logits and what else a step needs: they are valid again when the same memory comes
        back, as it does from one training step to the next while prompts are about as long. With tensor parallelism
        they go: NCCL does not end a communicator before the graphs that hold its collectives.
        """
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            self._graphs = None
        self._cache: KVCache | None = None
        self._is_limited = False  # by memory
        self._prompts: KVCache | None = None

    # Memory

    def _make_room(self, num_rows: int, prompts: Collection[_Prompt], decoding: Decoding) -> None:
        """Have a cache for as many rows as may be in flight, a store for prompts, and what goes with them."""
        self._make_caches(num_rows, prompts, decoding)
        size = (self._cache.num_rows, self._cache.capacity)
        if self._rotary is None or self._rotary.capacity != self._cache.capacity:
            self._rotary = RotaryTable(self._weights, self._cache.capacity)
        if self._device_rows is None or not self._device_rows.are_for(*size, decoding):
            self._device_rows = DeviceRows(*size, decoding, self._device)
        self._device_rows.clear_(slice(None))
        reads = (self._weights.pointers(), self._cache.pointers(), size, self._device_rows, self._rotary)
        if self._graphs is None or not self._graphs.are_valid_for(reads):
            warm = self._warm_sizes.setdefault((self._cache.capacity, decoding), set())  # what kernels are compiled for
            self._graphs = StepGraphs(self._step, reads, warm)

    def _make_caches(self, num_rows: int, prompts: Collection[_Prompt], decoding: Decoding) -> None:
        longest = max(len(prompt.tokens) for prompt in prompts)
        capacity = _round_up(longest + decoding.max_length, CAPACITY_STEP)
        prompt_capacity = _round_up(longest, CAPACITY_STEP)
        wanted = min(num_rows, self._max_rows)
        if self._has_room(wanted, capacity, prompt_capacity):
            return
        self.release()
        request, (last_request, last_num_rows) = (wanted, capacity, decoding), self._last_made
        is_again = request == last_request
        if self._device_rows is not None and not (
            is_again and self._device_rows.are_for(last_num_rows, capacity, decoding)
        ):
            self._graphs = None  # what they hold cannot be of use any more, and may be needed
        weights = self._weights
        sizes = {"num_layers": len(weights.layers), "num_groups": weights.num_groups, "head_dim": weights.head_dim}
        bytes_per_token = bytes_per_position(**sizes, dtype=weights.dtype)
        num_prompts = max(1, min(len(prompts), MAX_PROMPTS_PER_PREFILL, MAX_TOKENS_PER_PREFILL // prompt_capacity))
        memory = usable_memory(self._device) - num_prompts * prompt_capacity * bytes_per_token
        fitting = least_of_all_ranks(memory // (capacity * bytes_per_token))
        num_rows = max(1, min(wanted, fitting))
        if is_again and num_rows < wanted:
            num_rows = _steady(num_rows, last_num_rows)
        where = {"dtype": weights.dtype, "device": self._device}

        def caches() -> tuple[KVCache, KVCache]:
            return (
                KVCache(**sizes, num_rows=num_rows, capacity=capacity, **where),
                KVCache(**sizes, num_rows=num_prompts, capacity=prompt_capacity, **where),
            )

        while (made := _unless_out_of_memory(caches)) is None:
            if num_rows == 1:
                needed = (capacity + prompt_capacity) * bytes_per_token / 2**20
                raise torch.OutOfMemoryError(
                    f"rollouts: no memory for keys and values of a single row of {capacity} tokens and its prompt, "
                    f"{needed:.0f} MiB; lower model.rs.length_params.max_length or raise "
                    "model.tensor_model_parallel_size"
                )
            num_rows //= 2
            num_prompts = min(num_prompts, num_rows)
        self._cache, self._prompts = made
        self._last_made = (request, num_rows)
        self._is_limited = num_rows < wanted
        if self._is_limited:
            logging.warning(
                f"rollouts: memory for keys and values of {num_rows} rows in flight instead of {wanted}; "
                "the others wait for their turn"
            )
        logging.info(
            f"rollouts: {(self._cache.num_bytes + self._prompts.num_bytes) / 2**20:.0f} MiB for keys and values of "
            f"{num_rows} rows in flight, {capacity} tokens each, and of {num_prompts} prompts"
        )

    def _has_room(self, num_rows: int, capacity: int, prompt_capacity: int) -> bool:
        cache, prompts = self._cache, self._prompts
        if cache is None or cache.capacity < capacity or prompts.capacity < prompt_capacity:
            return False
        # what memory has limited is kept, unless the same memory holds more rows of this length
        can_hold = cache.num_rows * cache.capacity // capacity if self._is_limited else num_rows
        return cache.num_rows >= min(num_rows, can_hold)

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
        prompts = [prompt.tokens[:-1] for _, prompt in stored]
        if not any(prompts):
            return
        lengths = list(map(len, prompts))
        num_padding = -sum(lengths) % self._prefill_step
        make_attention = FusedPromptAttention if self._on_gpu else PromptAttention
        attention = make_attention(self._weights, self._rotary, self._prompts, lengths, num_padding)
        # numpy takes a list far faster than torch
        tokens_M = torch.from_numpy(np.array([token for prompt in prompts for token in prompt] + [0] * num_padding))
        forward(self._weights, sent(tokens_M, self._device), attention.position_M, attention, self._ops)

    # Rows are decoded

    def _decode(self, num_steps: int) -> Snapshot:
        """Queue so many steps, one token for each row in flight in each, and a look at what they generate."""
        num_rows = len(self._in_flight)
        for _ in range(num_steps):
            if self._on_gpu:
                self._graphs.run(min(graph_size(num_rows), self._cache.num_rows))
            else:
                self._step(num_rows)
        return Snapshot(self._device_rows, self._in_flight, num_steps)

    def _step(self, num_rows: int) -> None:
        """One token for each of the first rows; all that it needs is on the device."""
        num_looked_at = self._num_looked_at()
        logits_BV = self._next_logits(num_rows, num_looked_at)
        self._device_rows.advance_(self._device_rows.draw(logits_BV, num_looked_at))

    def _num_looked_at(self) -> int:
        """Positions in front of which all rows stand. A GPU does not wait until the host knows better."""
        if self._on_gpu:
            return self._cache.capacity
        return max(len(row.prompt) + len(row.generated) for row in self._in_flight)

    def _next_logits(self, num_rows: int, num_looked_at: int) -> torch.Tensor:
        """Logits of the next token of the first rows, [B, V]."""
        tokens_B, positions_B = self._device_rows.newest_tokens(num_rows)
        if self._on_gpu:
            attention = FusedRowAttention(self._weights, self._rotary, self._cache, positions_B)
        else:
            attention = RowAttention(self._weights, self._rotary, self._cache, positions_B, num_looked_at)
        hidden_BH = forward(self._weights, tokens_B, positions_B, attention, self._ops)
        return vocabulary_logits(self._weights, hidden_BH)

    # Rows leave

    def _take_in(self, look: Snapshot, decoding: Decoding, end_strings: EndStrings) -> Iterator[Row]:
        """Tell the rows what they have generated; those that have ended leave."""
        finished = []
        for row, tokens, is_broken in look.news():
            row.extend(tokens, decoding, end_strings.are_completed_by)
            if is_broken and not row.is_finished:
                raise NoTokenError(row.prompt, len(row.generated))
            if row.is_finished:
                finished.append(row)
        if finished:
            self._close_gaps()
        yield from finished

    def _close_gaps(self) -> None:
        """Move the last rows in flight to the places of those that have finished."""
        rows, num_before = self._in_flight, len(self._in_flight)
        place = 0
        while place < len(rows):
            if not rows[place].is_finished:
                place += 1
                continue
            last = rows.pop()
            if last.is_finished:
                continue
            rows[place] = last
            # the device may be ahead of what the host knows
            length = len(last.prompt) + len(last.generated) + self._steps_between_looks * self._looks_behind
            self._cache.copy_row_(place, self._cache, len(rows), min(length, self._cache.capacity))
            self._device_rows.move_(place, len(rows))
        self._device_rows.clear_(slice(len(rows), num_before))


def _kernels():
    """The operations of a GPU. Triton is imported where there is one."""
    from nemo_aligner.generation import triton_ops

    return triton_ops


def _steady(num_rows: int, last_num_rows: int) -> int:
    """As many rows as the last time, if so many fit and few more would: the graphs are for a cache of that size."""
    return last_num_rows if last_num_rows <= num_rows <= last_num_rows * 9 // 8 else num_rows


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _unless_out_of_memory(make: Callable):
    """What `make` makes, or None on all tensor-parallel ranks if one of them has no memory for it."""
    made = None
    with contextlib.suppress(torch.OutOfMemoryError):
        made = make()
    return made if least_of_all_ranks(int(made is not None)) else None
