"""Phases of RSTrainer that end early: what is kept, what is reported, and how the next start continues."""

import contextlib
import gc
import json
import types

import pytest
import torch
from nemo.utils import logging

from nemo_aligner.rewards import python_reward
from nemo_aligner.rewards.python_reward import PythonRewardModel, RewardError, load_reward_function
from nemo_aligner.testing.utils import Utils
from nemo_aligner.utils.errors import ConfigError, PromptError
from nemo_aligner.utils.termination import StopRequested
from tests.fake_trainer import EOS, FakeModel, OutOfTimeAfter, Prompts, SecondTokenReward, Tokenizer, make_trainer


@pytest.fixture(autouse=True, scope="module")
def one_process():
    Utils.initialize_model_parallel()
    gc.freeze()  # the trainer collects garbage every step, and NeMo's import leaves many objects to scan
    yield
    gc.unfreeze()
    Utils.destroy_model_parallel()


def test_the_time_limit_validates_saves_and_stops():
    trainer = make_trainer(run_timer=OutOfTimeAfter(1), max_epochs=3, val_check_interval=5, save_interval=5)
    trainer.fit()
    assert trainer.step == 1 and trainer.logger.finalized == 1
    assert [step for step, _ in trainer.logger.of("val_rollouts/")] == [1]
    ((saved, is_train_end),) = trainer.ckpt_callback.saved
    assert "val_global_rewards" in saved and not is_train_end


class SlowSave:
    """A save that stays pending until it is waited for."""

    is_pending = True
    trainer = types.SimpleNamespace(loggers=[])

    def __init__(self, events):
        self.events = events

    def advance(self, wait):
        self.events.append("save awaited" if wait else "save looked at")
        self.is_pending = not wait


def test_a_save_under_way_is_looked_at_often_and_awaited_at_the_end():
    trainer = make_trainer(max_steps=1, gbs=1)
    events = trainer.model.events
    trainer.ckpt_callback.background_save = SlowSave(events)
    trainer.fit()
    # two micro-batches are generated, as on all replicas, then rewards awaited; one row is trained on at a time
    kinds = ("infer", "reward awaited", "loss", "save looked at", "save awaited")
    rollouts = ["save looked at", "infer"] * 2 + ["save looked at"] + ["save looked at", "reward awaited"] * 2
    training = ["loss", "save looked at"] * 2
    assert [event for event in events if event in kinds] == ["save looked at", *rollouts, *training, "save awaited"]


def test_loggers_are_finalized_when_there_is_nothing_to_do():
    trainer = make_trainer(max_steps=0)
    trainer.fit()
    assert trainer.logger.finalized == 1 and trainer.model.events == []


def failing_reward(prompts, responses):
    raise RuntimeError("no idea")


def leaving_reward(prompts, responses):
    raise SystemExit(0)


def reward_of_nan(prompts, responses):
    return [float("nan")] * len(prompts)


@pytest.mark.parametrize(
    "function, message",
    [("failing_reward", "RuntimeError: no idea for row 0 of 2"), ("reward_of_nan", "nan, which is not a finite")],
)
def test_a_failing_reward_stops_before_training_and_keeps_the_rollouts(function, message, tmp_path):
    rm = PythonRewardModel(load_reward_function(f"{__name__}.{function}"), Tokenizer())
    trainer = make_trainer(rm=rm, rollout_dir=tmp_path)
    with pytest.raises(RewardError, match=message):
        trainer.fit()
    rm.close()
    assert trainer.logger.finalized == 1
    assert trainer.model.batches == [] and trainer.step == 0 and trainer.ckpt_callback.saved == []
    assert [batch["response_tokens"].shape for batch in kept_for_later(tmp_path, "train", 0)] == [(2, 3), (2, 3)]


def kept_for_later(folder, split, step):
    return torch.load(folder / f"unscored_{split}_step{step}_rank0.pt", weights_only=True)["rollout_batches"]


class FlakyReward(SecondTokenReward):
    """Fails the requests with these numbers, counted from 0."""

    def __init__(self, failing):
        super().__init__()
        self.failing = failing

    def infer_rm(self, rollouts):
        future = super().infer_rm(rollouts)
        if len(self.batches) - 1 in self.failing:
            future.result = self.fail
        return future

    def fail(self):
        raise RewardError("the server is away")


ANSWERS = {0: ([50, EOS], [60, EOS], [70, EOS]), 1: ([71, EOS], [61, EOS], [51, EOS])}


