"""Log of every rollout, one JSON object per line, written as soon as it is scored."""

import json
import math
import os
from pathlib import Path

from nemo.utils import logging

from nemo_aligner.algorithms.rollout_metrics import PART_PREFIX
from nemo_aligner.rewards.python_reward import decode_rollouts
from nemo_aligner.utils.server_utils import is_replica_source
from nemo_aligner.utils.tensors import cpu_dict


class RolloutLog:
    """Appends rollouts to `<folder>/<split>_rank<r>.jsonl`, where r is the replica's source rank, the only writer.

    A line has `step`, `prompt_index` (row of the dataset), `prompt` and `response` (as passed to a reward function),
    `num_tokens` (of the response, including its ending), `finished` (ended by itself), `reward` (null if it could not
    be judged or was never scored), `kept` (among the best of its prompt) and `trained_on` (kept and fit for training:
    neither truncated nor empty, judged, and not of a replacement for another prompt). If the reward is a sum, each part
    is under `reward_<name>`. Lines are duplicated for steps that a killed run had not saved, which are repeated, and
    for leftover rollouts that are scored again because the reward has changed.
    """

    def __init__(self, folder: str | Path | None, tokenizer, end_strings=(), rank: int = 0):
        """`folder`: None disables the log."""
        self.folder = None if folder is None else Path(folder)
        self.tokenizer = tokenizer
        self.end_strings = end_strings
        self.rank = rank

    def write(self, split: str, step: int, rollouts: dict, kept_rows=()) -> None:
        """Append a batch of rollouts and flush it to disk. A failure, such as a full disk, is only a warning.

        Args:
            rollouts: tensors with one leading size (`rewards` is optional), and `records`, for `decode_rollouts`.
            kept_rows: indices of the rows that were selected for training.
        """
        if self.folder is None or not is_replica_source():
            return
        try:
            self._append(split, step, rollouts, kept_rows)
        except OSError as error:  # training does not depend on the log
            logging.warning(f"rollouts of step {step} are missing in {self._path(split)}: {error}")

    def _path(self, split: str) -> Path:
        return self.folder / f"{split}_rank{self.rank}.jsonl"

    def _append(self, split: str, step: int, rollouts: dict, kept_rows) -> None:
        rollouts = cpu_dict(rollouts)
        kept = set(kept_rows)
        fit, padding = rollouts.get("is_fit"), rollouts.get("is_padding")
        texts = decode_rollouts(rollouts, self.tokenizer, self.end_strings)
        rewards = rollouts["rewards"].flatten().tolist() if "rewards" in rollouts else None
        parts = {name: part.tolist() for name, part in rollouts.items() if name.startswith(PART_PREFIX)}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(split)
        _drop_unfinished_line(path)
        with open(path, "a", encoding="utf-8") as file:
            for row, prompt_index in enumerate(rollouts["prompt_index"].tolist()):
                if padding is not None and padding[row]:
                    continue
                line = {
                    "step": step,
                    "prompt_index": prompt_index,
                    "prompt": texts["prompts"][row],
                    "response": texts["responses"][row],
                    "num_tokens": len(texts["response_tokens"][row]),
                    "finished": texts["finished"][row],
                    "reward": None if rewards is None else _or_null(rewards[row]),
                    **{name: _or_null(part[row]) for name, part in parts.items()},
                    "kept": row in kept,
                    "trained_on": row in kept and (fit is None or bool(fit[row])),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _or_null(reward: float) -> float | None:
    return None if math.isnan(reward) else reward


def _drop_unfinished_line(path: Path) -> None:
    """Remove the partial line left by a run that was killed while writing; its step is repeated."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            file.seek(end - 1)
            if file.read(1) == b"\n":
                break
            end -= 1
        file.truncate(end)
