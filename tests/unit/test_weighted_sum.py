"""Several rewards: selection uses their weighted sum, and each one is recorded under its name."""

import json

import pytest
import torch
from megatron.core import parallel_state

from nemo_aligner.algorithms.rollout_metrics import global_rollout_metrics
from nemo_aligner.rewards.weighted_sum import WeightedSum
from nemo_aligner.utils.rollout_log import RolloutLog
from nemo_aligner.utils.server_utils import FutureResult, RewardError


@pytest.fixture(scope="module", autouse=True)
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


class Fixed(FutureResult):
    """A reward that returns given numbers, or fails."""

    def __init__(self, *rewards, is_there=True, failure=None):
        self.rewards, self.is_there, self.failure = rewards, is_there, failure
        self.is_closed = False
        self.description = "fixed"

    def infer_rm(self, rollouts):
        return self

    def wait(self, timeout_s):
        return self.is_there

    def result(self):
        if self.failure:
            raise RewardError(self.failure)
        return torch.tensor(self.rewards)[:, None]

    def close(self):
        self.is_closed = True


def test_rewards_are_weighted_and_added_and_each_is_kept():
    rm = WeightedSum({"helpful": (2.0, Fixed(1.0, 3.0)), "long": (-0.5, Fixed(4.0, float("nan")))})
    future = rm.infer_rm({})
    total = future.result()
    assert total.shape == (2, 1)
    assert total[0].item() == 2.0 * 1.0 - 0.5 * 4.0
    assert total[1].isnan(), "a rollout that one of the rewards could not judge is not judged"
    assert {name: part.flatten().tolist()[0] for name, part in future.parts.items()} == {"helpful": 1.0, "long": 4.0}


def test_all_are_waited_for_closed_and_named_when_they_fail():
    slow, broken = Fixed(1.0, is_there=False), Fixed(failure="no idea")
    rm = WeightedSum({"slow": (1.0, slow), "broken": (1.0, broken)})
    assert not rm.infer_rm({}).wait(0)
    with pytest.raises(RewardError, match=r"^reward 'broken': no idea$"):
        rm.infer_rm({}).result()
    rm.close()
    assert slow.is_closed and broken.is_closed


class Tokenizer:
    eos_id = 0

    def ids_to_text(self, ids):
        return " ".join(map(str, ids))


def test_each_reward_is_logged_on_its_own(tmp_path):
    nan = float("nan")
    rollouts = {
        "response_tokens": torch.tensor([[5, 1, 0], [5, 2, 0], [5, 3, 0]]),
        "response_lengths": torch.tensor([3, 3, 3]),
        "prompt_lengths": torch.tensor([1, 1, 1]),
        "prompt_index": torch.tensor([7, 7, 7]),
        "rewards": torch.tensor([1.0, nan, 4.0]),
        "reward_helpful": torch.tensor([2.0, 4.0, 6.0]),
        "reward_short": torch.tensor([-1.0, nan, -2.0]),
        "is_padding": torch.tensor([False, False, True]),
    }
    metrics = global_rollout_metrics([rollouts, rollouts])
    assert metrics["global_rewards"] == 1.0
    assert (metrics["reward_helpful"], metrics["reward_short"]) == (3.0, -1.0)
    assert metrics["fraction_unjudged"] == 0.5

    RolloutLog(tmp_path, Tokenizer()).write("train", 0, rollouts)
    lines = [json.loads(line) for line in (tmp_path / "train_rank0.jsonl").read_text().splitlines()]
    assert [(line["reward"], line["reward_helpful"], line["reward_short"]) for line in lines] == [
        (1.0, 2.0, -1.0),
        (None, 4.0, None),
    ]
