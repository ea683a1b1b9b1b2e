"""Breakdown of a step's time: a clock that is always in exactly one phase, and a table of its measurements."""

import contextlib
import itertools
import time

import torch

from nemo_aligner.compat import device

PHASES = (
    "rollout",  # responses are generated
    "score",  # rewards are requested and awaited; rewards that arrive during generation cost nothing here
    "select",  # the best are selected, stacked and distributed over the replicas
    "offload",  # exposed time of offloading optimizer states from the GPU
    "load_state",  # exposed time of loading them back
    "forward_backward",
    "optimizer",  # gradients reduced, unless the optimizer already did that, and clipped; weights updated
    "checkpoint",  # time that training blocks on checkpoint writes
    "validation",  # as a whole, including its rollouts and rewards
    "trace",  # with --profile: traces are written
)
OTHER, TOTAL = "other", "total"


class PhaseClock:
    """Attributes all time between `start` and `consume` to one phase each; `with clock("select"):` enters a phase.

    A nested phase interrupts the outer one, except in `validation`. Repeated phases add up.

    On a GPU, boundaries are CUDA events on the current stream, without host synchronization; work counts towards the
    phase that enqueued it. On a CPU the host clock is used.
    """

    def __init__(self):
        self.start()

    def start(self) -> None:
        """Reset and start measuring. No phase may be open."""
        self._open = [OTHER]
        self._beginnings = [(OTHER, _now())]

    @contextlib.contextmanager
    def __call__(self, phase: str):
        """Attribute the body to `phase`, one of `PHASES`, or to `OTHER`."""
        assert phase in (*PHASES, OTHER), phase
        if self._open[-1] == "validation":
            yield
            return
        self._open.append(phase)
        self._beginnings.append((phase, _now()))
        try:
            yield
        finally:
            self._open.pop()
            self._beginnings.append((self._open[-1], _now()))

    def consume(self) -> dict[str, float]:
        """Seconds since `start` under `total`, and the seconds of each of `PHASES` and of `other`.

        Phases that did not occur have 0. Restarts the clock. Blocks the host until the GPU gets here.
        """
        end = _now()
        if not device.on_cpu():
            end.synchronize()
        seconds = dict.fromkeys((*PHASES, OTHER), 0.0)
        for (phase, begin), (_, next_begin) in itertools.pairwise([*self._beginnings, (None, end)]):
            seconds[phase] += _seconds_between(begin, next_begin)
        self.start()
        return {**seconds, TOTAL: sum(seconds.values())}


def _now() -> torch.cuda.Event | float:
    if device.on_cpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(begin, end) -> float:
    return end - begin if device.on_cpu() else begin.elapsed_time(end) / 1000


def phase_table(steps: dict[str, dict[str, float]]) -> str:
    """Seconds and share of the total for every phase that occurred, one column per step.

    Args:
        steps: column title -> result of `PhaseClock.consume`.
    """
    lines = [f"{'phase':18}" + "".join(f"{title:>22}" for title in steps)]
    for phase in (*PHASES, OTHER, TOTAL):
        if phase in PHASES and not any(seconds[phase] for seconds in steps.values()):
            continue
        cells = (f"{seconds[phase]:13.3f} s {seconds[phase] / seconds[TOTAL]:6.1%}" for seconds in steps.values())
        lines.append(f"{phase:18}" + "".join(cells))
    return "\n".join(lines)
