"""Rewards and failures reach every rank of a replica; they reach other replicas only if the job is to stop.

Four ranks, two replicas of two.
"""

import threading
from functools import partial

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from nemo_aligner.models.nlp.gpt.reward_critic_clients import RMFutureResult, get_future_result
from nemo_aligner.rewards.python_reward import PythonRewardModel
from nemo_aligner.utils.server_utils import RewardError, fail_on_all_ranks, share_from_source
from tests.distributed.launch import run_ranks


class LetterTokenizer:
    """Id 1 is "a", 2 is "b", ...; id 0 ends a text."""

    eos_id = 0

    def ids_to_text(self, ids):
        return "".join(chr(ord("a") + i - 1) for i in ids)


class Done:
    """A future that is already done."""

    def __init__(self, outcome):
        self.outcome = outcome

    def result(self):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def outcome_of(function):
    """A call's result, or the message and the cause's type if it raises `RewardError`."""
    try:
        return function()
    except RewardError as error:
        return str(error), type(error.__cause__).__name__


def rollouts(replica):
    tokens = torch.tensor([[1, 2, 3, 0], [2, 4, 4, 4]])
    lengths = {"response_lengths": torch.tensor([4, 4]), "prompt_lengths": torch.tensor([1, 1])}
    records = [{"replica": replica, "bonus": 10}, {"replica": replica, "bonus": 20}]
    return {"response_tokens": tokens, "prompt_tokens": tokens[:, :1], "records": records, **lengths}


def python_rewards(rank, source, replica):
    calls, released = [], threading.Event()

    def reward(prompts, responses, *, records, **columns):
        released.wait(60)
        calls.append((prompts, responses, threading.current_thread() is threading.main_thread()))
        return [record["bonus"] + record["replica"] + len(calls) for record in records]

    model = PythonRewardModel(reward, LetterTokenizer())
    batch = rollouts(replica)
    futures = [model.infer_rm(batch), model.infer_rm(batch)]
    batch["response_tokens"].fill_(9)
    pending = len(calls) == 0
    released.set()
    rewards = [future.result() for future in futures]
    model.close()
    return {
        "pending": pending,
        "calls": calls,
        "rewards": [reward.tolist() for reward in rewards],
        "dtypes": {str(reward.dtype) for reward in rewards},
    }


def python_failure(rank, source, replica):
    def reward(prompts, responses, *, records, **columns):
        return [record["bonus"] if record["replica"] == 0 else float("nan") for record in records]

    model = PythonRewardModel(reward, LetterTokenizer())
    return outcome_of(lambda: model.infer_rm(rollouts(replica)).result().tolist())


def missing_records(rank, source, replica):
    batch = rollouts(replica)
    del batch["records"]
    model = PythonRewardModel(lambda *args, **columns: [0.0, 0.0], LetterTokenizer())
    return outcome_of(lambda: model.infer_rm(batch).result().tolist())


def remote_rewards(rank, source, replica):
    def reply(outcome):
        return Done(outcome) if rank == source else None

    rewards = np.array([[0.5], [replica]], dtype=np.float32)
    counts = np.array([3, 4], dtype=np.int64)
    result = RMFutureResult(reply({"rewards": rewards})).result()
    several = get_future_result(reply({"rewards": rewards, "counts": counts}), "counts", "rewards")
    failure = ConnectionError("refused\nby the server") if replica == 1 else {"rewards": rewards}
    return {
        "rewards": (result.tolist(), str(result.dtype)),
        "several": [(tensor.tolist(), str(tensor.dtype)) for tensor in several],
        "failure": outcome_of(lambda: RMFutureResult(reply(failure)).result().tolist()),
        "missing": outcome_of(lambda: get_future_result(reply({"values": rewards}), "rewards")),
    }


def failures_of_the_job(rank, source, replica):
    def compute(*failing):
        if replica in failing:
            raise RewardError(f"no reward in replica {replica}")
        return rank

    calls = (partial(compute), partial(compute, 1), partial(compute, 0, 1))
    return [outcome_of(partial(fail_on_all_ranks, call)) for call in calls]


def one_rank(rank):
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    source, replica = rank // 2 * 2, rank // 2
    cases = (python_rewards, python_failure, missing_records, remote_rewards, failures_of_the_job)
    found = {case.__name__: case(rank, source, replica) for case in cases}
    found["shared"] = share_from_source(lambda: f"from {rank}")
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(one_rank, 4)


def test_only_the_source_rank_computes(ranks):
    assert [found["shared"] for found in ranks] == ["from 0", "from 0", "from 2", "from 2"]
    assert [len(found["python_rewards"]["calls"]) for found in ranks] == [2, 0, 2, 0]


def test_scoring_runs_behind_the_callers_back_on_a_copy(ranks):
    source = ranks[0]["python_rewards"]
    assert source["pending"]
    assert source["calls"] == [(["a", "b"], ["bc", "ddd"], False)] * 2


def test_every_rank_gets_its_replicas_rewards_in_the_order_of_the_calls(ranks):
    for rank, found in enumerate(ranks):
        replica = rank // 2
        first, second = [[11.0 + replica], [21.0 + replica]], [[12.0 + replica], [22.0 + replica]]
        assert found["python_rewards"]["rewards"] == [first, second]
        assert found["python_rewards"]["dtypes"] == {"torch.float32"}


def test_a_bad_reward_stops_its_whole_replica_with_one_message(ranks):
    assert ranks[0]["python_failure"] == ranks[1]["python_failure"] == [[10.0], [20.0]]
    message = (
        "the reward function returned nan, which is not a finite float32, for row 0 of 2, prompt 'a', "
        "record {'replica': 1, 'bonus': 10}"
    )
    assert [found["python_failure"][0] for found in ranks[2:]] == [message, message]


def test_rollouts_without_records_fail_on_every_rank(ranks):
    assert [found["missing_records"][0] for found in ranks] == ["KeyError: 'records'"] * 4


def test_a_reply_is_spread_over_the_replica(ranks):
    for rank, found in enumerate(ranks):
        rewards = ([[0.5], [float(rank // 2)]], "torch.float32")
        assert found["remote_rewards"]["rewards"] == rewards
        assert found["remote_rewards"]["several"] == [([3, 4], "torch.int64"), rewards]


def test_a_failed_request_stops_its_whole_replica(ranks):
    message = "ConnectionError: refused by the server"
    failures = [found["remote_rewards"]["failure"] for found in ranks]
    assert failures[:2] == [[[0.5], [0.0]]] * 2
    assert failures[2:] == [(message, "ConnectionError"), (message, "NoneType")]


def test_a_failure_in_one_replica_stops_the_job_with_its_own_message_where_there_is_one(ranks):
    assert [found["failures_of_the_job"][0] for found in ranks] == [0, 1, 2, 3]
    assert [found["failures_of_the_job"][1][0] for found in ranks] == ["no reward in replica 1"] * 4
    own = [f"no reward in replica {replica}" for replica in (0, 0, 1, 1)]
    assert [found["failures_of_the_job"][2][0] for found in ranks] == own


def test_a_reply_without_the_key_names_what_it_has(ranks):
    message = "ValueError: the server's reply lacks ['rewards']; it has ['values']"
    assert [found["remote_rewards"]["missing"][0] for found in ranks] == [message] * 4
