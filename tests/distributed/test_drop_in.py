"""A script and a configuration file written for the original run on this library unmodified, from start to resume."""

import subprocess
import sys
from pathlib import Path

from nemo_aligner.utils.checkpoints import newest_complete_checkpoint, read_counters
from tests.distributed.test_training_script import G, N, command, environment, rollouts, workplace
from tests.hurtable_server import HurtableServer, skip_if_triton_cannot_run

__all__ = ["workplace"]  # a fixture
SCRIPT = Path(__file__).parent / "drop_in/train.py"
PARALLEL = ("++model.tensor_model_parallel_size=1", "++model.pipeline_model_parallel_size=1")


def run(workplace, port: int, max_steps: int) -> str:
    """Run to `max_steps`, with tiny sizes on the command line; returns what was printed."""
    settings = [each for each in command("drop_in")[2:] if not each.startswith("model.rs.reward.target")]
    overrides = (f"remote_rm.reward_model.port={port}", f"trainer.rs.max_steps={max_steps}", *PARALLEL)
    # the horizon of the learning rate must not move with the limit
    horizon = ("+model.optim.sched.max_steps=6", "trainer.rs.max_epochs=1", "trainer.rs.val_check_interval=1")
    finished = subprocess.run(
        [sys.executable, str(SCRIPT), *settings, *overrides, *horizon],
        cwd=workplace, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout + finished.stderr


def test_an_unmodified_script_runs_and_resumes(workplace, tmp_path):
    skip_if_triton_cannot_run()
    with HurtableServer(tmp_path / "log") as server:
        assert "Resuming training" not in run(workplace, server.port, max_steps=2)
        checkpoints = workplace / "drop_in/checkpoints"
        assert read_counters(newest_complete_checkpoint(checkpoints))["step"] == 2
        assert "Resuming training from checkpoint" in run(workplace, server.port, max_steps=3)
    saved = newest_complete_checkpoint(checkpoints)
    assert read_counters(saved) == {"step": 3, "consumed_samples": 3 * G, "epoch": 1, "rs_optimization_step": 6}
    assert (checkpoints / "tiny.nemo").is_file()
    lines = rollouts(workplace / "drop_in", "train")
    assert [line["step"] for line in lines] == [0] * G * N + [1] * G * N + [2] * G * N
    assert len({line["prompt_index"] for line in lines}) == 3 * G  # each prompt once, also across the restart
