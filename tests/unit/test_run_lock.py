"""A log folder belongs to one run for as long as that run lives."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from nemo_aligner.utils import run_lock
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.run_lock import hold_log_dir

# Holds a folder, and leaves behind a child process forked while holding it.
HOLDER = """
import os, sys, time
from nemo_aligner.utils.run_lock import hold_log_dir
hold_log_dir(sys.argv[1])
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder, and that has a child."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        yield process
        process.kill()
        os.kill(child, signal.SIGKILL)


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path, holder):
    with pytest.raises(ConfigError) as error:
        hold_log_dir(tmp_path)
    message = str(error.value)
    assert "\n" not in message and f"{tmp_path} is in use by process {holder.pid} on " in message
    assert f"give this run another exp_manager.explicit_log_dir (if it has ended, delete {tmp_path}" in message
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    hold_log_dir(tmp_path)
    assert f"process {os.getpid()} on " in (tmp_path / run_lock.LOCK).read_text()


def test_other_ranks_of_the_job_hold_nothing(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(run_lock, "is_global_rank_zero", lambda: False)
    hold_log_dir(tmp_path)


@pytest.mark.parametrize(
    "function, error",
    [
        ("fcntl.lockf", OSError(errno.ENOLCK, "No locks available")),
        ("os.open", PermissionError(errno.EACCES, "Permission denied")),  # another user owns the file
    ],
)
def test_a_lock_that_cannot_be_had_is_warned_of(tmp_path, monkeypatch, function, error):
    def fail(*args):
        raise error

    warnings = []
    monkeypatch.setattr(f"nemo_aligner.utils.run_lock.{function}", fail)
    monkeypatch.setattr(run_lock.logging, "warning", warnings.append)
    hold_log_dir(tmp_path)
    assert len(warnings) == 1 and f"cannot be locked ({error.strerror})" in warnings[0]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run cannot be made \(Not a directory\); correct exp_manager.explicit"):
        hold_log_dir(tmp_path / "file/run")
