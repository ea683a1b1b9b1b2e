"""Datasets of tokenised prompts: a single file, and several files blended by weight."""

import importlib.util
from collections.abc import Sequence

import numpy as np
import torch
from nemo.utils import logging
from omegaconf import OmegaConf
from torch.utils.data import Dataset

from nemo_aligner.data.nlp.samplers import PaddingRow
from nemo_aligner.utils.errors import ConfigError


class RLHFDataset(Dataset):
    """The prompts of one split of one file.

    Item, a dict:
        text: int64 [L], token ids of the prompt
        length: int, L
        loss_multiplier: bool, False if the prompt was replaced by another one and the item must not be trained on
        prompt_index: int, the requested row, which distinguishes equal prompts
        is_padding: bool, True if the row only fills a batch (`PaddingRow`) and must not be counted

    A prompt that is empty or longer than `max_prompt_length` is replaced by the next admissible one, cyclically.
    """

    def __init__(self, cfg, tokenizer, name, data_prefix, documents, data, seq_length, seed, drop_last=True):
        """
        Args:
            cfg: the model section of the configuration
            tokenizer: has `text_to_ids` and `eos_id`, and for indexed data `ids_to_text`
            name: name of this dataset in messages: "train", "validation", "test"
            documents: int array, the rows of `data` that belong to this split
            data: rows by number, each a record with a string under "text" (`PromptFile`) or an array of token ids
                (`IndexedDataset`)
            seq_length: limit of prompt and response together, in tokens
            data_prefix, seed: part of the signature shared by all dataset classes; the sampler determines the order

        Raises:
            AssertionError: the longest response leaves no room for a prompt
            ValueError: no rows, a row that `data` does not have, or text repair without its package
        """
        documents = np.asarray(documents)
        if len(documents) == 0:
            raise ValueError(f"{name}: no prompts; check model.data.data_prefix and model.data.splits_string")
        if documents.min() < 0 or documents.max() >= len(data):
            raise ValueError(
                f"{name}: rows {documents.min()} to {documents.max()} were asked for, but {data_prefix} has {len(data)}"
            )
        self.name = name
        self.data = data
        self.documents = documents
        self.tokenizer = tokenizer
        self.drop_last = drop_last
        self.append_eod = cfg.data.get("append_eod", False)
        self.apply_ftfy = cfg.data.get("apply_ftfy", False)
        if self.apply_ftfy and importlib.util.find_spec("ftfy") is None:
            raise ValueError("model.data.apply_ftfy needs the package ftfy; install it or set the switch to False")
        self.max_prompt_length = _longest_prompt(cfg, seq_length)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> dict:
        row = _wrap(index, len(self))
        ids = self._prompt_ids(row)
        admissible = self._is_admissible(ids)
        if not admissible:
            supplier = self._supplier(row)
            logging.warning(
                f"{self.name}: prompt {row} has {len(ids)} tokens, outside 1 to {self.max_prompt_length}; prompt "
                f"{supplier} takes its place and is kept out of the loss"
            )
            ids = self._prompt_ids(supplier)
        return {
            "text": torch.tensor(ids, dtype=torch.int64),
            "length": len(ids),
            "loss_multiplier": admissible,
            "prompt_index": row,
            "is_padding": isinstance(index, PaddingRow),
        }

    def record(self, index: int) -> dict:
        """The JSON object of the prompt of item `index`, after any replacement, with all its keys.

        Indexed data has no JSON objects; its record holds only the prompt's text.
        """
        row = self.data[self.documents[self._supplier(_wrap(index, len(self)))]]
        return row if isinstance(row, dict) else {"text": self.tokenizer.ids_to_text(row.tolist())}

    def encode(self, text: str) -> tuple[list[int], int]:
        """Token ids of a prompt and their number, without BOS; with an end token only if `append_eod` and not empty."""
        if self.apply_ftfy:
            import ftfy  # imported here, because it is an optional dependency of this setting

            text = ftfy.fix_text(text)
        ids = list(self.tokenizer.text_to_ids(text))
        if self.append_eod and ids:
            ids.append(self.tokenizer.eos_id)
        return ids, len(ids)

    def count_over_long(self) -> int:
        """Tokenise every prompt and return how many are empty or over-long; if there are any, warn once.

        Raises:
            ConfigError: if all are.
        """
        count = sum(not self._is_admissible(self._prompt_ids(row)) for row in range(len(self)))
        if count == len(self):
            raise ConfigError(self._none_is_admissible())
        if count:
            logging.warning(
                f"{self.name}: {count} of {len(self)} prompts are empty or longer than {self.max_prompt_length} tokens "
                f"(sequence length minus response length); others take their places, neither trained on nor counted "
                "in validation"
            )
        return count

    def _prompt_ids(self, row: int) -> list[int]:
        content = self.data[self.documents[row]]
        return self.encode(content["text"])[0] if isinstance(content, dict) else content.tolist()

    def _is_admissible(self, ids: Sequence[int]) -> bool:
        return 1 <= len(ids) <= self.max_prompt_length

    def _supplier(self, row: int) -> int:
        """The row whose prompt is used for `row`: itself, or else the next admissible one, cyclically."""
        for distance in range(len(self)):
            candidate = (row + distance) % len(self)
            if self._is_admissible(self._prompt_ids(candidate)):
                return candidate
        raise RuntimeError(self._none_is_admissible())

    def _none_is_admissible(self) -> str:
        return (
            f"{self.name}: every prompt is empty or longer than {self.max_prompt_length} tokens; shorten the prompts, "
            f"raise model.data.seq_length or lower model.rs.length_params.max_length"
        )


