"""An error on one rank ends the job on all ranks, with that rank's message last, under every launcher."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from transformers import LlamaForSequenceClassification

from nemo_aligner.convert.hf_to_nemo import convert
from nemo_aligner.utils.run_lock import hold_log_dir
from tests.distributed.serving import MODEL, client, wait_until_ready
from tests.distributed.test_training_script import K, command, environment, workplace
from tests.hurtable_server import skip_if_triton_cannot_run
from tests.ports import free_port
from tests.tiny import save_tiny_llama

__all__ = ["workplace"]  # a fixture
LIMIT_S = 60
PREAMBLE = """
import datetime, os, signal, sys, time
import torch
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.rank_failure import end_all_ranks_on_error

def collective():
    torch.distributed.all_reduce(torch.ones(1))

rank = int(os.environ["RANK"])
with end_all_ranks_on_error():
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
    collective()
    time.sleep(1)
"""


def run_ranks(tmp_path: Path, body: str, world_size: int = 2) -> tuple[list[int], list[str], list[float]]:
    """Run PREAMBLE followed by `body` in processes; returns exit codes, lines of the shared stderr and durations."""
    seconds = {}
    script = tmp_path / "ranks.py"
    script.write_text(PREAMBLE + "".join(f"    {line}\n" for line in body.strip().splitlines()))
    environments = [
        {
            **environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
        }
        for port in [free_port()] for rank in range(world_size)
    ]  # fmt: skip
    started = time.monotonic()
    with open(tmp_path / "stderr", "a") as stderr:
        processes = [subprocess.Popen([sys.executable, script], stderr=stderr, env=env) for env in environments]
    try:
        while len(seconds) < world_size and time.monotonic() - started < LIMIT_S:
            for process in processes:
                if process.poll() is not None:
                    seconds.setdefault(process, time.monotonic() - started)
            time.sleep(0.02)
        codes = [process.wait(0) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, (tmp_path / "stderr").read_text().splitlines(), [seconds[process] for process in processes]


@pytest.mark.parametrize("failing", [0, 2])
def test_one_rank_fails_while_one_works_and_one_waits(tmp_path, failing):
    body = f"""
if rank == {failing}:
    raise RuntimeError("out of memory,\\n sadly")
while rank == {(failing + 1) % 3}:
    print("busy", file=sys.stderr, flush=True)
    time.sleep(0.01)
