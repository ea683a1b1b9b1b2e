"""The trainer's client of a remote reward model.

Only the source rank of each replica talks to the server; replies and errors are broadcast over the replica, so that no
rank is left waiting for another. Symbols: B rollouts, S token width.
"""

import json
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from nemo_aligner.compat.device import current_device
from nemo_aligner.servers.http_communicator import (
    INIT_TIMEOUT_S,
    REQUEST_TIMEOUT_S,
    RETRY_DEADLINE_S,
    HTTPCommunicator,
    not_there,
)
from nemo_aligner.utils.server_utils import BackgroundResult, fail_on_all_ranks, is_replica_source, share_from_source

# While the server starts, the other ranks wait in a sequence of collectives of at most this duration each: a single one
# would run into the timeout of their process group after some minutes.
CONNECT_SLICE_S = 60.0


def get_future_result(future: Any, *keys: str) -> torch.Tensor | list[torch.Tensor]:
    """Wait for a reply and broadcast it to the whole replica. Collective over the replica.

    Args:
        future: on the source rank an object whose `result()` is a dict of arrays, None on the others.
        keys: names of the requested arrays.

    Returns:
        The array as a tensor on this process's device, dtype kept; a list in the order of `keys` if there are several.

    Raises:
        RewardError: on every rank of the replica, if the request failed or a key is missing from the reply.
    """
    arrays = share_from_source(lambda: _pick(future.result(), keys))
    tensors = [torch.from_numpy(array).to(current_device()) for array in arrays]
    return tensors[0] if len(tensors) == 1 else tensors


def _pick(reply: dict[str, np.ndarray], keys: tuple[str, ...]) -> list[np.ndarray]:
    missing = [key for key in keys if key not in reply]
    if missing:
        raise ValueError(f"the server's reply lacks {missing}; it has {sorted(reply)}")
    return [np.array(reply[key]) for key in keys]


class RMFutureResult(BackgroundResult):
    """Pending rewards."""

    def __init__(self, rm_future: Future | None):
        """`rm_future`: what `HTTPCommunicator.send_data_to_server` returned; None on other ranks than the source."""
        super().__init__(rm_future)

    def result(self) -> torch.Tensor:
        """Wait for the rewards. Collective over the replica, in the order of the `infer_rm` calls.

        Returns:
            float32 [B, 1] on this process's device, the same on every rank of the replica; NaN: could not be judged.

        Raises:
            RewardError: on every rank of the replica, with the same message.
        """
        return get_future_result(self.future, "rewards").float()


@dataclass
class RemoteGPTRMClient:
    """Sends rollouts to the reward server. Constructing it waits until all replicas reach it; collective over the job.

    `cfg` is the section `remote_rm`: `reward_model.{name, ip, port}`, `pad_to_length`, and, each with a default,
    `wait_for_server_s`, `request_timeout_s` and `retry_deadline_s`.
    """

    cfg: DictConfig

    def __post_init__(self):
        self.pad_to_length = self.cfg.pad_to_length
        self.description = "{name} at {ip}:{port}".format(**self.cfg.reward_model)
        self.communicator = HTTPCommunicator(
            init_timeout_s=self.cfg.get("wait_for_server_s", INIT_TIMEOUT_S),
            request_timeout_s=self.cfg.get("request_timeout_s", REQUEST_TIMEOUT_S),
            retry_deadline_s=self.cfg.get("retry_deadline_s", RETRY_DEADLINE_S),
        )
        deadline = time.monotonic() + self.communicator.init_timeout_s
        while not _is_true_on_all_ranks(fail_on_all_ranks(lambda: share_from_source(lambda: self._connect(deadline)))):
            pass

    def _connect(self, deadline: float) -> bool:
        server = self.cfg.reward_model
        if server.name in self.communicator.connections:
            return True
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError(not_there(server.name, server.ip, server.port, self.communicator.init_timeout_s))
        if not HTTPCommunicator.is_ready(server.name, server.ip, server.port, min(CONNECT_SLICE_S, remaining)):
            return False
        self.communicator.add_server_by_name(server.name, ip=server.ip, port=server.port)
        self.communicator.print_server_dict()
        return True

    def infer_rm(self, rollout_batch: dict[str, torch.Tensor]) -> RMFutureResult:
        """Request the rewards of B rollouts and return at once. Local.

        Args:
            rollout_batch: `response_tokens` [B, S] int64 and `response_lengths` [B] int64, on any device. A server that
                scores with a Python function is also sent `prompt_lengths` [B] int64, `is_end` [B] bool and `records`,
                B dicts, where present.

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
            return RMFutureResult(None)
        if self.pad_to_length is not None:
            tokens = torch.nn.functional.pad(tokens, (0, self.pad_to_length - width))
        request = {
            "tokens": tokens.cpu().numpy().astype(np.int64),
            "sequence_lengths": _column(rollout_batch["response_lengths"]),
        }
        future = self.communicator.send_data_to_server(
            self.cfg.reward_model.name,
            request,
            further=_further_inputs(rollout_batch),
            check=lambda reply: check_rewards(reply, num_rows),
        )
        return RMFutureResult(future)

    def close(self) -> None:
        """Close the connections. Local; no-op on ranks without connections."""
        self.communicator.close()


def _is_true_on_all_ranks(value: bool) -> bool:
    least = torch.tensor(value, dtype=torch.int64, device=current_device())
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return bool(least)


def check_rewards(reply: dict[str, np.ndarray], num_rows: int) -> None:
    """Reject a reply that is not one number for each of `num_rows` rollouts.

    A server may mark in `judged` (bool [B, 1]) the rollouts that it could not judge; only these may be NaN.

    Raises:
        ValueError: one line with the content of the reply.
    """
    if "rewards" not in reply:
        raise ValueError(f"the reply has no rewards, but {sorted(reply)}")
    rewards = reply["rewards"]
    if rewards.shape != (num_rows, 1) or not np.issubdtype(rewards.dtype, np.number):
        raise ValueError(
            f"rewards are {rewards.dtype} {list(rewards.shape)}; one number for each rollout is wanted, [{num_rows}, 1]"
        )
    judged = reply.get("judged", np.ones_like(rewards, dtype=bool))
    bad = ~np.isfinite(rewards) & judged
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"the reward of rollout {row} of {num_rows} is {rewards[row, 0]}")


def _further_inputs(rollouts: dict) -> dict[str, np.ndarray]:
    further = {}
    if "prompt_lengths" in rollouts:
        further["prompt_lengths"] = _column(rollouts["prompt_lengths"])
    if "is_end" in rollouts:
        further["finished"] = rollouts["is_end"].unsqueeze(-1).cpu().numpy()
    if "records" in rollouts:
        lines = [[json.dumps(record).encode()] for record in rollouts["records"]]
        further["records"] = np.array(lines, dtype=np.object_)
    return further


def _column(numbers: torch.Tensor) -> np.ndarray:
    return numbers.unsqueeze(-1).cpu().numpy().astype(np.int64)
