"""Weighted sum of several rewards of any kind."""

from collections.abc import Mapping

import torch

from nemo_aligner.utils.server_utils import FutureResult, RewardError


class WeightedSum:
    """Replaces a single reward as `rm` of `RSTrainer`."""

    def __init__(self, rewards: Mapping[str, tuple[float, object]]):
        """`rewards`: name -> (weight, a `RemoteGPTRMClient` or `PythonRewardModel`)."""
        self.rewards = rewards
        self.description = {name: [weight, reward.description] for name, (weight, reward) in rewards.items()}

    def infer_rm(self, rollout_batch: Mapping) -> "WeightedSumFuture":
        """Request every reward of B rollouts and return at once. Local."""
        return WeightedSumFuture(
            {name: (weight, reward.infer_rm(rollout_batch)) for name, (weight, reward) in self.rewards.items()}
        )

    def close(self) -> None:
        """Close every reward."""
        for _, reward in self.rewards.values():
            reward.close()


class WeightedSumFuture(FutureResult):
    """Rewards in flight."""

    def __init__(self, futures: Mapping[str, tuple[float, FutureResult]]):
        """`futures`: name -> (weight, future of the rewards)."""
        self.futures = futures
        self.parts: dict[str, torch.Tensor] = {}

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds for each of the rewards; returns whether all are available. Local."""
        return all(future.wait(timeout_s) for _, future in self.futures.values())

    def result(self) -> torch.Tensor:
        """Wait for every reward and add them up. Collective over the replica, in the order of the `infer_rm` calls.

        Sets `parts`: each reward by name, unweighted, float32 [B, 1].

        Returns:
            float32 [B, 1], equal on all ranks of the replica; NaN where one of the rewards could not be judged.

        Raises:
            RewardError: on every rank of the replica, naming the reward that could not be obtained.
        """
        self.parts = {name: _named(name, future) for name, (_, future) in self.futures.items()}
        return sum(weight * self.parts[name] for name, (weight, _) in self.futures.items())


def _named(name: str, future: FutureResult) -> torch.Tensor:
    try:
        return future.result()
    except RewardError as error:
        raise RewardError(f"reward {name!r}: {error}") from error
