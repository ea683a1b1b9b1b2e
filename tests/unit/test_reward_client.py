"""The reward client, alone and with a real Triton server on the loopback interface."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from omegaconf import OmegaConf

from nemo_aligner.models.nlp.gpt import reward_critic_clients
from nemo_aligner.models.nlp.gpt.reward_critic_clients import RemoteGPTRMClient
from nemo_aligner.servers import http_communicator
from nemo_aligner.servers.http_communicator import HTTPCommunicator
from nemo_aligner.utils.server_utils import RewardError
from tests.hurtable_server import skip_if_triton_cannot_run
from tests.ports import free_port

TOKENS = torch.tensor([[5, 6, 7], [8, 9, 0]])
LENGTHS = torch.tensor([3, 2])
ROLLOUTS = {"response_tokens": TOKENS, "response_lengths": LENGTHS}


def serve(port):
    """A reward server in one process: a row's reward is the sum of its ids, and id 66 makes the forward pass fail."""
    from nemo_aligner.algorithms.reward_server import RewardModelServer
    from nemo_aligner.compat import cpu

    cpu.enable()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()

    def infer_fn(inputs):
        tokens, lengths = inputs
        if (tokens == 66).any():
            raise MemoryError("no room")
        content = torch.arange(tokens.shape[1]) < lengths[:, None]
        return (tokens * content).sum(dim=1, keepdim=True).float()

    def tokenize(sentences):
        return torch.ones(len(sentences), 9, dtype=torch.int64), torch.tensor([len(text) for text in sentences])

    RewardModelServer(infer_fn, tokenize, "reward_model", port, 4, 4, None, vocab_size=100).run_server()


@pytest.fixture(scope="module", autouse=True)
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def python(code, **options):
    """Start a Python process that runs `code`, with the tests importable."""
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, text=True, **options)


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Port of a running reward server."""
    skip_if_triton_cannot_run()
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = python(
            f"from tests.unit.test_reward_client import serve; serve({port})", stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while not HTTPCommunicator.is_ready("reward_model", "localhost", port, wait_s=2):
                assert process.poll() is None, f"the server ended:\n{log.read_text()[-3000:]}"
            yield port
        finally:
            process.terminate()
            process.wait()


@pytest.fixture
def communicator(port):
    made = HTTPCommunicator.create_http_communicator_from_dict({"reward_model": ("localhost", port)})
    yield made
    made.close()
    assert made.connections == {}


def client_config(port, pad_to_length=None):
    return OmegaConf.create(
        {"reward_model": {"name": "reward_model", "ip": "localhost", "port": port}, "pad_to_length": pad_to_length}
    )


@pytest.fixture
def client(port):
    made = RemoteGPTRMClient(client_config(port, pad_to_length=8))
    yield made
    made.close()


def request(tokens, lengths):
    return {"tokens": np.array(tokens), "sequence_lengths": np.array(lengths)}


def test_rewards_come_back_in_the_order_of_the_requests(client):
    batches = [{**ROLLOUTS, "response_tokens": TOKENS + step} for step in range(5)]
    futures = [client.infer_rm(batch) for batch in batches]
    rewards = [future.result() for future in futures]
    assert all(reward.dtype == torch.float32 for reward in rewards)
    assert [reward.tolist() for reward in rewards] == [[[18.0 + 3 * step], [17.0 + 2 * step]] for step in range(5)]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(http_communicator, "MAX_BAD_ANSWERS", 1)


def test_a_refused_request_says_why_in_one_line_and_the_next_is_answered(client, impatient):
    with pytest.raises(RewardError) as caught:
        client.infer_rm({**ROLLOUTS, "response_lengths": LENGTHS + 6}).result()
    assert str(caught.value).endswith("sequence_lengths must lie in 1..8 (the width of tokens), got 8..9")
    assert "\n" not in str(caught.value)
    with pytest.raises(RewardError, match=r"tokens holds the id 107; the vocabulary has 100 entries$"):
        client.infer_rm({**ROLLOUTS, "response_tokens": TOKENS + 98}).result()
    assert client.infer_rm(ROLLOUTS).result().tolist() == [[18.0], [17.0]]


def test_a_forward_pass_that_fails_is_reported_and_survived(client, impatient):
    with pytest.raises(RewardError, match=r"last: the server's error 500, MemoryError: no room$"):
        client.infer_rm({**ROLLOUTS, "response_tokens": TOKENS + 57}).result()
    assert client.infer_rm(ROLLOUTS).result().tolist() == [[18.0], [17.0]]


def test_batches_samples_and_sentences(communicator):
    send = communicator.send_data_to_server
    assert send("reward_model", request([[5, 6], [7, 0]], [[2], [1]])).result()["rewards"].tolist() == [[11.0], [7.0]]
    assert send("reward_model", request([5, 6], [2]), batching=False).result()["rewards"].tolist() == [11.0]
    sentences = {"sentences": np.array([[b"abc"], ["äb".encode()]])}
    assert send("reward_model", sentences).result()["rewards"].tolist() == [[3.0], [2.0]]


def test_requests_of_different_kinds_and_widths_at_once(communicator):
    requests = [request([[1] * width], [[width]]) for width in (2, 3, 2, 5)] + [{"sentences": np.array([[b"abcd"]])}]
    futures = [communicator.send_data_to_server("reward_model", each) for each in requests]
    assert [future.result()["rewards"].tolist() for future in futures] == [[[2.0]], [[3.0]], [[2.0]], [[5.0]], [[4.0]]]


def test_a_process_that_forgets_to_close_its_client_ends_all_the_same(port):
    process = python(
        f"""
