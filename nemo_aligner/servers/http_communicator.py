"""Named connections to Triton inference servers, with retries.

Requests are idempotent, so failed ones are retried: until a deadline if the server does not answer, a few times if its
answers are bad. The error that ends the attempts contains the server's address and its last answer.
"""

import logging as python_logging
import re
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import gevent
import numpy as np
import tenacity
from nemo.utils import logging
from pytriton.client import ModelClient
from pytriton.client.exceptions import PyTritonClientInferenceServerError, PyTritonClientTimeoutError
from pytriton.client.warnings import NotSupportedTimeoutWarning
from tritonclient.utils import InferenceServerException

from nemo_aligner.utils.server_utils import RewardError, one_line

INIT_TIMEOUT_S = 6000
REQUEST_TIMEOUT_S = 600
RETRY_DEADLINE_S = 3600
# A request answered with an error will most likely fail again; these attempts take about 20 seconds.
MAX_BAD_ANSWERS = 6
# Answers of a proxy in front of a server that is down.
UNAVAILABLE_STATUS = ("502", "503", "504")
MAX_REQUESTS_AT_ONCE = 8

Check = Callable[[dict[str, np.ndarray]], None]

# Failures that it logs as errors are retried, and reported if retries do not help.
python_logging.getLogger("pytriton.client.client").setLevel(python_logging.CRITICAL)
# PyTriton warns if the inference timeout exceeds the init timeout.
warnings.filterwarnings("ignore", category=NotSupportedTimeoutWarning)


class NoAnswer(Exception):
    """The server could not be reached, or did not answer in time."""


class TooSlow(NoAnswer):
    """The server accepted the request, but did not answer in time."""


class BadAnswer(Exception):
    """The server answered with an error, or with an unexpected reply."""


class HTTPCommunicator:
    """Sends batches to servers that speak the KServe v2 protocol over HTTP with binary tensors.

    Each request runs in its own thread until `close()`.
    """

    def __init__(
        self,
        init_timeout_s: float = INIT_TIMEOUT_S,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        retry_deadline_s: float = RETRY_DEADLINE_S,
    ):
        """
        Args:
            init_timeout_s: how long `add_server_by_name` waits for a server to come up, in seconds.
            request_timeout_s: timeout of the first attempt. It doubles after each timeout, so that retries do not keep
                a slow server from catching up.
            retry_deadline_s: how long after its first attempt an unanswered request is still retried.
        """
        self.init_timeout_s = init_timeout_s
        self.request_timeout_s = request_timeout_s
        self.retry_deadline_s = retry_deadline_s
        self.connections: dict[str, tuple[str, int, PersistentClient]] = {}

    @classmethod
    def create_http_communicator_from_dict(cls, servers: dict[str, tuple[str, int]]) -> "HTTPCommunicator":
        """Connect to every server of `servers`, {name: (ip, port)}."""
        communicator = cls()
        for name, (ip, port) in servers.items():
            communicator.add_server_by_name(name, ip=ip, port=port)
        communicator.print_server_dict()
        return communicator

    def add_server_by_name(self, server_name: str, ip: str = "localhost", port: int = 5555) -> None:
        """Wait until the server has loaded the model `server_name`, and create a client for it.

        Raises:
            TimeoutError: it did not come up within `init_timeout_s` seconds.
        """
        if not self.is_ready(server_name, ip, port, self.init_timeout_s):
            raise TimeoutError(not_there(server_name, ip, port, self.init_timeout_s))
        client = PersistentClient(_url(ip, port), server_name, self.request_timeout_s, self.retry_deadline_s)
        self.connections[server_name] = (ip, port, client)

    @staticmethod
    def is_ready(server_name: str, ip: str, port: int, wait_s: float) -> bool:
        """Whether the server answers and has the model; polls for up to about `wait_s` seconds."""
        with ModelClient(_url(ip, port), server_name, init_timeout_s=wait_s, inference_timeout_s=wait_s) as client:
            try:
                client.wait_for_model(wait_s)
            except PyTritonClientTimeoutError:
                return False
            except (InferenceServerException, OSError):  # it went down between two polls
                time.sleep(min(wait_s, 1.0))
                return False
        return True

    def print_server_dict(self) -> None:
        """Log the name and address of every connection."""
        for name, (ip, port, _) in self.connections.items():
            logging.info(f"inference server {name!r} at {_url(ip, port)}")

    def send_data_to_server(
        self,
        server_name: str,
        data: Mapping[str, np.ndarray],
        batching: bool = True,
        *,
        further: Mapping[str, np.ndarray] | None = None,
        check: Check | None = None,
    ) -> Future:
        """Send arrays and return at once; the future's `result()` is a dict of arrays.

        Args:
            batching: False sends a single sample without a batch dimension; its answer has none either.
            further: optional arrays; each is omitted if the server does not declare its name.
            check: raises `ValueError` for an invalid answer.

        The future raises `RewardError`, one line with the address, the request and the answer.
        """
        _, _, client = self.connections[server_name]
        return client.send(data, batching, further or {}, check or (lambda reply: None))

    def close(self) -> None:
        """Close every client and return at once. Answers to requests in flight are discarded."""
        for _, _, client in self.connections.values():
            client.close()
        self.connections.clear()


