"""Helpers shared by reward clients and the reward server: request checks, batch padding, sharing results within a
replica, and raising failures on all ranks.

Symbols: B rows of a request, S token width. A replica is the model-parallel group; its source rank acts for it.
"""

import concurrent.futures
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nemo_aligner.compat.device import current_device
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.errors import RewardError


class FutureResult(ABC):
    """A value that is being computed asynchronously."""

    @abstractmethod
    def result(self) -> Any:
        """Wait for the value. Subclasses document whether this is a collective call."""


class BackgroundResult(FutureResult):
    """The result or failure, for the whole replica, of a future on its source rank."""

    def __init__(self, future: concurrent.futures.Future | None):
        """`future`: None on every rank but the source rank."""
        self.future = future

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds for the value or failure; returns whether it is available. Local."""
        return self.future is None or not concurrent.futures.wait([self.future], timeout_s).not_done


def one_line(text: str, limit: int = 300) -> str:
    """`text` with runs of whitespace collapsed to one space, truncated to `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def is_replica_source() -> bool:
    """Whether this rank is the source rank of its replica."""
    return torch.distributed.get_rank() == parallel_state.get_model_parallel_src_rank()


def share_from_source(compute: Callable[[], Any]) -> Any:
    """Call `compute` on the replica's source rank and return its (picklable) value on every rank of the replica.

    Collective over the model-parallel group. If `compute` raises, every rank raises `RewardError` with the same
    message, so that none hangs; on the source rank it is chained to the original exception.
    """
    outcome, error = [None], None
    if is_replica_source():
        try:
            outcome = [(compute(), None)]
        except (Exception, SystemExit) as caught:
            error = caught
            if not isinstance(caught, RewardError):
                error = RewardError(one_line(f"{type(caught).__name__}: {caught}"))
                error.__cause__ = caught
            outcome = [(None, str(error))]
    source = parallel_state.get_model_parallel_src_rank()
    torch.distributed.broadcast_object_list(outcome, src=source, group=parallel_state.get_model_parallel_group())
    value, message = outcome[0]
    if message is not None:
        raise error or RewardError(message)
    return value


def fail_on_all_ranks(compute: Callable[[], Any], kind: type[Exception] = RewardError) -> Any:
    """The value of `compute` on this rank; if it raises an error of `kind` on any rank, every rank raises one.

    Collective over all ranks, after any collectives in `compute`. Ranks that did not fail raise the error of the first
    rank that did.
    """
    value = failure = None
    try:
        value = compute()
    except kind as error:
        failure = error
    messages = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(messages, None if failure is None else str(failure))
    message = next((message for message in messages if message is not None), None)
    if message is not None:
        raise failure or kind(message)
    return value


def lock_method(lock_name: str) -> Callable:
    """Decorator: run a method while holding the object's lock named by `lock_name`, written "self.<attr>"."""
    assert lock_name.startswith("self."), f'lock_name must be written "self.<attribute>", got {lock_name!r}'
    attribute = lock_name.removeprefix("self.")

    def decorate(method):
        @functools.wraps(method)
        def locked(self, *args, **kwargs):
            with getattr(self, attribute):
                return method(self, *args, **kwargs)

        return locked

    return decorate


def decode_bytes_ndarray(str_ndarray: np.ndarray) -> np.ndarray:
    """UTF-8 bytes [..., 1] → str [...]."""
    return np.char.decode(str_ndarray.astype(np.bytes_), "utf-8").squeeze(-1)


def pad_input(value: list, size: int, pad_value: Any = 0) -> tuple[list, int]:
    """Append `pad_value` until the length is a multiple of `size`; returns the new list and the number appended."""
    num_added = -len(value) % size
    return [*value, *[pad_value] * num_added], num_added


def process_inputs(inputs: dict, tokenize_func: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert one request to model inputs, refusing what the model could not run.

    Args:
        inputs: arrays by name: `sentences` bytes [B, 1], or `tokens` int64 [B, S] with `sequence_lengths` int64 [B, 1].
            Sentences take precedence if both are given.
        tokenize_func: list of B strings → (ids [B, S], lengths [B]).

    Returns:
        tokens [B, S] and lengths [B, 1], int64, on this process's device.

    Raises:
        ValueError: an input is missing, empty or of a wrong shape or dtype, a length is not in 1..S, or an id is
            below 0.
    """
    if inputs.get("sentences") is not None:
        tokens, lengths = tokenize_func(read_sentences(inputs["sentences"]))
        lengths = lengths.unsqueeze(-1)
        _check_request(tokens, lengths)
    else:
        tokens, lengths = read_tokens(inputs)
    return tokens.to(current_device()), lengths.to(current_device())


def read_sentences(sentences: np.ndarray) -> list[str]:
    """UTF-8 bytes [B, 1] → B strings. Raises `ValueError` for another shape or text that is not UTF-8."""
    if sentences.ndim != 2 or sentences.shape[1] != 1:
        raise ValueError(f"sentences must be [B, 1], got shape {sentences.shape}")
    return [text.decode("utf-8") for text in sentences[:, 0]]


def read_tokens(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """`tokens` [B, S] and `sequence_lengths` [B, 1] of a request, int64 on the CPU; raises like `process_inputs`."""
    missing = [name for name in ("tokens", "sequence_lengths") if inputs.get(name) is None]
    if missing:
        raise ValueError(f"send either sentences, or tokens and sequence_lengths; missing: {', '.join(missing)}")
    tokens, lengths = (_integers(name, inputs[name]) for name in ("tokens", "sequence_lengths"))
    _check_request(tokens, lengths)
    return tokens, lengths


def check_ids(tokens: torch.Tensor, vocab_size: int) -> None:
    """Raise `ValueError` if an id of `tokens` is not in the vocabulary."""
    if tokens.max() >= vocab_size:
        raise ValueError(f"tokens holds the id {tokens.max()}; the vocabulary has {vocab_size} entries")


def check_request_size(num_rows: int, width: int, max_request_tokens: int) -> None:
    """Raise `ValueError` for a request whose rows, padded to `width`, hold more than `max_request_tokens` tokens."""
    if num_rows * width > max_request_tokens:
        raise ValueError(
            f"a request of {num_rows} rows, {width} wide, is larger than inference.max_request_tokens="
            f"{max_request_tokens} of this server"
        )


def answer_separately(requests: list[dict], read: Callable, score: Callable[[list], list]) -> list:
    """Answer merged requests so that an invalid one does not affect the others.

    Args:
        requests: the inputs of each request.
        read: checks one request and returns the input of `score`; an exception is the answer to that request.
        score: takes the inputs of all valid requests together, returns an answer or an exception for each.

    Returns:
        An answer or an exception for each request, in order.
    """
    answers, sound, contents = [None] * len(requests), [], []
    for index, request in enumerate(requests):
        try:
            contents.append(read(request))
            sound.append(index)
        except Exception as error:
            answers[index] = error
    if sound:
        for index, answer in zip(sound, score(contents), strict=True):
            answers[index] = answer
    return answers


def _integers(name: str, array: np.ndarray) -> torch.Tensor:
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be int64, got {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))


def _check_request(tokens: torch.Tensor, lengths: torch.Tensor) -> None:
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens must be [B, S] and not empty, got shape {tuple(tokens.shape)}")
    num_rows, width = tokens.shape
    if lengths.shape != (num_rows, 1):
        raise ValueError(f"sequence_lengths must have shape {(num_rows, 1)} like tokens, got {tuple(lengths.shape)}")
    if lengths.min() < 1 or lengths.max() > width:
        raise ValueError(
            f"sequence_lengths must lie in 1..{width} (the width of tokens), got {lengths.min()}..{lengths.max()}"
        )
    if tokens.min() < 0:
        raise ValueError(f"tokens holds the negative id {tokens.min()}")


def calculate_inference_batch_padding_multiple(current_size: int, model_forward_micro_batch_size: int) -> int:
    """The multiple to which to pad a batch of `current_size` rows, so that every replica gets equal work."""
    num_replicas = parallel_state.get_data_parallel_world_size()
    rows_per_forward = model_forward_micro_batch_size * num_replicas
    return num_replicas if current_size <= rows_per_forward else rows_per_forward


def pad_batch_and_strip_sequence(
    tokens: torch.Tensor,
    sequence_lengths: torch.Tensor,
    pad_to_multiple: int,
    strip_sequence_length_to_multiple: int | None = None,
) -> tuple[dict[str, torch.Tensor], int, int]:
    """Trim surplus columns and pad the number of rows to a multiple.

    Args:
        tokens: [B, S] int64, right-padded.
        sequence_lengths: [B, 1] int64.
        pad_to_multiple: rows of zeros, of length zero, are added up to a multiple of this.
        strip_sequence_length_to_multiple: if given, the width becomes the longest length rounded up to a multiple of
            this, but never more than S.

    Returns:
        `{"inputs": [B', S'], "sequence_length": [B', 1]}`, the number of rows added, and S.
    """
    num_rows, width = tokens.shape
    if strip_sequence_length_to_multiple is not None:
        multiple = strip_sequence_length_to_multiple
        longest = int(sequence_lengths.max())
        tokens = tokens[:, : -(-longest // multiple) * multiple]
    num_added = -num_rows % pad_to_multiple
    tokens = torch.nn.functional.pad(tokens, (0, 0, 0, num_added))
    sequence_lengths = torch.nn.functional.pad(sequence_lengths, (0, 0, 0, num_added))
    return {"inputs": tokens, "sequence_length": sequence_lengths}, num_added, width
