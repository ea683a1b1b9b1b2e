"""Collectives of `nemo_aligner.utils.distributed` on gloo ranks; each check runs on every rank and raises there."""

import warnings

import numpy as np
import pytest
import torch

from nemo_aligner.testing.utils import Utils
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.distributed import (
    SyncTimer,
    Timer,
    broadcast_2d_tensor,
    broadcast_2d_tensor_within_mp,
    broadcast_2d_tensor_within_pp,
    broadcast_tensor,
    broadcast_tensor_within_pp,
    masked_global_mean_var,
    max_over_ranks,
    normalize_tensor,
    pad_tensors_to_max_global_seq_len,
    rebalance_nd_tensor,
    run_distributed_inference,
    run_if_model_parallel_src,
)
from tests.distributed.launch import run_ranks

BEYOND_FLOAT32 = 2**40 + 1


def rank_main(rank: int) -> None:
    """All checks in one launch of four ranks, in every layout they need, because starting the ranks is slow."""
    Utils.initialize_model_parallel(pipeline_model_parallel_size=4)
    check_broadcast_of_any_shape_and_dtype(rank)
    check_broadcast_casts(rank)
    check_missing_tensor_raises_everywhere(rank)
    check_pipeline_of_four(rank)
    check_2d_broadcasts(rank)
    check_rebalance(rank)
    check_rebalance_disagreement_raises_everywhere(rank)
    check_masked_statistics(rank)
    check_global_padding(rank)
    check_timers(rank)

    Utils.initialize_model_parallel()
    check_groups_of_one(rank)
    check_sync_timer(rank)

    Utils.initialize_model_parallel(tensor_model_parallel_size=2)
    check_source_ranks(rank)
    check_inference(rank)
    check_refused_inference(rank)
    check_smaller_world(rank)


def test_collectives():
    run_ranks(rank_main, 4)


def check_broadcast_of_any_shape_and_dtype(rank):
    tensors = [
        torch.tensor([[BEYOND_FLOAT32, -1]]),
        torch.tensor([True, False, True]),
        torch.tensor(3.25, dtype=torch.bfloat16),
        torch.empty(0, 3),
        torch.arange(24, dtype=torch.int16).reshape(2, 3, 4).transpose(0, 2),
        torch.tensor([1 + 2j], dtype=torch.complex64),
        torch.tensor([torch.nan, torch.inf], dtype=torch.float64),
    ]
    for tensor in tensors:
        received = broadcast_tensor(tensor if rank == 2 else None, src=2, group=None)
        assert received.dtype == tensor.dtype
        torch.testing.assert_close(received, tensor, rtol=0, atol=0, equal_nan=True)


def check_broadcast_casts(rank):
    received = broadcast_tensor(torch.tensor([1.5, -2.5]) if rank == 0 else None, 0, None, dtype=torch.int64)
    assert received.dtype == torch.int64 and received.tolist() == [1, -2]


def check_missing_tensor_raises_everywhere(rank):
    with pytest.raises(ValueError, match="rank 1 is the source of a broadcast but passed no tensor"):
        broadcast_tensor(None if rank == 1 else torch.ones(1), src=1, group=None)


def check_pipeline_of_four(rank):
    own = torch.tensor([[rank]])
    assert broadcast_tensor_within_pp(own).tolist() == [[3]]
    assert broadcast_tensor_within_pp(own if rank == 0 else None, from_last=False).tolist() == [[0]]
    assert broadcast_tensor_within_pp(own, dtype=torch.float64).dtype == torch.float64


def check_2d_broadcasts(rank):
    own = torch.tensor([[rank, 5]])
    with pytest.warns(DeprecationWarning, match="broadcast_2d_tensor is deprecated"):
        received = broadcast_2d_tensor(own, src=1, group=None)
    assert received.dtype == torch.float32 and received.tolist() == [[1.0, 5.0]]
    assert broadcast_2d_tensor_within_pp(own).tolist() == [[3.0, 5.0]]
    assert broadcast_2d_tensor_within_pp(own, from_last=False).dtype == torch.float32
    ids = broadcast_2d_tensor_within_mp(torch.tensor([[BEYOND_FLOAT32 + rank]]), dtype=torch.int64)
    assert ids.dtype == torch.int64 and ids.tolist() == [[BEYOND_FLOAT32]]
    # Only the source has a tensor of the wrong shape, but no rank may be left waiting.
    with pytest.raises(AssertionError, match=r"2-D tensor is required, not one of shape \[3\]"):
        broadcast_2d_tensor_within_mp(torch.ones(3) if rank == 0 else torch.ones(1, 1))


