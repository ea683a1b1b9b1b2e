"""Ends the job on all ranks when one rank fails, with the failing rank's message as the job's last output.

Without this the other ranks hang in their next collective: on GPUs for the minutes of NCCL's timeout, on CPUs until
gloo raises an error of its own, which hides the root cause. Every rank polls a key of the job's TCP store (the
rendezvous store of `init_process_group`, whatever the launcher). A failing rank writes its message there, the others
silence their output and acknowledge, then the failing rank prints the message, and all exit.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
import warnings
from datetime import timedelta

import torch
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from nemo_aligner.utils.errors import ConfigError, RewardError

POLL_INTERVAL_S = 0.5
# The failing rank waits this long for the others to be silent, and they wait as long for it to print its message.
ANSWER_S = 10.0
# When the store, hosted by rank 0 or the launcher, is gone, a rank has this long to end by itself.
GRACE_S = 10.0
# Raised on every rank at the same point, or by the user.
ON_ALL_RANKS = (RewardError, SystemExit, KeyboardInterrupt)


@contextlib.contextmanager
def end_all_ranks_on_error():
    """Context manager in which an error not in ON_ALL_RANKS ends all ranks: exit code 2 for a `ConfigError`, else 1.

    Before the process group exists, if it has one rank, or once rank 0 is done, errors propagate normally.
    """
    _silence_resource_tracker()
    watch = _Watch()
    watch.start()
    try:
        yield
    except ON_ALL_RANKS:
        raise
    except BaseException as error:
        if not _has_peers() or watch.rank_0_is_done:
            raise
        watch.end_job(error)
    finally:
        watch.finish()


def _silence_resource_tracker() -> None:
    """Keep Python's resource tracker process from printing last, about locks and memory that failing ranks leak."""
    before = os.environ.get("PYTHONWARNINGS")
    ours = "ignore::UserWarning:multiprocessing.resource_tracker"
    os.environ["PYTHONWARNINGS"] = f"{before},{ours}" if before else ours


class _Watch(threading.Thread):
    """Ends this process when another rank has failed.

    Attributes:
        rank_0_is_done: rank 0 ended normally. Collectives that other ranks still wait in, as those of a server do,
            will not complete.
    """

    def __init__(self):
        super().__init__(name="rank-failure-watch", daemon=True)
        self.is_over = threading.Event()
        self.rank_0_is_done = False
        self._own_message, self._exit_code = None, 1

    def run(self) -> None:
        while not _has_peers():
            if self.is_over.wait(POLL_INTERVAL_S):
                return
        try:
            store = _connect()
        except (KeyError, RuntimeError) as error:
            warnings.warn(f"errors on other ranks are noticed late: no connection to the store ({error})", stacklevel=1)
            return
        try:
            while not store.check([_key("failed")]):
                self.rank_0_is_done = store.check([_key("over")])
                if self.rank_0_is_done or self.is_over.wait(POLL_INTERVAL_S):
                    return
            message = store.get(_key("failed")).decode()
        except RuntimeError:
            if not self.is_over.wait(GRACE_S):
                _say(f"rank {torch.distributed.get_rank()} ends, as the store that the ranks share is gone")
                os._exit(1)
            return
        if message != self._own_message:
            _fall_silent()
            with contextlib.suppress(RuntimeError):  # the store may be gone already
                store.add(_key("silent"), 1)
                store.wait([_key("printed")], timedelta(seconds=ANSWER_S))
            _leave(self._exit_code)

    def finish(self) -> None:
        """Stop watching. Rank 0, which may host the store, also tells the other ranks."""
        self.is_over.set()
        if _has_peers() and torch.distributed.get_rank() == 0:
            with contextlib.suppress(KeyError, RuntimeError):
                _connect().set(_key("over"), "yes")
                time.sleep(2 * POLL_INTERVAL_S)

    def end_job(self, error: BaseException) -> None:
        """Print the error once the other ranks are silent, and end this process."""
        rank, reason = torch.distributed.get_rank(), " ".join(str(error).split())
        is_users_mistake = isinstance(error, ConfigError)
        self._exit_code = 2 if is_users_mistake else 1
        self._own_message = f"rank {rank}: {type(error).__name__}: {reason}"
        store = None
        with contextlib.suppress(KeyError, RuntimeError):  # without a store only this process ends here
            store = _connect()
            first = store.compare_set(_key("failed"), "", self._own_message).decode()
            if first != self._own_message:
                # A configuration mistake that every rank finds is printed by the first one only.
                first_rank, _, first_error = first.partition(": ")
                if not (is_users_mistake and self._own_message.endswith(f": {first_error}")):
                    _say(f"{self._own_message} ({first_rank} failed before)")
                time.sleep(3 * ANSWER_S)  # `run` ends this process
        if not is_users_mistake:
            traceback.print_exception(error)
            if "TORCHELASTIC_ERROR_FILE" in os.environ:  # the source of torchrun's final message
                ErrorHandler().record_exception(error)
        with contextlib.suppress(RuntimeError):
            if store is not None:
                _wait_for_silence(store)
        _say(f"error: {reason if is_users_mistake else self._own_message}")
        with contextlib.suppress(RuntimeError):
            if store is not None:
                store.set(_key("printed"), "yes")
        _leave(self._exit_code, has_failed=True)


def _has_peers() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _connect() -> torch.distributed.TCPStore:
    """A separate connection, because calls on a shared one are serialized."""
    return torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
        timeout=timedelta(seconds=ANSWER_S),
    )  # fmt: skip


def _key(name: str) -> str:
    """A key that is unique to each restart of the job by torchrun."""
    return f"nemo_aligner/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def _wait_for_silence(store: torch.distributed.TCPStore) -> None:
    deadline = time.monotonic() + ANSWER_S
    while store.add(_key("silent"), 0) < torch.distributed.get_world_size() - 1 and time.monotonic() < deadline:
        time.sleep(POLL_INTERVAL_S / 5)


def _leave(code: int, has_failed: bool = False) -> None:
    """End this process, with delays that make ranks exit in the order that the launcher expects.

    torchrun blames the rank that exits first. Under Lightning, rank 0 launched the others and would be killed if it saw
    one of them fail; it may also host the store, which the others still have to read.
    """
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        time.sleep(0 if has_failed else POLL_INTERVAL_S)
    else:
        time.sleep(POLL_INTERVAL_S if torch.distributed.get_rank() == 0 else 3 * POLL_INTERVAL_S)
    os._exit(code)


def _say(line: str) -> None:
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)


def _fall_silent() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