import numpy
from nemo_aligner.servers.http_communicator import HTTPCommunicator
communicator = HTTPCommunicator.create_http_communicator_from_dict({{"reward_model": ("localhost", {port})}})
communicator.send_data_to_server("reward_model", {{"sentences": numpy.array([[b"a"]])}}).result()
raise SystemExit(7)
"""
    )
    try:
        assert process.wait(timeout=120) == 7
    finally:
        process.kill()


def test_a_server_that_is_not_there_is_named():
    port = free_port()
    communicator = HTTPCommunicator(init_timeout_s=0.1)
    with pytest.raises(TimeoutError) as caught:
        communicator.add_server_by_name("judge", "localhost", port)
    assert f"no model 'judge' at http://localhost:{port} after 0 s; start the server" in str(caught.value)
    assert communicator.connections == {}


def test_a_server_that_is_too_slow_gets_twice_as_long_each_time(monkeypatch):
    waits = []

    def request(self, data, batching, further, check, timeout_s):
        waits.append(timeout_s)
        if timeout_s < 8:
            raise http_communicator.TooSlow(f"no answer in {timeout_s:.0f} s")
        return {"rewards": np.ones((1, 1))}

    monkeypatch.setattr(http_communicator.PersistentClient, "_request", request)
    monkeypatch.setattr(http_communicator.tenacity, "sleep_using_event", lambda event: lambda seconds: None)
    client = http_communicator.PersistentClient("http://localhost:1", "judge", 1.0, 100.0)
    assert client.send({}, True, {}, lambda reply: None).result()["rewards"].tolist() == [[1.0]]
    assert waits == [1.0, 2.0, 4.0, 8.0]


class Recorder:
    """A stand-in for the network: ready when asked for the third time; records what is sent."""

    def __init__(self, monkeypatch, ready_after=3):
        self.asked, self.sent, self.ready_after = [], [], ready_after
        monkeypatch.setattr(HTTPCommunicator, "is_ready", staticmethod(self.is_ready))
        monkeypatch.setattr(HTTPCommunicator, "send_data_to_server", self.send)

    def is_ready(self, name, ip, port, wait_s):
        self.asked.append((name, ip, port, wait_s))
        return len(self.asked) >= self.ready_after

    def send(self, name, data, further, check):
        self.sent.append((name, data, further, check))


def test_constructing_a_client_waits_for_the_server_in_slices(monkeypatch):
    recorder = Recorder(monkeypatch)
    client = RemoteGPTRMClient(client_config(5555))
    waits = [wait for *server, wait in recorder.asked if server == ["reward_model", "localhost", 5555]]
    assert waits[:3] == [reward_critic_clients.CONNECT_SLICE_S] * 3
    assert list(client.communicator.connections) == ["reward_model"]
    client.close()


def test_constructing_a_client_gives_up_in_the_end(monkeypatch):
    recorder = Recorder(monkeypatch, ready_after=99)
    clock = iter([0.0, 0.0, 5990.0, 6001.0])
    monkeypatch.setattr(reward_critic_clients.time, "monotonic", lambda: next(clock))
    with pytest.raises(RewardError, match=r"no model 'reward_model' at http://localhost:5555 after 6000 s"):
        RemoteGPTRMClient(client_config(5555))
    assert [wait for *_, wait in recorder.asked] == [60.0, 10.0]


@pytest.mark.parametrize(
    ("pad_to_length", "tokens"),
    [
        (None, [[5, 6, 7], [8, 9, 0]]),
        (3, [[5, 6, 7], [8, 9, 0]]),
        (5, [[5, 6, 7, 0, 0], [8, 9, 0, 0, 0]]),
    ],
)
def test_what_is_sent(monkeypatch, pad_to_length, tokens):
    recorder = Recorder(monkeypatch)
    more = {
        "prompt_lengths": LENGTHS - 1,
        "is_end": torch.tensor([True, False]),
        "records": [{"text": "ä", "answer": 3}, {}],
    }
    RemoteGPTRMClient(client_config(5555, pad_to_length)).infer_rm({**ROLLOUTS, **more})
    ((name, data, further, _),) = recorder.sent
    assert name == "reward_model" and set(data) == {"tokens", "sequence_lengths"}
    assert data["tokens"].tolist() == tokens and data["sequence_lengths"].tolist() == [[3], [2]]
    assert {array.dtype for array in data.values()} == {np.dtype(np.int64)}
    assert further["prompt_lengths"].tolist() == [[2], [1]] and further["prompt_lengths"].dtype == np.int64
    assert further["finished"].tolist() == [[True], [False]] and further["finished"].dtype == bool
    assert [json.loads(row[0]) for row in further["records"]] == more["records"]


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        ({"rewards": np.ones((2, 1), dtype=np.float32)}, None),
        ({"rewards": np.array([[1.0], [np.nan]]), "judged": np.array([[True], [False]])}, None),
        ({"rewards": np.array([[1.0], [np.nan]])}, "the reward of rollout 1 of 2 is nan"),
        ({"rewards": np.array([[-np.inf], [0.0]])}, "the reward of rollout 0 of 2 is -inf"),
        ({"rewards": np.array([[np.nan], [np.nan]]), "judged": np.array([[False], [True]])}, "rollout 1 of 2 is nan"),
        (
            {"rewards": np.ones((2, 2))},
            r"rewards are float64 \[2, 2\]; one number for each rollout is wanted",
        ),
        ({"rewards": np.array([["good"], ["bad"]])}, r"rewards are <U4 \[2, 1\]"),
        ({"values": np.ones((2, 1))}, r"the reply has no rewards, but \['values'\]"),
    ],
)
def test_what_may_come_back(reply, complaint):
    if complaint is None:
        reward_critic_clients.check_rewards(reply, 2)
    else:
        with pytest.raises(ValueError, match=complaint):
            reward_critic_clients.check_rewards(reply, 2)


def test_rollouts_wider_than_a_request_are_refused(monkeypatch):
    Recorder(monkeypatch)
    client = RemoteGPTRMClient(client_config(5555, pad_to_length=2))
    with pytest.raises(AssertionError, match=r"3 tokens wide, more than remote_rm\.pad_to_length=2"):
        client.infer_rm(ROLLOUTS)