def run_until_scored(folder, failing, **cfg):
    """Run until the requests with these numbers fail, and prepare the second start; returns both trainers."""
    cfg = {"k": 2, "val_check_interval": 1, "save_interval": 2, **cfg}
    first = make_trainer(rm=FlakyReward(failing), rollout_dir=folder, answers=ANSWERS, **cfg)
    with pytest.raises(RewardError, match=r"the server is away; the rollouts are in .*unscored_\w+_rank0\.pt"):
        first.fit()
    second = make_trainer(rm=SecondTokenReward(), rollout_dir=folder, model=first.model, **cfg)
    if first.ckpt_callback.saved:
        saved, _ = first.ckpt_callback.saved[-1]
        second.load_state_dict({key: int(saved[key]) for key in second.state_dict()})
    return first, second


def trained_tokens(*trainers):
    return [batch["response_tokens"].tolist() for batch in trainers[-1].model.batches]


def test_rollouts_that_could_not_be_scored_are_scored_first_by_the_next_start(tmp_path):
    undisturbed = make_trainer(
        rm=SecondTokenReward(), rollout_dir=tmp_path / "whole", answers=ANSWERS, k=2, val_check_interval=1,
        save_interval=2,
    )  # fmt: skip
    undisturbed.fit()

    # Requests 0 and 1 are those of step 0, 2 its validation's, 3 and 4 those of step 1.
    first, second = run_until_scored(tmp_path / "broken", failing={4})
    assert first.step == 1 and len(first.model.requests) == 5
    assert [int(saved["step"]) for saved, _ in first.ckpt_callback.saved] == [1]  # outside the save interval of 2
    kept = kept_for_later(tmp_path / "broken", "train", 1)
    assert ["rewards" in batch for batch in kept] == [True, False]
    assert len(logged_rollouts(tmp_path / "broken")) == 6, "those of the second micro-batch have no reward yet"

    second.fit()
    assert len(first.model.requests) == 6, "only the last validation is generated anew"
    assert len(second.rm.batches) == 2 and second.rm.batches[0]["response_tokens"].shape[0] == 2
    assert list((tmp_path / "broken").glob("unscored_*")) == []
    assert trained_tokens(first, second) == trained_tokens(undisturbed)
    for split in ("train", "val"):
        assert logged_rollouts(tmp_path / "broken", split) == logged_rollouts(tmp_path / "whole", split)


def test_stored_rollouts_that_were_not_reached_before_sigterm_are_kept(tmp_path, monkeypatch):
    first, second = run_until_scored(tmp_path, failing={1})
    before = kept_for_later(tmp_path, "train", 0)

    def asked_to_stop(is_done=True):
        raise StopRequested

    with monkeypatch.context() as patch:
        patch.setattr(second.termination, "sync", asked_to_stop)
        with pytest.raises(StopRequested):
            second.fit()
    kept = kept_for_later(tmp_path, "train", 0)
    assert len(kept) == len(before) == 2
    assert [batch["response_tokens"].tolist() for batch in kept] == [b["response_tokens"].tolist() for b in before]
    generated = len(first.model.requests)
    third = make_trainer(rm=SecondTokenReward(), rollout_dir=tmp_path, model=first.model, k=2, val_check_interval=1,
                         save_interval=2)  # fmt: skip
    third.fit()
    assert len(first.model.requests) == generated + 4, "rollouts of step 0 are those that were stored"


def test_sigterm_is_answered_in_the_middle_of_a_microbatch(tmp_path):
    """It arrives while the second one is generated: the first is kept, the second is left to the next start."""

    class Model(FakeModel):
        def infer_each(self, batches, check, on_last_rows):
            yield self.infer(batches[0])
            trainer.termination._remember(None, None)
            check()
            yield self.infer(batches[1])

    trainer = make_trainer(model=Model(), rollout_dir=tmp_path, g=4, mbs=1)
    with pytest.raises(StopRequested, match=r"the rollouts are in .*unscored_train_step0_rank0\.pt"):
        trainer.fit()
    assert len(kept_for_later(tmp_path, "train", 0)) == 1 and len(trainer.model.requests) == 1


def test_a_save_that_failed_is_tried_again_before_the_end(tmp_path):
    trainer = make_trainer(rm=FlakyReward({3}), rollout_dir=tmp_path, answers=ANSWERS, k=2, val_check_interval=1,
                           save_interval=1)  # fmt: skip
    trainer.ckpt_callback.has_last_save_failed = True  # for example, on a full disk
    with pytest.raises(RewardError):
        trainer.fit()
    assert [int(saved["step"]) for saved, _ in trainer.ckpt_callback.saved] == [1, 1]


