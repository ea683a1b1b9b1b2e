"""What the benchmarks print: the machine, and how what was measured stands to its targets."""

import os
import platform
import subprocess
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


def say(line: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, flush=True)


def say_verdicts(lines: list[tuple[str, float, str, bool]]) -> None:
    say("")
    for name, value, target, is_met in lines:
        say(f"{name:40}{value:>9.3f}{target:>10}   {'PASS' if is_met else 'MISS'}")
