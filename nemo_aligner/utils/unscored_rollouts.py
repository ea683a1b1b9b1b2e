"""Rollouts that a run had no time to score, or could not have scored, kept on disk for its next start."""

import os
from pathlib import Path

import torch
from nemo.utils import logging

from nemo_aligner.utils.server_utils import is_replica_source, share_from_source


class UnscoredRollouts:
    """One file for each phase that ended early: `<folder>/unscored_<split>_step<s>_rank<r>.pt`.

    r is the replica's source rank, which alone reads and writes.
    """

    def __init__(self, folder: str | Path, rank: int, made_with: dict):
        """`made_with`: the settings that rollouts depend on, plain values; those made with others are not taken up."""
        self.folder = Path(folder)
        self.rank = rank
        self.made_with = made_with

    def save(self, split: str, step: int, rollout_batches: list[dict]) -> Path:
        """Write the phase's rollout micro-batches (dicts of CPU tensors), scored or not, and sync them to disk. Local.

        Returns:
            The file, the same on all ranks of a replica.
        """
        path = self._path(split, step)
        if is_replica_source():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            with open(partial, "wb") as file:
                torch.save({"made_with": self.made_with, "rollout_batches": rollout_batches}, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        return path

    def load(self, split: str, step: int) -> list[dict] | None:
        """The micro-batches kept of this phase; None if it did not end early. Collective over the replica.

        Those made with other settings than this run's are left out, with a warning.
        """
        return share_from_source(lambda: self._read(self._path(split, step)))

    def _read(self, path: Path) -> list[dict] | None:
        if not path.exists():
            return None
        stored = torch.load(path, weights_only=True)
        changed = [name for name, value in self.made_with.items() if stored["made_with"].get(name) != value]
        if changed:
            logging.warning(f"{path} was made with another {' and '.join(changed)}; rolling out anew")
            return []
        logging.info(f"taking up {len(stored['rollout_batches'])} micro-batches of rollouts from {path}")
        return stored["rollout_batches"]

    def remove(self, split: str, step: int) -> None:
        """Forget the phase, as its rollouts have been scored. Local."""
        if is_replica_source():
            self._path(split, step).unlink(missing_ok=True)

    def _path(self, split: str, step: int) -> Path:
        return self.folder / f"unscored_{split}_step{step}_rank{self.rank}.pt"


class NoRolloutFolder:
    """In the place of `UnscoredRollouts`, and of a `RolloutLog`, in a run that has no folder for them."""

    def write(self, split: str, step: int, rollouts: dict, kept_rows=()) -> None:
        """Nothing to do."""

    def save(self, split: str, step: int, rollout_batches: list[dict]) -> None:
        """Nothing to do."""

    def load(self, split: str, step: int) -> None:
        """Nothing is there."""

    def remove(self, split: str, step: int) -> None:
        """Nothing to do."""
