"""Rollouts that a run had no time to score or failed to score, persisted for its next start."""

import os
import re
from itertools import chain, repeat
from pathlib import Path

import torch
from nemo.utils import logging

from nemo_aligner.algorithms.rollout_metrics import PART_PREFIX
from nemo_aligner.compat.device import current_device
from nemo_aligner.utils.errors import RewardError
from nemo_aligner.utils.server_utils import fail_on_all_ranks, is_replica_source, one_line, share_from_source
from nemo_aligner.utils.tensors import cpu_dict


class UnscoredRollouts:
    """One file for each phase that ended early: `<folder>/unscored_<split>_step<s>_rank<r>.pt`.

    r is the replica's source rank, the only rank that reads and writes.
    """

    def __init__(self, folder: str | Path | None, rank: int, made_with: dict):
        """
        Args:
            folder: None disables persistence.
            made_with: settings that the rollouts and, under "reward", their rewards depend on, as plain values.
                Rollouts made with other settings are not used. The weights are identified by the step alone, see
                `drop_later`.
        """
        self.folder = None if folder is None else Path(folder)
        self.rank = rank
        self.made_with = made_with

    def save(self, split: str, step: int, rollout_batches: list[dict]) -> str:
        """Write the phase's rollout micro-batches (dicts of tensors), scored or not, and sync them to disk. Local.

        A write failure, such as a full disk, is only a warning, because a checkpoint still has to be written.

        Returns:
            Text to append to the run's final message: where the rollouts are; empty if they are known not to be saved.
        """
        if self.folder is None:
            return ""
        path = self._path(split, step)
        if is_replica_source():
            try:
                self._write(path, rollout_batches)
            except (OSError, RuntimeError) as error:  # RuntimeError: torch could not finish the zip file
                logging.warning(f"{path} could not be written, its rollouts are lost: {one_line(str(error))}")
                return ""
        return f"; the rollouts are in {path}; the same command started again scores them first"

    def _write(self, path: Path, rollout_batches: list[dict]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        try:
            with open(partial, "wb") as file:
                batches = [cpu_dict(rollouts) for rollouts in rollout_batches]
                torch.save({"made_with": self.made_with, "rollout_batches": batches}, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        partial.replace(path)

    def is_pending(self, split: str, step: int) -> bool:
        """Whether an earlier start left this phase unfinished on any replica. Collective over all ranks.

        Raises:
            RewardError: on every rank, if a replica could not read its file.
        """
        verdict = torch.tensor([self._load(split, step) is not None], dtype=torch.int64, device=current_device())
        torch.distributed.all_reduce(verdict, torch.distributed.ReduceOp.MAX)
        return bool(verdict.item())

    def load(self, split: str, step: int, batches: list[dict], num_rollouts: int) -> list[dict | None]:
        """For each batch of prompts, the rollouts saved by an earlier start, on the device, or None.

        Rollouts made with other settings or for other prompts are dropped with a warning. Collective over all ranks.

        Args:
            batches: collated prompts, as returned by the dataloader.
            num_rollouts: consecutive rows per prompt.

        Raises:
            RewardError: on every rank, if a replica could not read its file.
        """
        stored = chain(self._load(split, step) or (), repeat(None))
        pairs = zip(batches, stored, strict=False)
        return [_if_answering(batch, rollouts, num_rollouts, step) for batch, rollouts in pairs]

    def _load(self, split: str, step: int) -> list[dict] | None:
        if self.folder is None:
            return fail_on_all_ranks(lambda: None)
        return fail_on_all_ranks(lambda: share_from_source(lambda: self._read(self._path(split, step))))

    def _read(self, path: Path) -> list[dict] | None:
        if not path.exists():
            return None
        try:
            stored = torch.load(path, weights_only=True)
        except Exception as error:
            raise RewardError(
                f"{path} could not be read ({type(error).__name__}); move it away to generate its rollouts again"
            ) from error
        changed = [name for name, value in self.made_with.items() if stored["made_with"].get(name) != value]
        if changed == ["reward"]:
            logging.warning(f"{path}: the reward has changed since; all of its rollouts are scored again")
            return [_without_rewards(rollouts) for rollouts in stored["rollout_batches"]]
        if changed:
            logging.warning(f"{path} was made with another {' and '.join(changed)}; generating new rollouts")
            return []
        logging.info(f"resuming with {len(stored['rollout_batches'])} micro-batches of rollouts from {path}")
        return stored["rollout_batches"]

    def drop_later(self, step: int) -> None:
        """Delete rollouts of phases after `step`, the step this start resumes at. Local; rank 0 does it for all ranks.

        A run that resumes from an earlier checkpoint reaches those steps with different weights.
        """
        if self.folder is None or torch.distributed.get_rank() != 0:
            return
        for path in self.folder.glob("unscored_*_step*_rank*.pt"):
            found = re.fullmatch(r"unscored_\w+_step(\d+)_rank\d+", path.stem)
            if found is not None and int(found[1]) > step:
                logging.warning(
                    f"{path} is from later weights than this run has, which resumes at step {step}: deleted"
                )
                path.unlink(missing_ok=True)

    def remove(self, split: str, step: int) -> None:
        """Delete the phase's file once its rollouts are scored. Local."""
        if self.folder is not None and is_replica_source():
            self._path(split, step).unlink(missing_ok=True)

    def _path(self, split: str, step: int) -> Path:
        return self.folder / f"unscored_{split}_step{step}_rank{self.rank}.pt"


def _without_rewards(rollouts: dict) -> dict | None:
    """The rollouts without rewards; None if scoring marked rows as unfit, as those can no longer be identified."""
    if "rewards" not in rollouts:
        return rollouts
    if rollouts["rewards"].isnan().any():
        return None
    return {key: value for key, value in rollouts.items() if key != "rewards" and not key.startswith(PART_PREFIX)}


def _if_answering(batch: dict, rollouts: dict | None, num_rollouts: int, step: int) -> dict | None:
    """The rollouts, on the device, if they answer the prompts of `batch`."""
    if rollouts is None:
        return None
    if not torch.equal(rollouts["prompt_tokens"], batch["text"].repeat_interleave(num_rollouts, dim=0)):
        logging.warning(f"unscored rollouts of step {step} answer other prompts; generating new rollouts")
        return None
    return {key: value.to(current_device()) for key, value in rollouts.items()}