class PersistentClient:
    """Requests to one model, each in its own thread and over its own connection, with retries.

    PyTriton's `FuturesModelClient` uses threads too, but a process that fails without closing it never exits: the
    threads wait for more work. A connection per request costs a millisecond and cannot go stale during a training
    phase.
    """

    def __init__(self, url: str, model_name: str, request_timeout_s: float, retry_deadline_s: float):
        self.url = url
        self.model_name = model_name
        self.request_timeout_s = request_timeout_s
        self.retry_deadline_s = retry_deadline_s
        self._closed = threading.Event()
        self._slots = threading.Semaphore(MAX_REQUESTS_AT_ONCE)

    def send(self, data: Mapping[str, np.ndarray], batching: bool, further: Mapping, check: Check) -> Future:
        """Start a request; see `HTTPCommunicator.send_data_to_server`."""
        future = Future()
        # A daemon, so that a hanging server cannot keep this process from exiting.
        threading.Thread(target=self._fulfil, args=(future, data, batching, further, check), daemon=True).start()
        return future

    def close(self) -> None:
        """Stop retrying."""
        self._closed.set()

    def _fulfil(self, future: Future, data, batching: bool, further: Mapping, check: Check) -> None:
        try:
            with self._slots:
                future.set_result(self._request_until_answered(data, batching, further, check))
        except BaseException as error:
            future.set_exception(error)
        finally:
            gevent.get_hub().destroy(destroy_loop=True)  # created by tritonclient for this thread

    def _request_until_answered(self, data, batching: bool, further: Mapping, check: Check) -> dict[str, np.ndarray]:
        first_sent = time.monotonic()
        num_bad_answers, timeout_s = 0, self.request_timeout_s

        def attempt() -> dict[str, np.ndarray]:
            nonlocal num_bad_answers, timeout_s
            remaining = first_sent + self.retry_deadline_s - time.monotonic()
            try:
                return self._request(data, batching, further, check, min(timeout_s, max(remaining, 1.0)))
            except TooSlow:
                timeout_s *= 2
                raise
            except BadAnswer:
                num_bad_answers += 1
                raise

        try:
            return tenacity.Retrying(
                retry=tenacity.retry_if_exception_type((NoAnswer, BadAnswer)),
                wait=tenacity.wait_exponential(multiplier=0.5, max=15) + tenacity.wait_random(0, 0.5),
                stop=tenacity.stop_any(
                    tenacity.stop_before_delay(self.retry_deadline_s),
                    tenacity.stop_when_event_set(self._closed),
                    lambda state: num_bad_answers >= MAX_BAD_ANSWERS,
                ),
                sleep=tenacity.sleep_using_event(self._closed),
                before_sleep=self._log_retry,
                reraise=True,
            )(attempt)
        except (NoAnswer, BadAnswer) as error:
            asked = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in data.items())
            raise RewardError(
                f"{self._server()} gave no usable answer to a request ({asked}) in "
                f"{time.monotonic() - first_sent:.0f} s; last: {error}"
            ) from error

    def _request(self, data, batching: bool, further: Mapping, check: Check, timeout_s: float) -> dict[str, np.ndarray]:
        """One attempt.

        Raises:
            NoAnswer, BadAnswer: with the failure in one line.
        """
        # A new client checks whether the model is ready; its timeout is short because the request is retried.
        with ModelClient(self.url, self.model_name, init_timeout_s=1, inference_timeout_s=timeout_s) as client:
            try:
                declared = {spec.name for spec in client.model_config.inputs}
                arrays = {**data, **{name: array for name, array in further.items() if name in declared}}
                reply = client.infer_batch(**arrays) if batching else client.infer_sample(**arrays)
                check(reply)
            except PyTritonClientInferenceServerError as error:
                if not isinstance(error.__cause__, InferenceServerException):
                    raise BadAnswer(one_line(str(error))) from error
                status, message = error.__cause__.status(), error.__cause__.message()
                kind = NoAnswer if status in UNAVAILABLE_STATUS else BadAnswer
                raise kind(f"the server's error {status}, {_last_error(message)}") from error
            except InferenceServerException as error:  # while checking whether the model is ready
                raise NoAnswer(one_line(str(error))) from error
            except PyTritonClientTimeoutError as error:
                if isinstance(error.__cause__, TimeoutError):
                    raise TooSlow(f"no answer in {timeout_s:.0f} s") from error
                raise NoAnswer(_reason(error)) from error
            except OSError as error:
                raise NoAnswer(one_line(f"{type(error).__name__}: {error}")) from error
            except Exception as error:  # a server with another protocol can cause any error in the client
                raise BadAnswer(one_line(f"{type(error).__name__}: {error}")) from error
        return reply

    def _log_retry(self, state: tenacity.RetryCallState) -> None:
        if state.attempt_number & (state.attempt_number - 1):  # only attempts 1, 2, 4, ...: an outage has thousands
            return
        logging.warning(
            f"{self._server()}: {state.outcome.exception()}; attempt {state.attempt_number} failed, next one in "
            f"{state.next_action.sleep:.1f} s"
        )

    def _server(self) -> str:
        return f"the server of {self.model_name!r} at {self.url}"


def _last_error(server_message: str) -> str:
    """The line with the last error in a server's answer, which may contain tracebacks."""
    errors = re.findall(r"^[\w.]+(?:Error|Exception): .*$", server_message, flags=re.MULTILINE)
    return errors[-1] if errors else one_line(server_message)


def _reason(error: PyTritonClientTimeoutError) -> str:
    """PyTriton reports every network error as a timeout."""
    if isinstance(error.__cause__, OSError):
        return one_line(f"{type(error.__cause__).__name__}: {error.__cause__}")
    return "no server answers there, or it has not loaded the model"


def not_there(server_name: str, ip: str, port: int, waited_s: float, key: str = "remote_rm") -> str:
    """One-line message for a server that did not come up; `key` is the section of the configuration that names it."""
    return (
        f"no model {server_name!r} at {_url(ip, port)} after {waited_s:.0f} s; start the server, or correct "
        f"{key}.reward_model.name, .ip and .port"
    )


def _url(ip: str, port: int) -> str:
    return f"http://{ip}:{port}"
