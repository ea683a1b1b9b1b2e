"""Graceful termination on SIGTERM, as sent by schedulers, at a point where all ranks stop together."""

import contextlib
import signal
import threading

import torch

from nemo_aligner.compat.device import current_device


class StopRequested(Exception):
    """The job was asked to end. Raised on every rank at the same point."""


class TerminationWatch:
    """Records a SIGTERM received within `watching`, until the next `sync` of all ranks."""

    def __init__(self):
        self._is_requested = False

    @contextlib.contextmanager
    def watching(self):
        """Context manager in which SIGTERM does not end the process at once. Only effective in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _remember(self, signum, frame) -> None:
        if self._is_requested:  # a second SIGTERM ends the process immediately
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        self._is_requested = True

    def sync(self, is_done: bool = True) -> bool:
        """Whether all ranks are done. Collective over all ranks.

        Raises:
            StopRequested: on every rank, if any rank has received SIGTERM.
        """
        state = torch.tensor([not is_done, self._is_requested], dtype=torch.int64, device=current_device())
        torch.distributed.all_reduce(state, torch.distributed.ReduceOp.MAX)
        is_anyone_waiting, is_requested = state.tolist()
        if is_requested:
            raise StopRequested
        return not is_anyone_waiting
