"""Rows that are decoded side by side, in slots of one cache, by this pipeline stage's part of the model.

A lane is told when its turn comes. It first plans it, on the host: rows that have ended leave, waiting ones join, whose
prompts may have to be prefilled before. Then it runs it, on the device. With several stages, each has as many lanes as
there are stages, and all of them plan the same turns.

The host runs ahead of the device: it looks at tokens only after it has queued the steps that follow them. A row may so
be decoded a few tokens beyond its end, which are dropped.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core import parallel_state
from nemo.utils import logging

from nemo_aligner.generation import torch_ops
from nemo_aligner.generation.attention import (
    DecodeAttention,
    FusedDecodeAttention,
    FusedPrefillAttention,
    PrefillAttention,
    RotaryTable,
)
from nemo_aligner.generation.cuda_graph import StepGraphs, graph_size
from nemo_aligner.generation.ends import EndStrings
from nemo_aligner.generation.forward import forward, vocabulary_logits
from nemo_aligner.generation.invalid_logits import InvalidLogitsError
from nemo_aligner.generation.kv_cache import KVCache, bytes_per_position, min_over_ranks, usable_memory
from nemo_aligner.generation.rows import Decoding, DeviceRows, Row, Snapshot
from nemo_aligner.generation.weights import find_weights
from nemo_aligner.utils.tensors import to_device_async

# Prompts that are prefilled together: few enough for their activations, many enough to fill the device.
MAX_PROMPTS_PER_PREFILL, MAX_TOKENS_PER_PREFILL = 32, 8192
# A prefill on a GPU has a multiple of so many tokens, the last ones padding. cuBLAS has another kernel for nearly every
# number of tokens, and to load one the host waits for all copies under way: 0.2 s, if they are the optimizer's state.
# The same number of prompts comes to a few sizes, which are loaded in the first steps. On average 128 tokens are
# padding, 2 % of 6144; below 256 it is a larger share, but there a product takes as long as reading its weights.
PREFILL_STEP = 256
# The cache grows in steps of so many positions, so that batches of about the same length share one.
CAPACITY_STEP = 64


@dataclass
class Prompt:
    """Neighbouring rows with the same prompt."""

    rows: deque[Row]

    @property
    def tokens(self) -> list[int]:
        return self.rows[0].prompt


@dataclass
class Prefill:
    """Prompts without their last tokens, which their rows decode first; they go to the store's slots 0, 1, ..."""

    prompts: list[list[int]]
    num_padding: int

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.prompts)) + self.num_padding


@dataclass
class Join:
    """A row gets the first `length` positions of a stored prompt."""

    slot: int
    stored: int
    length: int


@dataclass
class Turn:
    """What a stage does in a lane's turn, in order, and the rows that left before.

    Attributes:
        num_rows: that are decoded then, on a GPU perhaps with some idle ones; 0: none.
    """

    finished: list[Row] = field(default_factory=list)
    admission: list[Prefill | Join] = field(default_factory=list)
    num_rows: int = 0

    @property
    def is_idle(self) -> bool:
        return not (self.admission or self.num_rows)

    def sizes_of_messages(self) -> list[int]:
        """Tokens in each tensor of hidden states that a stage sends to the next one."""
        prefills = [action.num_tokens for action in self.admission if isinstance(action, Prefill)]
        return prefills + [self.num_rows] * (self.num_rows > 0)


