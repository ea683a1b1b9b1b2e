"""Filters and draws worked out by hand on a few logits; draws tested against their expected distribution.

Legend: B rows, V ids.
"""

import math

import pytest
import torch

from nemo_aligner.generation.sampling import (
    INVALID_TOKEN,
    SamplingParams,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    random_streams,
    sample,
    sample_token,
)

INF = math.inf


def from_probabilities(*rows) -> torch.Tensor:
    return torch.tensor(rows).log()


def kept(logits_BV) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits_BV]


def test_top_k_keeps_the_largest_and_ties_with_the_last_of_them():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [2.0, 5.0, 2.0, 2.0]])
    assert keep_top_k(logits, 2).tolist() == [[-INF, 3.0, 2.0, -INF], [2.0, 5.0, 2.0, 2.0]]
    assert keep_top_k(logits, 1).tolist() == [[-INF, 3.0, -INF, -INF], [-INF, 5.0, -INF, -INF]]
    assert torch.equal(keep_top_k(logits, 9), logits)


def test_top_k_brings_no_forbidden_id_back():
    logits = torch.tensor([[1.0, -INF, -INF]])
    assert torch.equal(keep_top_k(logits, 2), logits)


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.1, [1]),  # the best alone exceeds p, and is always kept
        (0.49, [1]),
        (0.51, [1, 3]),  # 0.5 does not reach p, 0.5 + 0.25 does
        (0.74, [1, 3]),
        (0.76, [0, 1, 3]),
        (0.9, [0, 1, 2, 3]),  # 0.875 does not reach it
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, expected):
    logits = from_probabilities([0.125, 0.5, 0.125, 0.25])
    filtered = keep_top_p(logits, p)
    if p == 0.76:  # one of two equally probable ids is needed
        assert len(kept(filtered)[0]) == 3 and {1, 3} <= set(kept(filtered)[0])
    else:
        assert kept(filtered) == [expected]
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


def test_top_p_looks_at_each_row_by_itself_and_leaves_its_input_alone():
    logits = from_probabilities([0.7, 0.2, 0.1], [0.1, 0.45, 0.45])
    before = logits.clone()
    assert kept(keep_top_p(logits, 0.8)) == [[0, 1], [1, 2]]
    assert torch.equal(logits, before)


def test_top_p_brings_no_forbidden_id_back():
    assert kept(keep_top_p(torch.tensor([[0.0, -INF, 0.0, -INF]]), 0.999)) == [[0, 2]]


def test_repetition_penalty_makes_both_signs_less_likely():
    logits = torch.tensor([[3.0, -3.0, 3.0, -3.0], [1.0, 0.0, -INF, 6.0]])
    previous = torch.tensor([[0, 1, 1, 0], [3, 2, 1, 3]])
    assert penalize_repetition(logits, previous, 1.5).tolist() == [[2.0, -4.5, 3.0, -3.0], [1.0, 0.0, -INF, 4.0]]


def test_greedy_takes_the_best_after_the_penalty_and_ignores_the_rest():
    logits = torch.tensor([[1.0, 3.0, 2.9], [0.5, -1.0, 0.4]])
    previous = torch.tensor([[1, 1], [2, 2]])
    odd = {"temperature": 7.0, "top_k": 1, "top_p": 0.1}
    assert sample(logits, previous, SamplingParams(use_greedy=True, **odd), None).tolist() == [1, 0]
    penalized = SamplingParams(use_greedy=True, repetition_penalty=1.5, **odd)
    assert sample(logits, previous, penalized, None).tolist() == [2, 0]


# The distribution of 20,000 draws, tested against the 99.99 % quantile of chi-square.

NUM_DRAWS = 20_000
CHI_SQUARE_9999 = {1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5, 5: 25.7}


def assert_drawn_from(drawn, expected_V):
    """Pearson's chi-square test of int64 [draws] against the probabilities of the ids."""
    expected_V = torch.as_tensor(expected_V, dtype=torch.float64)
    possible = expected_V > 0
    counts_V = torch.bincount(drawn, minlength=expected_V.numel())
    assert counts_V[~possible].sum() == 0
    expected_counts = expected_V[possible] * drawn.numel()
    chi_square = ((counts_V[possible] - expected_counts) ** 2 / expected_counts).sum()
    assert chi_square < CHI_SQUARE_9999[int(possible.sum()) - 1]


def many_rows(logits_V) -> torch.Tensor:
    return logits_V.expand(NUM_DRAWS, -1)


