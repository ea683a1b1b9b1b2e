"""A run that is killed repeatedly ends with exactly the result of an undisturbed run, bit for bit."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from nemo_aligner.utils.checkpoints import newest_complete_checkpoint, read_counters
from tests.distributed.test_training_script import G, K, command, environment, rollouts, scalars, workplace
from tests.distributed.zygote import Zygote
from tests.tiny import load_actor

__all__ = ["workplace"]  # a fixture
NUM_STEPS = 6
NUM_KILLS = 20


@pytest.fixture(scope="module")
def zygote(workplace):
    """The imported training script; its runs use dropout, so that training draws random numbers too."""
    started = Zygote(workplace, environment())
    yield started
    started.close()


def arguments(log_dir: str, *overrides: str) -> list[str]:
    settings = (
        f"trainer.rs.max_steps={NUM_STEPS}", "trainer.rs.max_epochs=2", "trainer.rs.val_check_interval=1",
        "++model.hidden_dropout=0.1", "++model.attention_dropout=0.1", *overrides,
    )  # fmt: skip
    return command(log_dir, *settings)[2:]


def run(zygote: Zygote, workplace: Path, log_dir: str, *overrides: str) -> None:
    zygote.start(arguments(log_dir, *overrides), workplace / f"{log_dir}.log")
    assert zygote.wait() == 0, (workplace / f"{log_dir}.log").read_text()[-3000:]


@pytest.fixture(scope="module")
def undisturbed(workplace, zygote):
    """The folder of an undisturbed run, and how many seconds it took."""
    started = time.monotonic()
    run(zygote, workplace, "undisturbed")
    return workplace / "undisturbed", time.monotonic() - started


def weights(folder: Path) -> dict[str, torch.Tensor]:
    one_process = {
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None, "optim.name": "adamw",
    }  # fmt: skip
    model = load_actor(folder / "checkpoints/tiny.nemo", **one_process)
    return {name: value.clone() for name, value in model.named_parameters()}


def trajectory(folder: Path) -> dict:
    """Rollouts with rewards and selections by step, losses by optimizer step; steps done twice must agree."""
    found = {}
    for split in ("train", "val"):
        lines = rollouts(folder, split)
        for step in {line["step"] for line in lines}:
            found[split, step] = sorted({json.dumps(line) for line in lines if line["step"] == step})
    found["loss"] = {}
    for part in [folder, *folder.glob("run_*")]:  # each start moves the previous start's files into a folder
        for step, loss in scalars(part).get("train_optim/loss", []):
            assert found["loss"].setdefault(step, loss) == loss, f"optimizer step {step} was done twice and differed"
    return found


def assert_equal_runs(folder: Path, expected: Path) -> None:
    assert trajectory(folder) == trajectory(expected)
    ours, theirs = weights(folder), weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_twenty_kills_at_random_moments_change_nothing(workplace, zygote, undisturbed):
    expected, seconds = undisturbed
    random_state, kills, attempt, num_resumed = random.Random(0), 0, 0, 0
    while kills < NUM_KILLS:
        attempt += 1
        log_dir = f"killed{attempt}"
        finished = False
        while not finished:
            is_fresh = not (workplace / log_dir).exists()
            pid = zygote.start(arguments(log_dir), workplace / f"{log_dir}.log")
            if kills < NUM_KILLS:
                time.sleep(random_state.uniform(0.2, 0.8) * seconds)
                os.kill(pid, signal.SIGKILL)
            code = zygote.wait()
            finished = code == 0
            if finished and is_fresh:  # the machine is faster than when the undisturbed run was timed
                seconds *= 0.8
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL), (workplace / f"{log_dir}.log").read_text()[-3000:]
        num_resumed += (workplace / f"{log_dir}.log").read_text().count("Resuming training from checkpoint")
        assert_equal_runs(workplace / log_dir, expected)
        shutil.rmtree(workplace / log_dir)
    assert num_resumed >= NUM_KILLS / 2, "the kills came too early for anything to resume from"


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(workplace, zygote, undisturbed):
    """The run is killed midway, as soon as the folder of an unfinished checkpoint appears."""
    checkpoints = workplace / "writing/checkpoints"
    for step in (2, 4):
        pid = zygote.start(arguments("writing"), workplace / "writing.log")
        while not list(checkpoints.glob(f".partial/*-step={step}-*-last/*")):
            assert os.path.exists(f"/proc/{pid}/exe"), (workplace / "writing.log").read_text()[-3000:]
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        assert zygote.wait() == -signal.SIGKILL
        assert read_counters(newest_complete_checkpoint(checkpoints))["step"] in (step - 1, step)
    run(zygote, workplace, "writing")
    assert_equal_runs(workplace / "writing", undisturbed[0])
    names = [path.name for path in checkpoints.iterdir() if path.is_dir()]
    assert len(names) == 2 and sum(name.endswith("-last") for name in names) == 1, names


def test_a_run_killed_before_or_while_its_archive_was_written_writes_it(workplace, zygote, undisturbed):
    shutil.copytree(undisturbed[0], workplace / "no_archive")
    checkpoints = workplace / "no_archive/checkpoints"
    names = {path.name for path in checkpoints.iterdir()}
    (checkpoints / "tiny.nemo").unlink()
    pid = zygote.start(arguments("no_archive"), workplace / "no_archive.log")
    while not list(checkpoints.glob(".partial-*/*/*")):
        assert os.path.exists(f"/proc/{pid}/exe"), (workplace / "no_archive.log").read_text()[-3000:]
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert zygote.wait() == -signal.SIGKILL and not (checkpoints / "tiny.nemo").exists()
    run(zygote, workplace, "no_archive")
    assert_equal_runs(workplace / "no_archive", undisturbed[0])
    assert {path.name for path in checkpoints.iterdir()} == names


def test_a_second_run_in_the_same_folder_is_refused_and_disturbs_nothing(workplace, zygote, undisturbed):
    first = zygote.start(arguments("twice"), workplace / "twice.log")
    while not (workplace / "twice/rollouts/train_rank0.jsonl").exists():
        assert os.path.exists(f"/proc/{first}/exe"), (workplace / "twice.log").read_text()[-3000:]
        time.sleep(0.001)
    os.kill(first, signal.SIGSTOP)
    second = zygote.start(arguments("twice"), workplace / "twice_second.log")
    while os.path.exists(f"/proc/{second}/exe"):
        time.sleep(0.01)
    os.kill(first, signal.SIGCONT)
    assert zygote.wait() == 0, (workplace / "twice.log").read_text()[-3000:]
    assert zygote.wait() == 2
    assert "error: the log folder" in (workplace / "twice_second.log").read_text().splitlines()[-1]
    assert_equal_runs(workplace / "twice", undisturbed[0])


def test_sigterm_saves_first(workplace, zygote, undisturbed):
    pid = zygote.start(arguments("stopped", "trainer.rs.save_interval=6"), workplace / "stopped.log")
    written = workplace / "stopped/rollouts/train_rank0.jsonl"
    while not (written.exists() and '"step": 3' in written.read_text()):
        assert os.path.exists(f"/proc/{pid}/exe"), (workplace / "stopped.log").read_text()[-3000:]
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert zygote.wait() == 143, (workplace / "stopped.log").read_text()[-3000:]
    saved = newest_complete_checkpoint(workplace / "stopped/checkpoints")
    assert read_counters(saved)["step"] in (3, 4)
    run(zygote, workplace, "stopped", "trainer.rs.save_interval=6")
    assert_equal_runs(workplace / "stopped", undisturbed[0])


def test_the_time_limit_saves_first(workplace, zygote, undisturbed):
    _, seconds = undisturbed
    limit = f"00:00:00:{max(1, int(seconds / 2)):02d}"
    run(zygote, workplace, "timed", f"exp_manager.max_time_per_run={limit}", "trainer.rs.save_interval=6")
    first = read_counters(newest_complete_checkpoint(workplace / "timed/checkpoints"))["step"]
    assert 0 < first <= NUM_STEPS
    run(zygote, workplace, "timed", "trainer.rs.save_interval=6")
    assert_equal_runs(workplace / "timed", undisturbed[0])


@pytest.mark.parametrize("damage", ["a shard cut off", "a shard missing", "no table of contents", "another precision"])
def test_a_checkpoint_that_cannot_be_restored_is_named_in_one_line(workplace, zygote, undisturbed, damage):
    name = damage.replace(" ", "_")
    shutil.copytree(undisturbed[0], workplace / name)
    (saved,) = (workplace / name / "checkpoints").glob("*-last")
    shards = sorted(saved.rglob("*.distcp"))
    more = []
    if damage == "a shard cut off":
        for shard in shards:
            shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    elif damage == "a shard missing":
        shards[0].unlink()
    elif damage == "no table of contents":
        (saved / ".metadata").write_bytes(b"")
    else:
        more = ["trainer.precision=bf16", "model.megatron_amp_O2=True"]
    zygote.start(arguments(name, f"trainer.rs.max_steps={NUM_STEPS + 1}", *more), workplace / f"{name}.log")
    code, log = zygote.wait(), (workplace / f"{name}.log").read_text()
    assert code == 2, log[-3000:]
    (line,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert f"error: the checkpoint {saved} could not be restored (" in line.replace(
        f"{name}/", f"{workplace}/{name}/", 1
    )
    assert "move it away to go on from an older one" in line and "Traceback" not in log


def test_a_run_that_could_judge_nothing_leaves_the_weights_and_continues(workplace, zygote):
    (workplace / "nulls.py").write_text("def reward(prompts, responses):\n    return [None] * len(prompts)\n")
    run(zygote, workplace, "unjudged", "model.rs.reward.target=nulls.py:reward", "trainer.rs.max_steps=1")
    first = newest_complete_checkpoint(workplace / "unjudged/checkpoints")
    assert read_counters(first) == {"step": 1, "consumed_samples": G, "epoch": 0, "rs_optimization_step": K}
    (workplace / "untrained/checkpoints").mkdir(parents=True)
    (workplace / "untrained/checkpoints/tiny.nemo").symlink_to(workplace / "tiny.nemo")
    untrained, after_nothing = weights(workplace / "untrained"), weights(workplace / "unjudged")
    assert all(torch.equal(after_nothing[name], untrained[name]) for name in untrained)
    run(zygote, workplace, "unjudged", "trainer.rs.max_steps=2")
    assert scalars(workplace / "unjudged")["train_optim/optim_step"] == [(2, 2), (3, 3)]
    trained = weights(workplace / "unjudged")
    assert not all(torch.equal(trained[name], untrained[name]) for name in untrained)


# A user's module that also simulates a full disk: in the second step before anything is written, in the third in the
# middle of writing.
FULL_DISK = """
import errno, shutil
from megatron.core.dist_checkpointing.strategies import filesystem_async
from nemo_aligner.algorithms.rs import RSTrainer

