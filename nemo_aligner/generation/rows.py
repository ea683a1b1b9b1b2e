"""Rows in flight: their state on the host, and the device state that lets them be decoded without the host.

Legend: R KV cache slots, B rows decoded in a step, T positions per row, L maximum number of generated tokens, K decode
steps between two snapshots.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from nemo_aligner.generation.invalid_logits import INVALID_TOKEN
from nemo_aligner.generation.sampling import SamplingParams, sample
from nemo_aligner.utils.tensors import to_device_async


@dataclass(frozen=True)
class Decoding:
    """Decoding options. What a row generates depends on these, its prompt, its random numbers and the weights alone.

    Attributes:
        max_length, min_length: maximum number of tokens a row generates, and the number before it may end.
        end_ids: tokens that end a row by themselves.
        num_tokens: ids from here on have no token and are never sampled.
    """

    sampling: SamplingParams
    max_length: int
    min_length: int
    end_ids: tuple[int, ...]
    num_tokens: int


@dataclass(eq=False)
class Row:
    """One rollout on the host: its prompt, its random numbers float64 [L], and the tokens known so far.

    `batch` is the index of the batch that it belongs to.
    """

    prompt: list[int]
    uniform_L: torch.Tensor
    batch: int
    generated: list[int] = field(default_factory=list)
    is_end: bool = False
    is_finished: bool = False

    def extend(self, tokens: list[int], decoding: Decoding, completes_end_string: Callable) -> None:
        """Append generated tokens, up to the end of the row."""
        for token in tokens:
            self.generated.append(token)
            may_end = len(self.generated) > decoding.min_length
            self.is_end = may_end and (token in decoding.end_ids or completes_end_string(self.prompt, self.generated))
            self.is_finished = self.is_end or len(self.generated) == decoding.max_length
            if self.is_finished:
                return


class DeviceRows:
    """The state of R rows on the device. `advance_` does not synchronize with the host.

    A row's position is that of its newest token, the model's next input. Rows that are done do not advance, nor do
    invalid ones, which have no next token.
    """

    def __init__(self, num_rows: int, capacity: int, decoding: Decoding, device: torch.device):
        self.decoding = decoding
        self.tokens_RT = torch.zeros(num_rows, capacity, dtype=torch.int64, device=device)
        self.position_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.prompt_length_R = torch.ones_like(self.position_R)
        self.is_done_R = torch.ones_like(self.position_R, dtype=torch.bool)
        self.is_invalid_R = torch.zeros_like(self.is_done_R)
        self.uniform_RL = torch.zeros(num_rows, decoding.max_length, dtype=torch.float64, device=device)
        self.end_ids = torch.tensor(decoding.end_ids, device=device)
        self.is_end_V = torch.zeros(max(decoding.num_tokens, *decoding.end_ids) + 1, dtype=torch.bool, device=device)
        self.is_end_V[self.end_ids] = True
        self.copies = torch.cuda.Stream() if device.type == "cuda" else None  # device to host

    def are_for(self, num_rows: int, capacity: int, decoding: Decoding) -> bool:
        return self.decoding == decoding and self.tokens_RT.shape == (num_rows, capacity)

    def put_(self, slots: list[int], rows: list[Row]) -> None:
        """Start `rows` in `slots`: the last token of each prompt is the model's next input."""
        device = self.position_R.device
        lengths = [len(row.prompt) for row in rows]
        tokens_BP = np.zeros((len(rows), max(lengths)), np.int64)  # numpy converts lists far faster than torch
        for tokens, row in zip(tokens_BP, rows, strict=True):
            tokens[: len(row.prompt)] = row.prompt
        index_B, lengths_B = (to_device_async(torch.tensor(x), device) for x in (slots, lengths))
        self.tokens_RT[index_B, : max(lengths)] = to_device_async(torch.from_numpy(tokens_BP), device)
        self.uniform_RL[index_B] = to_device_async(torch.stack([row.uniform_L for row in rows]), device)
        self.position_R[index_B] = lengths_B - 1
        self.prompt_length_R[index_B] = lengths_B
        self.is_done_R[index_B] = False
        self.is_invalid_R[index_B] = False

    def move_(self, slot: int, source: int) -> None:
        for state in (
            self.tokens_RT, self.position_R, self.prompt_length_R, self.is_done_R, self.is_invalid_R, self.uniform_RL
        ):  # fmt: skip
            state[slot] = state[source]

    def clear_(self, slots: slice) -> None:
        """Make `slots` idle: done, at position 0."""
        self.position_R[slots] = 0
        self.prompt_length_R[slots] = 1
        self.is_done_R[slots] = True

    def newest_tokens(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's next input: newest tokens and positions of the first `num_rows` rows, int64 [B] each."""
        position_B = self.position_R[:num_rows]
        return self.tokens_RT[:num_rows].gather(1, position_B[:, None]).squeeze(1), position_B

    def sample(self, logits_BV: torch.Tensor, max_context: int) -> torch.Tensor:
        """The next token of each row, int64 [B], or INVALID_TOKEN. `logits_BV` may be modified.

        Args:
            max_context: exclusive upper bound of the rows' positions.
        """
        decoding, num_rows = self.decoding, logits_BV.size(0)
        position_B = self.position_R[:num_rows]
        if logits_BV.is_cuda and decoding.sampling.draws_from_all:
            from nemo_aligner.generation import triton_sampling

            return triton_sampling.draw_next(
                logits_BV, self.uniform_RL, decoding.num_tokens, decoding.sampling.temperature, decoding.min_length,
                position_B, self.prompt_length_R, self.is_end_V,
            )  # fmt: skip
        logits_BV = logits_BV.float()
        num_generated_B = position_B + 1 - self.prompt_length_R[:num_rows]
        logits_BV[:, decoding.num_tokens :] = -torch.inf
        if decoding.min_length > 0:
            is_short_B = num_generated_B < decoding.min_length
            ends_BE = logits_BV[:, self.end_ids]
            logits_BV[:, self.end_ids] = ends_BE.masked_fill(is_short_B[:, None], -torch.inf)
        previous_BT = None
        if decoding.sampling.repetition_penalty != 1.0:
            tokens_BT = self.tokens_RT[:num_rows, :max_context]
            is_known_BT = torch.arange(max_context, device=tokens_BT.device) <= position_B[:, None]
            previous_BT = torch.where(is_known_BT, tokens_BT, tokens_BT[:, :1])
        index_B1 = num_generated_B.clamp(max=decoding.max_length - 1)[:, None]
        uniform_B = self.uniform_RL[:num_rows].gather(1, index_B1).squeeze(1)
        return sample(logits_BV, previous_BT, decoding.sampling, uniform_B)

    def advance_(self, sampled_B: torch.Tensor) -> None:
        """Append the sampled tokens to rows that are not done, and update which rows are done or invalid."""
        num_rows = sampled_B.numel()
        position_B, is_done_B = self.position_R[:num_rows], self.is_done_R[:num_rows]
        if sampled_B.is_cuda:
            from nemo_aligner.generation import triton_sampling

            return triton_sampling.advance_(
                self.tokens_RT, position_B, self.prompt_length_R, is_done_B, self.is_invalid_R, sampled_B,
                self.is_end_V, self.decoding.max_length,
            )  # fmt: skip
        has_token_B = sampled_B != INVALID_TOKEN
        self.is_invalid_R[:num_rows] |= ~is_done_B & ~has_token_B
        is_done_B |= ~has_token_B
        next_B = (position_B + ~is_done_B)[:, None]
        tokens_BT = self.tokens_RT[:num_rows]
        tokens_BT.scatter_(1, next_B, torch.where(is_done_B[:, None], tokens_BT.gather(1, next_B), sampled_B[:, None]))
        position_B.copy_(next_B.squeeze(1))
        num_generated_B = position_B + 1 - self.prompt_length_R[:num_rows]
        is_done_B |= self.is_end_V[sampled_B.clamp(min=0)] | (num_generated_B >= self.decoding.max_length)

    def seen(self, num_rows: int, num_steps: int) -> torch.Tensor:
        """Position, is_invalid and the last `num_steps` tokens of each of the first rows, int64 [B, 2 + K]."""
        if self.position_R.is_cuda:
            from nemo_aligner.generation import triton_sampling

            return triton_sampling.seen(self.tokens_RT, self.position_R, self.is_invalid_R, num_rows, num_steps)
        position_B1 = self.position_R[:num_rows, None]
        back_K = torch.arange(num_steps - 1, -1, -1)
        recent_BK = self.tokens_RT[:num_rows].gather(1, (position_B1 - back_K).clamp(min=0))
        return torch.cat((position_B1, self.is_invalid_R[:num_rows, None], recent_BK), dim=1)


class Snapshot:
    """The progress of the rows in the first slots at one point, being copied to the host.

    On a GPU the copy is queued after the steps so far and read once the next steps are queued, so neither side waits
    for the other. It runs in a stream of its own: it may have to wait for a copy of optimizer state, which the next
    steps need not.
    """

    def __init__(self, device_rows: DeviceRows, rows: list[Row], num_steps: int):
        """`num_steps` is the number of each row's latest tokens to copy."""
        self.rows = list(rows)
        seen = device_rows.seen(len(rows), num_steps)
        self._event = None
        if seen.is_cuda:
            self._on_host = torch.empty(seen.shape, dtype=seen.dtype, pin_memory=True)
            copies = device_rows.copies
            copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(copies):
                self._on_host.copy_(seen, non_blocking=True)
            seen.record_stream(copies)
            self._event = copies.record_event()
        else:
            self._on_host = seen

    def new_tokens(self) -> list[tuple[Row, list[int], bool]]:
        """Each row that has new tokens or has become invalid: (row, new tokens, whether it is invalid after them)."""
        if self._event is not None:
            self._event.synchronize()
        found = []
        for row, (position, is_invalid, *recent) in zip(self.rows, self._on_host.tolist(), strict=True):
            num_new = position + 1 - len(row.prompt) - len(row.generated)
            if (num_new > 0 or is_invalid) and not row.is_finished:
                found.append((row, recent[len(recent) - num_new :], bool(is_invalid)))
        return found
