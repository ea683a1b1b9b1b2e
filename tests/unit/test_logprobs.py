"""The arithmetic of one shard, with the other shards' values given by hand; tests/distributed has real ranks."""

import pytest
import torch

from nemo_aligner.utils import logprobs
from nemo_aligner.utils.logprobs import shard_exp_sums, shard_gradient, shard_target_logits

# Probabilities 0.1, 0.2, 0.3, 0.4; two shards of two ids each.
LOGITS = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]).log()
SHARDS = LOGITS.split(2, dim=-1)
MAXIMA = LOGITS.amax(-1)


def assert_close(actual, expected):
    torch.testing.assert_close(actual.flatten(), torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_each_shard_adds_its_part_of_the_sum():
    assert_close(shard_exp_sums(SHARDS[0], MAXIMA), [3 / 4])
    assert_close(shard_exp_sums(SHARDS[1], MAXIMA), [7 / 4])


def test_only_the_shard_that_holds_the_target_contributes_it():
    # Ids 1 and 2 lie on either side of the boundary between the shards.
    for target, contributions in ((1, [2 / 4, None]), (2, [None, 3 / 4])):
        for shard, quotient in enumerate(contributions):
            entry = shard_target_logits(SHARDS[shard], torch.tensor([[target - 2 * shard]]), MAXIMA)
            assert_close(entry.exp(), [1.0 if quotient is None else quotient])


def test_gradient_is_target_minus_softmax_in_each_shard():
    exp_sums, weight = torch.tensor([[10 / 4]]), torch.tensor([[2.0]])
    target = torch.tensor([[2]])
    first = shard_gradient(SHARDS[0], target, MAXIMA, exp_sums, weight)
    second = shard_gradient(SHARDS[1], target - 2, MAXIMA, exp_sums, weight)
    assert_close(torch.cat((first, second), dim=-1), [-0.2, -0.4, 1.4, -0.8])


@pytest.mark.parametrize("entries", [1, 2 * 6 * 3, 2 * 6 * 5])
def test_chunking_changes_nothing(monkeypatch, entries):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 6, generator=generator).to(torch.bfloat16)
    target = torch.randint(-6, 12, (2, 5), generator=generator)
    weight = torch.randn(2, 5, generator=generator)
    maxima = logits.amax(-1).float()

    def run():
        exp_sums = shard_exp_sums(logits, maxima)
        return exp_sums, shard_gradient(logits, target, maxima, exp_sums, weight)

    whole = run()
    monkeypatch.setattr(logprobs, "MAX_CHUNK_ENTRIES", entries)
    chunks = list(logprobs._split_positions(logits))
    assert len(chunks) == {1: 5, 36: 2, 60: 1}[entries]
    for in_chunks, at_once in zip(run(), whole, strict=True):
        assert torch.equal(in_chunks, at_once)


def test_transposed_logits():
    # Megatron's output layer gives [S, B, V]; its transpose is not contiguous.
    logits = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1)).transpose(0, 1)
    maxima, target, weight = logits.amax(-1), torch.tensor([[0, 1, 2], [3, 3, 3]]), torch.ones(2, 3)
    exp_sums = shard_exp_sums(logits, maxima)
    gradient = shard_gradient(logits, target, maxima, exp_sums, weight)
    expected = torch.nn.functional.one_hot(target, 4) - logits.softmax(-1)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_no_positions():
    logits, maxima = torch.empty(2, 0, 4), torch.empty(2, 0)
    assert shard_exp_sums(logits, maxima).shape == (2, 0)
    target = torch.empty(2, 0, dtype=torch.int64)
    assert shard_gradient(logits, target, maxima, maxima, maxima).shape == (2, 0, 4)
