"""From chosen rollouts to the batches of the optimizer.

Legend: R rows that a replica trains on per RS step, S padded token width, P padded prompt width.
"""

import torch
from megatron.core import parallel_state

from nemo_aligner.algorithms.balancing import balance_over_replicas
from nemo_aligner.compat.device import current_device
from nemo_aligner.utils.distributed import pad_list, pad_tensors_to_max_global_seq_len
from nemo_aligner.utils.ppo_utils import create_mask
from nemo_aligner.utils.utils import cpu_dict


def stack_rollouts(
    rollout_batches: list[dict], pad_id: int, min_width: int | None, width_multiple: int
) -> dict[str, torch.Tensor]:
    """Stack the kept rows of all micro-batches. Collective over the data-parallel group, which agrees on the width.

    Args:
        min_width: S at least, if given.
        width_multiple: what S is a multiple of.

    Returns:
        CPU tensors `response_tokens` int64 [R, S], padded with `pad_id`; `mask` float32 [R, S - 1], 1 where the
        prediction of a response token is trained on, all 0 in rows unfit for training; `prompt_tokens` int64 [R, P].
    """
    columns = {key: [batch[key] for batch in rollout_batches] for key in rollout_batches[0]}
    rows = [row.to(current_device()) for tokens in columns["response_tokens"] for row in tokens]
    tokens = pad_tensors_to_max_global_seq_len(rows, pad_id, parallel_state.get_data_parallel_group(), min_width)
    tokens = torch.nn.functional.pad(tokens, (0, -tokens.size(1) % width_multiple), value=pad_id)
    lengths = {key: torch.cat(columns[key]).to(tokens.device) for key in ("prompt_lengths", "response_lengths")}
    mask = create_mask(torch.zeros(tokens.size(0), tokens.size(1) - 1, device=tokens.device), **lengths)
    if "is_fit" in columns:
        mask *= torch.cat(columns["is_fit"]).to(tokens.device)[:, None]
    prompts = torch.cat(pad_list(columns["prompt_tokens"], pad_id))
    return cpu_dict({"response_tokens": tokens, "mask": mask, "prompt_tokens": prompts})


def count_trained_rows(batch: dict[str, torch.Tensor]) -> int:
    """Rows with a token in the loss, over all replicas. Collective over the data-parallel group.

    Args:
        batch: this replica's part of a global batch, `mask` [rows, S - 1] in it.
    """
    count = (batch["mask"] != 0).any(dim=1).sum().to(current_device())
    torch.distributed.all_reduce(count, group=parallel_state.get_data_parallel_group())
    return int(count)


def optimizer_batches(
    rows: dict[str, torch.Tensor], num_rows: int, rows_per_batch: int, balance: bool, pad_id: int
) -> list[dict[str, torch.Tensor]]:
    """This replica's rows, as `stack_rollouts` returns them, in batches of `rows_per_batch`.

    Args:
        num_rows: how many they must be.
        balance: first exchange rows of each global batch between the replicas, so that all have about as many tokens to
            train on. Collective over the job then.
        pad_id: pads tokens where replicas of different widths exchange rows.

    Raises:
        ValueError: if there are not `num_rows`. Replicas with different numbers of batches would deadlock.
    """
    if len(rows["mask"]) != num_rows:
        raise ValueError(
            f"this replica has {len(rows['mask'])} rollouts to train on, but each replica must have {num_rows}"
        )
    if balance:
        rows = balance_over_replicas(rows, rows_per_batch, pad_value=pad_id)
    parts = {key: value.split(rows_per_batch) for key, value in rows.items()}
    return [{key: value[i] for key, value in parts.items()} for i in range(len(parts["mask"]))]
