from itertools import islice

import pytest
import torch

from nemo_aligner.data.nlp.samplers import PaddingRow, RandomBatchSampler, SequentialBatchSampler

LAYOUTS = [(dp, mbs) for dp in (1, 2, 4) for mbs in (1, 2)]


def samplers(cls, total, gbs, dp, mbs, consumed=0, drop_last=True, load_gbs=False, **kwargs):
    """One sampler per rank."""
    return [
        cls(
            total_samples=total,
            consumed_samples=consumed,
            micro_batch_size=mbs,
            global_batch_size=gbs,
            data_parallel_rank=rank,
            data_parallel_size=dp,
            drop_last=drop_last,
            load_gbs=load_gbs,
            **kwargs,
        )
        for rank in range(dp)
    ]


def random_samplers(*args, seed=7, **kwargs):
    return samplers(RandomBatchSampler, *args, seed=seed, **kwargs)


def two_epochs(ranks) -> list[list[list[int]]]:
    """Batches by rank: the rest of the current epoch and the whole next one."""
    return [[batch for _ in range(2) for batch in sampler] for sampler in ranks]


def steps_of(batches_by_rank, batches_per_step) -> list[list[int]]:
    """Rows of each step over all ranks, sorted; a row that two ranks took would appear twice."""
    num_batches = len(batches_by_rank[0])
    assert all(len(batches) == num_batches for batches in batches_by_rank)
    assert num_batches % batches_per_step == 0
    return [
        sorted(
            row for batches in batches_by_rank for batch in batches[start : start + batches_per_step] for row in batch
        )
        for start in range(0, num_batches, batches_per_step)
    ]


