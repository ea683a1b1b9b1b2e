"""Starts the training script repeatedly without importing it each time: a process that forks one run per request.

Requests are lines of JSON on stdin, {"arguments": [...], "log": path, "environment": {...}}; answers are lines on
stdout: the run's process id and, once it has ended, its exit code (negative for a signal).
"""

import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples/nlp/gpt/train_gpt_rs_actor.py"


class Zygote:
    """The process as seen by its parent."""

    def __init__(self, folder: Path, environment: dict):
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def start(self, arguments: list[str], log: Path, **environment: str) -> int:
        """Start a run; returns its process id."""
        request = {"arguments": arguments, "log": str(log), "environment": environment}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """Exit code of the earliest started run that has not been waited for yet."""
        print(file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)
    runpy.run_path(str(SCRIPT), run_name="imports_only")
    os.write(answers, b"ready\n")
    runs = []
    for line in sys.stdin:
        if line.strip():
            runs.append(fork(**json.loads(line)))
            os.write(answers, f"{runs[-1]}\n".encode())
        else:
            _, status = os.waitpid(runs.pop(0), 0)
            os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def fork(arguments: list[str], log: str, environment: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    sys.argv = [str(SCRIPT), *arguments]
    code = 1
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