collective()
"""
    codes, lines, seconds = run_ranks(tmp_path, body, world_size=3)
    assert codes == [1, 1, 1]
    assert seconds[0] == min(seconds)  # or Lightning might see another rank fail and kill rank 0
    assert lines[-1] == f"error: rank {failing}: RuntimeError: out of memory, sadly"
    assert 'raise RuntimeError("out of memory' in "\n".join(lines), "the traceback is missing"


def test_a_mistake_of_the_user_is_one_line(tmp_path):
    codes, lines, _ = run_ranks(tmp_path, "if rank == 1: raise ConfigError('model.x=1 must be 2')\ncollective()")
    assert codes == [1, 2]
    assert lines == ["error: model.x=1 must be 2"]


def test_a_mistake_of_the_user_that_every_rank_finds_is_one_line(tmp_path):
    codes, lines, _ = run_ranks(tmp_path, "raise ConfigError('model.x=1 must be 2')")
    assert codes == [2, 2]
    assert lines == ["error: model.x=1 must be 2"]


def test_of_several_errors_the_first_is_last(tmp_path):
    body = "time.sleep(rank * 0.2)\nraise ValueError(f'the error of rank {rank}')"
    codes, lines, _ = run_ranks(tmp_path, body)
    assert codes == [1, 1]
    assert lines[-1] == "error: rank 0: ValueError: the error of rank 0"


def test_a_rank_that_is_killed_takes_the_others_along(tmp_path):
    body = "if rank == 0: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)"
    codes, lines, _ = run_ranks(tmp_path, body)
    assert codes == [-signal.SIGKILL, 1]
    assert lines[-1] == "rank 1 ends, as the store that the ranks share is gone"


def test_ranks_that_end_at_different_times_leave_each_other_alone(tmp_path):
    codes, lines, _ = run_ranks(tmp_path, "time.sleep(rank * 3)")
    assert codes == [0, 0] and lines == []


def test_a_rank_that_waits_for_more_when_rank_0_is_done_fails_as_python_does(tmp_path):
    codes, lines, _ = run_ranks(tmp_path, "if rank == 1:\n    while True: collective()")
    assert codes == [0, 1]
    assert "RuntimeError: " in lines[-1] and not any(line.startswith("error: ") for line in lines)


def test_one_process_fails_as_python_does(tmp_path):
    codes, lines, _ = run_ranks(tmp_path, "raise ValueError('alone')", world_size=1)
    assert codes == [1] and lines[-1].endswith("ValueError: alone")


# ---- the training script

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]


# What srun sets for the tasks of a one-node job, besides their numbers. Without MASTER_PORT the job id gives the port.
SLURM = {
    "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "test", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0",
}  # fmt: skip


def start_script(
    launcher: str, script: Path, arguments: list, workplace: Path, **variables: str
) -> tuple[list[int], str]:
    """Exit codes of the launcher (or of both ranks if there is none), and the stderr output."""
    port = str(free_port())
    tasks = [{**SLURM, "MASTER_PORT": port, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    starts = {
        "lightning": [([sys.executable], {})],
        "torchrun": [(TORCHRUN, {})],
        "slurm": [([sys.executable], task) for task in tasks],
    }
    log = workplace / f"{launcher}.stderr"
    with log.open("w") as stderr:
        processes = [
            subprocess.Popen(
                [*start, script, *arguments], cwd=workplace, env={**environment(), **variables, **own},
                stdout=subprocess.DEVNULL, stderr=stderr,
            )
            for start, own in starts[launcher]
        ]  # fmt: skip
    try:
        return [process.wait(120) for process in processes], log.read_text()
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    ("launcher", "place", "rank", "message"),
    [
        ("lightning", "loss", 0, "ValueError: a loss that is none"),
        ("lightning", "infer", 1, "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"),
        ("torchrun", "data", 1, "RuntimeError: the prompts are odd"),
        # replicas with unequal numbers of rollouts would enter different numbers of training collectives
        ("slurm", "select", 1, f"ValueError: this replica has 1 rollouts to train on, but each replica must have {K}"),
    ],
)
def test_an_error_in_the_training_script(workplace, launcher, place, rank, message):
    script = Path(__file__).with_name("fail_on_rank.py")
    arguments = command(f"fails_{place}", "trainer.devices=2")[2:]
    started = time.monotonic()
    codes, stderr = start_script(launcher, script, arguments, workplace, FAIL=f"{place}:{rank}")
    assert set(codes) == {1}, stderr[-3000:]
    assert time.monotonic() - started < LIMIT_S
    message, lines = f"error: rank {rank}: {message}", stderr.splitlines()
    if launcher == "torchrun":  # torchrun appends what it reads from the failed rank's file
        assert message in lines and f"rank      : {rank} (local_rank: {rank})\n  exitcode  : 1" in stderr
    else:
        assert lines[-1] == message, stderr[-3000:]


def test_prompts_that_one_rank_cannot_read_end_the_run_on_all_in_one_line(workplace):
    script = Path(__file__).with_name("fail_on_rank.py")
    codes, stderr = start_script(
        "slurm", script, command("fails_disk", "trainer.devices=2")[2:], workplace, FAIL="disk:1"
    )
    assert codes == [2, 2], stderr[-3000:]
    assert stderr.splitlines()[-1] == "error: the prompts are gone" and stderr.count("the prompts are gone") == 1


@pytest.mark.parametrize(("launcher", "codes"), [("lightning", [2]), ("slurm", [2, 1]), ("torchrun", [1])])
def test_a_log_folder_that_another_run_holds(workplace, launcher, codes):
    """Only rank 0 detects this, before the model is restored."""
    hold_log_dir(workplace / "held")
    arguments = command("held", "trainer.devices=2")[2:]
    script = Path(__file__).parents[2] / "examples/nlp/gpt/train_gpt_rs_actor.py"
    started = time.monotonic()
    ended, stderr = start_script(launcher, script, arguments, workplace)
    assert ended == codes and time.monotonic() - started < LIMIT_S
    lines = [line for line in stderr.splitlines() if "is in use by" in line]
    assert len(lines) == 1 and lines[0].startswith(f"error: the log folder held is in use by process {os.getpid()} on ")
    if launcher != "torchrun":  # torchrun appends its own message
        assert stderr.splitlines()[-1] == lines[0]


# ---- the reward model's server

# One row of three tokens.
REQUEST = json.dumps({
    "inputs": [
        {"name": "tokens", "shape": [1, 3], "datatype": "INT64", "data": [1, 2, 3]},
        {"name": "sequence_lengths", "shape": [1, 1], "datatype": "INT64", "data": [3]},
    ]
}).encode()  # fmt: skip


@pytest.fixture(scope="module")
def reward_nemo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    classifier = save_tiny_llama(
        folder / "hf", model_class=LlamaForSequenceClassification, num_labels=1, pad_token_id=0
    )
    convert(classifier, folder / "reward.nemo")
    return folder / "reward.nemo"


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "RuntimeError: the reward server ended: no room"),
        (1, "MemoryError: no room"),  # while rank 0 waits for rank 1 in the forward pass
    ],
)
def test_an_error_in_the_reward_server(reward_nemo, tmp_path, rank, message):
    skip_if_triton_cannot_run()
    port = free_port()
    command = [
        sys.executable, Path(__file__).with_name("fail_on_rank.py"), f"rm_model_file={reward_nemo}",
        f"inference.port={port}", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32",
        "+model.tensor_model_parallel_size=2",
    ]  # fmt: skip
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=tmp_path, env={**environment(), "FAIL": f"score:{rank}"}, stdout=subprocess.DEVNULL,
            stderr=stderr,
        )  # fmt: skip
    ranks, triton = [], []
    try:
        with client(port) as asker:
            wait_until_ready(asker, lambda: process.poll() is None)
        for child in psutil.Process(process.pid).children(recursive=True):
            (ranks if any("fail_on_rank" in word for word in child.cmdline()) else triton).append(child)
        started = time.monotonic()
        with pytest.raises(OSError):  # a 500 response, or none at all
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/{MODEL}/infer", REQUEST, timeout=LIMIT_S)
        assert process.wait(LIMIT_S) == 1
        _, left = psutil.wait_procs(ranks, timeout=LIMIT_S)
        assert len(ranks) == 1 and left == [] and time.monotonic() - started < LIMIT_S
    finally:
        process.kill()
        for child in (*ranks, *triton):  # Triton may wait half a minute for responses that never come
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    assert log.read_text().splitlines()[-1] == f"error: rank {rank}: {message}", log.read_text()[-3000:]