@pytest.mark.parametrize("total", [8, 9, 15, 16, 21, 25])
def test_steps_do_not_depend_on_the_layout_and_resume_anywhere(total):
    gbs, seed = 8, 7
    steps_per_epoch = total // gbs
    orders = [torch.randperm(total, generator=torch.Generator().manual_seed(seed + e)).tolist() for e in (0, 1, 2)]
    expected = [sorted(order[s * gbs : (s + 1) * gbs]) for order in orders for s in range(steps_per_epoch)]
    assert all(len(set(step)) == gbs for step in expected)
    for dp, mbs in LAYOUTS:
        for load_gbs in (False, True):
            batches_per_step = 1 if load_gbs else gbs // (dp * mbs)
            for step in range(2 * steps_per_epoch):
                ranks = random_samplers(total, gbs, dp, mbs, consumed=step * gbs, load_gbs=load_gbs)
                end = (step // steps_per_epoch + 2) * steps_per_epoch
                batches = two_epochs(ranks)
                assert {len(batch) for rank in batches for batch in rank} == {gbs // dp if load_gbs else mbs}
                assert steps_of(batches, batches_per_step) == expected[step:end]
                assert [sampler.consumed_samples for sampler in ranks] == [end * gbs] * dp


def test_every_prompt_gets_its_turn_in_some_epoch():
    # the original NeMo-Aligner never yields the last 15 mod 8 rows
    (sampler,) = random_samplers(15, 8, dp=1, mbs=8)
    assert {row for _ in range(6) for batch in sampler for row in batch} == set(range(15))


def test_consumed_samples_is_exact_when_nobody_asks_for_more():
    (sampler,) = random_samplers(9, 4, dp=1, mbs=2)
    batches = iter(sampler)
    for expected in (2, 4, 6, 8):
        next(batches)
        assert sampler.consumed_samples == expected
    first_epoch = torch.randperm(9, generator=torch.Generator().manual_seed(7))
    second_epoch = torch.randperm(9, generator=torch.Generator().manual_seed(8))
    assert first_epoch.tolist() != second_epoch.tolist()
    assert next(iter(sampler)) == second_epoch[:2].tolist()


def test_position_may_be_set_before_an_iterator_is_made():
    (sampler,) = random_samplers(9, 4, dp=1, mbs=2, consumed=5)
    with pytest.raises(ValueError, match="consumed_samples=5 lies inside a batch of 2"):
        next(iter(sampler))
    sampler.consumed_samples = 4
    assert list(sampler) == list(random_samplers(9, 4, dp=1, mbs=2, consumed=4)[0])


def test_seed_changes_the_order():
    one, other = (list(random_samplers(16, 16, dp=1, mbs=16, seed=seed)[0]) for seed in (1, 2))
    assert one != other


@pytest.mark.parametrize(
    ("consumed", "load_gbs", "expected"), [(0, False, 8), (4, False, 6), (16, False, 8), (8, True, 1)]
)
def test_len_is_what_the_next_iterator_yields(consumed, load_gbs, expected):
    (sampler,) = random_samplers(17, 8, dp=1, mbs=2, consumed=consumed, load_gbs=load_gbs)
    assert len(sampler) == expected
    assert len(list(sampler)) == expected


def test_dataset_smaller_than_a_step_is_refused():
    with pytest.raises(ValueError, match=r"7 prompts, fewer than one step of 8.*num_rollout_samples"):
        random_samplers(7, 8, dp=1, mbs=2)


def test_random_without_drop_last_needs_one_row_runs():
    with pytest.raises(RuntimeError, match=r"1 \* 2; leave drop_last at True"):
        random_samplers(9, 4, dp=2, mbs=1, drop_last=False)
    (sampler,) = random_samplers(9, 4, dp=1, mbs=1, drop_last=False)
    assert sorted(row for batch in sampler for row in batch) == list(range(9))


@pytest.mark.parametrize("cls", [SequentialBatchSampler, lambda **kwargs: RandomBatchSampler(seed=1, **kwargs)])
def test_empty_dataset_and_negative_position_are_refused(cls):
    with pytest.raises(ValueError, match="no rows"):
        samplers(cls, 0, 4, dp=1, mbs=1)
    with pytest.raises(ValueError, match="consumed_samples=-4 is negative"):
        samplers(cls, 8, 4, dp=1, mbs=1, consumed=-4)


def test_sequential_layout_by_hand():
    ranks = samplers(SequentialBatchSampler, 8, 8, dp=2, mbs=2)
    assert [list(sampler) for sampler in ranks] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    whole_steps = samplers(SequentialBatchSampler, 8, 8, dp=2, mbs=2, load_gbs=True)
    assert [list(sampler) for sampler in whole_steps] == [[[0, 1, 4, 5]], [[2, 3, 6, 7]]]


def test_sequential_passes_are_all_alike_and_start_at_consumed_samples():
    (sampler,) = samplers(SequentialBatchSampler, 6, 4, dp=1, mbs=2, consumed=2)
    assert list(sampler) == list(sampler) == [[2, 3], [4, 5]]


def test_sequential_remainder_by_hand():
    # 5 rows in groups of 4: row 4 goes to rank 0, and rank 1 pads its turn with row 0
    first, second = (list(sampler) for sampler in samplers(SequentialBatchSampler, 5, 8, dp=2, mbs=2))
    assert (first, second) == ([[0, 1], [4]], [[2, 3], [0]])
    assert [[isinstance(row, PaddingRow) for row in batch] for batch in second] == [[False, False], [True]]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("load_gbs", [False, True])
def test_one_validation_pass_takes_every_row_once_and_no_rank_waits(load_gbs, drop_last):
    gbs = 8
    for dp, mbs in LAYOUTS:
        for total in range(1, 20):
            ranks = samplers(SequentialBatchSampler, total, gbs, dp, mbs, load_gbs=load_gbs, drop_last=drop_last)
            batches_per_pass = min(len(ranks[0]), 1 if load_gbs else gbs // (mbs * dp))
            passes = [list(islice(sampler, batches_per_pass)) for sampler in ranks]
            assert [len(one_pass) for one_pass in passes] == [batches_per_pass] * dp
            assert all(batch for one_pass in passes for batch in one_pass)
            rows = [row for one_pass in passes for batch in one_pass for row in batch]
            assert sorted(row for row in rows if not isinstance(row, PaddingRow)) == list(range(min(total, gbs)))


def test_len_of_sequential_is_what_it_yields():
    for total in range(1, 20):
        for drop_last in (False, True):
            for sampler in samplers(SequentialBatchSampler, total, 8, dp=2, mbs=2, drop_last=drop_last):
                assert len(list(sampler)) == len(sampler)


@pytest.mark.parametrize(
    ("total", "drop_last", "expected"),
    [
        (5, True, [[0, 1], [2, 3]]),  # a pass of 4 rows is full without row 4
        (5, False, [[0, 1], [2, 3], [4]]),
        (3, True, [[0, 1], [2]]),  # a pass of 4 rows needs row 2
        (3, False, [[0, 1], [2]]),
    ],
)
def test_drop_last_drops_only_what_no_pass_needs(total, drop_last, expected):
    (sampler,) = samplers(SequentialBatchSampler, total, 4, dp=1, mbs=2, drop_last=drop_last)
    assert list(sampler) == expected


def test_sequential_refuses_to_start_behind_the_last_row():
    with pytest.raises(ValueError, match="consumed_samples=8 leaves none of the 8 rows"):
        samplers(SequentialBatchSampler, 8, 4, dp=1, mbs=2, consumed=8)
