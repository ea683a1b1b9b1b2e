"""A batch of rows decoded together, in the slots of one KV cache, by this pipeline stage's part of the model.

The engine calls a lane once per turn. The turn is first planned on the host: finished rows leave and waiting rows join,
after a prefill of their prompts if needed. It then runs on the device. With several stages, each has as many lanes as
there are stages, and all stages plan the same turns.

The host runs ahead of the device: it reads tokens only after queueing the steps that follow them. A row may therefore
be decoded a few tokens past its end; these are dropped.
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

# Limits of one prefill: small enough for the memory of its activations, large enough to fill the device.
MAX_PROMPTS_PER_PREFILL, MAX_TOKENS_PER_PREFILL = 32, 8192
# On a GPU, prefills are padded to a multiple of this many tokens. cuBLAS picks a different kernel for nearly every
# number of tokens, and loading one makes the host wait for all copies in flight: 0.2 s if they are the optimizer state.
# With padding, a given number of prompts yields only a few sizes, whose kernels are loaded in the first steps. On
# average 128 tokens are padding, 2 % of 6144; below 256 tokens the share is larger, but there a GEMM takes as long as
# reading its weights.
PREFILL_STEP = 256
# Cache capacity is rounded up to a multiple of this many positions, so that batches of similar length share one cache.
CAPACITY_STEP = 64


@dataclass
class Prompt:
    """Consecutive rows with the same prompt."""

    rows: deque[Row]

    @property
    def tokens(self) -> list[int]:
        return self.rows[0].prompt


@dataclass
class Prefill:
    """Prompts for the prompt store's slots 0, 1, ...; without their last tokens, which the rows decode first."""

    prompts: list[list[int]]
    num_padding: int

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.prompts)) + self.num_padding


@dataclass
class Join:
    """Copy the first `length` positions of stored prompt `stored` to KV cache slot `slot`."""

    slot: int
    stored: int
    length: int


@dataclass
class Turn:
    """What a stage runs in a lane's turn, in order, and the rows that finished before it.

    Attributes:
        num_rows: rows decoded after the admissions, on a GPU possibly padded with idle ones; 0 for no decode step.
    """

    finished: list[Row] = field(default_factory=list)
    admission: list[Prefill | Join] = field(default_factory=list)
    num_rows: int = 0

    @property
    def is_idle(self) -> bool:
        return not (self.admission or self.num_rows)

    def sizes_of_messages(self) -> list[int]:
        """Number of tokens in each tensor of hidden states sent to the next stage."""
        prefills = [action.num_tokens for action in self.admission if isinstance(action, Prefill)]
        return prefills + [self.num_rows] * (self.num_rows > 0)


