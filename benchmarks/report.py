"""What the benchmarks print: the machine, and how what was measured stands to its targets."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nemo_aligner.compat import device

ROOT = Path(__file__).parents[1]


def hardware() -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    found = {"commit": commit.stdout.strip(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    if device.on_cpu():
        return {**found, "cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    query = ["nvidia-smi", "--query-gpu=name,power.limit,driver_version", "--format=csv,noheader"]
    return {**found, "gpu": subprocess.run(query, capture_output=True, text=True).stdout.strip()}


def measured_by(num_processes: int, module: str, *arguments: str, env: dict[str, str] | None = None) -> dict:
    """What `python -m module`, or as many processes of it under torchrun, save as JSON where `--save` says."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable]
        if num_processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        subprocess.run([*command, "-m", module, *arguments, "--save", str(result)], env=env, check=True)
        return json.loads(result.read_text())


def say(line: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, flush=True)


def say_verdicts(lines: list[tuple[str, float, str, bool]]) -> None:
    say("")
    for name, value, target, is_met in lines:
        say(f"{name:40}{value:>9.3f}{target:>10}   {'PASS' if is_met else 'MISS'}")
