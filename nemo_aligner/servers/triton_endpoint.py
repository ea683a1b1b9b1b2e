"""Serves one scoring function at an HTTP endpoint that speaks the KServe v2 protocol, through PyTriton.

Triton's batcher merges requests that arrive together. Each of them is answered separately, with a result or an error.
"""

import os
import re
import signal
import socket
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pytriton.triton
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.models.model import Model
from pytriton.triton import Triton, TritonConfig

from nemo_aligner.servers.gate import Gate
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.server_utils import RewardError, one_line
from nemo_aligner.utils.value_rules import COUNT, PORT, WHOLE_FROM_0, Rule, check_section

LOOPBACK = "127.0.0.1"
MAX_BATCH = 9999999
MAX_REQUEST_TOKENS = 4 * 2**20

Request = dict[str, np.ndarray]


def serve(
    answer: Callable[[list[Request]], list[Request | Exception]],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    model_name: str,
    address: str,
    port: int,
    max_queue_delay_microseconds: int,
    preferred_batch_sizes: list[int] | None = None,
) -> None:
    """Answer requests at `http://<address>:<port>` until SIGINT or SIGTERM. Call it in the main thread.

    Args:
        answer: takes the inputs of all merged requests, returns outputs or an exception for each of them, in order. A
            `ValueError` is the client's fault (400), any other exception the server's (500). Called in one thread.
        inputs, outputs: the tensors, without the batch dimension. Inputs of different widths are merged too.
        preferred_batch_sizes: numbers of rows that the batcher tries to collect.

    Raises:
        RuntimeError: Triton exited on its own.
    """
    _let_triton_find_python()
    batcher = DynamicBatcher(
        max_queue_delay_microseconds=max_queue_delay_microseconds, preferred_batch_size=preferred_batch_sizes
    )
    with (
        _stop_signals() as received,
        Gate(address, port, model_name) as gate,
        _reserved_loopback_port() as triton_port,  # after the gate has bound its port
    ):
        endpoint = TritonConfig(
            allow_http=True, allow_grpc=False, allow_metrics=False, http_address=LOOPBACK, http_port=triton_port
        )
        try:
            server = Triton(config=endpoint)
            server._triton_server_config["reuse-http-port"] = "true"  # TritonConfig has no field for it
            with server as triton:
                with _requests_apart():
                    triton.bind(
                        model_name=model_name,
                        infer_func=lambda requests: [_as_outputs(each) for each in answer([dict(r) for r in requests])],
                        inputs=inputs,
                        outputs=outputs,
                        config=ModelConfig(max_batch_size=MAX_BATCH, batcher=batcher),
                    )
                with gate.running(triton_port):
                    logging.info(f"serving {model_name!r} at http://{address}:{port}")
                    triton.serve()
        except KeyboardInterrupt:
            pass  # during start-up; later, Triton catches it
    if not received:
        raise RuntimeError("the Triton server ended by itself; its log is above")
    logging.info(f"{model_name!r} at http://{address}:{port} has stopped")


@contextmanager
def _stop_signals():
    """Within the context SIGINT and SIGTERM raise `KeyboardInterrupt`; yields the list of those received."""
    received = []

    def interrupt(signum, frame):
        received.append(signum)
        raise KeyboardInterrupt

    before = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _let_triton_find_python() -> None:
    """Triton's worker loads the first libpython on the library path, which may belong to another Python."""
    folders = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
    os.environ["LD_LIBRARY_PATH"] = ":".join(folder for folder in folders if folder)


@contextmanager
def _reserved_loopback_port():
    """A port that, within the context, only this user's sockets with SO_REUSEPORT can bind.

    Triton needs seconds until it listens. A port that was merely found free may meanwhile be taken by any connection.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((LOOPBACK, 0))
        yield holder.getsockname()[1]


# PyTriton 0.7.0 answers a merged batch as a whole: one failing request fails them all. Triton itself supports an error
# per request, so the code that PyTriton passes to Triton's worker is patched to signal one through an output named
# "error", with the kind of the error and its message. PyTriton also never marks inputs as ragged, without which Triton
# merges only requests of equal widths. Removal: when PyTriton supports both.
_ERROR_ANSWERS = b"""

