"""Rows in flight: what the host knows of each, and what the device keeps to decode them without asking the host.

Legend: R rows with a slot in the cache, B of them decoded in a step, T positions that a row has room for, L tokens
that a row may generate, K decoding steps between two snapshots of what has been generated.
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
    """How rows are continued; what a row generates is a function of this, its prompt, its numbers and the weights.

    Attributes:
        max_length, min_length: tokens that a row generates at most, and before it may end.
        end_ids: tokens that end a row by themselves.
        num_tokens: ids from here on have no token and are never drawn.
    """

    sampling: SamplingParams
    max_length: int
    min_length: int
    end_ids: tuple[int, ...]
    num_tokens: int


@dataclass(eq=False)
class Row:
    """One rollout on the host: its prompt, its numbers float64 [L], and, as they become known, its tokens.

    `batch` is the number of the batch that it belongs to.
    """

    prompt: list[int]
    uniform_L: torch.Tensor
    batch: int
    generated: list[int] = field(default_factory=list)
    is_end: bool = False
    is_finished: bool = False

    def extend(self, tokens: list[int], decoding: Decoding, completes_end_string: Callable) -> None:
        """Take in what was generated, up to where the row ends."""
        for token in tokens:
            self.generated.append(token)
            may_end = len(self.generated) > decoding.min_length
            self.is_end = may_end and (token in decoding.end_ids or completes_end_string(self.prompt, self.generated))
            self.is_finished = self.is_end or len(self.generated) == decoding.max_length
            if self.is_finished:
                return


class DeviceRows:
    """The state of R rows on the device. `advance_` needs nothing from the host and tells it nothing.

    A row stands at the position of its newest token, the next to go through the model. One that is done stands still;
    so does one that is broken, which has no next token.
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
        self.copies = torch.cuda.Stream() if device.type == "cuda" else None  # to the host

    def are_for(self, num_rows: int, capacity: int, decoding: Decoding) -> bool:
        return self.decoding == decoding and self.tokens_RT.shape == (num_rows, capacity)

    def put_(self, slots: list[int], rows: list[Row]) -> None:
        """Let `rows` begin in `slots`: the last token of their prompts goes through the model next."""
        device = self.position_R.device
        lengths = [len(row.prompt) for row in rows]
        tokens_BP = np.zeros((len(rows), max(lengths)), np.int64)  # which takes lists far faster than torch
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
        """Let the rows in `slots` stand still at position 0, whatever they were."""
        self.position_R[slots] = 0
        self.prompt_length_R[slots] = 1
        self.is_done_R[slots] = True

    def newest_tokens(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and positions of the first `num_rows` rows, int64 [B] each: the model's next input."""
        position_B = self.position_R[:num_rows]
        return self.tokens_RT[:num_rows].gather(1, position_B[:, None]).squeeze(1), position_B

    def sample(self, logits_BV: torch.Tensor, max_context: int) -> torch.Tensor:
        """The next token of each row, int64 [B], or INVALID_TOKEN. `logits_BV` may be modified.

        Args:
            max_context: no row's position is at or beyond it.
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
        """Write each row's next token, unless it is done, and note which rows that ends, and which have none."""
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
        """Of the first rows the position, whether it is broken, and the last `num_steps` tokens, int64 [B, 2 + K]."""
        if self.position_R.is_cuda:
            from nemo_aligner.generation import triton_sampling

            return triton_sampling.seen(self.tokens_RT, self.position_R, self.is_invalid_R, num_rows, num_steps)
        position_B1 = self.position_R[:num_rows, None]
        back_K = torch.arange(num_steps - 1, -1, -1)
        recent_BK = self.tokens_RT[:num_rows].gather(1, (position_B1 - back_K).clamp(min=0))
        return torch.cat((position_B1, self.is_invalid_R[:num_rows, None], recent_BK), dim=1)


class Snapshot:
    """What the rows in the first slots had generated at one moment, on its way to the host.

    On a GPU the copy is queued behind the steps so far and read later, when the next steps are queued already: neither
    side waits for the other. It has a stream of its own: a piece of the optimizer's state may be in its way, which need
    not be in that of the next steps.
    """

    def __init__(self, device_rows: DeviceRows, rows: list[Row], num_steps: int):
        """`num_steps` is how many of a row's last tokens are taken along."""
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
        """Rows with tokens that they did not know of yet, and those that are broken behind them."""
        if self._event is not None:
            self._event.synchronize()
        found = []
        for row, (position, is_invalid, *recent) in zip(self.rows, self._on_host.tolist(), strict=True):
            num_new = position + 1 - len(row.prompt) - len(row.generated)
            if (num_new > 0 or is_invalid) and not row.is_finished:
                found.append((row, recent[len(recent) - num_new :], bool(is_invalid)))
        return found
