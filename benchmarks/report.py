"""What the benchmarks print: the machine, and the measurements against their targets."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
    """Run `python -m module` (under torchrun for several processes) and return the JSON that it writes to `--save`."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable]
        if num_processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        subprocess.run([*command, "-m", module, *arguments, "--save", str(result)], env=env, check=True)
        return json.loads(result.read_text())


def compare_replicas(
    num_replicas: int,
    module: str,
    steps_of: Callable[[dict], dict[str, list[float]]],
    rollouts_of_one: int,
    save: Path | None,
) -> None:
    """Compare the rollouts per second of several replicas with those of one replica alone.

    The two alternate, each time in new processes, because a machine can be faster or slower for minutes. `--devices 0`
    tells the script to measure as launched.

    Args:
        steps_of: maps what a run has saved to the seconds of its steps, for each case.
        rollouts_of_one: number of rollouts of one replica per step.
    """
    seconds = {1: {}, num_replicas: {}}
    for number in (1, num_replicas, 1, num_replicas):
        own = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"} if number == 1 else None
        for case, steps in steps_of(measured_by(number, module, *sys.argv[1:], "--devices", "0", env=own)).items():
            seconds[number].setdefault(case, []).extend(steps)
    target, lines, rates = 0.925 * num_replicas, [], {}
    for case in seconds[1]:
        rates[case] = [rollouts_of_one * number / statistics.median(steps[case]) for number, steps in seconds.items()]
        one, all_of_them = rates[case]
        say(f"{case}: rollouts/s of one replica {one:.1f}, of {num_replicas} {all_of_them:.1f}; seconds of the steps:")
        for number, steps in seconds.items():
            say(f"    {number}   {' '.join(f'{s:.3f}' for s in steps[case])}")
        ratio = all_of_them / one
        lines.append((f"{num_replicas} replicas / one, {case}", ratio, f">= {target:.2f}", ratio >= target))
    say_verdicts(lines)
    if save:
        found = {"machine": hardware(), "rollouts_per_s": rates, "steps_s": seconds}
        save.write_text(json.dumps(found, indent=2) + "\n")


def say(line: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, flush=True)


def say_verdicts(lines: list[tuple[str, float, str, bool]]) -> None:
    say("")
    for name, value, target, is_met in lines:
        say(f"{name:40}{value:>9.3f}{target:>10}   {'PASS' if is_met else 'MISS'}")
