"""Rows dealt out to replicas: equal numbers of rows, and about equal numbers of tokens."""

import random

import pytest
import torch

from nemo_aligner.algorithms.balancing import deal_to_replicas
from nemo_aligner.utils.masks import trained_lengths


def test_the_longest_row_goes_to_the_emptiest_share_that_is_not_full():
    # 9 | 8, then 7 to the second, 2 to the first: 11 | 15. No swap reduces the difference of 4: swapping 8 for 9,
    # or 7 for 2, leaves 6; swapping 8 for 2, or 7 for 9, leaves 8.
    assert deal_to_replicas([7, 2, 9, 8], 2) == [1, 0, 0, 1]


def test_a_swap_mends_what_full_shares_forced():
    # 10, 5, 5 | 9, 6, 1 gives 20 | 16; swapping 10 for 9 gives 19 | 17, and every other swap leaves a larger difference
    assert deal_to_replicas([10, 9, 6, 5, 5, 1], 2) == [1, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("lengths", [[], [3, 3, 3, 3], [0, 0]], ids=["none", "ties", "nothing to train on"])
def test_edges(lengths):
    shares = deal_to_replicas(lengths, 2)
    assert shares.count(0) == shares.count(1) == len(lengths) // 2


@pytest.mark.parametrize("num_shares", [2, 4, 8])
def test_geometric_lengths_are_balanced_to_half_a_percent(num_shares):
    rng = random.Random(0)
    worst_before = 0.0
    for _ in range(20):
        lengths = [rng.randint(64, 128) + min(256, int(rng.expovariate(1 / 64))) for _ in range(16 * num_shares)]
        shares = deal_to_replicas(lengths, num_shares)
        assert [shares.count(share) for share in range(num_shares)] == [16] * num_shares
        assert _excess(lengths, shares) <= 0.005
        worst_before = max(worst_before, _excess(lengths, [row // 16 for row in range(len(lengths))]))
    assert worst_before > 0.05


def _excess(lengths: list[int], shares: list[int]) -> float:
    """By how much the fullest share exceeds the mean."""
    num_shares = max(shares) + 1
    totals = torch.zeros(num_shares, dtype=torch.int64).scatter_add(0, torch.tensor(shares), torch.tensor(lengths))
    return totals.max().item() * num_shares / sum(lengths) - 1


def test_trained_lengths_end_with_the_last_prediction_that_counts():
    mask = torch.tensor([[0.0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]])
    assert trained_lengths(mask).tolist() == [3, 0, 4, 1]
