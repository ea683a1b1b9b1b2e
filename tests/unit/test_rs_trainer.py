"""RSTrainer with a fake model in one process: what it asks of its collaborators, when, and what it reports."""

import contextlib
import gc
import json
import math

import pytest
import torch
from megatron.core import parallel_state
from nemo.utils import logging

from nemo_aligner.algorithms import rs
from nemo_aligner.algorithms.rs import compute_num_rollout_microbatches
from nemo_aligner.testing.utils import Utils
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.phases import OTHER, PHASES, TOTAL
from tests.fake_trainer import EOS, OutOfTimeAfter, make_trainer


@pytest.fixture(autouse=True, scope="module")
def one_process():
    Utils.initialize_model_parallel()
    gc.freeze()  # the trainer collects garbage every step, and NeMo's import leaves many objects to scan
    yield
    gc.unfreeze()
    Utils.destroy_model_parallel()


def trained_rows(trainer) -> list[tuple[list[int], list[int]]]:
    """For every row that reached the loss: its tokens without padding, and the positions of the tokens trained on."""
    rows = []
    for batch in trainer.model.batches:
        for tokens, mask in zip(batch["response_tokens"].tolist(), batch["mask"], strict=True):
            while len(tokens) > 1 and tokens[-1] == tokens[-2] == EOS:
                tokens.pop()
            rows.append((tokens, (mask.nonzero().flatten() + 1).tolist()))
    return rows


# ---- selection


def test_the_best_response_of_each_prompt_is_trained_on_even_if_prompts_are_equal():
    answers = {0: ([20, EOS], [23, EOS], [22, EOS]), 1: ([31, EOS], [30, EOS], [30, EOS])}
    trainer = make_trainer(prompts=((1, 2), (1, 2)), n=3, mbs=2, answers=answers)
    trainer.fit()
    # the first generated id is the reward; token positions 2 and 3 are the response
    assert sorted(trained_rows(trainer)) == [([1, 2, 23, EOS], [2, 3]), ([1, 2, 31, EOS], [2, 3])]


def test_k_rows_a_prompt_in_order_of_reward():
    answers = {0: ([20, EOS], [23, EOS], [22, EOS])}
    trainer = make_trainer(prompts=((1,),), n=3, k=2, g=1, answers=answers)
    trainer.fit()
    assert [tokens for tokens, _ in trained_rows(trainer)] == [[1, 23, EOS], [1, 22, EOS]]


@pytest.mark.parametrize(
    "unfit",
    [[90, 91], [EOS], [99, EOS]],
    ids=["cut off", "nothing but the end", "unjudged"],
)
def test_an_unfit_response_comes_last_and_is_masked(unfit):
    answers = {0: (unfit, [20, EOS], [21, EOS])}
    one = make_trainer(prompts=((1,),), n=3, k=1, g=1, gbs=1, answers=answers)
    one.fit()
    assert trained_rows(one) == [([1, 21, EOS], [1, 2])]
    every = make_trainer(prompts=((1,),), n=3, k=3, g=1, gbs=3, answers=answers)
    every.fit()
    assert trained_rows(every)[:2] == [([1, 21, EOS], [1, 2]), ([1, 20, EOS], [1, 2])]
    assert trained_rows(every)[2][1] == []


def test_among_unfit_rows_the_better_reward_fills_up():
    answers = {0: ([40, 41], [20, EOS], [60, 61])}
    trainer = make_trainer(prompts=((1,),), n=3, k=2, g=1, answers=answers)
    trainer.fit()
    assert trained_rows(trainer) == [([1, 20, EOS], [1, 2]), ([1, 60, 61], [])]


def test_all_rejected_trains_on_nothing_but_keeps_the_row_count():
    trainer = make_trainer(answers={index: ([90, 91],) for index in range(4)})
    batches, run_training = [], trainer.run_training
    trainer.run_training = lambda step: run_training(batches.append(batch) or batch for batch in step)
    trainer.fit()
    assert [batch["mask"].shape[0] for batch in batches] == [2, 2]
    assert trainer.model.weight.item() == 0
    assert [metrics["selected_fraction_fit"] for _, metrics in trainer.logger.of("train_rollouts/")] == [0, 0]