def test_a_run_without_a_folder_promises_nothing():
    trainer = make_trainer(rm=FlakyReward({1}), val_check_interval=1, save_interval=1)
    with pytest.raises(RewardError, match=r"^the server is away$"):
        trainer.fit()


def test_a_validation_that_could_not_be_scored_is_finished_first(tmp_path):
    first, second = run_until_scored(tmp_path, failing={2})
    assert first.step == 1 and [int(saved["step"]) for saved, _ in first.ckpt_callback.saved] == [1]
    num_generated = len(first.model.requests)
    second.fit()
    # two micro-batches of step 1 and one of its validation; that of step 0 was already there
    assert len(first.model.requests) == num_generated + 3
    assert [step for step, _ in second.logger.of("val_rollouts/")] == [1, 2]
    assert "val_global_rewards" in second.ckpt_callback.saved[0][0]


@pytest.mark.parametrize(
    "change", ["model.seed", "pretrained_checkpoint.restore_from_path", "model.peft.restore_from_path"]
)
def test_rollouts_of_another_model_or_seed_are_not_taken_for_this_ones(tmp_path, change, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", warnings.append)
    with pytest.raises(RewardError):
        make_trainer(rm=FlakyReward({1}), rollout_dir=tmp_path).fit()
    model = FakeModel()
    if change == "model.seed":
        model.cfg.seed = 6
    elif change == "pretrained_checkpoint.restore_from_path":
        model.restored_from = "/models/other.nemo"
    else:
        model.cfg.peft = {"restore_from_path": "adapters.nemo"}
    second = make_trainer(rm=SecondTokenReward(), rollout_dir=tmp_path, model=model)
    second.fit()
    assert len(model.requests) == 4, "two micro-batches of each of two steps"
    assert f"made with another {change}; generating new rollouts" in warnings[0]


@pytest.mark.parametrize("change", ["settings", "prompts"])
def test_rollouts_of_another_run_are_not_taken_for_this_ones(tmp_path, change, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", warnings.append)
    _, second = run_until_scored(tmp_path, failing={1})
    generated = len(second.model.requests)
    if change == "settings":
        second.unscored.made_with = {**second.unscored.made_with, "length_params": {"max_length": 5}}
    else:
        second.train_dataloader.dataset.prompts = ((7,), (8,), (7,), (8,))
    second.fit()
    assert len(second.model.requests) == generated + 6 and list(tmp_path.glob("unscored_*")) == []
    complaint = (
        "another length_params; generating new rollouts"
        if change == "settings"
        else "other prompts; generating new rollouts"
    )
    assert complaint in warnings[0]


def test_rollouts_of_a_step_that_a_run_has_gone_back_from_are_not_taken_for_this_ones(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", warnings.append)
    first, _ = run_until_scored(tmp_path, failing={4})
    (left,) = tmp_path.glob("unscored_train_step1_*")
    generated = len(first.model.requests)
    make_trainer(rm=SecondTokenReward(), rollout_dir=tmp_path, model=first.model, k=2).fit()
    assert len(first.model.requests) == generated + 4, "two micro-batches of each of two steps"
    assert warnings == [f"{left} is from later weights than this run has, which resumes at step 0: deleted"]


def test_rewards_of_another_function_are_not_mixed_with_those_of_this_one(tmp_path, monkeypatch):
    """The function was fixed in between under the same name; rollouts that the old one scored are scored again."""
    warnings = []
    monkeypatch.setattr(logging, "warning", warnings.append)
    file = tmp_path / "rewards.py"
    found = []
    for reward in ("[100.0 / (calls.append(0) or 2 - len(calls)) for _ in responses[:1]] * 2", "[0.5, 0.5]"):
        file.write_text(f"calls = []\n\n\ndef reward(prompts, responses):\n    return {reward}\n")
        python_reward._execute_file.cache_clear()  # as if in another process
        rm = PythonRewardModel(load_reward_function(f"{file}:reward"), Tokenizer())
        trainer = make_trainer(rm=rm, rollout_dir=tmp_path, max_steps=1)
        with pytest.raises(RewardError, match="ZeroDivisionError") if not found else contextlib.nullcontext():
            trainer.fit()
        rm.close()
        found.append(trainer)
        if len(found) == 1:
            assert ["rewards" in batch for batch in kept_for_later(tmp_path, "train", 0)] == [True, False]
    assert found[1].model.requests == [], "the rollouts are those of the first start"
    ((_, metrics),) = found[1].logger.of("train_rollouts/")
    assert metrics["global_rewards"] == 0.5
    assert any("the reward has changed since; all of its rollouts are scored again" in line for line in warnings)


def test_a_disk_that_takes_no_rollouts_does_not_end_the_run(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", warnings.append)
    no_file = tmp_path / "train_rank0.jsonl"
    no_file.mkdir()
    trainer = make_trainer(rollout_dir=tmp_path, max_steps=1)
    trainer.fit()
    assert trainer.step == 1
    assert f"rollouts of step 0 are missing in {no_file}: [Errno 21] Is a directory" in warnings[0]


def test_a_disk_that_does_not_keep_the_unscored_leaves_the_checkpoint_to_be_written(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", warnings.append)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("PytorchStreamWriter failed")))
    trainer = make_trainer(rm=FlakyReward({4}), rollout_dir=tmp_path, answers=ANSWERS, k=2, val_check_interval=1,
                           save_interval=2)  # fmt: skip
    with pytest.raises(RewardError, match=r"^the server is away$"):
        trainer.fit()
    assert [int(saved["step"]) for saved, _ in trainer.ckpt_callback.saved] == [1]
    assert "step1_rank0.pt could not be written, its rollouts are lost: PytorchStreamWriter failed" in warnings[-1]
    assert not list(tmp_path.glob("unscored_*"))


def test_a_validation_whose_prompts_could_not_be_read_is_made_up_for(tmp_path):
    settings = {"rollout_dir": tmp_path, "val_check_interval": 1, "save_interval": 1}
    first = make_trainer(**settings)
    first.val_dataloader.dataset.record = lambda index: (tmp_path / "gone").read_text()
    with pytest.raises(PromptError, match="No such file or directory"):
        first.fit()
    assert first.step == 1 and [int(saved["step"]) for saved, _ in first.ckpt_callback.saved] == [1]
    second = make_trainer(**settings, model=first.model)
    second.load_state_dict({key: int(first.ckpt_callback.saved[0][0][key]) for key in second.state_dict()})
    second.fit()
    assert [step for step, _ in second.logger.of("val_rollouts/")] == [1, 2]
    assert not list(tmp_path.glob("unscored_*"))


def test_prompts_that_cannot_be_read_any_more_end_the_run_behind_a_checkpoint(tmp_path):
    trainer = make_trainer(rollout_dir=tmp_path, max_epochs=3, save_interval=9)
    read, dataset = Prompts.record, trainer.train_dataloader.dataset

    def record(index):
        if trainer.step == 3:
            raise ConfigError("train.jsonl: the prompt file has changed")
        return read(dataset, index)

    dataset.record = record
    with pytest.raises(PromptError, match=r"^train.jsonl: the prompt file has changed$"):
        trainer.fit()
    assert [int(saved["step"]) for saved, _ in trainer.ckpt_callback.saved] == [3]
    assert int(trainer.ckpt_callback.saved[0][0]["consumed_samples"]) == 3 * trainer.num_prompts_per_step


def test_a_run_that_failed_in_its_last_validation_still_ends_properly(tmp_path):
    first, second = run_until_scored(tmp_path, failing={5})
    assert first.step == first.max_steps == 2
    second.fit()
    assert [is_train_end for _, is_train_end in second.ckpt_callback.saved] == [True]


def test_a_pending_validation_at_the_start_saves_nothing(tmp_path):
    first, second = run_until_scored(tmp_path, failing={0}, val_at_start=True)
    assert first.step == 0 and first.ckpt_callback.saved == []
    second.fit()
    assert [step for step, _ in second.logger.of("val_rollouts/")] == [0, 1, 2]
    assert [int(saved["step"]) for saved, _ in second.ckpt_callback.saved] == [2]


def test_a_reward_function_cannot_end_the_run_unnoticed(tmp_path):
    rm = PythonRewardModel(load_reward_function(f"{__name__}.leaving_reward"), Tokenizer())
    with pytest.raises(RewardError, match="SystemExit: 0 for row 0 of 2"):
        make_trainer(rm=rm, rollout_dir=tmp_path).fit()
    rm.close()


def logged_rollouts(folder, split="train") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}_rank0.jsonl").read_text().splitlines()]


class InterruptedModel(FakeModel):
    """Ctrl-C arrives in its third inference call."""

    def infer(self, batch):
        if len(self.requests) == 2:
            raise KeyboardInterrupt
        return super().infer(batch)


class ModelWithoutNumbers(FakeModel):
    """Its weights are NaN from the third inference call onwards."""

    def infer(self, batch):
        if len(self.requests) == 2:
            raise FloatingPointError("rollouts: NaN")
        return super().infer(batch)


def test_weights_that_became_nan_end_the_run_with_the_step_and_nothing_is_saved(tmp_path):
    trainer = make_trainer(g=2, model=ModelWithoutNumbers(), rollout_dir=tmp_path, save_interval=5)
    with pytest.raises(FloatingPointError, match=r"^RS step 1: rollouts: NaN$"):
        trainer.fit()
    assert trainer.step == 1 and trainer.ckpt_callback.saved == [] and trainer.logger.finalized == 1


def test_rollouts_are_on_disk_after_an_interrupt_in_the_middle(tmp_path):
    trainer = make_trainer(g=4, model=InterruptedModel(), rollout_dir=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.logger.finalized == 1 and trainer.model.batches == []
    lines = logged_rollouts(tmp_path)
    assert len(lines) == 4 and not any(line["kept"] for line in lines)
    assert {line["response"] for line in lines} == {"50"}


def test_rollouts_are_on_disk_after_a_failure_in_their_selection(tmp_path):
    trainer = make_trainer(rollout_dir=tmp_path)
    trainer.top_n_rollouts = 3  # of 2
    with pytest.raises(ValueError, match="num_select=3 exceeds"):
        trainer.fit()
    written = [(line["reward"], line["kept"]) for line in logged_rollouts(tmp_path)]
    assert written == [(50, False), (50, False), (None, False), (None, False)]


def test_the_log_says_which_of_the_kept_were_trained_on(tmp_path):
    answers = {0: ([30, 31, 32],), 1: ([99, EOS],), 2: ([40, EOS],), 3: ([50, EOS],)}
    trainer = make_trainer(n=1, g=4, answers=answers, replaced=(3,), rollout_dir=tmp_path)
    trainer.fit()
    lines = sorted(logged_rollouts(tmp_path), key=lambda line: line["prompt_index"])
    assert [(line["kept"], line["trained_on"]) for line in lines] == [(True, index == 2) for index in range(4)]


def test_the_log_has_every_rollout_with_reward_and_choice(tmp_path):
    answers = {0: ([20, EOS], [30, 31, 32]), 1: ([99, EOS], [40, EOS])}
    trainer = make_trainer(prompts=((1,), (2, 2)), answers=answers, rollout_dir=tmp_path, val_check_interval=1)
    trainer.fit()
    lines = sorted(logged_rollouts(tmp_path), key=lambda line: line["prompt_index"])
    columns = ("step", "prompt_index", "prompt", "response", "num_tokens", "finished", "reward", "kept", "trained_on")
    assert [tuple(line[column] for column in columns) for line in lines] == [
        (0, 0, "1", "20", 2, True, 20.0, True, True),
        (0, 0, "1", "30 31 32", 3, False, 30.0, False, False),
        (0, 1, "2 2", "99", 2, True, None, False, False),
        (0, 1, "2 2", "40", 2, True, 40.0, True, True),
    ]
    assert [(line["step"], line["reward"]) for line in logged_rollouts(tmp_path, "val")] == [(1, 20.0)]


@pytest.mark.parametrize("model", [FakeModel(), InterruptedModel()], ids=["finished", "interrupted"])
def test_logs_and_tables_show_prompts_as_they_stand_in_their_file(tmp_path, model):
    trainer = make_trainer(model=model, g=4, rollout_dir=tmp_path, val_check_interval=1)
    for loader in (trainer.train_dataloader, trainer.val_dataloader):
        loader.dataset.record = lambda index: {"text": f"<user>{index}"}
    with pytest.raises(KeyboardInterrupt) if isinstance(model, InterruptedModel) else contextlib.nullcontext():
        trainer.fit()
    lines = logged_rollouts(tmp_path)
    assert lines and all(line["prompt"] == f"<user>{line['prompt_index']}" for line in lines)
    if isinstance(model, InterruptedModel):
        return
    assert {key: table["prompt"][0] for key, _, table in trainer.logger.tables} == {
        "table/train_rollouts": f"<user>{lines[0]['prompt_index']}",
        "table/val_rollouts": "<user>0",
    }