def check_rebalance(rank):
    num_rows = [2, 0, 3, 1][rank]
    rows = 10 * rank + torch.arange(num_rows * 2).reshape(num_rows, 2)
    gathered = rebalance_nd_tensor(rows, None)
    assert gathered.dtype == torch.int64
    assert gathered.tolist() == [[0, 1], [2, 3], [20, 21], [22, 23], [24, 25], [30, 31]]

    flags = rebalance_nd_tensor(torch.full((rank,), True), None)
    assert flags.dtype == torch.bool and flags.tolist() == [True] * 6
    assert rebalance_nd_tensor(torch.full((1, 2, 2), float(rank)).bfloat16(), None)[3, 1, 1].item() == 3.0
    nothing = rebalance_nd_tensor(torch.empty(0, 4, dtype=torch.int32), None)
    assert nothing.shape == (0, 4) and nothing.dtype == torch.int32


def check_rebalance_disagreement_raises_everywhere(rank):
    other = rank == 2
    for tensor in (
        torch.ones(1, 3 if other else 2),
        torch.ones(1, 2, dtype=torch.float64 if other else torch.float32),
        torch.ones(1) if other else torch.ones(1, 2),
        torch.tensor(1.0),
    ):
        with pytest.raises(ValueError, match="must agree in dtype and all dimensions but the first"):
            rebalance_nd_tensor(tensor, None)


def check_masked_statistics(rank):
    # Selected over the ranks: 1, 3, 5, 7 (rank 3 selects nothing). Mean 4, variance (9 + 1 + 1 + 9) / 4 = 5.
    values = [[1.0, 3.0, 100.0], [5.0, torch.nan, torch.nan], [-1.0, 7.0, 0.0], [8.0, 8.0, 8.0]][rank]
    mask = [[1, 1, 0], [2, 0, 0], [0, 1, 0], [0, 0, 0]][rank]
    values, mask = torch.tensor(values), torch.tensor(mask)
    mean, variance = masked_global_mean_var(values, mask)
    assert mean.dtype == variance.dtype == torch.float32
    assert (mean.item(), variance.item()) == (4.0, 5.0)
    torch.testing.assert_close(normalize_tensor(values, mask), (values - 4) / 5**0.5, equal_nan=True)

    # 2^24 and 2^24 + 2 on two ranks each: the deviations of 1 from the mean can be represented in float64 only.
    large = torch.tensor([2.0**24 + 2 * (rank % 2)])
    _, variance = masked_global_mean_var(large, torch.ones(1))
    assert variance.item() == 1.0
    assert all(torch.isnan(statistic) for statistic in masked_global_mean_var(large, torch.zeros(1)))
    with pytest.raises(ValueError, match=r"values \[1\] and mask \[2\]"):
        masked_global_mean_var(large, torch.ones(2))


