"""Sample the next token from logits on the device, without synchronization.

Shapes: logits_BV float32 over the vocabulary, B rows, V ids, in K blocks of W; a filtered id has logit -inf.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from nemo_aligner.generation.invalid_logits import INVALID_TOKEN

_BLOCK = 128  # tokens whose probabilities are summed at once
# A CPU samples for as many rows at a time as have this many probabilities, which fit in its cache even in float64.
_NUMBERS_AT_ONCE = 2**18


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters. Field names and meanings are those of `model.rs.sampling_params`.

    Attributes:
        use_greedy: take the most probable token; all other options but `repetition_penalty` are then ignored.
        temperature: divides the logits.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens that reaches this probability; 0.0 and 1.0 keep all.
        repetition_penalty: divides positive and multiplies negative logits of tokens that have occurred before
            (CTRL, arXiv:1909.05858, with the sign rule of common implementations); 1.0 is off.
    """

    use_greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @property
    def draws_from_all(self) -> bool:
        """Whether sampling depends on nothing but logits and temperature."""
        has_filter = self.top_k > 0 or 0.0 < self.top_p < 1.0
        return not (self.use_greedy or has_filter or self.repetition_penalty != 1.0)

    @classmethod
    def of(cls, configured: dict) -> "SamplingParams":
        """The configured options that affect sampling."""
        return cls(**{key: configured[key] for key in cls.__dataclass_fields__ if key in configured})


def random_streams(key: tuple[int, ...], row_ids: Iterable[tuple[int, ...]], length: int) -> torch.Tensor:
    """Each row's own random numbers in [0, 1), float64 [B, length] on the CPU.

    They depend only on `key` and the row's id, not on the row's batch, the number of replicas, or earlier draws. Key
    and ids are non-negative.
    """
    return torch.from_numpy(np.stack([np.random.default_rng([*key, *row_id]).random(length) for row_id in row_ids]))


def sample(
    logits_BV: torch.Tensor, previous_BT: torch.Tensor | None, params: SamplingParams, uniform_B: torch.Tensor
) -> torch.Tensor:
    """The next token of each row, int64 [B], or INVALID_TOKEN.

    The steps are temperature, repetition penalty over `previous_BT` (the tokens so far, possibly repeated; None if
    there is no penalty), top-k, top-p, draw. The draw depends only on the logits and `uniform_B`, float64 in [0, 1).
    """
    if not params.use_greedy and params.temperature != 1.0:
        logits_BV = logits_BV / params.temperature
    if params.repetition_penalty != 1.0:
        logits_BV = penalize_repetition(logits_BV, previous_BT, params.repetition_penalty)
    if params.use_greedy:
        highest_B, token_B = logits_BV.max(dim=-1)
        return token_B.masked_fill(~highest_B.isfinite(), INVALID_TOKEN)
    if params.top_k > 0:
        logits_BV = keep_top_k(logits_BV, params.top_k)
    if 0.0 < params.top_p < 1.0:
        logits_BV = keep_top_p(logits_BV, params.top_p)
    return sample_token(logits_BV, uniform_B)


def penalize_repetition(logits_BV: torch.Tensor, previous_BT: torch.Tensor, penalty: float) -> torch.Tensor:
    seen = logits_BV.gather(1, previous_BT)
    return logits_BV.scatter(1, previous_BT, torch.where(seen > 0, seen / penalty, seen * penalty))


def keep_top_k(logits_BV: torch.Tensor, k: int) -> torch.Tensor:
    """Filter all but the k largest logits of each row; ties with the k-th are kept."""
    smallest_kept = logits_BV.topk(min(k, logits_BV.size(1)), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < smallest_kept, -torch.inf)


def keep_top_p(logits_BV: torch.Tensor, p: float) -> torch.Tensor:
    """Filter all but the smallest set of most probable tokens whose probabilities reach p (arXiv:1904.09751)."""
    ordered, order = logits_BV.sort(dim=-1, descending=True)
    probability = ordered.softmax(dim=-1)
    reached_before = probability.cumsum(dim=-1) - probability >= p
    return logits_BV.masked_fill(reached_before.scatter(1, order, reached_before), -torch.inf)


def sample_token(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """One draw per row from softmax(logits), int64 [B]: where the cumulative probability first exceeds `uniform_B`.

    INVALID_TOKEN where the probabilities are NaN. The sums are in float64, as the error of a float32 sum over a
    vocabulary exceeds the probability of rare tokens.
    """
    if logits_BV.is_cuda:
        from nemo_aligner.generation import triton_sampling

        return triton_sampling.sample_token(logits_BV, uniform_B)
    num_rows = max(1, _NUMBERS_AT_ONCE // logits_BV.size(1))
    return torch.cat(list(map(_draw, logits_BV.split(num_rows), uniform_B.split(num_rows))))


def _draw(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    highest_B1 = logits_BV.amax(dim=-1, keepdim=True)
    weights_BV = (logits_BV - highest_B1).exp()
    # block sums first, so that only the block that contains the threshold is summed token by token
    weights_BKW = F.pad(weights_BV, (0, -weights_BV.size(1) % _BLOCK)).unflatten(1, (-1, _BLOCK))
    behind_BK = weights_BKW.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    # slightly below 1, so that rounding cannot go past the last token
    threshold_B1 = uniform_B[:, None] * behind_BK[:, -1:] * (1 - 2**-40)
    # past the last block only where sums are NaN
    block_B1 = torch.searchsorted(behind_BK, threshold_B1, right=True).clamp(max=behind_BK.size(1) - 1)
    before_B1 = F.pad(behind_BK, (1, 0)).gather(1, block_B1)
    within_BW = weights_BKW.gather(1, block_B1[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1)
    cumulated_BW = before_B1 + within_BW.cumsum(dim=-1, dtype=torch.float64)
    threshold_B1 = torch.minimum(threshold_B1, cumulated_BW[:, -1:] * (1 - 2**-40))
    place_B1 = torch.searchsorted(cumulated_BW, threshold_B1, right=True)
    return (block_B1 * _BLOCK + place_B1).masked_fill(~highest_B1.isfinite(), INVALID_TOKEN).squeeze(1)
