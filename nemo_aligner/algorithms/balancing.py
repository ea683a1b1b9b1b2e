"""Balances the rows of each global batch over the replicas, so that none waits for another that has more tokens.

Legend: R rows of a replica in an RS step, W any width.
"""

from bisect import bisect_left

import torch
from megatron.core import parallel_state

from nemo_aligner.compat.device import current_device
from nemo_aligner.utils.masks import trained_lengths


def balance_over_replicas(
    columns: dict[str, torch.Tensor], rows_per_batch: int, pad_value: int
) -> dict[str, torch.Tensor]:
    """Exchange rows between the replicas; all ranks must call it, the ranks of a replica with the same rows.

    The n-th `rows_per_batch` rows of all replicas are a global batch. Its members, and the number of rows of each
    replica, stay the same; which replica has which row, and their order, change. Two collectives: one for lengths, one
    for rows.

    Args:
        columns: CPU tensors [R, W] or [R], `mask` [R, W] among them, R being the same on all replicas and a multiple of
            `rows_per_batch`.
        pad_value: where replicas differ in W, integer rows are padded with it on the right, others with 0.

    Returns:
        CPU tensors of the same dtypes and, except for W, shapes.
    """
    group = parallel_state.get_data_parallel_group()
    num_replicas, replica = group.size(), group.rank()
    is_flat = {key: column.dim() == 1 for key, column in columns.items()}
    columns = {key: column.unsqueeze(1) if is_flat[key] else column for key, column in columns.items()}
    own = torch.cat([trained_lengths(columns["mask"]), torch.tensor([c.size(1) for c in columns.values()])])
    gathered = [torch.empty_like(own, device=current_device()) for _ in range(num_replicas)]
    torch.distributed.all_gather(gathered, own.to(current_device()), group=group)
    lengths, widths = torch.stack(gathered).cpu().split([len(columns["mask"]), len(columns)], dim=1)

    lengths_by_batch = lengths.unflatten(1, (-1, rows_per_batch)).transpose(0, 1)  # [batches, replicas, rows_per_batch]
    takers = torch.tensor([deal_to_replicas(batch.flatten().tolist(), num_replicas) for batch in lengths_by_batch])
    takers = takers.view(lengths_by_batch.shape)

    columns = {
        key: torch.nn.functional.pad(
            column, (0, width - column.size(1)), value=0 if column.is_floating_point() else pad_value
        )
        for (key, column), width in zip(columns.items(), widths.amax(dim=0).tolist(), strict=True)
    }
    taker_of_own = takers[:, replica].flatten()
    sent = _as_bytes(columns)[taker_of_own.argsort(stable=True)].to(current_device())
    source, batch, _ = (takers == replica).transpose(0, 1).nonzero().unbind(1)  # in the order in which they will come
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(
        received,
        sent,
        output_split_sizes=source.bincount(minlength=num_replicas).tolist(),
        input_split_sizes=taker_of_own.bincount(minlength=num_replicas).tolist(),
        group=group,
    )
    exchanged = _from_bytes(received.cpu()[batch.argsort(stable=True)], columns)
    return {key: column.squeeze(1) if is_flat[key] else column for key, column in exchanged.items()}


def deal_to_replicas(lengths: list[int], num_shares: int) -> list[int]:
    """Deal rows out in shares of equal number and about equal total length.

    The longest row that is left goes to the share with the least, as long as that is not full; then, while it helps,
    the fullest and the emptiest share swap the two rows that even them out best.

    Args:
        lengths: of the rows, as many as `num_shares` divides.

    Returns:
        The share of each row, a function of the arguments alone.
    """
    members = [[] for _ in range(num_shares)]
    totals = [0] * num_shares
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        unfilled = (share for share in range(num_shares) if len(members[share]) < len(lengths) // num_shares)
        share = min(unfilled, key=totals.__getitem__)
        members[share].append(row)
        totals[share] += lengths[row]
    while True:
        fullest, emptiest = totals.index(max(totals)), totals.index(min(totals))
        swap = _best_swap(lengths, members[fullest], members[emptiest], totals[fullest] - totals[emptiest])
        if swap is None:
            break
        given, taken = swap
        members[fullest].remove(given)
        members[emptiest].remove(taken)
        members[fullest].append(taken)
        members[emptiest].append(given)
        totals[fullest] -= lengths[given] - lengths[taken]
        totals[emptiest] += lengths[given] - lengths[taken]
    share_of = {row: share for share, rows in enumerate(members) for row in rows}
    return [share_of[row] for row in range(len(lengths))]


def _best_swap(lengths: list[int], fuller: list[int], emptier: list[int], gap: int) -> tuple[int, int] | None:
    """The row of each share whose swap leaves the smallest difference between them, if that is smaller than `gap`."""
    candidates = sorted(emptier, key=lengths.__getitem__)
    sorted_lengths = [lengths[row] for row in candidates]
    best, smallest = None, gap
    for given in fuller:
        place = bisect_left(sorted_lengths, lengths[given] - gap / 2)
        for taken in candidates[max(place - 1, 0) : place + 1]:
            difference = abs(gap - 2 * (lengths[given] - lengths[taken]))
            if difference < smallest:
                best, smallest = (given, taken), difference
    return best


def _as_bytes(columns: dict[str, torch.Tensor]) -> torch.Tensor:
    """uint8 [R, W]: the bytes of each row's entries, columns concatenated."""
    return torch.cat([column.contiguous().view(torch.uint8) for column in columns.values()], dim=1)


def _from_bytes(rows: torch.Tensor, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    widths = [column.size(1) * column.element_size() for column in like.values()]
    parts = zip(like.items(), rows.split(widths, dim=1), strict=True)
    return {key: part.clone().view(column.dtype) for (key, column), part in parts}
