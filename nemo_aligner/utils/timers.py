"""Timers for sections of a step, with their maximum over ranks, and for a run's time limit."""

import contextlib
import math
import re
import time

import numpy as np
import torch
from nemo.utils.timers import NamedTimer

from nemo_aligner.compat.device import current_device
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.tensors import deprecated_in_version


class Timer:
    """A run's clock and its time limit, given as "DD:HH:MM:SS"; None sets no limit."""

    def __init__(self, duration: str | None):
        self.limit_s = math.inf if duration is None else _parse_duration(duration)
        self._started_at = None

    def start_time(self) -> None:
        """Start the clock, or restart it."""
        self._started_at = time.monotonic()

    def get_time_elapsed(self) -> float:
        """Seconds since `start_time`.

        Raises:
            RuntimeError: the clock was not started.
        """
        if self._started_at is None:
            raise RuntimeError("call start_time() before asking the timer")
        return time.monotonic() - self._started_at

    def get_time_remaining(self) -> float:
        """Seconds left, negative once the limit has passed, infinite without one."""
        return self.limit_s - self.get_time_elapsed()

    def is_finished(self) -> bool:
        """Whether the limit has passed by the clock of global rank 0. Collective over all ranks."""
        limit_passed = self.get_time_remaining() <= 0
        if not torch.distributed.is_initialized():
            return limit_passed
        decision = torch.tensor(limit_passed, dtype=torch.int64, device=current_device())
        torch.distributed.broadcast(decision, src=0)
        return bool(decision)


def _parse_duration(duration: str) -> float:
    """Seconds in "DD:HH:MM:SS"."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+):(\d+)", duration) if isinstance(duration, str) else None
    if match is None:
        raise ValueError(f'a duration must be a quoted string "DD:HH:MM:SS", not {duration!r}')
    days, hours, minutes, seconds = map(int, match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class ScopedTimer:
    """Times sections as `with timer("name"):`; durations are this rank's, in seconds; see `max_over_ranks`.

    Args:
        reduction, buffer_size: as for NeMo's `NamedTimer`.
        sync_cuda: synchronize the current stream at both ends of a section. Unlike NeMo, not the whole device, as
            copies of the optimizer's state may be in flight on another stream.
    """

    def __init__(self, reduction: str = "mean", sync_cuda: bool = False, buffer_size: int = -1):
        self._timer = NamedTimer(reduction, buffer_size=buffer_size)
        self._sync_cuda = sync_cuda

    @contextlib.contextmanager
    def __call__(self, name: str):
        """Time the body.

        Raises:
            ValueError: `name` has a duration that was not consumed yet.
        """
        if name in self._timer.export():
            raise ValueError(f"section {name!r} was timed already: call consume_durations() before timing it again")
        self._wait()
        self._timer.start(name)
        try:
            yield
        finally:
            self._wait()
            self._timer.stop(name)

    def _wait(self) -> None:
        if self._sync_cuda and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()

    def consume_durations(self) -> dict[str, float]:
        """Return and clear the durations of finished sections, by name."""
        durations = self._timer.export()
        for name in durations:
            del self._timer.timers[name]
        return durations


def max_over_ranks(durations: dict[str, float]) -> dict[str, float]:
    """Each section's longest duration over all ranks; all ranks must call it, with the same names."""
    names = sorted(durations)
    longest = torch.tensor([durations[name] for name in names], dtype=torch.float64, device=current_device())
    torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
    return dict(zip(names, longest.tolist(), strict=True))


class SyncTimer(NamedTimer):
    """NeMo's `NamedTimer`, whose sections can be reduced over the data-parallel group. Deprecated: use `ScopedTimer`.

    Args:
        reduction, sync_cuda, buffer_size: as for `NamedTimer`.
        reduce_op: reduction over data-parallel ranks.
    """

    @deprecated_in_version("0.1.0", "use ScopedTimer and max_over_ranks")
    def __init__(self, reduction="mean", sync_cuda=False, buffer_size=-1, reduce_op=torch.distributed.ReduceOp.MAX):
        super().__init__(reduction, sync_cuda, buffer_size)
        self._reduce_op = reduce_op
        self._stored: dict[str, list[float]] = {}

    def stop_and_get_time(self, name: str = "") -> float:
        """Stop the section and return its seconds on this rank."""
        self.stop(name)
        return self.get(name)

    def get_synced(self, name: str = "") -> float:
        """The section's seconds, reduced over the data-parallel group; all its ranks must call it."""
        return self._reduce(self.get(name))

    def store(self, name: str = "") -> None:
        """Store the section's seconds and clear the section."""
        self._stored.setdefault(name, []).append(self.get(name))
        self.reset(name)

    def sync_and_consume_over_stored_time(self, name: str = "") -> float:
        """Return the stored seconds, reduced by `reduction` and then over the data-parallel group, and clear them.

        All ranks of the data-parallel group must call it.

        Raises:
            ValueError: nothing is stored under `name`.
        """
        if name not in self._stored:
            raise ValueError(f"no time is stored for section {name!r}; stored: {sorted(self._stored)}")
        return self._reduce(self._reduction_fn(self._stored.pop(name)))

    def _reduce(self, seconds: float | list[float]) -> float | list[float]:
        reduced = torch.tensor(np.asarray(seconds), dtype=torch.float64, device=current_device())
        torch.distributed.all_reduce(reduced, self._reduce_op, group=parallel_state.get_data_parallel_group())
        return reduced.tolist()
