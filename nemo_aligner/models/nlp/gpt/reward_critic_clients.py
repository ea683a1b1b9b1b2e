"""The trainer's side of a remote reward model.

Only the source rank of each replica talks to the server; answers and failures are spread over the replica, so that no
rank is left waiting for another. Symbols: B rollouts, S token width.
"""

import re
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from pytriton.client.exceptions import PyTritonClientInferenceServerError

from nemo_aligner.compat.device import current_device
from nemo_aligner.servers.http_communicator import HTTPCommunicator, no_answer
from nemo_aligner.utils.server_utils import FutureResult, RewardError, is_replica_source, one_line, share_from_source

# While the server comes up, the other ranks of a replica wait in one collective after the other, each no longer than
# this: their process group gives up on a single one after some minutes.
CONNECT_SLICE_S = 60.0


def get_future_result(future: Any, *keys: str) -> torch.Tensor | list[torch.Tensor]:
    """Wait for a reply and give it to the whole replica. Collective over the replica.

    Args:
        future: on the source rank an object whose `result()` is a dict of arrays, None on the others.
        keys: which of the arrays are wanted.

    Returns:
        The array as a tensor on this process's device, dtype kept; a list in the order of `keys` if there are several.

    Raises:
        RewardError: on every rank of the replica, if the request failed or a key is missing from the reply.
    """
    arrays = share_from_source(lambda: _pick(_reply(future), keys))
    tensors = [torch.from_numpy(array).to(current_device()) for array in arrays]
    return tensors[0] if len(tensors) == 1 else tensors


def _reply(future: Any) -> dict[str, np.ndarray]:
    try:
        return future.result()
    except PyTritonClientInferenceServerError as error:
        raise RewardError(f"the reward server failed: {_last_error(str(error))}") from error


def _last_error(server_message: str) -> str:
    """The line of a server's answer, tracebacks and all, that says what went wrong."""
    errors = re.findall(r"^[\w.]+(?:Error|Exception): .*$", server_message, flags=re.MULTILINE)
    return errors[-1] if errors else one_line(server_message)


def _pick(reply: dict[str, np.ndarray], keys: tuple[str, ...]) -> list[np.ndarray]:
    missing = [key for key in keys if key not in reply]
    if missing:
        raise ValueError(f"the server's reply lacks {missing}; it has {sorted(reply)}")
    return [np.array(reply[key]) for key in keys]


class RMFutureResult(FutureResult):
    """Rewards under way."""

    def __init__(self, rm_future: Any, num_rows: int | None = None):
        """
        Args:
            rm_future: what `HTTPCommunicator.send_data_to_server` returned; None on other ranks than the source.
            num_rows: B, if the reply is to be checked.
        """
        self.rm_future = rm_future
        self.num_rows = num_rows

    def result(self) -> torch.Tensor:
        """Wait for the rewards. Collective over the replica, in the order of the `infer_rm` calls.

        Returns:
            float32 [B, 1] on this process's device, the same on every rank of the replica.

        Raises:
            RewardError: on every rank of the replica, with the same message.
        """
        rewards = get_future_result(self.rm_future, "rewards").float()
        if self.num_rows is not None and rewards.shape != (self.num_rows, 1):
            raise RewardError(
                f"the reward server sent rewards of shape {tuple(rewards.shape)} for {self.num_rows} rollouts; it has "
                "to send one number for each, [B, 1]"
            )
        return rewards


@dataclass
class RemoteGPTRMClient:
    """Sends rollouts to the reward server. Constructing it waits until the server is up; collective over the replica.

    `cfg` is the section `remote_rm`: `reward_model.{name, ip, port}` and `pad_to_length`.
    """

    cfg: DictConfig

    def __post_init__(self):
        self.pad_to_length = self.cfg.pad_to_length
        self.communicator = HTTPCommunicator()
        deadline = time.monotonic() + self.communicator.init_timeout_s
        while not share_from_source(lambda: self._connect(deadline)):
            pass

    def _connect(self, deadline: float) -> bool:
        server = self.cfg.reward_model
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError(no_answer(server.name, server.ip, server.port, self.communicator.init_timeout_s))
        if not HTTPCommunicator.is_ready(server.name, server.ip, server.port, min(CONNECT_SLICE_S, remaining)):
            return False
        self.communicator.add_server_by_name(server.name, ip=server.ip, port=server.port)
        self.communicator.print_server_dict()
        return True

    def infer_rm(self, rollout_batch: dict[str, torch.Tensor]) -> RMFutureResult:
        """Request the rewards of B rollouts and return at once. Local.

        Args:
            rollout_batch: `response_tokens` [B, S] int64 and `response_lengths` [B] int64, on any device.

        Raises:
            AssertionError: S exceeds `pad_to_length`; on every rank, as all ranks of a replica hold the same tokens.
        """
        tokens = rollout_batch["response_tokens"]
        num_rows, width = tokens.shape
        if self.pad_to_length is not None:
            assert width <= self.pad_to_length, (
                f"rollouts are {width} tokens wide, more than remote_rm.pad_to_length={self.pad_to_length}"
            )
        if not is_replica_source():
            return RMFutureResult(None, num_rows)
        if self.pad_to_length is not None:
            tokens = torch.nn.functional.pad(tokens, (0, self.pad_to_length - width))
        request = {
            "tokens": tokens.cpu().numpy().astype(np.int64),
            "sequence_lengths": rollout_batch["response_lengths"].unsqueeze(-1).cpu().numpy().astype(np.int64),
        }
        return RMFutureResult(self.communicator.send_data_to_server(self.cfg.reward_model.name, request), num_rows)

    def close(self) -> None:
        """Close the connections. Local; nothing happens on ranks that have none."""
        self.communicator.close()
