"""A log folder belongs to one run as long as that lives."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from nemo_aligner.utils import run_lock
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.run_lock import hold_log_dir

# Holds a folder, and leaves a child behind that was forked meanwhile.
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
    """A process that holds the folder, and its child's id."""
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


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    warnings = []
    monkeypatch.setattr(run_lock.fcntl, "lockf", no_locks)
    monkeypatch.setattr(run_lock.logging, "warning", warnings.append)
    hold_log_dir(tmp_path)
    assert len(warnings) == 1 and "cannot be locked (No locks available)" in warnings[0]


def test_a_lock_file_of_somebody_else_is_warned_of(tmp_path, monkeypatch):
    def not_ours(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    warnings = []
    monkeypatch.setattr(run_lock.os, "open", not_ours)
    monkeypatch.setattr(run_lock.logging, "warning", warnings.append)
    hold_log_dir(tmp_path)
    assert len(warnings) == 1 and "cannot be locked (Permission denied)" in warnings[0]
