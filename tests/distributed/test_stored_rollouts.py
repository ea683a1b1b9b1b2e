"""Two replicas, one of which has lost the rollouts that an earlier start could not score, still continue together."""

from pathlib import Path

import pytest
from megatron.core import parallel_state

from nemo_aligner.utils.server_utils import RewardError
from tests.distributed.launch import run_ranks
from tests.fake_trainer import SecondTokenReward, make_trainer
from tests.unit.test_rs_interruptions import FlakyReward


def fail_and_start_again(rank: int, folder: str, split: str) -> dict:
    """The first start fails in step 0's rollouts or validation; replica 1 then loses its file."""
    parallel_state.initialize_model_parallel()
    settings = {"g": 4, "gbs": 2, "rollout_dir": Path(folder), "val_check_interval": 1, "save_interval": 1}
    settings |= {"val_prompts": ((5,), (6,)), "num_val": 2}
    first = make_trainer(rm=FlakyReward({1} if split == "train" else {2}), **settings)
    with pytest.raises(RewardError):
        first.fit()
    if rank == 1:
        (Path(folder) / f"unscored_{split}_step{first.step}_rank1.pt").unlink()
    second = make_trainer(rm=SecondTokenReward(), **settings)
    if first.ckpt_callback.saved:
        saved, _ = first.ckpt_callback.saved[-1]
        second.load_state_dict({key: int(saved[key]) for key in second.state_dict()})
    second.fit()
    return {"step": second.step, "generated": len(second.model.requests), "val": second.logger.of("val_rollouts/")}


@pytest.mark.parametrize("split, generated", [("train", [1, 3]), ("val", [0, 1])])
def test_a_replica_that_lost_its_file_rolls_out_anew(tmp_path, split, generated):
    # 4 prompts per step: two rollout micro-batches per replica, plus one for validation
    ranks = run_ranks(fail_and_start_again, 2, str(tmp_path), split, timeout_s=60)
    assert [found["step"] for found in ranks] == [1, 1]
    assert [found["generated"] for found in ranks] == generated
    assert ranks[0]["val"] == ranks[1]["val"] and len(ranks[0]["val"]) == 1
    assert not list(tmp_path.glob("unscored_*"))
