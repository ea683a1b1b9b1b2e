"""Rows are exchanged between two replicas: every optimizer batch keeps its rows, with tokens spread evenly."""

import torch

from nemo_aligner.algorithms.balancing import balance_over_replicas
from nemo_aligner.testing.utils import Utils
from nemo_aligner.utils.masks import trained_lengths
from tests.distributed.launch import run_ranks
from tests.fake_trainer import EOS, make_trainer

LONG = (0, 3, 4, 7)  # prompts with long answers: in prompt order, one replica would get both of a batch's
BATCH = 4  # rows of a replica in an optimizer batch
LENGTHS = ([20, 19, 18, 17, 3, 3, 3, 3], [2, 3, 4, 5, 30, 3, 0, 30])  # the first replica's and the second's


def test_balancing():
    ranks = run_ranks(rank_main, 2)
    check_exchange([exchanged for exchanged, *_ in ranks])
    check_trainer(*zip(*[trained for _, *trained, _ in ranks], strict=True))
    # the second step is taken by both replicas, the third by neither
    assert [num_steps for *_, num_steps in ranks] == [2, 2]


def rank_main(rank: int):
    Utils.initialize_model_parallel()
    trained = [trained_by_the_trainer(normalization) for normalization in ("global_batch", "micro_batch")]
    return exchanged_rows(rank), *trained, num_steps_taken(rank)


def check_exchange(ranks) -> None:
    for batch in range(2):
        before = [row for own in LENGTHS for row in own[batch * BATCH : (batch + 1) * BATCH]]
        after = [rows[batch] for rows in ranks]
        assert sorted(length for rows in after for length, _ in rows) == sorted(before)
        # no row occurs twice: each carries its number among all rows in its tokens
        numbers = sorted(number for rows in after for _, number in rows)
        assert numbers == [rank * 8 + batch * BATCH + row for rank in range(2) for row in range(BATCH)]
    # by hand: 20 + 17 + 5 + 2 and 19 + 18 + 4 + 3; then 30 + 3 + 3 + 3 and 30 + 3 + 3 + 0
    assert [sum(length for length, _ in rows[0]) for rows in ranks] == [44, 44]
    assert sorted(sum(length for length, _ in rows[1]) for rows in ranks) == [36, 39]


def check_trainer(balanced, in_order) -> None:
    for batch in range(2):
        members = [sorted(ranks[0][batch] + ranks[1][batch]) for ranks in (balanced, in_order)]
        assert members[0] == members[1] and len(members[0]) == 4
        assert [sorted(tokens for _, tokens in rank[batch]) for rank in balanced] == [[2, 13], [2, 13]]
        assert sorted(sorted(tokens for _, tokens in rank[batch]) for rank in in_order) == [[2, 2], [13, 13]]


def exchanged_rows(rank: int) -> list[list[tuple[int, int]]]:
    """(length, number) of this rank's rows in each batch, after checking the other columns that came with them."""
    width, prompt_width = 32, 3 + rank
    mask, tokens = torch.zeros(8, width - 1), torch.full((8, width), EOS)
    for row, length in enumerate(LENGTHS[rank]):
        mask[row, :length] = 1
        tokens[row, 0] = 100 + rank * 8 + row
    prompts = tokens[:, :1].expand(8, prompt_width).clone()
    columns = {"response_tokens": tokens, "mask": mask, "prompt_tokens": prompts, "number": tokens[:, 0]}
    after = balance_over_replicas(columns, BATCH, pad_value=EOS)
    assert {key: (value.shape, value.dtype) for key, value in after.items()} == {
        "response_tokens": ((8, 32), torch.int64),
        "mask": ((8, 31), torch.float32),
        "prompt_tokens": ((8, 4), torch.int64),
        "number": ((8,), torch.int64),
    }
    assert torch.equal(after["number"], after["response_tokens"][:, 0])
    lengths = trained_lengths(after["mask"]).tolist()
    for number, prompt, own_mask, length in zip(
        after["response_tokens"][:, 0].tolist(), after["prompt_tokens"].tolist(), after["mask"], lengths, strict=True
    ):
        was_on = (number - 100) // 8
        assert prompt == [number] * 3 + [number if was_on else EOS]
        assert LENGTHS[was_on][(number - 100) % 8] == length and own_mask.sum() == length
    rows = list(zip(lengths, (after["response_tokens"][:, 0] - 100).tolist(), strict=True))
    return [rows[:BATCH], rows[BATCH:]]


def trained_by_the_trainer(loss_normalization: str) -> list[list[tuple[int, int]]]:
    """(prompt, number of tokens trained on) of the rows that this rank's model got in each optimizer batch."""
    answers = {index: ([50] * (12 if index in LONG else 1) + [EOS],) for index in range(8)}
    trainer = make_trainer(
        prompts=tuple((1 + index,) for index in range(8)), n=1, g=8, gbs=4, num_val=2, answers=answers,
        loss_normalization=loss_normalization,
    )  # fmt: skip
    trainer.fit()
    return [
        list(zip(batch["response_tokens"][:, 0].tolist(), batch["mask"].sum(1).int().tolist(), strict=True))
        for batch in trainer.model.batches
    ]


def num_steps_taken(rank: int) -> int:
    """Out of three steps: both replicas have tokens in the first, one of them in the second, none in the third."""
    trainer = make_trainer(n=1, g=4, gbs=4, num_val=2)
    trainer.run_training(iter([{"mask": torch.full((2, 5), float(has_tokens))} for has_tokens in (1, rank, 0)]))
    return trainer.scheduler.last_epoch