def uniforms(seed: int) -> torch.Tensor:
    return torch.rand(NUM_DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


PROBABILITIES = [0.05, 0.4, 0.15, 0.1, 0.29, 0.01]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), PROBABILITIES),
        (SamplingParams(top_k=2), [0, 0.4 / 0.69, 0, 0, 0.29 / 0.69, 0]),
        (SamplingParams(top_p=0.8), [0, 0.4 / 0.84, 0.15 / 0.84, 0, 0.29 / 0.84, 0]),
        # top-p applies to what top-k left: 0.4 / 0.84 is 0.476, adding 0.29 / 0.84 gives 0.82
        (SamplingParams(top_k=3, top_p=0.8), [0, 0.4 / 0.69, 0, 0, 0.29 / 0.69, 0]),
        # squares of the probabilities
        (SamplingParams(temperature=0.5, top_k=2), [0, 0.16 / 0.2441, 0, 0, 0.0841 / 0.2441, 0]),
        (SamplingParams(top_k=0, top_p=1.0), PROBABILITIES),
        (SamplingParams(top_p=0.0), PROBABILITIES),
    ],
)
def test_draws_follow_the_filtered_distribution(params, expected):
    logits = many_rows(torch.tensor(PROBABILITIES).log() + 3.0)
    drawn = sample(logits, torch.zeros(NUM_DRAWS, 1, dtype=torch.int64), params, uniforms(1))
    assert drawn.dtype == torch.int64
    assert_drawn_from(drawn, expected)


def test_temperature_comes_before_the_repetition_penalty():
    # 4 / 2 = 2, which the penalty of 2 turns into 1
    params = SamplingParams(temperature=2.0, repetition_penalty=2.0)
    previous = torch.zeros(NUM_DRAWS, 1, dtype=torch.int64)
    drawn = sample(many_rows(torch.tensor([4.0, 0.0])), previous, params, uniforms(2))
    assert_drawn_from(drawn, torch.tensor([1.0, 0.0]).softmax(0))


def test_draw_never_takes_a_filtered_id():
    logits = many_rows(torch.tensor([-INF, 0.0, -INF, math.log(3.0)]))
    assert_drawn_from(sample_token(logits, uniforms(3)), [0, 0.25, 0, 0.75])


def test_a_draw_is_where_the_cumulated_probability_exceeds_the_number():
    logits = from_probabilities([0.25, 0.0, 0.5, 0.25, 0.0]).repeat(7, 1)
    numbers = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-24, 1 - 2**-53], dtype=torch.float64)
    assert sample_token(logits, numbers).tolist() == [0, 0, 2, 2, 3, 3, 3]


def test_rare_tokens_of_a_large_vocabulary_are_as_probable_as_they_should_be():
    """One token with half of the probability, then 100,000 that share the rest, where float32 sums would drift."""
    logits = torch.full((1, 100_001), 0.0)
    logits[0, 0] = math.log(100_000)
    numbers = torch.tensor([0.0, 0.25, 0.499999, 0.750002, 1 - 2**-30], dtype=torch.float64)
    drawn = torch.cat([sample_token(logits, number[None]) for number in numbers])
    assert drawn.tolist() == [0, 0, 0, 50_001, 100_000]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(use_greedy=True),
        SamplingParams(temperature=0.7, top_k=2, top_p=0.9, repetition_penalty=1.3),
    ],
    ids=["plain", "greedy", "filtered"],
)
def test_no_token_is_drawn_from_logits_that_are_nan_or_infinite_and_other_rows_are(params):
    nan = math.nan
    logits = torch.tensor(
        [[nan, nan, nan], [0.0, nan, 1.0], [9.0, -INF, -INF], [0.0, INF, 1.0], [-INF, -INF, -INF], [-INF, -INF, 9.0]]
    )
    logits = torch.cat((logits, torch.full((6, 300), -INF)), dim=1)  # several blocks
    previous = torch.zeros(6, 1, dtype=torch.int64)
    drawn = sample(logits, previous, params, torch.full((6,), 0.5, dtype=torch.float64))
    assert drawn.tolist() == [INVALID_TOKEN, INVALID_TOKEN, 0, INVALID_TOKEN, INVALID_TOKEN, 2]


# Random streams


def test_a_rows_stream_does_not_depend_on_the_batch_it_is_in():
    together = random_streams((7, 3), [(0, 0), (0, 1), (5, 0)], 20)
    alone = random_streams((7, 3), [(5, 0)], 20)
    assert torch.equal(together[2:], alone)
    assert together.dtype == torch.float64 and (together >= 0).all() and (together < 1).all()


def test_streams_of_different_keys_and_rows_are_independent():
    ids = [(row,) for row in range(NUM_DRAWS)]
    first, second = random_streams((1, 2), ids, 2), random_streams((2, 1), ids, 2)
    for one, other in ((first[:, 0], second[:, 0]), (first[:, 0], first[:, 1]), (first[:-1, 0], first[1:, 0])):
        assert_drawn_from(2 * (one < 0.5).long() + (other < 0.5).long(), [0.25] * 4)
