"""Which settings a checkpoint stores, which differences are reported, and which are refused."""

import pytest
import torch
from nemo.utils import logging
from omegaconf import OmegaConf

from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.run_settings import check_resumed, data_position, tracked_settings
from nemo_aligner.utils.train_script_utils import retrieve_custom_trainer_state_dict

LORA = {"adapter_dim": 32, "alpha": None, "target_modules": ["attention_qkv"]}
MODEL = {
    "seed": 1,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "rs": {
        "num_rollout_samples": 4,
        "num_rollouts_per_prompt": 3,
        "rewards": {
            "right": {"weight": 1.0, "target": "r.py:f"},
            "liked": {"weight": 0.5, "remote_rm": {"port": 5555}},
        },
    },
    "data": {"data_prefix": {"train": ["a.jsonl"]}, "num_workers": 0},
    "optim": {"name": "adamw", "lr": "${multiply_lr:}", "betas": [0.9, 0.98], "sched": {"min_lr": 0.0}},
    "peft": {"peft_scheme": "lora", "lora_tuning": LORA},
}
OmegaConf.register_new_resolver("multiply_lr", lambda: 1e-3, replace=True)


def settings(**changes) -> dict:
    cfg = OmegaConf.create(MODEL)
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return tracked_settings(cfg, "/m.nemo", 6)


def test_settings_that_decide_are_taken_and_plain():
    assert settings() == {
        "pretrained_checkpoint.restore_from_path": "/m.nemo",
        "the number of training prompts": 6,
        "model.seed": 1,
        "model.global_batch_size": 4,
        "model.rs.num_rollout_samples": 4,
        "model.rs.num_rollouts_per_prompt": 3,
        "model.rs.rewards.right.weight": 1.0,
        "model.rs.rewards.right.target": "r.py:f",
        "model.rs.rewards.liked.weight": 0.5,
        "model.data.data_prefix.train": ["a.jsonl"],
        "model.optim.name": "adamw",
        "model.optim.lr": 1e-3,
        "model.optim.betas": [0.9, 0.98],
        "model.optim.sched.min_lr": 0.0,
        "model.peft.peft_scheme": "lora",
        "model.peft.lora_tuning.adapter_dim": 32,
        "model.peft.lora_tuning.target_modules": ["attention_qkv"],
    }
    without = settings(peft__peft_scheme="none")
    assert not any("lora_tuning" in key for key in without)


def test_spellings_of_one_thing_do_not_differ():
    assert settings(peft__peft_scheme=None) == settings(peft__peft_scheme="none") == settings(peft=None)
    by_alias = settings(peft__lora_tuning__target_modules=["attention"])
    assert by_alias == settings(peft__lora_tuning__target_modules=["attention_dense", "attention_qkv"])


# The state of a run with `settings()` and six prompts, after three steps of four prompts each.
COUNTERS = {"step": 3, "consumed_samples": 12, "epoch": 3, "rs_optimization_step": 9}
STATE = {**COUNTERS, "settings": settings()}


@pytest.fixture
def warnings(monkeypatch):
    seen = []
    monkeypatch.setattr(logging, "warning", seen.append)
    return seen


def test_the_same_settings_say_nothing(warnings):
    own = settings(
        micro_batch_size=1, rs__rewards__liked__remote_rm__port=6000, optim__contiguous_param_buffer=True
    )  # fmt: skip
    check_resumed(STATE, own, "saved")
    assert warnings == []


def test_one_warning_names_all_differences_also_of_keys_that_came_or_went(warnings):
    own = settings(seed=2, optim__sched__warmup_steps=10, peft__lora_tuning__alpha=16)
    del own["model.rs.num_rollouts_per_prompt"]
    check_resumed(STATE, own, "saved")
    (warning,) = warnings
    assert "\n" not in warning
    differences = warning.split("from here on: ")[1].split(", ")
    assert sorted(differences) == [
        "model.optim.sched.warmup_steps=10 (was None)", "model.peft.lora_tuning.alpha=16 (was None)",
        "model.rs.num_rollouts_per_prompt=None (was 3)", "model.seed=2 (was 1)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "key, value, old",
    [
        ("optim.name", "fused_adam", "adamw"),
        ("peft.peft_scheme", "none", "lora"),
        ("peft.lora_tuning.adapter_dim", 8, 32),
        ("peft.lora_tuning.target_modules", ["all"], r"\['attention_qkv'\]"),
    ],
)
def test_what_the_stored_state_does_not_fit_is_refused(key, value, old):
    line = (
        rf"^model\.{key}=.*: the checkpoint to resume from was made with {old} and cannot be continued.*; set it back"
    )
    with pytest.raises(ConfigError, match=line):
        check_resumed(STATE, settings(**{key.replace(".", "__"): value}, seed=2), "saved")


def test_the_state_of_a_trainer_has_the_settings_with_it_and_is_read_at_once(tmp_path, monkeypatch):
    torch.save({"rs_trainer": COUNTERS, "rs_settings": settings()}, tmp_path / "common.pt")
    reads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda file, **options: reads.append(file) or load(file, **options))
    assert retrieve_custom_trainer_state_dict(type("Trainer", (), {"ckpt_path": str(tmp_path)})) == STATE
    assert reads == [tmp_path / "common.pt"]


@pytest.mark.parametrize(
    "num_prompts, per_step, expected",
    [
        (6, 4, (12, 0)),  # unchanged: three epochs of one step
        (6, 3, (18, 0)),  # three epochs of two steps
        (6, 1, (18, 0)),
        (20, 4, (60, 0)),
    ],
)
def test_epochs_stay_epochs(num_prompts, per_step, expected):
    state = {"step": 3, "consumed_samples": 12, "settings": settings()}
    assert data_position(state, num_prompts, per_step) == expected


@pytest.mark.parametrize(
    "num_prompts, per_step, expected",
    [(20, 4, (12, 0)), (20, 1, (12, 0)), (20, 5, (15, 3)), (20, 20, (20, 8)), (9, 4, (8, 0)), (10, 10, (10, 0))],
)
def test_the_place_within_an_epoch_is_rounded_up_to_a_whole_step(num_prompts, per_step, expected):
    stored = {**settings(), "the number of training prompts": 20}
    state = {"step": 3, "consumed_samples": 12, "settings": stored}
    assert data_position(state, num_prompts, per_step) == expected


def test_without_settings_the_steps_count():
    # the original NeMo-Aligner counted selected responses
    assert data_position({"step": 3, "consumed_samples": 48}, 20, 4) == (12, 0)