@pytest.fixture
def warnings(monkeypatch):
    caught = []
    monkeypatch.setattr(rs.logging, "warning", caught.append)
    return caught


def test_without_a_token_to_train_on_the_weights_stay_as_they_are(warnings):
    """Momentum and weight decay would change them even without a gradient."""
    trainer = make_trainer()
    weight = trainer.model.weight
    trainer.optimizer = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.5)
    trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: 0.5**step)
    weight.data.fill_(3.0)
    nothing, something = {"mask": torch.zeros(2, 3)}, {"mask": torch.tensor([[0.0, 1, 1], [0, 1, 1]])}

    trainer.run_training(iter([nothing]))
    assert trainer.model.events == ["prepare_for_training", "finish_training"]  # no pass
    assert weight.item() == 3.0 and trainer.optimizer.state_dict()["state"] == {}
    assert warnings == [
        "RS step 1: 1 of 1 optimizer steps had nothing to train on and were left out; 0 of 2 kept rollouts were fit "
        "for training (others were cut off, empty, not judged, or of a prompt that was too long)"
    ]
    trainer.run_training(iter([something]))
    assert weight.item() < 3.0 and len(warnings) == 1

    trainer.run_training(iter([nothing, something]))
    assert "1 of 2 optimizer steps had nothing to train on and were left out; 2 of 4 kept" in warnings[1]
    # skipped steps are still counted and logged, but do not advance the schedule
    logged = trainer.logger.of("train_optim/")
    assert [(step, metrics["lr"], metrics["loss"], metrics["grad_norm"]) for step, metrics in logged] == [
        (0, 0.5, 0, 0), (1, 0.5, 4, 4), (2, 0.25, 0, 0), (3, 0.25, 4, 4),
    ]  # fmt: skip
    assert len({tuple(sorted(metrics)) for _, metrics in logged}) == 1


def test_without_clipping_a_batch_without_a_token_has_no_norm_either():
    trainer = make_trainer(gradient_clip_val=0)
    trainer.run_training(iter([{"mask": torch.zeros(2, 3)}, {"mask": torch.ones(2, 3)}]))
    (_, nothing), (_, something) = trainer.logger.of("train_optim/")
    assert nothing.keys() == something.keys() and "grad_norm" not in nothing


def test_a_replaced_prompt_is_not_trained_on():
    trainer = make_trainer(prompts=((1,), (2,)), replaced=(1,))
    trainer.fit()
    assert sorted(trained_rows(trainer)) == [([1, 50, EOS], [1, 2]), ([2, 50, EOS], [])]


# ---- training rows


def test_rows_are_padded_with_the_end_token_and_masks_with_zero():
    # prompts of 1 and 3 tokens, responses of 3 and 2 tokens
    trainer = make_trainer(prompts=((1,), (2, 2, 2)), answers={0: ([30, 31, EOS],), 1: ([40, EOS],)})
    trainer.fit()
    (batch,) = trainer.model.batches
    order = batch["response_tokens"][:, 0].argsort()
    assert batch["response_tokens"][order].tolist() == [[1, 30, 31, EOS, EOS], [2, 2, 2, 40, EOS]]
    assert batch["mask"][order].tolist() == [[1, 1, 1, 0], [0, 0, 1, 1]]
    assert batch["mask"].dtype == torch.float32 and batch["response_tokens"].dtype == torch.int64
    assert batch["prompt_tokens"][order][:, 0].tolist() == [1, 2]


def test_a_minimum_width_widens_rows_and_masks():
    trainer = make_trainer(prompts=((1,), (2,)), rollout_batch_seq_length=7)
    trainer.fit()
    (batch,) = trainer.model.batches
    assert batch["response_tokens"].shape == (2, 7) and batch["mask"].shape == (2, 6)
    assert (batch["response_tokens"][:, 3:] == EOS).all() and (batch["mask"][:, 2:] == 0).all()


def test_wider_data_wins_over_the_minimum_width_with_a_warning():
    trainer = make_trainer(prompts=((1,), (2,)), rollout_batch_seq_length=2)
    with pytest.warns(UserWarning, match="3 tokens is longer than the 2"):
        trainer.fit()
    assert trainer.model.batches[0]["response_tokens"].shape == (2, 3)


