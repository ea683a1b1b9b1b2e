"""What a step's time goes into: a clock that is always in exactly one phase, and the table of what it found."""

import contextlib
import itertools
import time

import torch

from nemo_aligner.compat import device

PHASES = (
    "rollout",  # responses are generated
    "score",  # rewards are asked and waited for; rewards that come while rollouts are generated cost nothing here
    "select",  # the best are chosen, stacked and dealt out to the replicas
    "offload",  # optimizer states leave the GPU, as far as something waits for that
    "load_state",  # and come back
    "forward_backward",
    "optimizer",  # gradients reduced, if the optimizer has not done that before, and clipped; weights updated
    "checkpoint",  # what training waits for while a checkpoint is written
    "validation",  # as a whole: its rollouts and rewards are not training's
    "trace",  # with --profile: traces are written
)
OTHER, TOTAL = "other", "total"


class PhaseClock:
    """Attributes every moment between `start` and `consume` to one phase: with `with clock("select"):` to that one.

    A phase inside another interrupts it, except in `validation`. Phases may come several times and add up.

    The clock is the GPU's: boundaries are events on the current stream, and the host does not wait at any of them. Work
    that is queued counts in the phase that queued it. On a CPU it is the host's.
    """

    def __init__(self):
        self.start()

    def start(self) -> None:
        """Forget what was measured, and measure from now on. No phase may be open."""
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
        """Seconds since `start` under `total`, and each phase's share of them: all of `PHASES`, and `other`.

        Phases that did not occur have 0. The clock starts anew. The host waits for the GPU here.
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
    """Seconds and share of the total of every phase that occurred, a column for each step.

    Args:
        steps: what `PhaseClock.consume` returned, by the column's title.
    """
    lines = [f"{'phase':18}" + "".join(f"{title:>22}" for title in steps)]
    for phase in (*PHASES, OTHER, TOTAL):
        if phase in PHASES and not any(seconds[phase] for seconds in steps.values()):
            continue
        cells = (f"{seconds[phase]:13.3f} s {seconds[phase] / seconds[TOTAL]:6.1%}" for seconds in steps.values())
        lines.append(f"{phase:18}" + "".join(cells))
    return "\n".join(lines)
