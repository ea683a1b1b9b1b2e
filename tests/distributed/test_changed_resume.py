"""A run resumed with changed settings uses the new ones and reports which have changed."""

import json
import math
import shutil
from collections import Counter

import pytest
import torch

from nemo_aligner.utils.checkpoints import newest_complete_checkpoint, read_counters
from tests.distributed.test_training_script import N, command, environment, rollouts, scalars, workplace
from tests.distributed.zygote import Zygote

__all__ = ["workplace"]  # a fixture
LR, MIN_LR = 1e-3, 9e-8


@pytest.fixture(scope="module")
def start(workplace):
    """Run the script with a given log folder; returns its exit code and output."""
    zygote = Zygote(workplace, environment())

    def start(log_dir: str, *overrides: str) -> tuple[int, str]:
        log = workplace / f"{log_dir}.log"
        zygote.start(command(log_dir, "trainer.rs.val_check_interval=1", *overrides)[2:], log)
        return zygote.wait(), log.read_text()

    yield start
    zygote.close()


@pytest.fixture(scope="module")
def one_step(workplace, start):
    """The folder of a run that ended after one RS step, of two prompts and two optimizer steps."""
    code, output = start("one_step", "trainer.rs.max_steps=1")
    assert code == 0, output[-3000:]
    return workplace / "one_step"


def resume(workplace, start, one_step, name: str, *overrides: str):
    """Resume in a copy of the run's folder; returns exit code, output and folder."""
    folder = workplace / name
    shutil.copytree(one_step, folder)
    (folder / "checkpoints/tiny.nemo").unlink()
    code, output = start(name, *overrides)
    return code, output, folder


def warnings_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if "with changed settings, which apply" in line]


def rates(folder) -> dict[int, float]:
    """The learning rate by optimizer step, across all starts of the run."""
    logged = [pair for part in [folder, *folder.glob("run_*")] for pair in scalars(part).get("train_optim/lr", [])]
    return dict(logged)


def cosine(lr: float, min_lr: float, horizon: int, step: int) -> float:
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * step / horizon))


def test_an_extended_run_goes_on_at_the_rates_of_a_run_of_that_length(workplace, start, one_step):
    code, output, folder = resume(workplace, start, one_step, "extended", "trainer.rs.max_steps=3")
    assert code == 0, output[-3000:]
    found = rates(folder)
    assert found.keys() == set(range(6))
    for step in range(2):  # a schedule of two steps
        assert found[step] == pytest.approx(cosine(LR, MIN_LR, 2, step), rel=1e-6)
    for step in range(2, 6):  # a schedule of six steps
        assert found[step] == pytest.approx(cosine(LR, MIN_LR, 6, step), rel=1e-6)

    (warning,) = warnings_of(output)
    assert "model.optim.sched.max_steps=6 (was 2)" in warning and warning.count("(was ") == 1


def test_the_same_command_says_nothing(workplace, start):
    settings = ("trainer.rs.max_steps=6", "trainer.rs.max_epochs=2", "model.rs.reward.kwargs={seconds: 0.5}")
    code, output = start("same", *settings, "exp_manager.max_time_per_run=00:00:00:01")
    assert code == 0, output[-3000:]
    assert 0 < read_counters(newest_complete_checkpoint(workplace / "same/checkpoints"))["step"] < 6
    code, output = start("same", *settings)
    assert code == 0, output[-3000:]
    assert "Resuming training from checkpoint" in output and warnings_of(output) == []
    expected = {step: cosine(LR, MIN_LR, 12, step) for step in range(12)}
    assert rates(workplace / "same") == pytest.approx(expected, rel=1e-6)