def test_sequence_parallelism_rounds_the_width_up(monkeypatch):
    trainer = make_trainer(prompts=((1,), (2,)), answers={0: ([30, 31, 32, EOS],)})
    trainer.model.trains_with_sequence_parallel = True
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 4)
    trainer.fit()
    (batch,) = trainer.model.batches
    assert batch["response_tokens"].shape == (2, 8) and batch["mask"].shape == (2, 7)
    assert (batch["response_tokens"][:, 5:] == EOS).all()


def test_every_optimizer_step_gets_its_rows_in_order():
    # G = 4 prompts, K = 2: 8 rows in 4 steps of 2; rollouts of a prompt stay together, the better one first
    answers = {index: ([20 + index, EOS], [30 + index, EOS]) for index in range(4)}
    trainer = make_trainer(k=2, g=4, answers=answers)
    trainer.fit()
    responses = [batch["response_tokens"][:, 1].tolist() for batch in trainer.model.batches]
    assert sorted(responses) == [[30 + index, 20 + index] for index in range(4)]


# ---- inference


def test_all_rollouts_of_a_micro_batch_come_from_one_call():
    trainer = make_trainer(n=3, mbs=2)
    trainer.generate_rollouts(iter(trainer.train_dataloader), 1)
    (request,) = trainer.model.requests
    index = request["prompt_index"].tolist()
    assert len(index) == 6 and index[0] == index[1] == index[2] != index[3] == index[4] == index[5]
    assert (request["text"][:, 0] == request["prompt_index"] + 1).all() and request["length"].tolist() == [1] * 6


def test_rewards_are_requested_at_once_and_awaited_when_all_are_under_way():
    trainer = make_trainer(g=4)
    trainer.generate_rollouts(iter(trainer.train_dataloader), 4)
    assert trainer.model.events == [
        "prepare_for_inference",
        *["infer", "reward requested"] * 3,
        "prefetch_adam_states beside rollouts",
        *["infer", "reward requested"],
        "prefetch_adam_states",
        *["reward awaited"] * 4,
        "finish_inference",
    ]


def test_optimizer_states_stay_away_during_validation():
    trainer = make_trainer()
    trainer.run_validation()
    assert "infer" in trainer.model.events
    assert not any(event.startswith("prefetch") for event in trainer.model.events)


def test_the_reward_sees_every_rollout_with_its_record():
    trainer = make_trainer(n=2)
    trainer.generate_rollouts(iter(trainer.train_dataloader), 2)
    for batch in trainer.rm.batches:
        assert [record["number"] for record in batch["records"]] == batch["prompt_index"].tolist()
        assert len(batch["records"]) == 2
        for key in ("response_tokens", "prompt_tokens", "response_lengths", "prompt_lengths"):
            assert len(batch[key]) == 2, key


def test_no_surplus_batch_is_drawn():
    trainer = make_trainer()
    batches = iter(list(trainer.train_dataloader))
    trainer.generate_rollouts(batches, 2)
    assert len(list(batches)) == 2


def test_training_and_validation_draw_from_their_own_stream_of_every_step():
    trainer = make_trainer(val_check_interval=1, save_interval=1)
    trainer.fit()
    assert len(set(trainer.model.seeds)) == 4


# ---- metrics


def test_metrics_by_hand():
    # rewards (lengths): 20 (2), 30 (3, cut off), unjudged (2), 40 (2); G = 2, N = 2; prompts of 1 and 2 tokens
    answers = {0: ([20, EOS], [30, 31, 32]), 1: ([99, EOS], [40, EOS])}
    trainer = make_trainer(prompts=((1,), (2, 2)), answers=answers)
    _, metrics = trainer.generate_rollouts(iter(trainer.train_dataloader), 2)
    table = metrics.pop("table")
    assert metrics == {
        "global_rewards": 30,  # (20 + 30 + 40) / 3
        "global_response_lengths_mean": 2.25,
        "global_prompt_lengths": 1.5,
        "fraction_finished": 0.75,
        "fraction_fit": 0.5,
        "fraction_unjudged": 0.25,
        "selected_rewards_mean": 30,  # mean of 20, because 30 was cut off, and 40
        "selected_response_lengths_mean": 2,
        "selected_fraction_fit": 1,
        "consumed_samples": 2,
    }
    assert table in (
        {"reward": 20, "prompt": "1", "response": f"20 {EOS}"},
        {"reward": 40, "prompt": "2 2", "response": f"40 {EOS}"},
    )


