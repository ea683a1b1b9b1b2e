"""Start a server in a process of its own and talk to it."""

import os
import time
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import torch
from pytriton.client import ModelClient
from pytriton.client.exceptions import PyTritonClientError

from tests.hurtable_server import skip_if_triton_cannot_run
from tests.ports import free_port

MODEL = "reward_model"
JOB_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")


def client(port: int, wait_s: float = 60) -> ModelClient:
    return ModelClient(f"http://127.0.0.1:{port}", MODEL, init_timeout_s=wait_s, inference_timeout_s=60)


@contextmanager
def server_process(serve, *args):
    """Run `serve(port, *args)`, a function at the top of a module, in a process; yields (port, process) once ready."""
    skip_if_triton_cannot_run()
    port = free_port()
    process = torch.multiprocessing.get_context("spawn").Process(target=_serve, args=(serve, port, *args))
    process.start()
    try:
        with client(port) as asker:
            wait_until_ready(asker, process.is_alive)
        yield port, process
    finally:
        process.terminate()
        process.join(30)
        process.kill()


def _serve(serve, *args):
    for name in JOB_VARIABLES:
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    serve(*args)


def wait_until_ready(asker: ModelClient, is_alive: Callable[[], bool], wait_s: float = 90) -> None:
    give_up = time.monotonic() + wait_s
    while True:
        try:
            return asker.wait_for_model(1)
        except (PyTritonClientError, OSError):
            assert is_alive() and time.monotonic() < give_up, "the server did not come up"
            time.sleep(0.2)


def tokens_request(*rows) -> dict[str, np.ndarray]:
    """`tokens` [B, S], padded with 0, and `sequence_lengths` [B, 1]."""
    width = max(map(len, rows))
    return {
        "tokens": np.array([[*row, *[0] * (width - len(row))] for row in rows]),
        "sequence_lengths": np.array([[len(row)] for row in rows]),
    }


def bytes_column(*texts: str | bytes) -> np.ndarray:
    """UTF-8 bytes [B, 1]."""
    rows = [[text.encode() if isinstance(text, str) else text] for text in texts]
    return np.array(rows, dtype=np.object_)
