import gc
import math
import warnings
import weakref

import pytest
import torch

from nemo_aligner.utils.distributed import pad_list
from nemo_aligner.utils.tensors import (
    apply_func_to_dict,
    batch_pad_to_fixed_len,
    calculate_response_lengths,
    clear_memory,
    cpu_dict,
    deprecated_in_version,
    gc_frozen,
    masked_mean,
    masked_std,
    move_to_device_if_tensor,
    select_log_probs,
    surpress_user_warnings,
)

NAN = math.nan


def test_masked_mean_over_all_entries_and_along_a_dimension():
    values = torch.tensor([[1.0, 2.0, NAN], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, -3], [0, 0, 0]])
    assert masked_mean(values, mask).item() == 3.0
    along_columns = masked_mean(values, mask, dim=-1)
    assert along_columns[:2].tolist() == [1.5, 6.0] and along_columns[2].isnan()


def test_masked_mean_of_nothing_is_nan():
    assert masked_mean(torch.ones(3), torch.zeros(3)).isnan()
    assert masked_mean(torch.ones(0), torch.ones(0)).isnan()


def test_masked_mean_keeps_the_dtype_without_losing_the_sum():
    values = torch.full((1000,), 200.0, dtype=torch.float16)  # the sum exceeds float16
    mean = masked_mean(values, torch.ones(1000))
    assert mean.dtype == torch.float16 and mean.item() == 200.0
    assert masked_mean(torch.tensor([1, 2]), torch.ones(2)).item() == 1.5


def test_masked_mean_gradient_is_an_equal_share_of_the_selected():
    values = torch.tensor([1.0, NAN, 5.0], requires_grad=True)
    masked_mean(values, torch.tensor([True, False, True])).backward()
    assert values.grad.tolist() == [0.5, 0.0, 0.5]


def test_masked_std_has_the_n_minus_1_of_torch():
    values = torch.tensor([[1.0, 3.0, NAN], [5.0, 7.0, 12.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    # (1, 3, 5): squared deviations 4 + 0 + 4, divided by 2
    assert masked_std(values, mask).item() == 2.0
    rows = masked_std(values, mask, dim=1)
    assert rows[0].item() == pytest.approx(math.sqrt(2)) and rows[1].isnan()
    assert masked_std(values, torch.zeros(2, 3)).isnan()


@pytest.mark.parametrize("statistic", [masked_mean, masked_std])
def test_masked_statistics_need_equal_shapes(statistic):
    with pytest.raises(ValueError, match=r"values \[2, 3\] and mask \[2, 1\]"):
        statistic(torch.zeros(2, 3), torch.ones(2, 1))


def test_select_log_probs_takes_the_next_token():
    full = torch.arange(12.0).reshape(1, 3, 4)
    picked, kept = select_log_probs(full, torch.tensor([[3, 1, 2]]))
    assert picked.tolist() == [[1.0, 6.0]]
    assert kept.tolist() == full[:, :2].tolist()


def test_response_lengths_count_everything_but_eos():
    tokens = torch.tensor([[5, 0, 6, 0], [0, 0, 0, 0]])
    assert calculate_response_lengths(tokens, 0).tolist() == [2, 0]


def test_batch_pad_to_fixed_len():
    padded = batch_pad_to_fixed_len([torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64)], 3, 9)
    assert padded.tolist() == [[1, 2, 9], [9, 9, 9]] and padded.dtype == torch.int64
    assert batch_pad_to_fixed_len([torch.tensor([True])], 2, 0).dtype == torch.bool
    assert batch_pad_to_fixed_len([], 3, 9).shape == (0, 3)


def test_batch_pad_refuses_a_row_that_is_too_long():
    with pytest.raises(ValueError, match="length 4 does not fit max_batch_len=3"):
        batch_pad_to_fixed_len([torch.arange(4)], 3, 0)


def test_pad_list_uses_the_pad_value():
    narrow, wide = pad_list([torch.ones(2, 1, dtype=torch.int64), torch.ones(1, 3)], 7)
    assert narrow.tolist() == [[1, 7, 7], [1, 7, 7]] and narrow.dtype == torch.int64
    assert wide.tolist() == [[1.0, 1.0, 1.0]]
    assert pad_list([], 7) == []


def test_dict_helpers_move_tensors_and_leave_the_rest():
    source = {"tensor": torch.ones(1), "text": "a", "none": None}
    moved = apply_func_to_dict(lambda item: move_to_device_if_tensor("meta", item), source)
    assert moved["tensor"].device.type == "meta" and moved["text"] == "a" and moved["none"] is None
    assert source["tensor"].device.type == "cpu"
    assert cpu_dict({"tensor": torch.ones(1), "number": 3})["number"] == 3


def test_clear_memory_collects_reference_cycles():
    class Node:
        pass

    node = Node()
    node.itself = node
    alive = weakref.ref(node)
    del node
    clear_memory()
    assert alive() is None


def test_user_warnings_are_suppressed_and_others_pass():
    @surpress_user_warnings
    def noisy(value):
        warnings.warn("hidden", UserWarning, stacklevel=1)
        warnings.warn("shown", DeprecationWarning, stacklevel=1)
        return value

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert noisy(4) == 4
    assert [str(warning.message) for warning in caught] == ["shown"]


def test_deprecation_names_function_version_and_replacement():
    @deprecated_in_version("1.2", "use new")
    def old(value):
        return value + 1

    with pytest.warns(DeprecationWarning, match=r"old is deprecated since version 1\.2: use new"):
        assert old(1) == 2
    assert old.__name__ == "old"


def test_what_existed_before_the_context_is_not_looked_through():
    class Node:
        pass

    def cycle():
        node = Node()
        node.itself = node
        return weakref.ref(node)

    gc.disable()
    try:
        before = cycle()
        with gc_frozen():
            within = cycle()
            clear_memory()
            assert within() is None and before() is not None
        clear_memory()
        assert before() is None
    finally:
        gc.enable()