real_usage, real_write, real_save = shutil.disk_usage, filesystem_async._write_item, RSTrainer.save
step = 0

def save(self, *args, **kwargs):
    global step
    step = self.step
    real_save(self, *args, **kwargs)

def write_item(*args, **kwargs):
    if step == 3:
        raise OSError(errno.ENOSPC, "No space left on device")
    return real_write(*args, **kwargs)

RSTrainer.save, filesystem_async._write_item = save, write_item
shutil.disk_usage = lambda path: real_usage(path)._replace(free=5) if step == 2 else real_usage(path)

def last_token(prompts, responses, *, response_tokens):
    return [tokens[-1] % 10 for tokens in response_tokens]
"""


def test_a_full_disk_is_reported_and_survived(workplace, zygote, undisturbed):
    (workplace / "full_disk.py").write_text(FULL_DISK)
    run(zygote, workplace, "full", "model.rs.reward.target=full_disk.py:last_token")
    complaints = [line for line in (workplace / "full.log").read_text().splitlines() if "could not be written" in line]
    # two steps fail to write their last checkpoint, and their best one if they improve on the step before
    assert 2 <= len(complaints) <= 4
    assert all("the run goes on, its last checkpoint is" in line and "step=1-" in line for line in complaints)
    assert "has room for 5 of" in complaints[0] and "No space left on device" in complaints[-1]
    checkpoints = workplace / "full/checkpoints"
    assert read_counters(newest_complete_checkpoint(checkpoints))["step"] == NUM_STEPS
    assert len(list(checkpoints.glob("*-last"))) == 1
    assert not list(checkpoints.glob(".partial")) and not list(checkpoints.glob("*unfinished"))
    assert_equal_runs(workplace / "full", undisturbed[0])