def check_global_padding(rank):
    rows = [[[1], [2, 3]], [], [[4, 5, 6]], [[]]][rank]
    rows = [torch.tensor(row, dtype=torch.int64) for row in rows]
    expected = [[[1, 9, 9], [2, 3, 9]], [], [[4, 5, 6]], [[9, 9, 9]]][rank]
    padded = pad_tensors_to_max_global_seq_len(rows, 9, None)
    assert padded.tolist() == expected and padded.dtype == torch.int64 and padded.shape == (len(rows), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pad_tensors_to_max_global_seq_len(rows, 9, None, sequence_length_to_pad_to=5).shape == (len(rows), 5)
    with pytest.warns(UserWarning, match="3 tokens is longer than the 2 to pad to"):
        assert pad_tensors_to_max_global_seq_len(rows, 9, None, sequence_length_to_pad_to=2).shape == (len(rows), 3)


def check_timers(rank):
    for rank_0_limit, other_limit, finished in (("00:00:00:00", None, True), (None, "00:00:00:00", False)):
        timer = Timer(rank_0_limit if rank == 0 else other_limit)
        timer.start_time()
        assert timer.is_finished() is finished
    assert max_over_ranks({"a": 1.0 + rank, "b": 9.0 - rank}) == {"a": 4.0, "b": 9.0}
    assert max_over_ranks({}) == {}


def check_groups_of_one(rank):
    tensor = torch.tensor([[rank, 7]])
    assert broadcast_tensor_within_pp(tensor) is tensor
    assert broadcast_tensor_within_pp(tensor, dtype=torch.float32).dtype == torch.float32
    for received in (broadcast_2d_tensor_within_pp(tensor), broadcast_2d_tensor_within_mp(tensor)):
        assert received.dtype == torch.float32 and received.tolist() == [[float(rank), 7.0]]
    assert broadcast_2d_tensor_within_mp(tensor, dtype=torch.int64) is tensor
    with pytest.raises(AssertionError, match="2-D"):
        broadcast_2d_tensor_within_pp(torch.ones(2))


def check_sync_timer(rank):
    with pytest.warns(DeprecationWarning):
        timer = SyncTimer(reduction="sum")
    timer.timers["section"] = {"dt": [1.0, float(rank)]}
    assert timer.get("section") == 1.0 + rank and timer.get_synced("section") == 4.0
    timer.store("section")
    timer.timers["section"] = {"dt": [10.0]}
    timer.store("section")
    assert timer.sync_and_consume_over_stored_time("section") == 14.0
    with pytest.raises(ValueError, match="no time is stored"):
        timer.sync_and_consume_over_stored_time("section")


def check_source_ranks(rank):
    assert parallel_state.get_model_parallel_src_rank() == [0, 0, 2, 2][rank]
    assert parallel_state.get_tensor_model_parallel_world_size() == 2
    with pytest.raises(AttributeError):
        parallel_state.no_such_query()
    value = run_if_model_parallel_src(lambda first, *, second: first + second + rank, 10, second=20)
    assert value == [30, None, 32, None][rank]
    assert broadcast_2d_tensor_within_mp(torch.tensor([[float(rank)]])).item() == [0, 0, 2, 2][rank]


def check_inference(rank):
    tokens = torch.tensor([[1, 2], [3, 4], [5, 6], [BEYOND_FLOAT32, 8]])
    inputs = {"inputs": tokens, "sequence_length": torch.tensor([[2], [1], [2], [1]])}
    seen = []

    def sum_of_row_and_length(inputs):
        tokens, lengths = inputs
        seen.append((tokens.tolist(), lengths.tolist()))
        return (tokens.sum(-1) + lengths).unsqueeze(-1)

    outputs = run_distributed_inference(inputs if rank == 0 else None, sum_of_row_and_length)
    first_row = 2 * parallel_state.get_data_parallel_rank()
    assert seen == [(tokens[first_row : first_row + 2].tolist(), [2, 1])]
    assert isinstance(outputs, np.ndarray) and outputs.dtype == np.int64
    assert outputs.tolist() == [[5], [8], [13], [BEYOND_FLOAT32 + 9]]

    half = run_distributed_inference(inputs if rank == 0 else None, lambda inputs: inputs[1].bfloat16() / 2)
    assert half.dtype == np.float32 and half.tolist() == [1.0, 0.5, 1.0, 0.5]


def check_refused_inference(rank):
    def inputs(num_rows, num_lengths):
        tokens, lengths = torch.ones(num_rows, 2).long(), torch.ones(num_lengths, 1).long()
        return {"inputs": tokens, "sequence_length": lengths} if rank == 0 else None

    for refused, message in (
        (inputs(3, 3), "3 rows cannot be divided by 2 replicas"),
        (inputs(4, 2), "'inputs' has 4 rows, but 'sequence_length' has 2"),
        (None, "passed no tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            run_distributed_inference(refused, lambda inputs: inputs[0])
    with pytest.raises(ValueError, match="infer_fn made 2 rows of a batch of 4"):
        run_distributed_inference(inputs(4, 4), lambda inputs: inputs[0][:1])


def check_smaller_world(rank):
    Utils.set_world_size(2)
    assert Utils.rank == [0, 1, -1, -1][rank]
    Utils.initialize_model_parallel(tensor_model_parallel_size=2)
    if rank < 2:
        assert torch.distributed.get_world_size() == parallel_state.get_tensor_model_parallel_world_size() == 2
        assert broadcast_tensor(torch.tensor(rank), src=1, group=None).item() == 1
    else:
        assert not torch.distributed.is_initialized()
    Utils.set_world_size()
    Utils.initialize_model_parallel()
    assert torch.distributed.get_world_size() == 4 and Utils.rank == rank
