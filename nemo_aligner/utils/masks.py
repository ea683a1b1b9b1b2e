"""Attention masks and position ids of right-padded rows, with resets at document ends, and trained lengths."""

import torch


def attention_mask_and_position_ids(
    tokens: torch.Tensor, eod_id: int, reset_position_ids: bool, reset_attention_mask: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The transformer's inputs in addition to the tokens [B, S] (int64).

    A document ends with, and includes, an end-of-document id. Rows are padded with such ids; as attention is causal,
    resets in the padding do not affect the tokens before it.

    Returns:
        the mask of blocked positions, bool [B, 1, S, S], or None if attention is purely causal (no resets); and the
        position ids, int64 [B, S].
    """
    positions = torch.arange(tokens.size(1), device=tokens.device)
    if not (reset_position_ids or reset_attention_mask):
        return None, positions.expand_as(tokens)
    is_end = tokens == eod_id
    document = torch.nn.functional.pad(is_end.cumsum(dim=1)[:, :-1], (1, 0))
    position_ids = positions.expand_as(tokens)
    if reset_position_ids:
        starts = torch.nn.functional.pad(is_end[:, :-1], (1, 0)) * positions
        position_ids = positions - starts.cummax(dim=1).values
    if not reset_attention_mask:
        return None, position_ids
    other_document = document[:, :, None] != document[:, None, :]
    return (other_document | (positions[:, None] < positions[None, :])).unsqueeze(1), position_ids


def trained_lengths(mask: torch.Tensor) -> torch.Tensor:
    """int64 [R]: number of tokens of each row that the loss needs, through the one that predicts its last target.

    Args:
        mask: [R, W], where entry t refers to the prediction of token t + 1.
    """
    return (torch.arange(1, mask.size(1) + 1) * (mask != 0)).amax(dim=1)