_wrap_outputs = _wrap_response


def _wrap_response(response, requested_outputs_names, model_outputs_dict):
    if "error" not in response.data:
        return _wrap_outputs(response, requested_outputs_names, model_outputs_dict)
    kind, message = [part.decode() for part in response.data["error"][0]]
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, getattr(pb_utils.TritonError, kind)))
"""


class _ModelOfSeparateRequests(Model):
    def get_proxy_model_files(self) -> dict[str, bytes]:
        files = super().get_proxy_model_files()
        worker = f"file:{self.model_version}/model.py"
        assert b"\ndef _wrap_response(response: Response, " in files[worker], "PyTriton has changed: see _ERROR_ANSWERS"
        return {**files, worker: files[worker] + _ERROR_ANSWERS}

    def get_model_config(self) -> dict:
        config = super().get_model_config()
        return {**config, "input": [{**tensor, "allow_ragged_batch": True} for tensor in config["input"]]}


@contextmanager
def _requests_apart():
    """Within the context, models bound to PyTriton may get requests of different widths, each answered on its own.

    Only there, so as not to change models that the process binds elsewhere.
    """
    before, pytriton.triton.Model = pytriton.triton.Model, _ModelOfSeparateRequests
    try:
        yield
    finally:
        pytriton.triton.Model = before


def _as_outputs(answer: Request | Exception) -> Request:
    if not isinstance(answer, Exception):
        return answer
    kind = "INVALID_ARG" if isinstance(answer, ValueError) else "INTERNAL"
    is_told = isinstance(answer, (ValueError, RewardError))  # a message of this library needs no exception name
    message = one_line(str(answer) if is_told else f"{type(answer).__name__}: {answer}", limit=1000)
    return {"error": np.array([[kind.encode(), message.encode()]], dtype=np.object_)}


# Keys of the section `inference`.
_REQUIRED = {
    "port": PORT,
    "model_name": Rule(
        lambda value: isinstance(value, str) and re.fullmatch(r"[\w.-]+", value, re.ASCII) is not None,
        "a name of letters, digits, dots, dashes and underscores",
    ),
}
_OPTIONAL = {
    "address": Rule(lambda value: isinstance(value, str) and value != "", "an IPv4 address or name of this machine"),
    "max_queue_delay_microseconds": WHOLE_FROM_0,
    "max_request_tokens": COUNT,
}


def check_inference_config(section: DictConfig | None, further_keys: Mapping[str, Rule] | None = None) -> dict:
    """Check the section `inference` of a server's configuration and return it as a plain dict.

    Args:
        further_keys: required keys in addition to the endpoint's own.

    Raises:
        ConfigError: one line naming a key that is unknown, missing or has an invalid value.
    """
    required = {**_REQUIRED, **(further_keys or {})}
    known = (*required, *_OPTIONAL)
    if not OmegaConf.is_dict(section):
        raise ConfigError(f"inference={section!r} must be a section with keys, of {', '.join(known)}")
    for key in section:
        if key not in known:
            raise ConfigError(f"inference.{key} is not known; the keys are {', '.join(known)}")
    check_section(section, required, _OPTIONAL, prefix="inference.")
    return OmegaConf.to_container(section, resolve=True)


def check_port_is_free(address: str, port: int) -> None:
    """Check the port early, before a model is loaded.

    Raises:
        ConfigError: one line, if this process cannot listen there.
    """
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        raise ConfigError(
            f"inference.address={address}, inference.port={port}: cannot listen there ({error.strerror}); "
            "stop what does, or give another port or address"
        ) from error