def test_other_optimizer_settings_hold_from_the_resumed_step_on(workplace, start, one_step):
    changes = (
        "trainer.rs.max_steps=2", "model.optim.lr=2e-3", "model.optim.sched.min_lr=1e-3",
        "model.optim.sched.warmup_steps=1", "model.optim.weight_decay=0.3", "model.optim.betas=[0.8,0.9]",
    )  # fmt: skip
    code, output, folder = resume(workplace, start, one_step, "other_optimizer", *changes)
    assert code == 0, output[-3000:]
    found = rates(folder)
    for step in (2, 3):  # a schedule of four steps, the first of which is warm-up
        assert found[step] == pytest.approx(cosine(2e-3, 1e-3, 3, step - 1), rel=1e-6)
    last = newest_complete_checkpoint(folder / "checkpoints")
    (optimizer,) = torch.load(last / "common.pt", weights_only=True)["optimizer_states"]
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.3, 0.0]  # none for norms and biases
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer["param_groups"])
    assert all(group["step"] == 4 for group in optimizer["param_groups"])
    (warning,) = warnings_of(output)
    assert (
        "model.optim.lr=0.002 (was 0.001), " in warning and "model.optim.betas=[0.8, 0.9] (was [0.9, 0.98])" in warning
    )


def test_everything_else_that_changes_what_a_run_does_is_named(workplace, start, one_step):
    (workplace / "more.jsonl").write_text("".join(json.dumps({"text": f"another prompt {i}"}) + "\n" for i in range(8)))
    (workplace / "other.nemo").write_bytes((workplace / "tiny.nemo").read_bytes())
    changes = (
        "trainer.rs.max_steps=2", "pretrained_checkpoint.restore_from_path=other.nemo", "model.seed=7",
        "model.data.data_prefix={train: [more.jsonl], validation: [val.jsonl], test: [val.jsonl]}",
        "model.rs.num_rollouts_per_prompt=2", "model.rs.sampling_params.temperature=0.5",
    )  # fmt: skip
    code, output, _ = resume(workplace, start, one_step, "other", *changes)
    assert code == 0, output[-3000:]
    (warning,) = warnings_of(output)
    archive, other = (workplace / "tiny.nemo").resolve(), workplace / "other.nemo"
    for difference in (
        f"pretrained_checkpoint.restore_from_path={other} (was {archive})", "model.seed=7 (was 1234)",
        "the number of training prompts=8 (was 6)", "sampling_params.temperature=0.5 (was 1.0)",
        "model.data.data_prefix.train=['more.jsonl'] (was ['train.jsonl'])", "num_rollouts_per_prompt=2 (was 3)",
    ):  # fmt: skip
        assert difference in warning
    assert warning.count("(was ") == 7, "and the horizon of the schedule"


def test_fewer_prompts_a_step_go_on_behind_those_that_were_trained_on(workplace, start, one_step):
    code, output, folder = resume(
        workplace, start, one_step, "fewer", "trainer.rs.max_steps=-1", "model.rs.num_rollout_samples=1"
    )
    assert code == 0, output[-3000:]
    lines = rollouts(folder, "train")
    assert sorted({line["step"] for line in lines}) == [0, 1, 2, 3, 4]
    assert Counter(line["prompt_index"] for line in lines) == dict.fromkeys(range(6), N)
    found = rates(folder)  # the horizon is two steps, then one for each of four RS steps
    assert {step: found[step] for step in range(2, 6)} == pytest.approx(
        {step: cosine(LR, MIN_LR, 6, step) for step in range(2, 6)}, rel=1e-6
    )
    counters = read_counters(newest_complete_checkpoint(folder / "checkpoints"))
    assert counters == {"step": 5, "consumed_samples": 6, "epoch": 1, "rs_optimization_step": 6}


def test_another_optimizer_cannot_take_over(workplace, start, one_step):
    change = "model.optim.name=mcore_distributed_optim"
    code, output, _ = resume(workplace, start, one_step, "other_name", "trainer.rs.max_steps=2", change)
    assert code == 2
    assert output.splitlines()[-1].startswith(
        f"error: {change}: the checkpoint to resume from was made with adamw and cannot be continued with another"
    )


def test_a_checkpoint_without_settings_says_nothing(workplace, start, one_step):
    folder = workplace / "old_format"
    shutil.copytree(one_step, folder)
    common = newest_complete_checkpoint(folder / "checkpoints") / "common.pt"
    stored = torch.load(common, weights_only=True)
    del stored["rs_settings"]
    torch.save(stored, common)
    code, output = start("old_format", "trainer.rs.max_steps=2", "model.seed=7")
    assert code == 0, output[-3000:]
    assert warnings_of(output) == [] and len(rollouts(folder, "train")) == 2 * 2 * N
