"""Lock that allows one run at a time per log folder: two would write the same checkpoints and rollout files."""

import fcntl
import os
import socket
from pathlib import Path

from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero

from nemo_aligner.utils.errors import ConfigError

# In a subfolder, because NeMo moves files directly in the log folder away at every start.
LOCK = Path(".lock", "holder")


def hold_log_dir(log_dir: str | Path) -> None:
    """Lock the folder against other runs until this process ends, in whatever way.

    Only global rank 0 takes the lock. If the file system has no locks, only warn.

    Raises:
        ConfigError: on global rank 0, if the folder cannot be created or another process holds the lock.
    """
    if not is_global_rank_zero():
        return
    path = Path(log_dir) / LOCK
    try:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the log folder {log_dir} cannot be made ({error.strerror}); correct exp_manager.explicit_log_dir"
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Never closed. Unlike a `flock` lock, a record lock is not inherited by children that outlive this process.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        is_ours = _try_to_lock(descriptor)
    except OSError as error:
        logging.warning(
            f"{path} cannot be locked ({error.strerror}); see to it that no other run has this log folder meanwhile"
        )
        return
    if not is_ours:
        raise ConfigError(
            f"the log folder {log_dir} is in use by {path.read_text() or 'another run'}; wait until that has ended, or "
            f"give this run another exp_manager.explicit_log_dir (if it has ended, delete {path})"
        )
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())


def _try_to_lock(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the errors that POSIX allows for a lock held elsewhere
        return False
    return True
