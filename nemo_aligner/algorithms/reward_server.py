"""Serves a reward model over HTTP from a distributed job.

Global rank 0 answers requests; all other ranks wait for its signal and join it in each forward pass. Between the signal
and the end of that pass nothing may fail on rank 0 alone, so a request is checked before the signal is given.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from nemo.utils import logging
from omegaconf import OmegaConf
from pytriton.exceptions import PyTritonUnrecoverableError
from pytriton.model_config import Tensor

from nemo_aligner.servers import triton_endpoint
from nemo_aligner.servers.constants import ServerSignal
from nemo_aligner.servers.triton_endpoint import MAX_BATCH, MAX_REQUEST_TOKENS  # noqa: F401
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.distributed import run_distributed_inference
from nemo_aligner.utils.server_utils import (
    answer_separately,
    calculate_inference_batch_padding_multiple,
    check_ids,
    check_request_size,
    lock_method,
    pad_batch_and_strip_sequence,
    process_inputs,
)
from nemo_aligner.utils.value_rules import COUNT_OR_NULL, Rule, is_count

# The value of `inference.address` that opens the server to every machine which can reach this one.
ENDPOINT_BIND_ADDRESS = "0.0.0.0"

# Between two rollouts lies a whole training phase, in which the other ranks wait for the next signal.
IDLE_TIMEOUT = timedelta(days=365)

# What the section `inference` must have beside the endpoint's own keys.
MODEL_KEYS = {
    "inference_micro_batch_size": Rule(
        lambda value: is_count(value) or (OmegaConf.is_list(value) and len(value) > 0 and all(map(is_count, value))),
        "a positive whole number or a list of them",
    ),
    "strip_sequence_length_to_multiple": COUNT_OR_NULL,
}


@dataclass
class RewardModelServer:
    """One reward model behind one HTTP endpoint. Every rank of the job constructs it (collective) and runs it.

    Attributes:
        infer_fn: `infer_fn(inputs=(tokens [B, S], lengths [B]))` → rewards float32 [B, 1] on every rank of a replica.
        tokenize_func: list of B strings → (ids [B, S], lengths [B]).
        model_name, port: the endpoint.
        inference_micro_batch_size: request rows per replica that the batcher tries to collect; a number or several.
        model_forward_micro_batch_size: rows per forward pass and replica.
        strip_sequence_length_to_multiple: cut the width of a batch to its longest length rounded up to a multiple of
            this; None leaves the width alone.
        max_queue_delay_microseconds: how long a request may wait to be merged with others.
        vocab_size: ids at or above are refused; None checks nothing. On a GPU such an id would end the whole server.
        address: where to listen; the default answers this machine alone.
        max_length: longest row that the model can take; None checks nothing.
        max_request_tokens: limit of a request's rows times its width.
    """

    infer_fn: Callable
    tokenize_func: Callable
    model_name: str
    port: int
    inference_micro_batch_size: int | list[int]
    model_forward_micro_batch_size: int
    strip_sequence_length_to_multiple: int | None
    max_queue_delay_microseconds: int = 2000
    vocab_size: int | None = None
    address: str = triton_endpoint.LOOPBACK
    max_length: int | None = None
    max_request_tokens: int = MAX_REQUEST_TOKENS

    def __post_init__(self):
        self.lock = threading.Lock()
        # A group of its own: the default one gives up on idle ranks after some minutes.
        self._signal_group = torch.distributed.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
        self._failure: Exception | None = None

    @lock_method("self.lock")
    def infer(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Score one batch. Runs on global rank 0, while the others are in `run_subscriber_loop`.

        Args:
            inputs: `sentences` bytes [B, 1], or `tokens` int64 [B, S] and `sequence_lengths` int64 [B, 1].

        Returns:
            `{"rewards": float32 [B, 1]}`.

        Raises:
            ValueError: the request is malformed; it is answered with an error and the server goes on.
            PyTritonUnrecoverableError: the forward pass failed while other ranks take part; the server ends.
        """
        return self._score([self._read(inputs)])[0]

    @lock_method("self.lock")
    def answer(self, requests: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray] | Exception]:
        """Score merged requests in one batch.

        Like `infer`, but a malformed request is answered with its `ValueError`, and if the forward pass failed while no
        other rank took part, the answer to each sound one is that exception.
        """
        return answer_separately(requests, self._read, self._score_if_possible)

    def _read(self, inputs: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids [B, S] and lengths [B, 1] of one request, if the model can run them."""
        if inputs.get("sentences") is not None:
            check_request_size(len(inputs["sentences"]), self.max_length or 1, self.max_request_tokens)
        tokens, lengths = process_inputs(inputs, self.tokenize_func)
        check_request_size(*tokens.shape, self.max_request_tokens)
        if self.vocab_size is not None:
            check_ids(tokens, self.vocab_size)
        if self.max_length is not None and lengths.max() > self.max_length:
            raise ValueError(f"a row has {lengths.max()} tokens; the model takes at most {self.max_length}")
        return tokens[:, : self.max_length], lengths

    def _score_if_possible(self, contents: list) -> list[dict[str, np.ndarray] | Exception]:
        try:
            return self._score(contents)
        except PyTritonUnrecoverableError:
            raise
        except Exception as error:
            logging.warning("the forward pass failed", exc_info=True)
            return [error] * len(contents)

    def _score(self, contents: list[tuple[torch.Tensor, torch.Tensor]]) -> list[dict[str, np.ndarray]]:
        """The rewards of several requests, whose rows are padded to a common width and run together."""
        width = max(tokens.shape[1] for tokens, _ in contents)
        tokens = torch.cat([torch.nn.functional.pad(ids, (0, width - ids.shape[1])) for ids, _ in contents])
        lengths = torch.cat([lengths for _, lengths in contents])
        multiple = calculate_inference_batch_padding_multiple(len(tokens), self.model_forward_micro_batch_size)
        model_inputs, _, _ = pad_batch_and_strip_sequence(
            tokens, lengths, multiple, self.strip_sequence_length_to_multiple
        )
        rewards = self._forward_on_all_ranks(model_inputs)[: len(tokens)]
        ends = np.cumsum([len(lengths) for _, lengths in contents])[:-1]
        return [{"rewards": rows} for rows in np.split(np.asarray(rewards, dtype=np.float32), ends)]

    def _forward_on_all_ranks(self, model_inputs: dict[str, torch.Tensor]) -> np.ndarray:
        torch.distributed.broadcast(torch.tensor([ServerSignal.FORWARD]), src=0, group=self._signal_group)
        try:
            return run_distributed_inference(inputs=model_inputs, infer_fn=self.infer_fn)
        except Exception as error:
            if torch.distributed.get_world_size() == 1:
                raise
            # The other ranks may be anywhere in the forward pass; the next signal would be misread.
            self._failure = error
            raise PyTritonUnrecoverableError(f"the forward pass failed: {type(error).__name__}: {error}") from error

    def run_server(self) -> None:
        """Serve until interrupted on global rank 0, follow its signals on all others. Collective over the job.

        Raises:
            RuntimeError: on rank 0 if a forward pass failed while other ranks took part, on the others if the signals
                stop.
        """
        if torch.distributed.get_rank() == 0:
            self._serve()
        else:
            self.run_subscriber_loop()

    def run_subscriber_loop(self) -> None:
        """Take part in one forward pass per signal, forever.

        Raises:
            RuntimeError: a signal other than `FORWARD`, or the connection to rank 0 broke.
        """
        signal = torch.zeros(1, dtype=torch.int64)
        while True:
            torch.distributed.broadcast(signal, src=0, group=self._signal_group)
            if signal.item() != ServerSignal.FORWARD:
                raise RuntimeError(f"expected the signal {ServerSignal.FORWARD!r} from rank 0, got {signal.item()}")
            run_distributed_inference(infer_fn=self.infer_fn)

    def _serve(self) -> None:
        sizes = self.inference_micro_batch_size
        sizes = [sizes] if isinstance(sizes, int) else list(sizes)
        num_replicas = parallel_state.get_data_parallel_world_size()
        try:
            triton_endpoint.serve(
                self.answer,
                inputs=[
                    Tensor(name="sentences", shape=(-1,), dtype=bytes, optional=True),
                    Tensor(name="tokens", shape=(-1,), dtype=np.int64, optional=True),
                    Tensor(name="sequence_lengths", shape=(-1,), dtype=np.int64, optional=True),
                ],
                outputs=[Tensor(name="rewards", shape=(1,), dtype=np.float32)],
                model_name=self.model_name,
                address=self.address,
                port=self.port,
                max_queue_delay_microseconds=self.max_queue_delay_microseconds,
                preferred_batch_sizes=[size * num_replicas for size in sizes],
            )
        except RuntimeError as error:
            if self._failure is None:
                raise
            raise RuntimeError(f"the reward server ended: {self._failure}") from error