def test_without_a_judgement_the_mean_reward_is_nan():
    trainer = make_trainer(prompts=((1,), (2,)), answers={0: ([99, EOS],), 1: ([99, EOS],)})
    _, metrics = trainer.generate_rollouts(iter(trainer.train_dataloader), 2)
    assert math.isnan(metrics["global_rewards"]) and math.isnan(metrics["selected_rewards_mean"])
    assert metrics["fraction_unjudged"] == 1


def test_rows_that_only_fill_a_batch_are_not_counted():
    trainer = make_trainer()
    batch = {
        "response_tokens": torch.tensor([[1, 50, EOS], [1, 50, EOS], [1, 50, EOS]]),
        "response_lengths": torch.tensor([3, 2, 2]), "prompt_lengths": torch.tensor([1, 1, 1]),
        "rewards": torch.tensor([1.0, 4.0, 100.0]), "is_padding": torch.tensor([False, False, True]),
    }  # fmt: skip
    metrics = trainer.compute_global_rollout_metrics([batch])
    assert metrics["global_rewards"] == 2.5
    assert metrics["global_response_lengths_mean"] == 1.5


def test_sums_are_exact_beyond_float32():
    trainer = make_trainer()
    batch = {
        "response_tokens": torch.tensor([[1, EOS]] * 3), "prompt_lengths": torch.tensor([1, 1, 1]),
        "response_lengths": torch.tensor([2**24, 2, 2]), "rewards": torch.tensor([[2.0**24], [1.0], [1.0]]),
    }  # fmt: skip
    metrics = trainer.compute_global_rollout_metrics([batch])
    assert metrics["global_rewards"] == (2**24 + 2) / 3
    assert metrics["global_response_lengths_mean"] == (2**24 + 1) / 3


@pytest.mark.parametrize("num_val, scored", [(8, 5), (4, 4), (2, 2)])
def test_validation_scores_every_prompt_once_up_to_the_limit(num_val, scored):
    lengths = [2, 2, 3, 2, 3]
    answers = {i: ([10 * i, *[61] * (length - 2), EOS],) for i, length in enumerate(lengths)}
    trainer = make_trainer(val_prompts=((1,),) * 5, val_mbs=2, num_val=num_val, answers=answers)
    for _ in range(2):  # every validation starts a new pass
        metrics = trainer.run_validation()
        assert metrics["global_rewards"] == sum(range(scored)) * 10 / scored
        assert metrics["global_response_lengths_mean"] == sum(lengths[:scored]) / scored
    assert "selected_rewards_mean" not in metrics


def test_a_validation_prompt_that_stands_in_for_another_is_counted_once(tmp_path):
    answers = {index: ([10 * index, EOS],) for index in range(4)}
    settings = {"val_prompts": ((1,),) * 4, "val_mbs": 2, "num_val": 4, "answers": answers, "rollout_dir": tmp_path}
    trainer = make_trainer(val_replaced=(1, 2), **settings)
    metrics = trainer.run_validation()
    assert metrics["global_rewards"] == (0 + 30) / 2 and metrics["fraction_fit"] == 1
    logged = (tmp_path / "val_rank0.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt_index"] for line in logged] == [0, 3]


def test_a_validation_of_stand_ins_alone_has_no_means():
    metrics = make_trainer(val_replaced=(0,)).run_validation()
    assert all(math.isnan(value) for name, value in metrics.items() if name != "table")


def test_an_empty_rollout_phase_is_an_error():
    trainer = make_trainer()
    with pytest.raises(ValueError, match="training prompts make no micro-batch"):
        trainer.generate_rollouts(iter([]), 2)
    with pytest.raises(ValueError, match="no rollouts to train on"):
        trainer.run_training(iter([]))


# ---- optimizer steps


