"""Processing of rollouts before training: response masks and selection of the best rollouts of each prompt.

Shapes: M rows, B rows, S token positions, P prompt positions, V vocabulary entries.
"""

import torch

from nemo_aligner.algorithms.selection import best_rows, number_prompts, selection_scores
from nemo_aligner.utils.tensors import masked_mean


def create_mask(values: torch.Tensor, prompt_lengths: torch.Tensor, response_lengths: torch.Tensor) -> torch.Tensor:
    """Mask the log-probabilities that belong to a response, including its ending token.

    Entry t of a log-probability row is the prediction of token t + 1, so a row's ones are at positions
    prompt_length - 1 to response_length - 2.

    Args:
        values: [B, S-1], one entry per predicted token.
        prompt_lengths: [B] int64.
        response_lengths: [B] int64, prompt and response together.

    Returns:
        Zeros and ones in the shape, dtype and device of `values`.

    Raises:
        ValueError: a response is longer than the S tokens that `values` covers.
    """
    num_predictions = values.size(-1)
    prompt_lengths, response_lengths = prompt_lengths.to(values.device), response_lengths.to(values.device)
    if (response_lengths > num_predictions + 1).any():
        raise ValueError(
            f"response length {response_lengths.max().item()} exceeds the {num_predictions + 1} tokens of a row"
        )
    position = torch.arange(num_predictions, device=values.device)
    is_response = (position >= prompt_lengths.unsqueeze(-1) - 1) & (position <= response_lengths.unsqueeze(-1) - 2)
    return is_response.to(values.dtype)


def select_topk(batch: dict[str, torch.Tensor], num_select: int = 1) -> dict[str, torch.Tensor]:
    """Keep the `num_select` best rows of each prompt.

    Rows of one prompt are ordered by reward, best first; ties go to the lower row, NaN comes last. If the batch says
    which rows are fit for training, all fit rows of a prompt come before its unfit ones.

    Args:
        batch: tensors with leading size M, on any device:
            rewards [M] or [M, 1];
            prompt_tokens [M, P]; rows with equal tokens belong to one prompt, unless there is
            prompt_index [M] integer (optional): rows with equal values belong to one prompt;
            is_fit [M] bool (optional).
        num_select: rows to keep per prompt.

    Returns:
        The same keys, `num_select` rows per prompt, prompts in the order of their first row.

    Raises:
        ValueError: `num_select` is below 1 or above a prompt's number of rows; a key is missing or has a wrong shape.
    """
    rewards = _checked_rewards(batch)
    device = rewards.device
    fit = batch["is_fit"].to(device) if "is_fit" in batch else torch.ones_like(rewards, dtype=torch.bool)
    prompts = number_prompts(batch["prompt_index"] if "prompt_index" in batch else batch["prompt_tokens"])
    rows = best_rows(selection_scores(rewards, fit), prompts.to(device), num_select)
    return {key: value[rows.to(value.device)] for key, value in batch.items()}


def _checked_rewards(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The rewards as [M], after checking that every key has M rows."""
    for key in ("prompt_tokens", "rewards"):
        if key not in batch:
            raise ValueError(f"the batch to select from lacks the key {key!r}; it has {sorted(batch)}")
    num_rows = len(batch["rewards"])
    for key, value in batch.items():
        if len(value) != num_rows:
            raise ValueError(f"{key!r} has {len(value)} rows, but 'rewards' has {num_rows}")
    if batch["rewards"].shape not in ((num_rows,), (num_rows, 1)):
        raise ValueError(f"'rewards' must be [M] or [M, 1], not {list(batch['rewards'].shape)}")
    prompt_index = batch.get("prompt_index")
    if prompt_index is not None and (prompt_index.dim() != 1 or prompt_index.is_floating_point()):
        raise ValueError(
            f"'prompt_index' must be an integer tensor [M], not {prompt_index.dtype} {list(prompt_index.shape)}"
        )
    return batch["rewards"].flatten()


def calculate_entropy(log_probs: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of -sum_v p_v log p_v, with 0 log 0 = 0.

    Args:
        log_probs: [B, S, V], or any shape whose last dimension is the distribution.
        mask: [B, S]; if given, the mean is over the positions where it is not zero.

    Returns:
        A scalar; NaN if the mask selects nothing.
    """
    # The clamp keeps 0 * -inf, from an entry that was filtered out, from becoming NaN here and in the gradient.
    entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)
    return entropy.mean() if mask is None else masked_mean(entropy, mask)
