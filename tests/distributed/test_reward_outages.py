"""The reward client against a real Triton server that is killed, hangs, refuses, errs, or loses answers."""

import time

import pytest
import torch
from megatron.core import parallel_state
from omegaconf import OmegaConf

from nemo_aligner.models.nlp.gpt.reward_critic_clients import RemoteGPTRMClient
from nemo_aligner.servers import http_communicator
from nemo_aligner.utils.server_utils import RewardError
from tests.hurtable_server import DroppingProxy, HurtableServer, skip_if_triton_cannot_run
from tests.ports import free_port


@pytest.fixture(scope="module", autouse=True)
def one_process():
    skip_if_triton_cannot_run()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def connect():
    clients = []

    def connect(port, **patience):
        server = {"name": "reward_model", "ip": "localhost", "port": port}
        clients.append(RemoteGPTRMClient(OmegaConf.create({"reward_model": server, "pad_to_length": None, **patience})))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def rollouts(number: int) -> dict:
    """Two rollouts whose rewards are `number` and `number` + 1, modulo 7."""
    tokens = torch.tensor([[number, 0, 0], [number, 1, 5]])
    return {"response_tokens": tokens, "response_lengths": torch.tensor([3, 2])}


def expected(number: int) -> list[list[float]]:
    return [[number % 7], [(number + 1) % 7]]


def test_a_server_that_is_killed_and_restarted_costs_no_rollout(connect, tmp_path):
    with HurtableServer(tmp_path / "log", seconds_per_request=0.7) as server:
        client = connect(server.port, retry_deadline_s=120)
        futures = [client.infer_rm(rollouts(number)) for number in range(30)]
        time.sleep(1.0)
        server.kill()
        unanswered = [future for future in futures if not future.wait(0)]
        futures += [client.infer_rm(rollouts(number)) for number in range(30, 35)]
        time.sleep(4.0)
        server.start()
        assert 0 < len(unanswered) < 30, "the server was faster or slower than the test"
        assert [future.result().tolist() for future in futures] == [expected(number) for number in range(35)]


def test_answers_that_get_lost_are_asked_for_again(connect, tmp_path):
    with HurtableServer(tmp_path / "log") as server:
        proxy = DroppingProxy(server.port)
        client = connect(proxy.port)
        futures = [client.infer_rm(rollouts(number)) for number in range(50)]
        assert [future.result().tolist() for future in futures] == [expected(number) for number in range(50)]
        assert proxy.num_dropped >= 5 and proxy.num_requests == 50 + proxy.num_dropped
        proxy.close()


@pytest.mark.parametrize(
    "illness, answer",
    [
        ("error", "the server's error 500, RuntimeError: out of order"),
        ("nan", "ValueError: the reward of rollout 1 of 2 is nan"),
        ("wrong shape", "ValueError: rewards are float32 [2, 2]; one number for each rollout is wanted, [2, 1]"),
        ("no rewards", "ValueError: the reply has no rewards, but ['values']"),
    ],
)
def test_bad_answers_end_the_run_after_a_few_attempts(connect, tmp_path, monkeypatch, illness, answer):
    monkeypatch.setattr(http_communicator, "MAX_BAD_ANSWERS", 3)
    retries = []
    monkeypatch.setattr(http_communicator.logging, "warning", retries.append)
    with HurtableServer(tmp_path / "log", illness) as server:
        client = connect(server.port)
        with pytest.raises(RewardError) as caught:
            client.infer_rm(rollouts(1)).result()
    start = f"the server of 'reward_model' at http://localhost:{server.port} gave no usable answer to a request "
    message = str(caught.value)
    assert message.startswith(start + "(tokens int64 [2, 3], sequence_lengths int64 [2, 1]) in ")
    assert message.endswith(f"s; last: {answer}")
    assert len(retries) == 2 and answer in retries[0] and "attempt 1 failed, next one in" in retries[0]


def test_a_server_that_hangs_is_given_up_at_the_deadline(connect, tmp_path):
    with HurtableServer(tmp_path / "log", "slow") as server:
        client = connect(server.port, request_timeout_s=1, retry_deadline_s=5)
        started = time.monotonic()
        with pytest.raises(RewardError, match=r"last: no answer in [12] s$"):
            client.infer_rm(rollouts(1)).result()
        assert 3 < time.monotonic() - started < 10


def test_a_server_that_goes_away_for_good_is_given_up_at_the_deadline(connect, tmp_path):
    with HurtableServer(tmp_path / "log") as server:
        client = connect(server.port, retry_deadline_s=4)
        server.kill()
        started = time.monotonic()
        with pytest.raises(RewardError, match=r"last: no server answers there, or it has not loaded the model$"):
            client.infer_rm(rollouts(1)).result()
        assert 2 < time.monotonic() - started < 10


def test_a_server_that_never_came_is_named(connect):
    port = free_port()
    with pytest.raises(RewardError, match=rf"no model 'reward_model' at http://localhost:{port} after 2 s; start"):
        connect(port, wait_for_server_s=2)
