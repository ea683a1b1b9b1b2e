"""Named connections to Triton inference servers."""

import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from nemo.utils import logging
from pytriton.client import ModelClient
from pytriton.client.exceptions import PyTritonClientTimeoutError
from pytriton.client.warnings import NotSupportedTimeoutWarning
from tritonclient.utils import InferenceServerException

# A request may queue at the server behind those of all other replicas.
INFERENCE_TIMEOUT_S = 600_000
# A server that has answered before gets this long to answer again before a request to it fails.
RETURN_TIMEOUT_S = 300
NUM_THREADS = 32

# PyTriton finds it strange that an answer may take longer than the server's start.
warnings.filterwarnings("ignore", category=NotSupportedTimeoutWarning)


class HTTPCommunicator:
    """Sends batches to servers that speak the KServe v2 protocol over HTTP with binary tensors.

    Its clients hold threads: `close()` it.
    """

    def __init__(self, init_timeout_s: float = 6000):
        """`init_timeout_s`: how long `add_server_by_name` waits for a server to come up, in seconds."""
        self.init_timeout_s = init_timeout_s
        self.connections: dict[str, tuple[str, int, BackgroundClient]] = {}

    @classmethod
    def create_http_communicator_from_dict(cls, servers: dict[str, tuple[str, int]]) -> "HTTPCommunicator":
        """Connect to every server of `servers`, {name: (ip, port)}."""
        communicator = cls()
        for name, (ip, port) in servers.items():
            communicator.add_server_by_name(name, ip=ip, port=port)
        communicator.print_server_dict()
        return communicator

    def add_server_by_name(self, server_name: str, ip: str = "localhost", port: int = 5555) -> None:
        """Wait until the server has loaded the model `server_name`, and keep a client for it.

        Raises:
            TimeoutError: it did not come up in `init_timeout_s` seconds.
        """
        if not self.is_ready(server_name, ip, port, self.init_timeout_s):
            raise TimeoutError(no_answer(server_name, ip, port, self.init_timeout_s))
        self.connections[server_name] = (ip, port, BackgroundClient(_url(ip, port), server_name))

    @staticmethod
    def is_ready(server_name: str, ip: str, port: int, wait_s: float) -> bool:
        """Whether the server answers and has the model, asked again and again for up to about `wait_s` seconds."""
        with ModelClient(_url(ip, port), server_name, init_timeout_s=wait_s, inference_timeout_s=wait_s) as client:
            try:
                client.wait_for_model(wait_s)
            except PyTritonClientTimeoutError:
                return False
            except (InferenceServerException, OSError):  # it went away between two questions
                time.sleep(min(wait_s, 1.0))
                return False
        return True

    def print_server_dict(self) -> None:
        """Log the name and address of every connection."""
        for name, (ip, port, _) in self.connections.items():
            logging.info(f"inference server {name!r} at {_url(ip, port)}")

    def send_data_to_server(self, server_name: str, data: dict[str, np.ndarray], batching: bool = True) -> Future:
        """Send arrays and return at once; the future's `result()` is a dict of arrays.

        `batching=False` sends a single sample, without a batch dimension, and its answer has none either.
        """
        _, _, client = self.connections[server_name]
        return client.send(data, batching)

    def close(self) -> None:
        """Close every client and return at once. Requests not yet begun are dropped, those under way end unheard."""
        for _, _, client in self.connections.values():
            client.close()
        self.connections.clear()


class BackgroundClient:
    """Requests to one model, each in a thread and over a connection of its own.

    PyTriton's `FuturesModelClient` does the same, but a process that fails without closing it never ends: its threads
    wait for more work. A connection per request costs a millisecond and cannot go stale during a training phase.
    """

    def __init__(self, url: str, model_name: str):
        self.url = url
        self.model_name = model_name
        self._executor = ThreadPoolExecutor(NUM_THREADS)

    def send(self, data: dict[str, np.ndarray], batching: bool) -> Future:
        """Start a request; see `HTTPCommunicator.send_data_to_server`."""
        return self._executor.submit(self._request, data, batching)

    def _request(self, data: dict[str, np.ndarray], batching: bool) -> dict[str, np.ndarray]:
        with ModelClient(
            self.url, self.model_name, init_timeout_s=RETURN_TIMEOUT_S, inference_timeout_s=INFERENCE_TIMEOUT_S
        ) as client:
            return client.infer_batch(**data) if batching else client.infer_sample(**data)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


def no_answer(server_name: str, ip: str, port: int, waited_s: float) -> str:
    """One line for a server that did not come up."""
    return (
        f"no model {server_name!r} at {_url(ip, port)} after {waited_s:.0f} s; start the server, or correct "
        "remote_rm.reward_model.name, .ip and .port"
    )


def _url(ip: str, port: int) -> str:
    return f"http://{ip}:{port}"