def test_optimizer_steps_are_logged_one_by_one():
    trainer = make_trainer(k=2)  # 2 RS steps of 2 optimizer steps, each of 2 rows with 2 tokens: gradient 4
    trainer.fit()
    logged = trainer.logger.of("train_optim/")
    assert [step for step, _ in logged] == [0, 1, 2, 3]
    assert [metrics["optim_step"] for _, metrics in logged] == [0, 1, 2, 3]
    assert [metrics["lr"] for _, metrics in logged] == [1, 0.5, 0.25, 0.125]  # before the scheduler's step
    assert [metrics["loss"] for _, metrics in logged] == [4, 4, 4, 4]
    assert [metrics["grad_norm"] for _, metrics in logged] == [4, 4, 4, 4]
    assert all(metrics["train_step_time"] > 0 for _, metrics in logged)
    # gradients are clipped to norm 1 and zeroed in between: -(1 + 0.5 + 0.25 + 0.125)
    assert trainer.model.weight.item() == pytest.approx(-1.875, rel=1e-5)
    assert trainer.rs_optimization_step == 4


@pytest.mark.parametrize("clip_val", [None, 0])
def test_without_clipping_there_is_no_norm(clip_val):
    trainer = make_trainer(gradient_clip_val=clip_val, max_steps=1)
    trainer.fit()
    assert "grad_norm" not in trainer.logger.of("train_optim/")[0][1]
    assert trainer.model.weight.item() == -4


def test_order_of_calls_in_an_optimizer_step():
    trainer = make_trainer(max_steps=1)
    trainer.fit()
    training = trainer.model.events[trainer.model.events.index("prepare_for_training") :]
    assert training == [
        "prepare_for_training", "prepare_for_training_step", "loss", "finish_training_step", "finish_training",
    ]  # fmt: skip


# ---- steps, epochs, intervals


@pytest.mark.parametrize(
    "max_epochs, max_steps, done", [(1, -1, 2), (3, -1, 6), (3, 3, 3), (1, 10, 2), (1, 0, 0), (0, -1, 0)]
)
def test_number_of_steps(max_epochs, max_steps, done):
    trainer = make_trainer(prompts=[(i,) for i in range(1, 6)], max_epochs=max_epochs, max_steps=max_steps)
    trainer.fit()
    assert (trainer.step, trainer.max_steps) == (done, done)
    assert trainer.consumed_samples == 2 * done
    assert [step for step, _ in trainer.logger.of("train_rollouts/")] == list(range(done))


@pytest.fixture
def messages(monkeypatch):
    caught = []
    monkeypatch.setattr(rs.logging, "info", caught.append)
    return caught


@pytest.mark.parametrize("limits, last", [({"max_steps": 2}, 2), ({"max_epochs": 0}, 0)])
def test_a_run_with_nothing_left_to_do_says_so(messages, limits, last):
    trainer = make_trainer(**limits)
    trainer.fit()
    first_messages = list(messages)
    trainer.fit()
    nothing_left = (
        f"step {last} of {last}: nothing left to train; raise trainer.rs.max_steps or trainer.rs.max_epochs, or give "
        "another exp_manager.explicit_log_dir"
    )
    assert messages[len(first_messages) :] == [nothing_left]
    assert (nothing_left in first_messages) == (last == 0)


@pytest.mark.parametrize("max_steps, stops_early", [(2, True), (1, False)])
def test_a_run_whose_time_is_up_says_so(messages, max_steps, stops_early):
    make_trainer(run_timer=OutOfTimeAfter(1), max_steps=max_steps).fit()
    said = (
        "RS step 1/2: the time of exp_manager.max_time_per_run is up; the same command continues from its last "
        "checkpoint"
    )
    assert (said in messages) == stops_early


def test_every_epoch_takes_each_prompt_at_most_once():
    trainer = make_trainer(prompts=[(i,) for i in range(1, 6)], max_epochs=3)
    trainer.fit()
    prompts = [request["prompt_index"][0].item() for request in trainer.model.requests]
    epochs = [prompts[start : start + 4] for start in (0, 4, 8)]
    assert all(len(set(epoch)) == 4 for epoch in epochs)
    assert trainer.epoch == 3


