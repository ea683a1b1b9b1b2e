"""A checkpoint of tensor, pipeline and virtual pipeline parallel ranks can be resumed on any other layout."""

import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest

from nemo_aligner.utils.checkpoints import newest_complete_checkpoint, read_counters
from tests.distributed.test_kill_and_resume import trajectory, weights
from tests.distributed.test_training_script import G, K, command, environment, run_script, workplace

__all__ = ["workplace"]  # a fixture
NUM_STEPS = 4
VPP = "++model.virtual_pipeline_model_parallel_size=2"
FIRST_LAYOUT = (
    "trainer.devices=4", "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2", VPP,
)  # fmt: skip
LAYOUTS = {
    "tp2": ("trainer.devices=2", "model.tensor_model_parallel_size=2"),
    "one": ("trainer.devices=1",),
    "pp2": ("trainer.devices=2", "model.pipeline_model_parallel_size=2"),
    "dp2": ("trainer.devices=2",),
    "vpp": ("trainer.devices=2", "model.pipeline_model_parallel_size=2", VPP),
}


def settings(layout: tuple[str, ...]) -> tuple[str, ...]:
    # One optimizer step per RS step, so that any number of replicas together train on the same rows.
    return (
        f"trainer.rs.max_steps={NUM_STEPS}", "trainer.rs.max_epochs=2", "trainer.rs.val_check_interval=1",
        f"model.global_batch_size={G * K}", *layout,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(workplace):
    """An undisturbed one-process run."""
    process = run_script(workplace, "one_process", *settings(LAYOUTS["one"]))
    assert process.returncode == 0, process.stderr[-3000:]
    return workplace / "one_process"


@pytest.fixture(scope="module")
def half_way(workplace):
    """The folder of a four-rank run, one rank of which was killed after the second checkpoint."""
    folder = workplace / "half_way"
    process = subprocess.Popen(
        command("half_way", *settings(FIRST_LAYOUT)), cwd=workplace, env=environment(), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not list(folder.glob("checkpoints/*-step=2-*-last")):
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.01)
    *_, other_rank = [child for child in psutil.Process(process.pid).children() if "train_gpt" in str(child.cmdline())]
    os.kill(other_rank.pid, signal.SIGKILL)
    killed_at = time.monotonic()
    assert process.wait(timeout=60) != 0, "the other rank went on by itself"
    assert time.monotonic() - killed_at < 60
    return folder


def test_the_ranks_that_are_left_end_too_and_leave_a_complete_checkpoint(half_way):
    assert read_counters(newest_complete_checkpoint(half_way / "checkpoints"))["step"] in (2, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_continues_on_another_layout(workplace, half_way, undisturbed, layout):
    folder = workplace / f"resumed_{layout}"
    shutil.copytree(half_way, folder)
    process = run_script(workplace, folder.name, *settings(LAYOUTS[layout]))
    assert process.returncode == 0, process.stderr[-3000:]
    assert "Resuming training from checkpoint" in process.stdout + process.stderr
    expected, found = trajectory(undisturbed), trajectory(folder)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    ours, theirs = weights(folder), weights(undisturbed)
    for name in theirs:  # as a whole: Adam takes a full step on a weight whose gradient is pure rounding error
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name
