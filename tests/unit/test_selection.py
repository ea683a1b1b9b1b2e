import math

import pytest
import torch

from nemo_aligner.algorithms.selection import best_rows, number_prompts, selection_scores

NAN, INF = math.nan, math.inf


def ascending(scores: torch.Tensor) -> list[int]:
    return scores.argsort(stable=True).tolist()


def test_fit_rows_outrank_unfit_rows_whatever_the_rewards():
    rewards = torch.tensor([INF, -INF, NAN, 5.0, -7.0, NAN])
    fit = torch.tensor([False, True, False, False, True, True])
    # reward (row), ascending; unfit: NaN (2), 5 (3), inf (0); fit: NaN (5), -inf (1), -7 (4)
    assert ascending(selection_scores(rewards, fit)) == [2, 3, 0, 5, 1, 4]


def test_all_fit_and_all_unfit_are_ordered_by_reward():
    rewards = torch.tensor([0.5, -1.0, 2.0])
    for fit in (torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)):
        assert ascending(selection_scores(rewards, fit)) == [1, 0, 2]


def test_ties_get_equal_scores():
    scores = selection_scores(torch.tensor([0.0, -0.0, NAN, NAN, 1.0]), torch.ones(5, dtype=torch.bool))
    assert scores[0] == scores[1] and scores[2] == scores[3]
    assert scores[2] < scores[0] < scores[4]


def test_neighbouring_and_huge_rewards_stay_apart():
    # Adding an offset to unfit rewards would merge these.
    rewards = torch.tensor([1e38, 1e38 * (1 + 2**-22), 1e-45, 0.0])
    assert ascending(selection_scores(rewards, torch.tensor([True, True, False, False]))) == [3, 2, 0, 1]


def test_scores_of_nothing_and_of_one_row():
    assert selection_scores(torch.empty(0), torch.empty(0, dtype=torch.bool)).tolist() == []
    assert selection_scores(torch.tensor([NAN]), torch.tensor([False])).shape == (1,)


def test_scores_need_one_fitness_per_reward():
    with pytest.raises(ValueError, match=r"rewards \[2\] and fit \[3\]"):
        selection_scores(torch.zeros(2), torch.ones(3, dtype=torch.bool))


def test_prompts_are_numbered_by_their_first_row():
    assert number_prompts(torch.tensor([5, 3, 5, 3, 7])).tolist() == [0, 1, 0, 1, 4]
    tokens = torch.tensor([[9, 1], [2, 2], [9, 1], [9, 2]])
    assert number_prompts(tokens).tolist() == [0, 1, 0, 3]
    assert number_prompts(torch.empty(0, 4)).tolist() == []


def test_best_rows_keep_prompt_order_then_score_then_row():
    scores = torch.tensor([1, 8, 3, 8, 3, 9])
    prompts = torch.tensor([0, 1, 0, 1, 0, 1])
    assert best_rows(scores, prompts, 1).tolist() == [2, 5]
    assert best_rows(scores, prompts, 2).tolist() == [2, 4, 5, 1]
    assert best_rows(scores, prompts, 3).tolist() == [2, 4, 0, 5, 1, 3]


def test_best_rows_of_nothing():
    assert best_rows(torch.empty(0), torch.empty(0, dtype=torch.int64), 2).tolist() == []


@pytest.mark.parametrize("num_select", [0, -1])
def test_selecting_less_than_one_row_is_an_error(num_select):
    with pytest.raises(ValueError, match=f"num_select={num_select} must be at least 1"):
        best_rows(torch.zeros(2), torch.tensor([0, 0]), num_select)


def test_selecting_more_rows_than_a_prompt_has_names_the_prompt():
    with pytest.raises(ValueError, match=r"num_select=2 exceeds the 1 row\(s\) of prompt 1"):
        best_rows(torch.zeros(3), torch.tensor([0, 1, 0]), 2)