class Lane:
    """Takes its rows through `model`, a stage's `GPTModel`, turn by turn; `begin` comes first.

    Args:
        max_rows: rows in flight at most; memory may lower it.
        num_lanes: of this stage, as many as there are stages. A single one, which has all of the model, draws and
            advances in one go.
    """

    def __init__(self, model: torch.nn.Module, max_rows: int, num_lanes: int):
        self._model, self._max_rows, self._num_lanes = model, max_rows, num_lanes
        self._is_alone = is_alone = num_lanes == 1
        self._device = next(model.parameters()).device
        self._on_gpu = self._device.type == "cuda"
        self._ops = _kernels() if self._on_gpu else torch_ops
        # How far the host runs ahead, in steps. On a CPU it is the device itself.
        self._steps_a_turn, self._snapshots_behind = (2 if is_alone else 1, 1) if self._on_gpu else (1, 0)
        self._prefill_step = PREFILL_STEP if self._on_gpu else 1
        self.in_flight: list[Row] = []
        self._rotary: RotaryTable | None = None
        self._device_rows: DeviceRows | None = None
        # between stages: hidden states in and out, and the tokens that the last one draws
        self._hidden_RH: torch.Tensor | None = None
        self._sampled_R: torch.Tensor | None = None
        self._graphs: StepGraphs | None = None
        self._warm_sizes: dict[tuple[int, Decoding], set[int]] = {}
        self._last_made: tuple[tuple | None, int] = (None, 0)  # what was asked for, and rows that memory held
        self.release()

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

    def begin(self, num_rows: int, prompts: Collection[Prompt], decoding: Decoding, share: float) -> None:
        """Have a cache for as many rows as may be in flight, a store for prompts, and what goes with them.

        Args:
            num_rows: that are in flight in this lane at most.
            share: of the memory that is free, that this lane may take.
        """
        self._weights, self._decoding = find_weights(self._model), decoding
        self.in_flight, self._stored, self._snapshots = [], deque(), deque()
        self._make_caches(num_rows, prompts, decoding, share)
        self._num_slots = min(num_rows, self._cache.num_rows)  # the cache may be an earlier, larger batch's
        size = (self._cache.num_rows, self._cache.capacity)
        if self._rotary is None or self._rotary.capacity != self._cache.capacity:
            self._rotary = RotaryTable(self._weights, self._cache.capacity)
        if self._device_rows is None or not self._device_rows.are_for(*size, decoding):
            self._device_rows = DeviceRows(*size, decoding, self._device)
        self._device_rows.clear_(slice(None))
        if not self._is_alone and (self._hidden_RH is None or len(self._hidden_RH) != size[0]):
            hidden_size = self._model.config.hidden_size
            self._hidden_RH = torch.empty(size[0], hidden_size, dtype=self._weights.dtype, device=self._device)
            self._sampled_R = torch.empty(size[0], dtype=torch.int64, device=self._device)
        between_stages = None if self._hidden_RH is None else self._hidden_RH.data_ptr()
        where = (self._weights.pointers(), self._cache.pointer, size, between_stages)
        reads = (*where, self._device_rows, self._rotary)
        if self._graphs is None or not self._graphs.are_valid_for(reads):
            warm = self._warm_sizes.setdefault((self._cache.capacity, decoding), set())  # what kernels are compiled for
            self._graphs = StepGraphs(self._step, reads, warm)

    def _make_caches(self, num_rows: int, prompts: Collection[Prompt], decoding: Decoding, share: float) -> None:
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
        memory = int(usable_memory(self._device) * share) - num_prompts * prompt_capacity * bytes_per_token
        fitting = min_over_ranks(memory // (capacity * bytes_per_token))
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

    # A turn is planned, on the host

    @property
    def is_at_most_half_full(self) -> bool:
        return not self._stored and 2 * len(self.in_flight) <= self._num_slots

    def plan(self, waiting: deque[Prompt], end_strings: EndStrings) -> Turn:
        """Take in what is known of the last turns, let rows leave and join, and say what is to be done.

        Raises:
            InvalidLogitsError: when the logits of a row in flight are NaN or infinite.
        """
        turn = Turn()
        while self._snapshots and (len(self._snapshots) > self._snapshots_behind or not self._are_needed()):
            turn.finished += self._process_snapshot(self._snapshots.popleft(), end_strings)
        self._admit(waiting, turn)
        if self._are_needed():
            num_rows = len(self.in_flight)
            turn.num_rows = min(graph_size(num_rows), self._cache.num_rows) if self._on_gpu else num_rows
        return turn

    def give_up(self) -> None:
        """Let all rows go, finished or not."""
        self._device_rows.clear_(slice(None))
        self.in_flight.clear(), self._stored.clear(), self._snapshots.clear()

    def _are_needed(self) -> bool:
        """Whether another step is, for any row."""
        ahead = self._steps_a_turn * len(self._snapshots)
        return any(len(row.generated) + ahead < self._decoding.max_length for row in self.in_flight)

    def _admit(self, waiting: deque[Prompt], turn: Turn) -> None:
        """Let waiting rows join while there are slots for them."""
        slots, joining = [], []
        while len(self.in_flight) < self._num_slots and (self._stored or waiting):
            if not self._stored:
                self._store_next(waiting, turn)
            number, prompt = self._stored[0]
            slot, row = len(self.in_flight), prompt.rows.popleft()
            turn.admission.append(Join(slot, number, len(row.prompt) - 1))
            slots.append(slot)
            joining.append(row)
            self.in_flight.append(row)
            if not prompt.rows:
                self._stored.popleft()
        if joining:
            self._device_rows.put_(slots, joining)

    def _store_next(self, waiting: deque[Prompt], turn: Turn) -> None:
        """Fill the store, which nobody needs any more, with the next prompts.

        Several, as prompts are prefilled at little more than the cost of one, but only this lane's share of all that
        wait, unless there are slots for more.
        """
        num_waiting = sum(len(prompt.rows) for prompt in waiting)
        num_left = max(self._num_slots - len(self.in_flight), num_waiting // self._num_lanes)
        num_tokens = 0
        while waiting and num_left > 0 and len(self._stored) < self._prompts.num_rows:
            num_tokens += len(waiting[0].tokens)
            if self._stored and num_tokens > MAX_TOKENS_PER_PREFILL:
                break
            prompt = _first_rows(waiting, num_left)
            num_left -= len(prompt.rows)
            self._stored.append((len(self._stored), prompt))
        prompts = [prompt.tokens[:-1] for _, prompt in self._stored]
        if any(prompts):
            turn.admission.append(Prefill(prompts, -sum(map(len, prompts)) % self._prefill_step))

    def _process_snapshot(self, snapshot: Snapshot, end_strings: EndStrings) -> list[Row]:
        """Tell the rows what they have generated; those that have ended leave."""
        finished = []
        for row, tokens, is_invalid in snapshot.new_tokens():
            row.extend(tokens, self._decoding, end_strings.are_completed_by)
            if is_invalid and not row.is_finished:
                raise InvalidLogitsError(row.prompt, len(row.generated))
            if row.is_finished:
                finished.append(row)
        if finished:
            self._close_gaps()
        return finished

    def _close_gaps(self) -> None:
        """Move the last rows in flight to the slots of those that have finished."""
        rows, num_before = self.in_flight, len(self.in_flight)
        slot = 0
        while slot < len(rows):
            if not rows[slot].is_finished:
                slot += 1
                continue
            last = rows.pop()
            if last.is_finished:
                continue
            rows[slot] = last
            # the device may be ahead of what the host knows
            length = len(last.prompt) + len(last.generated) + self._steps_a_turn * self._snapshots_behind
            self._cache.copy_row_(slot, self._cache, len(rows), min(length, self._cache.capacity))
            self._device_rows.move_(slot, len(rows))
        self._device_rows.clear_(slice(len(rows), num_before))

    # It is run, on the device

    def run(self, turn: Turn, received: list[torch.Tensor]) -> list[torch.Tensor]:
        """Queue a turn; takes and returns the hidden states that stages send each other, as the turn says."""
        received, outputs = deque(received), []

        def next_received():
            return received.popleft() if received else None

        for action in turn.admission:
            if isinstance(action, Join):
                self._cache.copy_row_(action.slot, self._prompts, action.stored, action.length)
            else:
                outputs.append(self._prefill(action, next_received()))
        if turn.num_rows:
            outputs.append(self._decode(turn.num_rows, next_received()))
        return [] if self._weights.output is not None else outputs

    def sampled(self, turn: Turn) -> torch.Tensor:
        """Where the last stage has put the tokens of a turn, int64 [rows], and others get them."""
        return self._sampled_R[: turn.num_rows]

    def advance(self, turn: Turn) -> None:
        """Go on with the tokens that were drawn in a turn."""
        self._device_rows.advance_(self.sampled(turn))
        self._snapshots.append(Snapshot(self._device_rows, self.in_flight, self._steps_a_turn))

    def _prefill(self, prefill: Prefill, hidden_MH: torch.Tensor | None) -> torch.Tensor:
        make_attention = FusedPrefillAttention if self._on_gpu else PrefillAttention
        lengths = list(map(len, prefill.prompts))
        attention = make_attention(self._weights, self._rotary, self._prompts, lengths, prefill.num_padding)
        # numpy takes a list far faster than torch
        tokens = [token for prompt in prefill.prompts for token in prompt] + [0] * prefill.num_padding
        tokens_M = to_device_async(torch.from_numpy(np.array(tokens)), self._device)
        return forward(self._weights, tokens_M, attention.position_M, attention, self._ops, hidden_MH)

    def _decode(self, num_rows: int, hidden_BH: torch.Tensor | None) -> torch.Tensor | None:
        if hidden_BH is not None:
            self._hidden_RH[:num_rows] = hidden_BH
        for _ in range(self._steps_a_turn):
            if self._on_gpu:
                self._graphs.run(num_rows)
            else:
                self._step(num_rows)
        if self._is_alone:
            self._snapshots.append(Snapshot(self._device_rows, self.in_flight, self._steps_a_turn))
            return None
        return self._hidden_RH[:num_rows]

    def _step(self, num_rows: int) -> None:
        """One token for each of the first rows; all that it needs is on the device."""
        max_context = self._max_context()
        if self._weights.output is None:
            self._hidden_RH[:num_rows] = self._next_hidden(num_rows, max_context)
            return
        sampled_B = self._device_rows.sample(self._next_logits(num_rows, max_context), max_context)
        if self._is_alone:
            self._device_rows.advance_(sampled_B)
        else:
            self._sampled_R[:num_rows] = sampled_B

    def _next_logits(self, num_rows: int, max_context: int) -> torch.Tensor:
        """Logits of the next token of the first rows, [B, V]."""
        return vocabulary_logits(self._weights, self._next_hidden(num_rows, max_context))

    def _next_hidden(self, num_rows: int, max_context: int) -> torch.Tensor:
        tokens_B, positions_B = self._device_rows.newest_tokens(num_rows)
        if self._on_gpu:
            attention = FusedDecodeAttention(self._weights, self._rotary, self._cache, positions_B)
        else:
            attention = DecodeAttention(self._weights, self._rotary, self._cache, positions_B, max_context)
        hidden_BH = None if self._is_alone else self._hidden_RH[:num_rows]
        return forward(self._weights, tokens_B, positions_B, attention, self._ops, hidden_BH)

    def _max_context(self) -> int:
        """Positions in front of which all rows stand. A GPU does not wait until the host knows better."""
        if self._on_gpu:
            return self._cache.capacity
        return max(len(row.prompt) + len(row.generated) for row in self.in_flight)


def _kernels():
    """The operations of a GPU. Triton is imported where there is one."""
    from nemo_aligner.generation import triton_ops

    return triton_ops


def _first_rows(waiting: deque[Prompt], num_rows: int) -> Prompt:
    """The first prompt with all of its rows, or with the first `num_rows`: the others go on waiting."""
    if len(waiting[0].rows) <= num_rows:
        return waiting.popleft()
    return Prompt(deque(waiting[0].rows.popleft() for _ in range(num_rows)))


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
    return made if min_over_ranks(int(made is not None)) else None
