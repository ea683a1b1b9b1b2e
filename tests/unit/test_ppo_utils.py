import math

import pytest
import torch

from nemo_aligner.utils.ppo_utils import calculate_entropy, create_mask, select_topk

NAN = math.nan


def test_mask_covers_the_predictions_of_the_response_and_its_end():
    # Row 0: tokens p p p r e, the last two are the response. Row 1: p r r r e. Row 2: prompt only.
    mask = create_mask(torch.full((3, 4), 7.0), torch.tensor([3, 1, 4]), torch.tensor([5, 5, 4]))
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert mask.dtype == torch.float32


def test_mask_stops_at_the_response_length_and_keeps_the_dtype():
    mask = create_mask(torch.zeros(2, 6, dtype=torch.bfloat16), torch.tensor([2, 3]), torch.tensor([4, 4]))
    assert mask.tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert mask.dtype == torch.bfloat16


def test_mask_of_no_rows():
    empty = torch.empty(0, dtype=torch.int64)
    assert create_mask(torch.zeros(0, 3), empty, empty).shape == (0, 3)


def test_response_longer_than_its_row_is_an_error():
    with pytest.raises(ValueError, match="response length 6 exceeds the 5 tokens"):
        create_mask(torch.zeros(1, 4), torch.tensor([2]), torch.tensor([6]))


def batch_of(prompts: list, rewards: list, **more) -> dict:
    tokens = torch.tensor([[prompt, 0] for prompt in prompts])
    return {"prompt_tokens": tokens, "rewards": torch.tensor(rewards), "row": torch.arange(len(prompts)), **more}


def test_best_row_of_each_prompt_in_order_of_first_appearance():
    batch = batch_of([9, 2, 9, 2], [0.1, 0.4, 0.3, -1.0])
    best = select_topk(batch, 1)
    assert best["row"].tolist() == [2, 1]
    assert best["prompt_tokens"].tolist() == [[9, 0], [2, 0]]
    assert best["rewards"].tolist() == torch.tensor([0.3, 0.4]).tolist()
    assert batch["row"].tolist() == [0, 1, 2, 3]


def test_rows_descend_by_reward_with_ties_to_the_lower_row_and_nan_last():
    batch = batch_of([1] * 6, [NAN, 2.0, 5.0, 2.0, -math.inf, 5.0])
    assert select_topk(batch, 6)["row"].tolist() == [2, 5, 1, 3, 4, 0]


def test_all_rewards_nan_still_gives_num_select_rows():
    assert select_topk(batch_of([3, 4, 3, 4], [NAN] * 4), 1)["row"].tolist() == [0, 1]


def test_rewards_may_be_a_column_and_keep_their_shape():
    batch = batch_of([1, 1, 1], [[1.0], [3.0], [2.0]])
    best = select_topk(batch, 2)
    assert best["row"].tolist() == [1, 2]
    assert best["rewards"].tolist() == [[3.0], [2.0]]


def test_prompt_index_separates_equal_prompts_and_joins_different_ones():
    batch = batch_of([1, 1, 1, 1], [1.0, 2.0, 3.0, 4.0], prompt_index=torch.tensor([8, 8, 3, 3]))
    best = select_topk(batch, 1)
    assert best["row"].tolist() == [1, 3]
    assert best["prompt_index"].tolist() == [8, 3]
    batch = batch_of([1, 2], [1.0, 2.0], prompt_index=torch.tensor([0, 0]))
    assert select_topk(batch, 1)["row"].tolist() == [1]


def test_fit_rows_come_before_better_rewarded_unfit_rows():
    fit = torch.tensor([False, True, False, True, False, False])
    batch = batch_of([1, 1, 1, 1, 2, 2], [9.0, 1.0, NAN, 2.0, 0.0, 1.0], is_fit=fit)
    best = select_topk(batch, 2)
    # Prompt 2 has no fit row, but still gets its number of rows.
    assert best["row"].tolist() == [3, 1, 5, 4]
    assert best["is_fit"].tolist() == [True, True, False, False]
    assert select_topk({key: value[:4] for key, value in batch.items()}, 3)["row"].tolist() == [3, 1, 0]


def test_one_rollout():
    assert select_topk(batch_of([5], [0.0]), 1)["row"].tolist() == [0]


def test_no_rows():
    best = select_topk({"prompt_tokens": torch.empty(0, 3, dtype=torch.int64), "rewards": torch.empty(0)}, 1)
    assert best["prompt_tokens"].shape == (0, 3) and best["rewards"].shape == (0,)


@pytest.mark.parametrize("num_select", [0, 3])
def test_num_select_outside_the_group_size_is_an_error(num_select):
    with pytest.raises(ValueError, match=f"num_select={num_select}"):
        select_topk(batch_of([1, 1], [0.0, 1.0]), num_select)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": None}, "lacks the key 'rewards'"),
        ({"prompt_tokens": None}, "lacks the key 'prompt_tokens'"),
        ({"extra": torch.zeros(3)}, "'extra' has 3 rows, but 'rewards' has 2"),
        ({"rewards": torch.zeros(2, 2)}, r"'rewards' must be \[M\] or \[M, 1\]"),
        ({"prompt_index": torch.zeros(2)}, "'prompt_index' must be an integer tensor"),
    ],
)
def test_malformed_batches_name_the_key(change, message):
    batch = {**batch_of([1, 1], [0.0, 1.0]), **change}
    with pytest.raises(ValueError, match=message):
        select_topk({key: value for key, value in batch.items() if value is not None}, 1)


def test_entropy_of_known_distributions():
    # ln 2 for the fair coin, 0 for the certain outcome, whose alternative has the log-probability -inf.
    log_probs = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]).log().requires_grad_()
    entropy = calculate_entropy(log_probs)
    assert entropy.item() == pytest.approx(math.log(2) / 2)
    entropy.backward()
    assert log_probs.grad.isfinite().all()


def test_masked_entropy():
    log_probs = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]]).log()
    assert calculate_entropy(log_probs, torch.tensor([[1, 0]])).item() == pytest.approx(math.log(2))
    assert calculate_entropy(log_probs, torch.tensor([[0, 0]])).isnan()