class Lane:
    """Runs rows through `model`, a stage's `GPTModel`, turn by turn; call `begin` first.

    Args:
        max_rows: maximum number of rows in flight; lowered if memory is short.
        num_lanes: lanes of this stage, as many as there are stages. A single lane has the whole model, so it samples
            and advances in one step.
    """

    def __init__(self, model: torch.nn.Module, max_rows: int, num_lanes: int):
        self._model, self._max_rows, self._num_lanes = model, max_rows, num_lanes
        self._is_alone = is_alone = num_lanes == 1
        self._device = next(model.parameters()).device
        self._on_gpu = self._device.type == "cuda"
        self._ops = _kernels() if self._on_gpu else torch_ops
        # How far the host runs ahead: steps per turn, and snapshots not yet read. On a CPU the host is the device.
        self._steps_a_turn, self._snapshots_behind = (2 if is_alone else 1, 1) if self._on_gpu else (1, 0)
        self._prefill_step = PREFILL_STEP if self._on_gpu else 1
        self.in_flight: list[Row] = []
        self._rotary: RotaryTable | None = None
        self._device_rows: DeviceRows | None = None
        # between stages: hidden states in and out, and the tokens that the last stage samples
        self._hidden_RH: torch.Tensor | None = None
        self._sampled_R: torch.Tensor | None = None
        self._graphs: StepGraphs | None = None
        self._warm_sizes: dict[tuple[int, Decoding], set[int]] = {}
        self._last_made: tuple[tuple | None, int] = (None, 0)  # the request, and the number of rows that fit
        self.release()

    def release(self) -> None:
        """Free the memory of the KV caches.

        The CUDA graphs are kept, with the logits and other buffers of a step: they are valid again if the caches get
        the same memory again, as they do from one training step to the next while prompt lengths are similar. With
        tensor parallelism they are dropped: NCCL cannot destroy a communicator before the graphs that captured its
        collectives.
        """
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            self._graphs = None
        self._cache: KVCache | None = None
        self._is_limited = False  # by memory
        self._prompts: KVCache | None = None

    # Memory

    def begin(self, num_rows: int, prompts: Collection[Prompt], decoding: Decoding, share: float) -> None:
        """Allocate the KV cache for the rows in flight, the prompt store, and the state that goes with them.

        Args:
            num_rows: maximum number of rows in flight in this lane.
            share: fraction of the free memory that this lane may use.
        """
        self._weights, self._decoding = find_weights(self._model), decoding
        self.in_flight, self._stored, self._snapshots = [], deque(), deque()
        self._make_caches(num_rows, prompts, decoding, share)
        self._num_slots = min(num_rows, self._cache.num_rows)  # the cache may be from an earlier, larger batch
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
            warm = self._warm_sizes.setdefault((self._cache.capacity, decoding), set())  # kernels compiled
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
            self._graphs = None  # they can no longer become valid, and their memory may be needed
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
                f"rollouts: memory for the keys and values of {num_rows} rows in flight instead of {wanted}; "
                "the others wait for a free slot"
            )
        logging.info(
            f"rollouts: {(self._cache.num_bytes + self._prompts.num_bytes) / 2**20:.0f} MiB for keys and values of "
            f"{num_rows} rows in flight, {capacity} tokens each, and of {num_prompts} prompts"
        )

    def _has_room(self, num_rows: int, capacity: int, prompt_capacity: int) -> bool:
        cache, prompts = self._cache, self._prompts
        if cache is None or cache.capacity < capacity or prompts.capacity < prompt_capacity:
            return False
        # a cache limited by memory is kept, unless the same memory holds more rows of this length
        can_hold = cache.num_rows * cache.capacity // capacity if self._is_limited else num_rows
        return cache.num_rows >= min(num_rows, can_hold)

    # Planning a turn, on the host

    @property
    def is_at_most_half_full(self) -> bool:
        return not self._stored and 2 * len(self.in_flight) <= self._num_slots

    def plan(self, waiting: deque[Prompt], end_strings: EndStrings) -> Turn:
        """Process the snapshots that are due, retire and admit rows, and return the next turn.

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
        """Drop all rows, finished or not."""
        self._device_rows.clear_(slice(None))
        self.in_flight.clear(), self._stored.clear(), self._snapshots.clear()

    def _are_needed(self) -> bool:
        """Whether any row may need another decode step."""
        ahead = self._steps_a_turn * len(self._snapshots)
        return any(len(row.generated) + ahead < self._decoding.max_length for row in self.in_flight)

    def _admit(self, waiting: deque[Prompt], turn: Turn) -> None:
        """Admit waiting rows while slots are free."""
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
        """Refill the prompt store, whose contents are no longer needed, with the next prompts.

        Several at a time, as prefilling them together costs little more than prefilling one, but only this lane's share
        of the waiting rows, unless it has free slots for more.
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
        """Append the new tokens to their rows; returns the finished rows, which leave."""
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
            # the device may be ahead of what the host has seen
            length = len(last.prompt) + len(last.generated) + self._steps_a_turn * self._snapshots_behind
            self._cache.copy_row_(slot, self._cache, len(rows), min(length, self._cache.capacity))
            self._device_rows.move_(slot, len(rows))
        self._device_rows.clear_(slice(len(rows), num_before))

    # Running a turn, on the device

    def run(self, turn: Turn, received: list[torch.Tensor]) -> list[torch.Tensor]:
        """Queue a turn; takes the hidden states from the previous stage and returns those for the next."""
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
        """The buffer for a turn's tokens, int64 [rows]: written by the last stage, received by the others."""
        return self._sampled_R[: turn.num_rows]

    def advance(self, turn: Turn) -> None:
        """Advance the rows by the tokens sampled in a turn, and take a snapshot."""
        self._device_rows.advance_(self.sampled(turn))
        self._snapshots.append(Snapshot(self._device_rows, self.in_flight, self._steps_a_turn))

    def _prefill(self, prefill: Prefill, hidden_MH: torch.Tensor | None) -> torch.Tensor:
        make_attention = FusedPrefillAttention if self._on_gpu else PrefillAttention
        lengths = list(map(len, prefill.prompts))
        attention = make_attention(self._weights, self._rotary, self._prompts, lengths, prefill.num_padding)
        # numpy converts a list far faster than torch
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
        """One decode step for the first `num_rows` rows; all its inputs are on the device."""
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
        """Next-token logits of the first rows, [B, V]."""
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
        """Exclusive upper bound of all rows' positions; on a GPU the capacity, as the exact one would need a sync."""
        if self._on_gpu:
            return self._cache.capacity
        return max(len(row.prompt) + len(row.generated) for row in self.in_flight)


def _kernels():
    """The GPU operations; Triton is imported only where there is a GPU."""
    from nemo_aligner.generation import triton_ops

    return triton_ops


def _first_rows(waiting: deque[Prompt], num_rows: int) -> Prompt:
    """Pop the first prompt with at most `num_rows` of its rows; the remaining rows keep waiting."""
    if len(waiting[0].rows) <= num_rows:
        return waiting.popleft()
    return Prompt(deque(waiting[0].rows.popleft() for _ in range(num_rows)))


def _steady(num_rows: int, last_num_rows: int) -> int:
    """The previous number of rows, if it fits and few more would: the graphs were captured for a cache of that size."""
    return last_num_rows if last_num_rows <= num_rows <= last_num_rows * 9 // 8 else num_rows


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _unless_out_of_memory(make: Callable):
    """The result of `make`, or None on all ranks of the replica if one of them runs out of memory."""
    made = None
    with contextlib.suppress(torch.OutOfMemoryError):
        made = make()
    return made if min_over_ranks(int(made is not None)) else None
