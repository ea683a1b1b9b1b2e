"""Rollouts that a run had no time to score, or could not have scored, kept on disk for its next start."""

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

    r is the replica's source rank, which alone reads and writes.
    """

    def __init__(self, folder: str | Path | None, rank: int, made_with: dict):
        """
        Args:
            folder: None keeps nothing.
            made_with: the settings that rollouts, and under "reward" their rewards, depend on, plain values; those made
                with others are not used. The weights are told apart by the step alone, see `drop_later`.
        """
        self.folder = None if folder is None else Path(folder)
        self.rank = rank
        self.made_with = made_with

    def save(self, split: str, step: int, rollout_batches: list[dict]) -> str:
        """Write the phase's rollout micro-batches (dicts of tensors), scored or not, and sync them to disk. Local.

        If that fails, as on a full disk, a warning says so: there is a checkpoint still to be written.

        Returns:
            What there is to add to the message that the run ends with: where they are, unless this rank knows better.
        """
        if self.folder is None:
            return ""
        path = self._path(split, step)
        if is_replica_source():
            try:
                self._write(path, rollout_batches)
            except (OSError, RuntimeError) as error:  # torch's, if the zip file cannot be written to its end
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
        """Whether an earlier start left this phase unfinished, on any replica. Collective over the job.

        Raises:
            RewardError: on every rank of the job, if a replica could not read its file.
        """
        verdict = torch.tensor([self._load(split, step) is not None], dtype=torch.int64, device=current_device())
        torch.distributed.all_reduce(verdict, torch.distributed.ReduceOp.MAX)
        return bool(verdict.item())

    def load(self, split: str, step: int, batches: list[dict], num_rollouts: int) -> list[dict | None]:
        """For each batch of prompts its rollouts, on the device, as an earlier start left them, or None.

        Those made with other settings than this run's, or of other prompts, are left out, with a warning. Collective
        over the job.

        Args:
            batches: collated prompts, as the dataloader gives them.
            num_rollouts: neighbouring rows for each prompt.

        Raises:
            RewardError: on every rank of the job, if a replica could not read its file.
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
                f"{path} could not be read ({type(error).__name__}); move it away, and its rollouts are made anew"
            ) from error
        changed = [name for name, value in self.made_with.items() if stored["made_with"].get(name) != value]
        if changed == ["reward"]:
            logging.warning(f"{path}: the reward is another one since; all of its rollouts are scored by that")
            return [_without_rewards(rollouts) for rollouts in stored["rollout_batches"]]
        if changed:
            logging.warning(f"{path} was made with another {' and '.join(changed)}; rolling out anew")
            return []
        logging.info(f"taking up {len(stored['rollout_batches'])} micro-batches of rollouts from {path}")
        return stored["rollout_batches"]

    def drop_later(self, step: int) -> None:
        """Delete what was left in phases behind `step`, at which this start begins. Local; rank 0 does it for all.

        A run that has gone back to an earlier checkpoint comes to those steps with other weights.
        """
        if self.folder is None or torch.distributed.get_rank() != 0:
            return
        for path in self.folder.glob("unscored_*_step*_rank*.pt"):
            found = re.fullmatch(r"unscored_\w+_step(\d+)_rank\d+", path.stem)
            if found is not None and int(found[1]) > step:
                logging.warning(f"{path} is of other weights than this run has, which goes on at step {step}: deleted")
                path.unlink(missing_ok=True)

    def remove(self, split: str, step: int) -> None:
        """Forget the phase, as its rollouts have been scored. Local."""
        if self.folder is not None and is_replica_source():
            self._path(split, step).unlink(missing_ok=True)

    def _path(self, split: str, step: int) -> Path:
        return self.folder / f"unscored_{split}_step{step}_rank{self.rank}.pt"


def _without_rewards(rollouts: dict) -> dict | None:
    """As they were before they were scored; None if that made rows unfit, as it cannot be told which."""
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
        logging.warning(f"unscored rollouts of step {step} answer other prompts; rolling out anew")
        return None
    return {key: value.to(current_device()) for key, value in rollouts.items()}
