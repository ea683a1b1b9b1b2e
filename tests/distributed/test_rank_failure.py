"""An error on one rank ends the job on all ranks, with that rank's message last, under every launcher."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.test_training_script import K, command, environment, workplace
from tests.ports import free_port

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


def run_ranks(tmp_path: Path, body: str, world_size: int = 2) -> tuple[list[int], list[str], float]:
    """Exit codes, lines of the shared stderr and seconds of processes that run PREAMBLE and `body` behind it."""
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
        codes = [process.wait(LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, (tmp_path / "stderr").read_text().splitlines(), time.monotonic() - started


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
    codes, lines, _ = run_ranks(tmp_path, body, world_size=3)
    assert codes == [1, 1, 1]
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
    codes, lines, seconds = run_ranks(tmp_path, body)
    assert codes == [-signal.SIGKILL, 1] and seconds < LIMIT_S
    assert lines[-1] == "rank 1 ends, as the store that the ranks share is gone"


def test_ranks_that_end_at_different_times_leave_each_other_alone(tmp_path):
    codes, lines, _ = run_ranks(tmp_path, "time.sleep(rank * 3)")
    assert codes == [0, 0] and lines == []


def test_one_process_fails_as_python_does(tmp_path):
    codes, lines, _ = run_ranks(tmp_path, "raise ValueError('alone')", world_size=1)
    assert codes == [1] and lines[-1].endswith("ValueError: alone")


# ---- the training script

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]


# What srun tells the tasks of a job on one node, beside their numbers. Without MASTER_PORT the job's id gives the port.
SLURM = {
    "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "test", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0",
}  # fmt: skip


def start_script(
    launcher: str, script: Path, arguments: list, workplace: Path, **variables: str
) -> tuple[list[int], str]:
    """Exit codes of the launcher, or of both ranks without one, and what went to stderr."""
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
        ("torchrun", "data", 1, "OSError: the prompts are gone"),
        # replicas with unequal numbers of rollouts would enter collectives of training unequally often
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
    if launcher == "torchrun":  # which adds what it read in the failed rank's file
        assert message in lines and f"rank      : {rank} (local_rank: {rank})\n  exitcode  : 1" in stderr
    else:
        assert lines[-1] == message, stderr[-3000:]
