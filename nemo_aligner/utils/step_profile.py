"""Profile of a few RS steps: torch profiler traces and a phase table."""

import contextlib
import gzip
import shutil
from pathlib import Path

import torch
from nemo.utils import logging

from nemo_aligner.compat import device
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.phases import phase_table

MAX_STEPS = 5
# A size that trace viewers can still open, and that hosts can still hold for eight ranks.
MAX_TRACE_BYTES = 500_000_000


def check_profile(num_steps) -> None:
    """Refuse a `trainer.rs.profile` that is not False, True (one step) or a small number of steps.

    Raises:
        ConfigError
    """
    if num_steps is not None and not (isinstance(num_steps, int) and 0 <= num_steps <= MAX_STEPS):
        raise ConfigError(
            f"trainer.rs.profile={num_steps!r} must be false, true, or the number of RS steps to trace, "
            f"at most {MAX_STEPS}"
        )


class StepProfile:
    """Traces `num_steps` RS steps, after one warm-up step, into `folder`.

    Each rank writes `step<s>-rank<r>-<half>.json.gz` in Chrome's trace format, one file per half of a step, because
    rollouts consist of many small operations, whose trace may be too large to keep. Rank 0 writes and logs the phase
    table.
    """

    def __init__(self, num_steps: int, folder: Path | None):
        """
        Args:
            num_steps: 0 disables profiling.

        Raises:
            ConfigError: if `num_steps` is invalid, or there is something to write but no folder.
        """
        check_profile(num_steps)
        if num_steps and folder is None:
            raise ConfigError("trainer.rs.profile writes to the log folder of exp_manager, which has set up none")
        self._num_steps = int(num_steps or 0)
        self._folder = folder
        self._warm_up_step: int | None = None
        self._table: dict[str, dict[str, float]] = {}

    @contextlib.contextmanager
    def trace(self, half: str, step: int):
        """Trace the body if `step` is to be traced; the first step seen is the warm-up."""
        if self._warm_up_step is None:
            self._warm_up_step = step
        if not self._is_traced(step):
            yield
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if not device.on_cpu():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            yield
        name = f"step{step}-rank{torch.distributed.get_rank()}-{half}.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        _write_compressed(profile, self._folder / name)

    def record(self, step: int, seconds: dict[str, float]) -> None:
        """Add a step's phases, as returned by `PhaseClock.consume`, to the table; the last step completes it."""
        if self._warm_up_step is None or not (step == self._warm_up_step or self._is_traced(step)):
            return
        self._table[f"step {step}, {'traced' if self._is_traced(step) else 'warm-up'}"] = seconds
        if self._num_steps and torch.distributed.get_rank() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "phases.txt").write_text(phase_table(self._table) + "\n")
            if len(self._table) == self._num_steps + 1:
                logging.info(f"phases of rank 0; traces are in {self._folder}\n{phase_table(self._table)}")

    def close(self) -> None:
        """Report if the run ended before all steps were traced."""
        num_traced = max(len(self._table) - 1, 0)
        if num_traced < self._num_steps:
            logging.warning(
                f"trainer.rs.profile: {num_traced} of {self._num_steps} step(s) were traced, as the run ended before; "
                "it needs one more step than are to be traced"
            )

    def _is_traced(self, step: int) -> bool:
        return 0 < step - self._warm_up_step <= self._num_steps


def _write_compressed(profile: torch.profiler.profile, path: Path) -> None:
    profile.export_chrome_trace(str(path))
    if path.stat().st_size > MAX_TRACE_BYTES:
        logging.warning(
            f"{path.name} would have {path.stat().st_size / 1e6:.0f} MB and is not kept; fewer or shorter responses "
            "(model.rs.num_rollout_samples, model.rs.length_params.max_length) make a trace that can be read"
        )
    else:
        with open(path, "rb") as plain, gzip.open(f"{path}.gz", "wb", compresslevel=3) as compressed:
            shutil.copyfileobj(plain, compressed)
    path.unlink()
