"""Masks and position ids, written out by hand. E is the end-of-document id, True means blocked."""

import pytest
import torch

from nemo_aligner.utils.masks import attention_mask_and_position_ids

E = 0
TOKENS = torch.tensor([[5, E, 6, 7, E], [5, 6, 7, E, E]])


def blocked(*visible_rows: str) -> list[list[bool]]:
    """One string per query position, with 'x' for each position that it sees."""
    return [[seen != "x" for seen in row] for row in visible_rows]


def test_without_resets_attention_is_plainly_causal():
    mask, position_ids = attention_mask_and_position_ids(TOKENS, E, False, False)
    assert mask is None
    assert position_ids.dtype == torch.int64 and position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_attention_stays_within_documents():
    mask, position_ids = attention_mask_and_position_ids(TOKENS, E, False, True)
    assert mask.dtype == torch.bool and mask.shape == (2, 1, 5, 5)
    assert mask[0, 0].tolist() == blocked("x....", "xx...", "..x..", "..xx.", "..xxx")
    assert mask[1, 0].tolist() == blocked("x....", "xx...", "xxx..", "xxxx.", "....x")
    assert position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_positions_start_anew_behind_each_end():
    mask, position_ids = attention_mask_and_position_ids(TOKENS, E, True, False)
    assert mask is None
    assert position_ids.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]


def test_both_resets():
    mask, position_ids = attention_mask_and_position_ids(TOKENS[:1], E, True, True)
    assert mask[0, 0].tolist() == blocked("x....", "xx...", "..x..", "..xx.", "..xxx")
    assert position_ids.tolist() == [[0, 1, 0, 1, 2]]


@pytest.mark.parametrize("tokens", [[[E]], [[E, E, E]]])
def test_rows_of_end_tokens_are_documents_of_one_token(tokens):
    mask, position_ids = attention_mask_and_position_ids(torch.tensor(tokens), E, True, True)
    width = len(tokens[0])
    assert mask[0, 0].tolist() == (~torch.eye(width, dtype=torch.bool)).tolist()
    assert position_ids.tolist() == [[0] * width]


def test_padding_changes_nothing_in_front_of_it():
    padded = torch.nn.functional.pad(TOKENS, (0, 3), value=E)
    mask, position_ids = attention_mask_and_position_ids(TOKENS, E, True, True)
    padded_mask, padded_position_ids = attention_mask_and_position_ids(padded, E, True, True)
    assert torch.equal(padded_mask[..., :5, :5], mask) and padded_mask[..., :5, 5:].all()
    assert torch.equal(padded_position_ids[:, :5], position_ids)
