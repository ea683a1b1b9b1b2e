"""Serves a user's Python reward function over HTTP in place of a reward model. Needs one process, no GPU, no model.

A request holds token ids, so the server has the policy's tokenizer and sees the same texts as a function that runs
inside the trainer. Symbols: B rows of a request, S token width.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from nemo.utils import logging
from pytriton.model_config import Tensor

from nemo_aligner.rewards.python_reward import RewardError, decode_rollouts, score
from nemo_aligner.servers import triton_endpoint
from nemo_aligner.servers.triton_endpoint import MAX_REQUEST_TOKENS
from nemo_aligner.utils.server_utils import (
    answer_separately,
    check_ids,
    check_request_size,
    read_sentences,
    read_tokens,
)

INPUTS = (
    Tensor(name="sentences", shape=(-1,), dtype=bytes, optional=True),
    Tensor(name="tokens", shape=(-1,), dtype=np.int64, optional=True),
    Tensor(name="sequence_lengths", shape=(-1,), dtype=np.int64, optional=True),
    Tensor(name="prompt_lengths", shape=(1,), dtype=np.int64, optional=True),
    Tensor(name="finished", shape=(1,), dtype=np.bool_, optional=True),
    Tensor(name="records", shape=(1,), dtype=bytes, optional=True),
)
OUTPUTS = (
    Tensor(name="rewards", shape=(1,), dtype=np.float32),
    Tensor(name="judged", shape=(1,), dtype=np.bool_),
)
# What a reward function can take and a client may have left out.
SENT_COLUMNS = ("records", "finished")


@dataclass
class PythonRewardServer:
    """One reward function behind one HTTP endpoint.

    Attributes:
        function: from `load_reward_function`. It runs in one thread; calls never overlap.
        tokenizer: the policy's; has `eos_id`, `vocab_size`, `ids_to_text` and `text_to_ids`.
        model_name, address, port, max_queue_delay_microseconds, max_request_tokens: see `RewardModelServer`.
        end_strings: a finished response that ends in one of them loses it in its text.
    """

    function: Callable
    tokenizer: object
    model_name: str
    port: int
    end_strings: Sequence[str] = ()
    address: str = triton_endpoint.LOOPBACK
    max_queue_delay_microseconds: int = 2000
    max_request_tokens: int = MAX_REQUEST_TOKENS

    def __post_init__(self):
        self._has_warned = False

    def run_server(self) -> None:
        """Serve until interrupted. Raises `RuntimeError` if Triton ends by itself."""
        triton_endpoint.serve(
            self.answer,
            INPUTS,
            OUTPUTS,
            model_name=self.model_name,
            address=self.address,
            port=self.port,
            max_queue_delay_microseconds=self.max_queue_delay_microseconds,
        )

    def answer(self, requests: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray] | Exception]:
        """Score merged requests.

        Args:
            requests: of each, arrays by name: `tokens` int64 [B, S] with `sequence_lengths` int64 [B, 1], or
                `sentences` bytes [B, 1], which win and are responses; and, all optional, `prompt_lengths` int64 [B, 1],
                `finished` bool [B, 1], `records` bytes [B, 1], each a JSON object.

        Returns:
            For each request `rewards` float32 [B, 1] and `judged` bool [B, 1], where the reward is NaN if, and only
            if, it is not judged; or a `ValueError` for a request that is malformed or lacks what the function takes;
            or the `RewardError` of a function that failed.
        """
        return answer_separately(requests, self._read, self._score)

    def _read(self, inputs: dict[str, np.ndarray]) -> dict[str, list]:
        """What the function sees of one request: lists of B entries by the names of `score`."""
        self._check_columns(inputs)
        num_rows = len(next(iter(inputs.values()), ()))
        records = [{}] * num_rows  # not passed on unless the request has them
        if inputs.get("records") is not None:
            records = [_read_record(text) for text in inputs["records"][:, 0]]
        is_text = inputs.get("sentences") is not None
        rollouts = self._read_sentences(inputs) if is_text else self._read_tokens(inputs, records)
        return {**rollouts, "records": records}

    def _check_columns(self, inputs: dict) -> None:
        missing = [name for name in SENT_COLUMNS if name in self.function.columns and inputs.get(name) is None]
        if missing:
            raise ValueError(
                f"the reward function takes {' and '.join(missing)}, which this request lacks; send a column for each"
            )
        num_rows = len(next(iter(inputs.values()), ()))
        for name in ("prompt_lengths", "finished", "records"):
            if inputs.get(name) is not None and inputs[name].shape != (num_rows, 1):
                raise ValueError(f"{name} must have shape {(num_rows, 1)}, got {inputs[name].shape}")

    def _read_sentences(self, inputs: dict) -> dict[str, list]:
        if inputs.get("prompt_lengths") is not None:
            raise ValueError("prompt_lengths count tokens: send tokens and sequence_lengths in place of sentences")
        self._warn_of_empty_prompts()
        responses = read_sentences(inputs["sentences"])
        finished = inputs.get("finished")
        return {
            "prompts": [""] * len(responses),
            "responses": responses,
            "response_tokens": [self.tokenizer.text_to_ids(text) for text in responses],
            "finished": [None] * len(responses) if finished is None else finished[:, 0].tolist(),
        }

    def _read_tokens(self, inputs: dict, records: list[dict]) -> dict[str, list]:
        tokens, lengths = read_tokens(inputs)
        check_request_size(*tokens.shape, self.max_request_tokens)
        check_ids(tokens, self.tokenizer.vocab_size)
        if inputs.get("prompt_lengths") is None:
            self._warn_of_empty_prompts()
            prompt_lengths = torch.zeros_like(lengths)
        else:
            prompt_lengths = torch.from_numpy(inputs["prompt_lengths"])
            outside = (prompt_lengths < 0) | (prompt_lengths > lengths)
            if outside.any():
                row = int(outside.nonzero()[0, 0])
                raise ValueError(
                    f"prompt_lengths must lie in 0..sequence_lengths; row {row} has {prompt_lengths[row].item()} of "
                    f"{lengths[row].item()}"
                )
        batch = {
            "response_tokens": tokens,
            "response_lengths": lengths.squeeze(1),
            "prompt_lengths": prompt_lengths.squeeze(1),
        }
        if inputs.get("prompt_lengths") is not None:
            batch["records"] = records
        if inputs.get("finished") is not None:
            batch["is_end"] = torch.from_numpy(inputs["finished"]).squeeze(1)
        return decode_rollouts(batch, self.tokenizer, self.end_strings)

    def _warn_of_empty_prompts(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            logging.warning("a client sends no prompt_lengths: prompts are empty, whole texts are the responses")

    def _score(self, contents: list[dict[str, list]]) -> list[dict[str, np.ndarray] | RewardError]:
        """All requests with one call; if that fails, each with its own, to tell the failing from the sound."""
        merged = {name: list(chain.from_iterable(content[name] for content in contents)) for name in contents[0]}
        try:
            rewards = score(self.function, **merged).unsqueeze(1).numpy()
        except RewardError as error:
            if len(contents) == 1:
                return [error]
            return [self._score([content])[0] for content in contents]
        ends = np.cumsum([len(content["prompts"]) for content in contents])[:-1]
        return [{"rewards": rows, "judged": ~np.isnan(rows)} for rows in np.split(rewards, ends)]


def _read_record(text: bytes) -> dict:
    try:
        record = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("records must be JSON objects in UTF-8") from None
    if not isinstance(record, dict):
        raise ValueError(f"records must be JSON objects, got a {type(record).__name__}")
    return record
