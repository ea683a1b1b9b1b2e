"""Which rollouts of each prompt are kept: pure functions over M rows, on any device."""

import torch


def selection_scores(rewards: torch.Tensor, fit: torch.Tensor) -> torch.Tensor:
    """Rank the rows by fitness for training first and by reward second.

    Ranks instead of shifted rewards keep the order exact for every reward, infinite ones included. A fit row without
    a judgement (NaN) still outranks an unfit row: to have it ranked otherwise, call it unfit.

    Args:
        rewards: [M] floating or integer.
        fit: [M] bool, whether a row may be trained on.

    Returns:
        int64 [M], a higher score being better: every fit row above every unfit one; among the fit, and among the
        unfit, ordered by reward with NaN at the bottom; equal for equal fitness and reward.

    Raises:
        ValueError: the shapes differ.
    """
    if rewards.shape != fit.shape or rewards.dim() != 1:
        raise ValueError(f"rewards {list(rewards.shape)} and fit {list(fit.shape)} must both be [M]")
    judged = ~rewards.isnan()
    _, rank_from_0 = torch.where(judged, rewards, 0).unique(return_inverse=True)
    rank = torch.where(judged, rank_from_0 + 1, 0)
    return rank + fit * (len(rewards) + 1)


def number_prompts(identity: torch.Tensor) -> torch.Tensor:
    """Number each row's prompt by the first row that has the same prompt.

    Args:
        identity: [M] or [M, P]; equal entries, or equal rows, are one prompt.

    Returns:
        int64 [M]; for example [5, 3, 5, 3, 7] gives [0, 1, 0, 1, 4].
    """
    num_rows = len(identity)
    if num_rows == 0:
        return torch.empty(0, dtype=torch.int64, device=identity.device)
    distinct, inverse = identity.unique(dim=0, return_inverse=True)
    rows = torch.arange(num_rows, device=identity.device)
    first_rows = torch.full((len(distinct),), num_rows, device=identity.device).scatter_reduce(0, inverse, rows, "amin")
    return first_rows[inverse]


def best_rows(scores: torch.Tensor, prompts: torch.Tensor, num_select: int) -> torch.Tensor:
    """Find the best rows of each prompt.

    Args:
        scores: [M] without NaN, higher is better.
        prompts: int64 [M], the number of each row's prompt.
        num_select: rows to find for each prompt.

    Returns:
        int64 row numbers, `num_select` for each prompt: prompts in ascending order of their numbers, then scores
        descending, ties in ascending order of rows.

    Raises:
        ValueError: `num_select` is below 1 or above the number of rows of some prompt.
    """
    if num_select < 1:
        raise ValueError(f"num_select={num_select} must be at least 1")
    numbers, sizes = prompts.unique(return_counts=True)
    if (sizes < num_select).any():
        smallest = sizes.argmin()
        raise ValueError(
            f"num_select={num_select} exceeds the {sizes[smallest].item()} row(s) of prompt {numbers[smallest].item()}"
        )
    order = scores.argsort(descending=True, stable=True)
    order = order[prompts[order].argsort(stable=True)]
    prompt_in_order = prompts[order]
    start_of_prompt = torch.searchsorted(prompt_in_order, prompt_in_order)
    place_in_prompt = torch.arange(len(order), device=order.device) - start_of_prompt
    return order[place_in_prompt < num_select]
