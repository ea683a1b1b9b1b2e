"""CUDA graphs of the decode step, one for each number of rows: one launch instead of a few hundred."""

import contextlib
import weakref
from collections.abc import Callable

import torch
from nemo.utils import logging, logging_mode

_all: weakref.WeakSet["StepGraphs"] = weakref.WeakSet()


def pools_in_use() -> set[tuple[int, int]]:
    """The ids of the memory pools held by captured graphs."""
    return {graphs._pool for graphs in _all if graphs._pool is not None}


class StepGraphs:
    """Runs `step(num_rows)`: eagerly the first time, which also compiles its kernels, then as a captured graph.

    `step` must work on memory at fixed addresses and take nothing from the host. If that memory moves, a new object is
    needed: `reads` identifies the memory that the graphs have captured, and `are_valid_for` compares it. Compiled
    kernels outlive the object: `warm` holds the row counts that have them, and is updated in place.
    """

    def __init__(self, step: Callable[[int], None], reads: tuple, warm: set[int]):
        self._step, self._reads, self._warm = step, reads, warm
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = None
        self._is_refused = False
        _all.add(self)

    def are_valid_for(self, reads: tuple) -> bool:
        """Whether the graphs captured `reads`; False after a failed capture, as memory may suffice now."""
        return reads == self._reads and not self._is_refused

    def run(self, num_rows: int) -> None:
        if num_rows not in self._graphs and num_rows in self._warm and not self._is_refused:
            self._capture(num_rows)
        if num_rows in self._graphs:
            self._graphs[num_rows].replay()
        else:
            self._step(num_rows)
            self._warm.add(num_rows)

    def _capture(self, num_rows: int) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # not torch.cuda.graph, which collects garbage and empties the cache before each capture
        with torch.cuda.stream(stream):
            graph.capture_begin(*(() if self._pool is None else (self._pool,)), capture_error_mode="thread_local")
            try:
                self._step(num_rows)
                graph.capture_end()
            except RuntimeError as error:
                with contextlib.suppress(RuntimeError):  # ending a failed capture raises as well
                    graph.capture_end()
                self._is_refused = True
                message = f"rollouts: no CUDA graphs, steps are launched one kernel at a time: {error}"
                logging.warning(message, mode=logging_mode.ONCE)
        torch.cuda.current_stream().wait_stream(stream)
        if not self._is_refused:
            self._pool = graph.pool()
            self._graphs[num_rows] = graph


def graph_size(num_rows: int) -> int:
    """The number of rows that a step is captured for, at least `num_rows`.

    There are few sizes, as a capture takes as long as several steps and padding rows cost little: they have no
    positions to attend to, and GEMMs with few rows take as long as reading the weights.
    """
    return 1 << (num_rows - 1).bit_length() if num_rows <= 64 else -(-num_rows // 64) * 64
