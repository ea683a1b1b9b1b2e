"""SIGTERM to one rank while replicas generate at different speeds."""

import os
import signal
from pathlib import Path

import pytest
from megatron.core import parallel_state

from nemo_aligner.utils.termination import StopRequested
from tests.distributed.launch import run_ranks
from tests.fake_trainer import FakeModel, make_trainer


class UnequalModel(FakeModel):
    """Generates on rank 1 for much longer than on rank 0; one of them may get SIGTERM in its second batch."""

    def __init__(self, rank: int, is_asked: bool):
        super().__init__()
        self.num_checks = 1 + 8 * rank
        self.is_asked = is_asked

    def infer(self, batch):
        if self.is_asked and len(self.requests) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().infer(batch)


def train(rank: int, folder: str) -> dict:
    """Rank that gets SIGTERM, if any -> what this rank sees of the run."""
    parallel_state.initialize_model_parallel()
    return {asked: train_once(rank, Path(folder, str(asked)), rank == asked) for asked in (None, 0, 1)}


def train_once(rank: int, folder: Path, is_asked: bool) -> dict:
    model, stopped = UnequalModel(rank, is_asked), ""
    settings = {"g": 8, "gbs": 2, "val_prompts": ((5,), (6,)), "num_val": 2, "prompts": [(n,) for n in range(1, 9)]}
    trainer = make_trainer(model=model, rollout_dir=folder, val_check_interval=1, **settings)
    try:
        trainer.fit()
    except StopRequested as stop:
        stopped = str(stop)
    return {"step": trainer.step, "generated": len(model.requests), "stopped": stopped}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(train, 2, str(tmp_path_factory.mktemp("termination")), timeout_s=60)


def test_replicas_meet_as_often_as_each_likes_while_they_generate(ranks):
    # four batches, plus one for validation
    assert [found[None] for found in ranks] == [{"step": 1, "generated": 5, "stopped": ""}] * 2


@pytest.mark.parametrize("asked", [0, 1])
def test_all_ranks_stop_at_the_same_meeting_and_keep_what_is_complete(ranks, asked):
    for rank, found in enumerate(ranks):
        assert found[asked]["step"] == 0
        assert f"unscored_train_step0_rank{rank}.pt" in found[asked]["stopped"]
    # rank 0 has finished all its batches when rank 1 is in its first
    generated = [found[asked]["generated"] for found in ranks]
    assert generated == ([2, 0] if asked == 0 else [4, 2])