def test_prompts_are_counted_whatever_k_is():
    trainer = make_trainer(k=2)
    trainer.fit()
    assert [metrics["consumed_samples"] for _, metrics in trainer.logger.of("train_rollouts/")] == [2, 4]


def test_intervals_of_validation_and_saving():
    trainer = make_trainer(max_epochs=3, max_steps=5, val_check_interval=2, save_interval=4)
    trainer.fit()
    assert [step for step, _ in trainer.logger.of("val_rollouts/")] == [2, 4, 5]
    assert [(int(saved["step"]), is_train_end) for saved, is_train_end in trainer.ckpt_callback.saved] == (
        [(4, False), (5, True)]
    )
    assert [step for step, _ in trainer.logger.of("timers/")] == [1, 2, 3, 4, 5]
    assert [set(metrics) for _, metrics in trainer.logger.of("timers/")][:2] == [
        {"rollout_time", "train_time"},
        {"rollout_time", "train_time", "validation_time"},
    ]


def test_phases_are_logged_with_every_step_and_what_it_saved():
    trainer = make_trainer(max_epochs=2, val_check_interval=2, save_interval=2)
    trainer.fit()
    phases = trainer.logger.of("timers/phase_")
    assert [step for step, _ in phases] == [1, 2, 3, 4]
    assert {frozenset(seconds) for _, seconds in phases} == {frozenset((*PHASES, OTHER, TOTAL))}
    for step, seconds in phases:
        assert (seconds["validation"] > 0) == (step % 2 == 0)
        assert sum(seconds[name] for name in (*PHASES, OTHER)) == pytest.approx(seconds[TOTAL])


def test_writing_a_trace_is_a_phase_of_its_own():
    trainer = make_trainer(max_steps=1)
    at_the_end = []

    @contextlib.contextmanager
    def trace(half, step):
        yield
        at_the_end.append((half, step, trainer.phases._open[-1]))

    trainer.profile.trace = trace
    trainer.fit()
    assert at_the_end == [("rollouts", 1, "trace"), ("training", 1, "trace")]


def test_time_in_a_collaborator_is_in_its_phase():
    trainer = make_trainer(max_steps=1, val_check_interval=1, save_interval=1)
    model, optimizer, checkpoints = trainer.model, trainer.optimizer, trainer.ckpt_callback
    for owner, name, phase in (
        (model, "infer", "rollout"),
        (trainer.rm, "infer_rm", "score"),
        (trainer, "generate_rs_data", "select"),
        (model, "prepare_for_inference", "offload"),
        (model, "prefetch_adam_states", "load_state"),
        (model, "prepare_for_training", "load_state"),
        (model, "get_loss_and_metrics", "forward_backward"),
        (model, "finish_training_step", "optimizer"),
        (optimizer, "step", "optimizer"),
        (checkpoints, "custom_save", "checkpoint"),
    ):
        _note_phase(owner, name, trainer.phases, seen := set())
        trainer.step = 0
        trainer.fit()
        in_validation = {"validation"} if name in ("infer", "infer_rm", "prepare_for_inference") else set()
        in_checkpoint = {"checkpoint"} if name == "prepare_for_training" else set()
        assert seen == {phase} | in_validation | in_checkpoint, name


def _note_phase(owner, name: str, clock, seen: set) -> None:
    original = getattr(owner, name)

    def noting(*args, **kwargs):
        seen.add(clock._open[-1])
        return original(*args, **kwargs)

    setattr(owner, name, noting)


def test_validation_before_the_first_step():
    trainer = make_trainer(max_steps=1, val_at_start=True, val_check_interval=1, save_interval=1)
    trainer.fit()
    assert [step for step, _ in trainer.logger.of("val_rollouts/")] == [0, 1]


def test_tables_grow_by_one_row_a_step():
    trainer = make_trainer(val_check_interval=1)
    trainer.fit()
    train = [(step, len(frame)) for key, step, frame in trainer.logger.tables if key == "table/train_rollouts"]
    val = [(step, len(frame)) for key, step, frame in trainer.logger.tables if key == "table/val_rollouts"]
    assert train == [(0, 1), (1, 2)] and val == [(1, 1), (2, 2)]
    assert list(trainer.val_df.columns) == ["step", "prompt", "response", "reward"]
    assert trainer.val_df.iloc[0].tolist() == [1, "5", f"50 {EOS}", 50]


