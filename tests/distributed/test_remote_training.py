"""The training script with a reward server that fails during the run: nothing is lost and no result changes."""

import os
import re
import subprocess
import time

import pytest

from tests.distributed.test_training_script import G, N, command, environment, rollouts, run_script, workplace
from tests.hurtable_server import HurtableServer, skip_if_triton_cannot_run
from tests.ports import free_port

__all__ = ["workplace"]  # a fixture
NUM_STEPS = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    skip_if_triton_cannot_run()
    with HurtableServer(tmp_path_factory.mktemp("server") / "log") as running:
        yield running


def settings(port: int) -> list[str]:
    return [
        "model.rs.reward.target=null", f"remote_rm.reward_model.port={port}", f"trainer.rs.max_steps={NUM_STEPS}",
        "trainer.rs.val_check_interval=3", "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=False",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(workplace, server):
    """The rollouts, scores and selections of a run with a healthy server."""
    process = run_script(workplace, "undisturbed", *settings(server.port))
    assert process.returncode == 0, process.stderr[-3000:]
    found = all_rollouts(workplace / "undisturbed")
    assert len(found["train"]) == NUM_STEPS * G * N and {line["kept"] for line in found["train"]} == {True, False}
    return found


def all_rollouts(folder):
    return {split: rollouts(folder, split) for split in ("train", "val")}


def kill_after_first_step(server, process, folder) -> None:
    written = folder / "rollouts/train_rank0.jsonl"
    while process.poll() is None and not (written.exists() and written.read_text().count("\n") >= G * N):
        time.sleep(0.05)
    server.kill()


def start(workplace, log_dir, *overrides) -> subprocess.Popen:
    return subprocess.Popen(
        command(log_dir, *overrides), cwd=workplace, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_an_outage_of_a_minute_changes_nothing(workplace, server, undisturbed):
    process = start(workplace, "outage", *settings(server.port))
    kill_after_first_step(server, process, workplace / "outage")
    time.sleep(60)
    assert process.poll() is None, process.communicate()[1][-3000:]
    server.start()
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    assert "attempt 1 failed, next one in" in output + errors
    assert all_rollouts(workplace / "outage") == undisturbed
    assert list((workplace / "outage/rollouts").glob("unscored_*")) == []


def test_what_is_unscored_at_the_deadline_is_scored_first_by_the_next_start(workplace, server, undisturbed):
    impatient = [*settings(server.port), "remote_rm.retry_deadline_s=2"]
    process = start(workplace, "deadline", *impatient)
    kill_after_first_step(server, process, workplace / "deadline")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1 and "Traceback" not in errors
    (kept,) = (workplace / "deadline/rollouts").glob("unscored_train_step*_rank0.pt")
    assert re.fullmatch(
        rf"error: the server of 'reward_model' at http://localhost:{server.port} gave no usable answer to a request "
        r"\(tokens int64 \[3, 128\], sequence_lengths int64 \[3, 1\]\) in \d s; last: no server answers there, or it "
        rf"has not loaded the model; the rollouts are in deadline/rollouts/{kept.name}; the same command started again "
        "scores them first",
        errors.strip().splitlines()[-1],
    )
    assert [path.name for path in (workplace / "deadline/checkpoints").glob("*-last")], "the step before is not saved"

    server.start()
    server.wait_until_ready()
    again = run_script(workplace, "deadline", *impatient)
    assert again.returncode == 0, again.stderr[-3000:]
    assert all_rollouts(workplace / "deadline") == undisturbed
    assert not kept.exists()


def test_a_server_that_is_not_there_is_noticed_before_a_model_is_loaded(workplace):
    port = free_port()
    process = run_script(workplace, "absent", *settings(port), "remote_rm.wait_for_server_s=1")
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: no model 'reward_model' at http://localhost:{port} after 1 s; start the")
    assert process.stderr.count("\n") == 1 and not os.path.exists(workplace / "absent")
