"""A reward server that some replicas can reach only later, or never: either all replicas continue or none."""

import pytest
from megatron.core import parallel_state
from omegaconf import OmegaConf

from nemo_aligner.models.nlp.gpt.reward_critic_clients import RemoteGPTRMClient
from nemo_aligner.servers.http_communicator import HTTPCommunicator
from nemo_aligner.utils.server_utils import RewardError
from tests.distributed.launch import run_ranks


def connect(rank: int, times_refused: int) -> tuple[int, str | None]:
    """Replica 1 is refused `times_refused` times; returns how often this replica asked, and the error if any."""
    parallel_state.initialize_model_parallel()
    asked = []

    def is_ready(name, ip, port, wait_s):
        asked.append(wait_s)
        return rank == 0 or len(asked) > times_refused

    HTTPCommunicator.is_ready = staticmethod(is_ready)
    server = {"name": "reward_model", "ip": "localhost", "port": 5555}
    cfg = {"reward_model": server, "pad_to_length": None, "wait_for_server_s": 1 if times_refused > 9 else 60}
    try:
        RemoteGPTRMClient(OmegaConf.create(cfg)).close()
    except RewardError as error:
        return len(asked), str(error)
    return len(asked), None


@pytest.mark.parametrize("times_refused", [3, 10**9])
def test_all_replicas_connect_or_none(times_refused):
    (asked_by_0, told_0), (asked_by_1, told_1) = run_ranks(connect, 2, times_refused, timeout_s=60)
    assert told_0 == told_1 and asked_by_0 < asked_by_1
    if times_refused == 3:
        assert told_0 is None
    else:
        assert "no model 'reward_model' at http://localhost:5555 after 1 s" in told_0