def test_tables_are_bounded():
    trainer = make_trainer(prompts=((1,), (2,)), max_epochs=120)
    trainer.fit()
    assert trainer.train_df["step"].tolist() == list(range(20, 120))


# ---- sizes


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"k": 0}, r"top_n_rollouts=0 must be between 1 and model.rs.num_rollouts_per_prompt=2"),
        ({"k": 3}, r"top_n_rollouts=3 must be between 1 and model.rs.num_rollouts_per_prompt=2"),
        ({"gbs": 3}, r"num_rollout_samples=2 \* model.rs.top_n_rollouts=1 .* model.global_batch_size=3"),
        ({"model_mbs": 3}, r"model.global_batch_size=2 .* model.micro_batch_size=3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_at_construction(sizes, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(**sizes)


def test_fewer_prompts_than_a_step_are_refused():
    trainer = make_trainer()
    trainer.train_dataloader.batch_sampler.total_samples = 1
    with pytest.raises(ConfigError, match=r"1 prompts are fewer than one step of model.rs.num_rollout_samples=2"):
        trainer._check_sizes()


def test_rollout_micro_batches_must_divide_the_step():
    trainer = make_trainer(g=4, mbs=2)
    assert compute_num_rollout_microbatches(trainer.train_dataloader) == 2
    trainer.train_dataloader.batch_sampler.micro_batch_size = 3
    with pytest.raises(AssertionError, match="4 prompts cannot be split into micro-batches of 3"):
        compute_num_rollout_microbatches(trainer.train_dataloader)


# ---- state


def test_counters_are_whole_numbers():
    trainer = make_trainer(k=2, max_steps=1)
    trainer.fit()
    state = trainer.state_dict()
    assert state == {"step": 1, "consumed_samples": 2, "epoch": 0, "rs_optimization_step": 2}
    assert all(type(value) is int for value in state.values())


def test_a_resumed_run_takes_the_prompts_that_an_uninterrupted_one_would_have():
    def prompts_of(trainer):
        trainer.fit()
        return [request["prompt_index"][0].item() for request in trainer.model.requests]

    settings = {"prompts": [(i,) for i in range(1, 8)], "k": 2, "max_epochs": 2}  # 3 steps an epoch
    whole = prompts_of(make_trainer(**settings))
    for step in range(7):
        trainer = make_trainer(**settings)
        # the original NeMo-Aligner counted selected responses, K per prompt
        trainer.load_state_dict({"step": step, "consumed_samples": 4 * step, "rs_optimization_step": 2 * step})
        assert trainer.consumed_samples == 2 * step
        assert prompts_of(trainer) == whole[2 * step :]
        assert trainer.rs_optimization_step == 12
        assert trainer.step == 6 and trainer.consumed_samples == 12


def resumed_with(g: int, state: dict, prompts=6, **settings):
    """A trainer that continues a run of 6 prompts in steps of two, but in steps of g prompts."""
    trainer = make_trainer(prompts=[(i,) for i in range(1, prompts + 1)], g=g, k=2, **settings)
    stored = {"model.rs.num_rollout_samples": 2, "the number of training prompts": 6}
    trainer.load_state_dict({**state, "settings": stored})
    return trainer


def order_of(prompts: int, epoch: int) -> list[int]:
    return torch.randperm(prompts, generator=torch.Generator().manual_seed(5 + epoch)).tolist()  # 5: the seed


AFTER_ONE_STEP = {"step": 1, "consumed_samples": 2, "epoch": 0, "rs_optimization_step": 2}
AFTER_AN_EPOCH = {"step": 4, "consumed_samples": 8, "epoch": 1, "rs_optimization_step": 8}


@pytest.mark.parametrize("state", [AFTER_ONE_STEP, AFTER_AN_EPOCH])
@pytest.mark.parametrize("g", [1, 2])
def test_a_step_of_fewer_prompts_goes_on_where_the_checkpoint_was(state, g, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", warnings.append)
    trainer = resumed_with(g, state, max_epochs=2)
    trainer.fit()
    left = (order_of(6, 0) + order_of(6, 1))[state["consumed_samples"] :]
    assert [request["prompt_index"][0].item() for request in trainer.model.requests] == left
    assert trainer.step == trainer.max_steps == state["step"] + len(left) // g
    assert (trainer.consumed_samples, trainer.epoch) == (12, 2)
    assert warnings == []


@pytest.mark.parametrize("state", [AFTER_ONE_STEP, AFTER_AN_EPOCH])
def test_a_step_of_more_prompts_skips_those_that_make_no_whole_step(state, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", warnings.append)
    trainer = resumed_with(3, state, gbs=3, max_epochs=2)
    trainer.fit()
    left = (order_of(6, 0) + order_of(6, 1))[state["consumed_samples"] + 1 :]
    assert [request["prompt_index"][0].item() for request in trainer.model.requests] == left
    assert trainer.consumed_samples == 12 and trainer.step == state["step"] + len(left) // 3
    assert len(warnings) == 1 and "model.rs.num_rollout_samples=3" in warnings[0] and "1 of its prompts" in warnings[0]


def test_a_step_of_more_prompts_than_are_left_is_reported(monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", warnings.append)
    trainer = resumed_with(4, {"step": 2, "consumed_samples": 4, "epoch": 0, "rs_optimization_step": 4}, gbs=4)
    trainer.fit()
    assert trainer.model.requests == [] and trainer.step == 2
    assert len(warnings) == 1 and "no step of model.rs.num_rollout_samples=4 is left" in warnings[0]
    assert "trainer.rs.max_epochs=1" in warnings[0]


def test_a_limit_in_steps_counts_those_before_the_change():
    trainer = resumed_with(1, AFTER_ONE_STEP, max_steps=3)
    trainer.fit()
    assert trainer.step == 3 and trainer.consumed_samples == 4


def test_more_prompts_leave_the_place_within_the_epoch():
    trainer = resumed_with(2, AFTER_AN_EPOCH, prompts=9, max_epochs=2)
    trainer.fit()
    # an epoch now has 8 prompts, and two of the second epoch are already consumed
    assert [request["prompt_index"][0].item() for request in trainer.model.requests] == order_of(9, 1)[2:8]
    assert (trainer.step, trainer.consumed_samples, trainer.epoch) == (7, 16, 2)


def test_counters_beyond_float32_survive():
    trainer = make_trainer()
    trainer.load_state_dict({"step": 2**24 + 1, "consumed_samples": 0, "rs_optimization_step": 2**40 + 1})
    assert (trainer.step, trainer.rs_optimization_step) == (2**24 + 1, 2**40 + 1)


@pytest.mark.parametrize("missing", ["step", "consumed_samples", "rs_optimization_step"])
def test_a_missing_counter_is_an_error(missing):
    state = {"step": 1, "consumed_samples": 2, "rs_optimization_step": 1}
    del state[missing]
    with pytest.raises(KeyError, match=missing):
        make_trainer().load_state_dict(state)


def test_a_checkpoint_is_offered_counters_and_metrics():
    trainer = make_trainer(max_steps=1, val_check_interval=1, save_interval=1)
    trainer.fit()
    ((saved, is_train_end),) = trainer.ckpt_callback.saved
    assert is_train_end
    assert {key: saved[key].item() for key in trainer.state_dict()} == trainer.state_dict()
    assert all(saved[key].dtype == torch.int64 for key in trainer.state_dict())
    assert saved["val_global_rewards"] == 50 and saved["train_global_rewards"] == 50
    assert {"rollout_time", "train_time", "validation_time"} <= set(saved)
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    # optimizer states are loaded back before the save
    assert trainer.model.events[-4:] == ["prepare_for_training", "onload_adam_states", "save", "finish_training"]


def test_validation_metrics_are_offered_only_if_validation_ran():
    trainer = make_trainer(max_steps=1, val_check_interval=0, save_interval=1)
    trainer.fit()
    ((saved, _),) = trainer.ckpt_callback.saved
    assert not any(key.startswith("val_") for key in saved)