class BlendedDataset(Dataset):
    """Several prompt datasets as one, interleaved evenly in proportion to their weights; items as in `RLHFDataset`."""

    def __init__(self, datasets: Sequence[RLHFDataset], weights: Sequence[float], size: int):
        self.datasets = datasets
        self._component, self._row = blend_rows(weights, [len(dataset) for dataset in datasets], size)

    def __len__(self) -> int:
        return len(self._component)

    def __getitem__(self, index: int) -> dict:
        row = _wrap(index, len(self))
        item = self.datasets[self._component[row]][self._row[row]]
        return item | {"prompt_index": row, "is_padding": isinstance(index, PaddingRow)}

    def record(self, index: int) -> dict:
        row = _wrap(index, len(self))
        return self.datasets[self._component[row]].record(self._row[row])

    def count_over_long(self) -> int:
        """Empty and over-long prompts of all parts, each counted once even if the blend repeats it."""
        return sum(dataset.count_over_long() for dataset in self.datasets)


def blend_rows(weights: Sequence[float], lengths: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Assign `size` positions to components in proportion to their weights, spread evenly, rows in order and cyclic.

    Follows Sainte-Laguë's rule of apportionment: the j-th row of a component (from 0) is due at (j + 1/2) / weight,
    ties go to the earlier component. Every prefix of the sequence is thus itself in proportion.

    Returns:
        the component of each position, int64 [size], and its row within the component, int64 [size]
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    # Upper bound for each component: the rule exceeds share * size by at most share * (components - 1) / 2 + 1 / 2.
    enough = np.ceil(shares * size).astype(np.int64) + len(shares)
    component = np.repeat(np.arange(len(shares)), enough)
    turn = np.concatenate([np.arange(count) for count in enough])
    first = np.argsort((turn + 0.5) / shares[component], kind="stable")[:size]
    return component[first], turn[first] % np.asarray(lengths)[component[first]]


def _wrap(index: int, length: int) -> int:
    if index == -1:
        raise NotImplementedError("index -1 stood for a padding row, which is not supported; see samplers.PaddingRow")
    return int(index) % length


def _longest_prompt(cfg, seq_length: int) -> int:
    """Tokens left for the prompt by the longest response; half of all tokens if no response length is configured."""
    for key in ("length_params.max_length", "rs.length_params.max_length"):
        max_response_length = OmegaConf.select(cfg, key)
        if max_response_length is not None:
            break
    else:
        max_response_length = seq_length - seq_length // 2
    longest_prompt = seq_length - max_response_length
    assert longest_prompt > 0, (
        f"model.data.seq_length={seq_length} leaves no room for a prompt beside responses of up to "
        f"{max_response_length} tokens; raise it or lower model.rs.length_params.max_length"
    )
    return longest_prompt
