"""The overhead of the reward client, against a no-op server on the loopback device, compared with a naive client.

    python -m benchmarks.reward_client

The client sends micro-batches, as the trainer does. The naive client sends one rollout per request and waits for each
answer. Bytes are counted by the loopback device, in both directions, including headers and handshakes.
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import time

import nemo_aligner.compat.quiet_imports  # noqa: F401

# isort: split
import numpy as np
import psutil
import torch
from megatron.core import parallel_state
from omegaconf import OmegaConf
from pytriton.client import ModelClient

from nemo_aligner.compat import cpu
from nemo_aligner.models.nlp.gpt.reward_critic_clients import RemoteGPTRMClient


def serve(port: int, seconds_per_request: float, max_rows: int) -> None:
    """Run a server that answers 0 for every row."""
    from pytriton.decorators import batch
    from pytriton.model_config import ModelConfig, Tensor
    from pytriton.triton import Triton, TritonConfig

    os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")  # where Triton's worker finds libpython

    @batch
    def infer(tokens, sequence_lengths):
        time.sleep(seconds_per_request)
        return {"rewards": np.zeros((len(tokens), 1), dtype=np.float32)}

    endpoint = TritonConfig(allow_grpc=False, allow_metrics=False, http_address="127.0.0.1", http_port=port)
    with Triton(config=endpoint) as triton:
        triton.bind(
            model_name="reward_model",
            infer_func=infer,
            inputs=[Tensor(name=name, shape=(-1,), dtype=np.int64) for name in ("tokens", "sequence_lengths")],
            outputs=[Tensor(name="rewards", shape=(1,), dtype=np.float32)],
            config=ModelConfig(max_batch_size=max_rows),
        )
        triton.serve()


class Server:
    """The server, in its own process."""

    def __init__(self, seconds_per_request: float, max_rows: int):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, __file__, "--serve", str(self.port), str(seconds_per_request), str(max_rows)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def __enter__(self) -> RemoteGPTRMClient:
        server = {"name": "reward_model", "ip": "localhost", "port": self.port}
        self.client = RemoteGPTRMClient(OmegaConf.create({"reward_model": server, "pad_to_length": None}))
        return self.client

    def __exit__(self, *error) -> None:
        self.client.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def microbatches(num_rollouts: int, num_tokens: int, rows: int) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(1000, (num_rollouts, num_tokens))
    lengths = torch.full((num_rollouts,), num_tokens)
    return [
        {"response_tokens": some, "response_lengths": of_some}
        for some, of_some in zip(tokens.split(rows), lengths.split(rows), strict=True)
    ]


def score(client: RemoteGPTRMClient, batches: list[dict], seconds_to_generate: float = 0.0) -> None:
    futures = []
    for batch in batches:
        time.sleep(seconds_to_generate)
        futures.append(client.infer_rm(batch))
    for future in futures:
        future.result()


def score_naively(port: int, batches: list[dict]) -> None:
    for batch in batches:
        for tokens, length in zip(batch["response_tokens"], batch["response_lengths"], strict=True):
            with ModelClient(f"http://localhost:{port}", "reward_model") as client:
                client.infer_batch(tokens=tokens[None].numpy(), sequence_lengths=length[None, None].numpy())


def measure(function, repeats: int) -> tuple[float, float]:
    """Median seconds and bytes of a call, after one warm-up call."""
    function()
    seconds, sent = [], []
    for _ in range(repeats):
        before, start = psutil.net_io_counters(pernic=True)["lo"].bytes_sent, time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
        sent.append(psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before)
    return statistics.median(seconds), statistics.median(sent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a rollout")
    parser.add_argument("--microbatch", type=int, default=32, help="rollouts of a request")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(int(args.serve[0]), float(args.serve[1]), int(args.serve[2]))

    cpu.enable()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    batches = microbatches(args.rollouts, args.tokens, args.microbatch)
    token_bytes = args.rollouts * args.tokens * 8
    server = Server(0.0, args.rollouts)
    with server as client:
        ours, our_bytes = measure(lambda: score(client, batches), args.repeats)
        naive, naive_bytes = measure(lambda: score_naively(server.port, batches), 1)
    print(f"{args.rollouts} rollouts of {args.tokens} tokens, {args.microbatch} a request, no-op server, loopback")
    print(f"{'':24}{'ms per rollout':>16}{'bytes / token bytes':>21}")
    for name, seconds, sent in (("this client", ours, our_bytes), ("one request a rollout", naive, naive_bytes)):
        print(f"{name:24}{seconds * 1000 / args.rollouts:>16.3f}{sent / token_bytes:>21.3f}")
    print(f"{'ratio':24}{naive / ours:>15.1f}x")

    num_requests, seconds = len(batches), 0.5
    with Server(seconds, args.microbatch) as client:
        overlapped, _ = measure(lambda: score(client, batches, seconds), 1)
    both = num_requests * seconds
    print(f"\n{num_requests} micro-batches, generated in {both:.1f} s and scored in {both:.1f} s")
    print(f"together {overlapped:.2f} s; the longer one plus one micro-batch would be {both + seconds:.2f} s, ", end="")
    print(f"one after the other {2 * both:.1f} s")


if __name__ == "__main__":
    main()
