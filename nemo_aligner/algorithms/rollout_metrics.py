"""Means over the rollouts of all replicas, and examples of them."""

import torch
from megatron.core import parallel_state

from nemo_aligner.compat.device import current_device
from nemo_aligner.rewards.python_reward import prompt_text

# Rewards of one kind among several, by name; see `rewards/weighted_sum.py`.
PART_PREFIX = "reward_"


def global_rollout_metrics(rollout_batches: list[dict]) -> dict[str, float]:
    """Means over the rows of all replicas, without padding rows; NaN if there are no others. Every rank calls it.

    Args:
        rollout_batches: dicts of tensors with one leading size: `rewards` (NaN: not judged), `response_lengths`,
            `prompt_lengths`; where known `is_end`, `is_fit`, `is_padding`, and parts of the reward as `reward_<name>`.
    """
    num_rows, lengths, prompt_lengths, num_judged, rewards, ended, fit, *parts = _sums(rollout_batches)
    metrics = {
        "global_response_lengths_mean": _mean(lengths, num_rows),
        "global_prompt_lengths": _mean(prompt_lengths, num_rows),
        "global_rewards": _mean(rewards, num_judged),
        "fraction_finished": _mean(ended, num_rows),
        "fraction_fit": _mean(fit, num_rows),
        "fraction_unjudged": 1 - _mean(num_judged, num_rows),
    }
    for index, name in enumerate(_part_names(rollout_batches[0])):
        metrics[name] = _mean(*parts[2 * index : 2 * index + 2])
    return metrics


def selection_metrics(kept_batches: list[dict]) -> dict[str, float]:
    """Means over the kept rows of all replicas; see `global_rollout_metrics`."""
    num_rows, lengths, _, num_judged, rewards, _, fit, *_ = _sums(kept_batches)
    return {
        "selected_rewards_mean": _mean(rewards, num_judged),
        "selected_response_lengths_mean": _mean(lengths, num_rows),
        "selected_fraction_fit": _mean(fit, num_rows),
    }


def example(rollouts: dict, tokenizer) -> dict:
    """Texts and reward of the first row; its prompt by `records`, where `rollouts` has them."""
    prompt_length, response_length = int(rollouts["prompt_lengths"][0]), int(rollouts["response_lengths"][0])
    tokens = rollouts["response_tokens"][0].tolist()
    return {
        "reward": rollouts["rewards"].flatten()[0].item(),
        "prompt": prompt_text(rollouts.get("records", [{}])[0], tokens[:prompt_length], tokenizer),
        "response": tokenizer.ids_to_text(tokens[prompt_length:response_length]),
    }


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")


def _part_names(rollouts: dict) -> list[str]:
    return sorted(name for name in rollouts if name.startswith(PART_PREFIX))


def _sums(rollout_batches: list[dict]) -> list[float]:
    sums = sum(_sums_over_rows(batch) for batch in rollout_batches).to(current_device())
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    return sums.tolist()


def _sums_over_rows(batch: dict) -> torch.Tensor:
    """fp64 [7 + 2 * parts]: rows, response lengths, prompt lengths, judged rows, their rewards, ended and fit rows;
    then for each part of the reward its sum over the rows that it judged, and their number. No padding."""
    rewards = batch["rewards"].flatten().double()
    counts = ~batch["is_padding"] if "is_padding" in batch else torch.ones_like(rewards, dtype=torch.bool)
    none = torch.zeros_like(rewards)
    per_row = [
        torch.ones_like(rewards),
        (batch["response_lengths"] - batch["prompt_lengths"]).double(),
        batch["prompt_lengths"].double(),
        (~rewards.isnan()).double(),
        rewards.nan_to_num(),
        batch.get("is_end", none).double(),
        batch.get("is_fit", none).double(),
    ]
    for name in _part_names(batch):
        part = batch[name].flatten().double()
        per_row += [part.nan_to_num(), (~part.isnan()).double()]
    return torch.stack(per_row)[:, counts].sum(dim=1)
