"""Sequence packing: the rows of a training batch without padding, concatenated into one long row per micro-batch.

Only what the loss depends on is computed: a row is cut after the token that predicts its last loss token, and a row
without loss tokens is left out.

Legend: B rows, S padded width, T tokens of a pack, R loss tokens of a pack, Q sequences of a pack.
"""

import heapq
from dataclasses import dataclass, replace

import torch

from nemo_aligner.models.nlp.gpt.packed_attention import PackedSequences
from nemo_aligner.utils.masks import trained_lengths
from nemo_aligner.utils.tensors import to_device_async


@dataclass(frozen=True)
class Pack:
    """One micro-batch. Padding after the rows, if any, is a sequence of its own, on which nothing depends.

    Attributes:
        tokens_1T, position_ids_1T: int64; positions start at 0 in every row.
        sequences: boundaries of the rows.
        loss_positions_R: int64, the indices in the pack that predict a loss token.
        targets_R: int64, those loss tokens.
        weights_R: float32, their mask entries.
    """

    tokens_1T: torch.Tensor
    position_ids_1T: torch.Tensor
    sequences: PackedSequences
    loss_positions_R: torch.Tensor
    targets_R: torch.Tensor
    weights_R: torch.Tensor

    def to(self, device: torch.device) -> "Pack":
        """Copy to `device` without blocking the host."""
        return Pack(
            tokens_1T=to_device_async(self.tokens_1T, device),
            position_ids_1T=to_device_async(self.position_ids_1T, device),
            sequences=replace(self.sequences, cu_seqlens=to_device_async(self.sequences.cu_seqlens, device)),
            loss_positions_R=to_device_async(self.loss_positions_R, device),
            targets_R=to_device_async(self.targets_R, device),
            weights_R=to_device_async(self.weights_R, device),
        )


def pack_batch(
    tokens_BS: torch.Tensor,
    mask_BS: torch.Tensor,
    num_packs: int,
    *,
    max_tokens: int | None = None,
    in_order: bool = False,
    equal_lengths: bool = False,
    multiple: int = 1,
) -> list[Pack]:
    """Assign the rows of a batch to packs and concatenate each pack's rows.

    Args:
        tokens_BS: int64 [B, S] on the CPU.
        mask_BS: float [B, S - 1] on the CPU; where it is positive, the next token is a loss token with that weight.
        num_packs: divides B.
        max_tokens: if given, use as few packs as possible with at most this many tokens each, but at most `num_packs`.
        in_order: pack i gets the rows from i * B / num_packs on; otherwise packs are of about the same length.
        equal_lengths: pad all packs to the length of the longest.
        multiple: every pack's length is padded to a multiple of this.

    Returns:
        The packs, each of at least one token, on the CPU.
    """
    lengths_B = trained_lengths(mask_BS).tolist()
    if in_order:
        rows_of = _deal_in_order(lengths_B, num_packs)
    elif max_tokens is None:
        rows_of = deal_to_packs(lengths_B, num_packs)
    else:
        rows_of = deal_to_fewest(lengths_B, num_packs, max_tokens, multiple)
    widths = [_round_up(sum(lengths_B[row] for row in rows), multiple) for rows in rows_of]
    if equal_lengths:
        widths = [max(widths)] * len(widths)
    return [
        _join([(tokens_BS[row], mask_BS[row], lengths_B[row]) for row in rows], width)
        for rows, width in zip(rows_of, widths, strict=True)
    ]


def deal_to_packs(lengths: list[int], num_packs: int) -> list[list[int]]:
    """Row indices of each pack: longest row first, each to the pack with the fewest tokens (R. L. Graham 1969).

    Rows of length 0 are dropped. Ties between rows and between packs go to the first, so that all ranks agree.
    """
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    loads = [(0, number) for number in range(num_packs)]
    for row in sorted((row for row, length in enumerate(lengths) if length), key=lambda row: (-lengths[row], row)):
        load, number = loads[0]
        packs[number].append(row)
        heapq.heapreplace(loads, (load + lengths[row], number))
    return [sorted(rows) for rows in packs]


def deal_to_fewest(lengths: list[int], most: int, max_tokens: int, multiple: int = 1) -> list[list[int]]:
    """Row indices of the fewest packs that `deal_to_packs` fills with at most `max_tokens` each, padding included.

    At least one pack and at most `most`, which are used even if one then exceeds `max_tokens`. That cannot happen if no
    row is longer than r tokens, `max_tokens` is n * r, a multiple of `multiple`, and there are n * `most` rows: a pack
    that a row makes too long had n rows before, and so had all others, which were no emptier.
    """
    most = max(1, min(most, sum(length > 0 for length in lengths)))
    for num_packs in range(max(1, -(-sum(lengths) // max_tokens)), most):
        rows_of = deal_to_packs(lengths, num_packs)
        if all(_round_up(sum(lengths[row] for row in rows), multiple) <= max_tokens for rows in rows_of):
            return rows_of
    return deal_to_packs(lengths, most)


def _deal_in_order(lengths: list[int], num_packs: int) -> list[list[int]]:
    share = len(lengths) // num_packs
    return [[row for row in range(number * share, (number + 1) * share) if lengths[row]] for number in range(num_packs)]


def _round_up(length: int, multiple: int) -> int:
    return max(1, -(-length // multiple)) * multiple


def _join(rows: list[tuple[torch.Tensor, torch.Tensor, int]], width: int) -> Pack:
    lengths = [length for _, _, length in rows]
    num_behind = width - sum(lengths)
    behind = [torch.zeros(num_behind, dtype=torch.int64)]  # padding; all at position 0, which every position table has
    sequence_lengths = lengths + [num_behind] * (num_behind > 0)
    weights_T = torch.cat([mask[:length] for _, mask, length in rows] + [torch.zeros(num_behind)]).float()
    targets_T = torch.cat([tokens[1 : length + 1] for tokens, _, length in rows] + behind)
    (loss_positions_R,) = (weights_T > 0).nonzero(as_tuple=True)
    return Pack(
        tokens_1T=torch.cat([tokens[:length] for tokens, _, length in rows] + behind).unsqueeze(0),
        position_ids_1T=torch.cat([torch.arange(length) for length in lengths] + behind).unsqueeze(0),
        sequences=PackedSequences.of(sequence_lengths),
        loss_positions_R=loss_positions_R,
        targets_R=targets_T[loss_positions_R],
        weights_R=weights_T[loss_positions_R],
    )
