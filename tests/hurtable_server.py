"""A reward server to inject faults into: a real Triton server without a model, in its own process, behind a proxy.

The reward of a row is the sum of its ids below its length, modulo 7.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import pytriton
from pytriton.utils.distribution import get_libs_path

from tests.ports import free_port

# Triton 2.51's message when it aborts during startup, which is rare; the server is then started again.
STILLBORN = "what():  boost::interprocess::lock_exception"
# Ways in which the server misbehaves.
ILLNESSES = ("none", "slow", "error", "nan", "wrong shape", "no rewards")


def skip_if_triton_cannot_run() -> None:
    """A server that can start prints its usage when given an argument that it does not understand."""
    server = Path(pytriton.__file__).parent / "tritonserver" / "bin" / "tritonserver"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(get_libs_path())}
    try:
        answer = subprocess.run([server, "--help"], env=environment, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"the Triton server does not start on this machine: {error}")
    if "Usage" not in answer.stdout + answer.stderr:
        pytest.skip(f"the Triton server does not start on this machine: {answer.stderr.strip()}")


class HurtableServer:
    """Starts, kills and restarts the server on one port."""

    def __init__(self, log: Path, illness: str = "none", seconds_per_request: float = 0.0):
        self.port = free_port()
        self.log, self.illness, self.seconds_per_request = log, illness, seconds_per_request
        self.process = None

    def start(self) -> None:
        """Start the server and return at once."""
        with self.log.open("a") as output:
            arguments = [str(self.port), self.illness, str(self.seconds_per_request)]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.hurtable_server", *arguments],
                cwd=Path(__file__).parents[1],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        from nemo_aligner.servers.http_communicator import HTTPCommunicator

        while not HTTPCommunicator.is_ready("reward_model", "localhost", self.port, wait_s=2):
            if self.process.poll() is not None:
                log = self.log.read_text()
                assert log.count(STILLBORN) == 1, f"the server ended:\n{log[-3000:]}"
                self.start()

    def kill(self) -> None:
        """Send SIGKILL to the server and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> "HurtableServer":
        self.start()
        self.wait_until_ready()
        return self

    def __exit__(self, *error) -> None:
        self.kill()


class DroppingProxy:
    """Forwards connections to a port, and drops every tenth request (POST) in the middle of the response."""

    def __init__(self, to_port: int):
        self.to_port = to_port
        self.num_requests = self.num_dropped = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.to_port))
                drops = threading.Event()
                for args in ((client, server, drops, True), (server, client, drops, False)):
                    threading.Thread(target=self._pump, args=args, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, drops: threading.Event, is_request: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_request and data.startswith(b"POST"):
                    with self._lock:
                        self.num_requests += 1
                        if self.num_requests % 10 == 0:
                            self.num_dropped += 1
                            drops.set()
                if drops.is_set() and not is_request:
                    data = data[: len(data) // 2]
                sink.sendall(data)
                if drops.is_set() and not is_request:
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def serve(port: int, illness: str, seconds_per_request: float) -> None:
    import sysconfig

    import numpy as np
    from pytriton.decorators import batch
    from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")  # where Triton's worker finds libpython

    @batch
    def infer(tokens, sequence_lengths):
        time.sleep(30 if illness == "slow" else seconds_per_request)
        if illness == "error":
            raise RuntimeError("out of order")
        is_content = np.arange(tokens.shape[1]) < sequence_lengths
        rewards = ((tokens * is_content).sum(axis=1, keepdims=True) % 7).astype(np.float32)
        if illness == "nan":
            rewards[-1] = np.nan
        if illness == "wrong shape":
            rewards = np.repeat(rewards, 2, axis=1)
        return {"values" if illness == "no rewards" else "rewards": rewards}

    output = Tensor(
        name="values" if illness == "no rewards" else "rewards",
        shape=(2 if illness == "wrong shape" else 1,),
        dtype=np.float32,
    )
    endpoint = TritonConfig(
        allow_http=True, allow_grpc=False, allow_metrics=False, http_address="127.0.0.1", http_port=port
    )
    with Triton(config=endpoint) as triton:
        triton.bind(
            model_name="reward_model",
            infer_func=infer,
            inputs=[Tensor(name=name, shape=(-1,), dtype=np.int64) for name in ("tokens", "sequence_lengths")],
            outputs=[output],
            config=ModelConfig(max_batch_size=1000, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        triton.serve()


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
