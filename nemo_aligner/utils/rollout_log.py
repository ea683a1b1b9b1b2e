"""Every rollout on disk, one JSON object a line, the moment it is scored."""

import json
import math
from pathlib import Path

from nemo_aligner.rewards.python_reward import decode_rollouts
from nemo_aligner.utils.server_utils import is_replica_source


class RolloutLog:
    """Appends rollouts to `<folder>/<split>_rank<r>.jsonl`, r being the replica's source rank, which alone writes.

    A line has `step`, `prompt_index` (row of the dataset), `prompt`, `response`, `num_tokens` (of the response, with
    its ending), `finished` (ended by itself), `reward` (null if it could not be judged, or was never scored) and `kept`
    (chosen for training).
    """

    def __init__(self, folder: str | Path, tokenizer, end_strings=(), rank: int = 0):
        self.folder = Path(folder)
        self.tokenizer = tokenizer
        self.end_strings = end_strings
        self.rank = rank

    def write(self, split: str, step: int, rollouts: dict, kept_rows=()) -> None:
        """Append a batch of rollouts (tensors with one leading size; `rewards` may be missing) and flush it to disk."""
        if not is_replica_source():
            return
        kept = set(kept_rows)
        padding = rollouts.get("is_padding")
        texts = decode_rollouts(rollouts, self.tokenizer, self.end_strings)
        rewards = rollouts["rewards"].flatten().tolist() if "rewards" in rollouts else None
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"{split}_rank{self.rank}.jsonl", "a", encoding="utf-8") as file:
            for row, prompt_index in enumerate(rollouts["prompt_index"].tolist()):
                if padding is not None and padding[row]:
                    continue
                reward = None if rewards is None or math.isnan(rewards[row]) else rewards[row]
                line = {
                    "step": step,
                    "prompt_index": prompt_index,
                    "prompt": texts["prompts"][row],
                    "response": texts["responses"][row],
                    "num_tokens": len(texts["response_tokens"][row]),
                    "finished": texts["finished"][row],
                    "reward": reward,
                    "kept": row in kept,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
