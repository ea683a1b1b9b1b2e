"""`mcore_distributed_optim` trains like one-process AdamW in every layout, and resumes in a different layout.

Optimizers with fp32 master weights keep these across a restart.
"""

import shutil

import pytest
import torch

from nemo_aligner.utils.checkpoints import newest_complete_checkpoint, read_counters
from tests.distributed.test_kill_and_resume import trajectory, weights
from tests.distributed.test_training_script import G, K, run_script, scalars, workplace

__all__ = ["workplace"]  # a fixture
NUM_STEPS = 4
MCORE = ("model.optim.name=mcore_distributed_optim",)
OVERLAP = ("model.optim.overlap_grad_sync=True", "+model.optim.overlap_param_sync=True")
FIRST_LAYOUT = ("trainer.devices=4", "model.tensor_model_parallel_size=2", *OVERLAP)
LAYOUTS = {
    "one": (),
    "dp2_overlap": ("trainer.devices=2", *OVERLAP),
    "tp2": ("trainer.devices=2", "model.tensor_model_parallel_size=2"),
    "pp2": ("trainer.devices=2", "model.pipeline_model_parallel_size=2"),
    "pp2_vpp2": (
        "trainer.devices=2", "model.pipeline_model_parallel_size=2", "++model.virtual_pipeline_model_parallel_size=2",
    ),
}  # fmt: skip


def settings(num_steps: int) -> tuple[str, ...]:
    # One optimizer step per RS step, so that any number of replicas together train on the same rows. Weight decay and
    # clipping are strong enough to have a visible effect.
    return (
        f"trainer.rs.max_steps={num_steps}", "trainer.rs.max_epochs=2", "trainer.rs.val_check_interval=2",
        f"model.global_batch_size={G * K}", f"+model.optim.sched.max_steps={NUM_STEPS}",
        "model.optim.weight_decay=1.0", "trainer.rs.gradient_clip_val=0.5",
    )  # fmt: skip


@pytest.fixture(scope="module")
def adamw(workplace):
    """A one-process run with torch's AdamW."""
    process = run_script(workplace, "adamw", *settings(NUM_STEPS))
    assert process.returncode == 0, process.stderr[-3000:]
    return workplace / "adamw"


@pytest.fixture(scope="module")
def half_way(workplace):
    """A run of two replicas of two ranks each that ended after half of the steps."""
    process = run_script(workplace, "half_way", *settings(NUM_STEPS // 2), *MCORE, *FIRST_LAYOUT)
    assert process.returncode == 0, process.stderr[-3000:]
    assert read_counters(newest_complete_checkpoint(workplace / "half_way/checkpoints"))["step"] == NUM_STEPS // 2
    return workplace / "half_way"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_a_run_here_and_half_there_is_a_run_of_adamw(workplace, adamw, half_way, layout):
    folder = workplace / f"resumed_{layout}"
    shutil.copytree(half_way, folder)
    process = run_script(workplace, folder.name, *settings(NUM_STEPS), *MCORE, *LAYOUTS[layout])
    assert process.returncode == 0, process.stderr[-3000:]
    assert "Resuming training from checkpoint" in process.stdout + process.stderr
    expected, found = trajectory(adamw), trajectory(folder)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    norm, expected_norm = (dict(scalars(run)["train_optim/grad_norm"])[NUM_STEPS // 2] for run in (folder, adamw))
    assert norm == pytest.approx(expected_norm, rel=1e-5) and norm > 0.5
    ours, theirs = weights(folder), weights(adamw)
    for name in theirs:  # as a whole: Adam takes a full step on a weight whose gradient is pure rounding error
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


@pytest.mark.parametrize("optimizer", ["adamw", "mcore_distributed_optim"])
def test_a_restart_keeps_the_master_weights_of_a_model_in_bf16(workplace, optimizer):
    in_bf16 = (f"model.optim.name={optimizer}", "trainer.precision=bf16", "model.megatron_amp_O2=True")
    for folder, num_steps in (("left_alone", NUM_STEPS), ("restarted", NUM_STEPS // 2), ("restarted", NUM_STEPS)):
        process = run_script(workplace, f"{optimizer}_{folder}", *settings(num_steps), *in_bf16)
        assert process.returncode == 0, process.stderr[-3000:]
    left_alone, restarted = (workplace / f"{optimizer}_{folder}" for folder in ("left_alone", "restarted"))
    assert trajectory(restarted) == trajectory(left_alone)
    ours, theirs = weights(restarted), weights(left_alone)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {weight.dtype for weight in ours.values()} == {torch.bfloat16}
