"""What a configuration names (checkpoint, prompts, rewards) is looked at before any model is loaded."""

import socket
import time
from pathlib import Path

import pytest

from nemo_aligner.rewards import build
from nemo_aligner.utils.config_checks import check_rs_config
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.nemo_archive import check_archive
from tests.unit.working_config import config, refusal

# ---- checkpoints


def test_the_checkpoint_must_be_given_and_exist(files):
    assert refusal("pretrained_checkpoint.restore_from_path=null").startswith(
        "pretrained_checkpoint.restore_from_path is not set"
    )
    assert "nowhere.nemo does not exist" in refusal("pretrained_checkpoint.restore_from_path=nowhere.nemo")


def test_an_archive_cut_anywhere_is_refused(files):
    whole = Path("model.nemo").read_bytes()
    end_of_content = 512 + 512 + 512 + 5120 + 1024  # header, config, header, weights, end; the rest is padding
    for size in [0, 100, 512, 1000, 1024, 1536, 3000, end_of_content - 1024, end_of_content - 1]:
        Path("cut.nemo").write_bytes(whole[:size])
        message = refusal("pretrained_checkpoint.restore_from_path=cut.nemo")
        assert "cut.nemo is not a complete .nemo archive" in message and "copy or convert it again" in message, size
    Path("cut.nemo").write_bytes(whole[:end_of_content])
    check_archive("cut.nemo")


def test_what_is_no_checkpoint_is_refused(files):
    Path("notes.nemo").write_text("not an archive")
    assert "notes.nemo is not a complete .nemo archive" in refusal("pretrained_checkpoint.restore_from_path=notes.nemo")
    folder = files / "folder"
    folder.mkdir()
    assert f"{folder} has no model_config.yaml" in refusal(f"pretrained_checkpoint.restore_from_path={folder}")
    (folder / "model_config.yaml").write_text("a: 1")
    assert f"{folder} has no model weights" in refusal(f"pretrained_checkpoint.restore_from_path={folder}")
    (folder / "model_weights").mkdir()
    check_archive(folder)


# ---- prompts


@pytest.mark.parametrize(
    "content, parts",
    [
        (None, ["bad.jsonl: there is no such prompt file"]),
        ("", ["bad.jsonl", "holds no records"]),
        ('{"text": "a"}\n{"text": \n', ["bad.jsonl, line 2", "not valid JSON"]),
        ('{"text": "a"}\n\n{"prompt": "b"}\n', ["bad.jsonl, line 3", '"text"', "['prompt']"]),
        ('{"text": 1}\n', ["bad.jsonl, line 1", '"text" is a int']),
        ('["a"]\n', ["bad.jsonl, line 1", "a list, not an object"]),
        ('{"text": "a"}\n', ["model.data.data_prefix: the 1 training prompts are fewer", "num_rollout_samples=8"]),
    ],
)
def test_prompt_files(files, content, parts):
    if content is not None:
        Path("bad.jsonl").write_text(content)
    message = refusal("model.data.data_prefix.train=[bad.jsonl]")
    assert all(part in message for part in parts), message


def test_prompts_of_a_blend_and_of_a_split_are_counted(files):
    check_rs_config(config("model.data.data_prefix.train=[1, train.jsonl, 2, val.jsonl]"))
    assert "the 4 training prompts are fewer" in refusal("model.data.data_prefix.train=[1, val.jsonl, 2, val.jsonl]")
    cfg = config("model.data.splits_string='50,25,25'")
    cfg.model.data.data_prefix = ["train.jsonl"]
    with pytest.raises(ConfigError, match="the 4 training prompts are fewer"):
        check_rs_config(cfg)
    cfg.model.data.splits_string = None
    with pytest.raises(ConfigError, match=r"model\.data\.splits_string=None must be three numbers"):
        check_rs_config(cfg)


def test_the_prompt_files_must_be_named(files):
    assert refusal("model.data.data_prefix=null").startswith("model.data.data_prefix is not set")
    assert "model.data.data_prefix.test" in refusal("model.data.data_prefix.test=[]")
    assert "model.data.data_prefix.training is not supported" in refusal(
        "++model.data.data_prefix.training=[train.jsonl]"
    )
    assert "model.data.data_impl='csv'" in refusal("model.data.data_impl=csv")


def test_there_is_one_validation_set_and_it_has_prompts(files):
    assert "model.data.data_prefix.validation_b is one validation set too many" in refusal(
        "++model.data.data_prefix.validation_b=[val.jsonl]"
    )
    cfg = config("model.data.splits_string='100,0,0'")
    cfg.model.data.data_prefix = ["train.jsonl"]
    with pytest.raises(ConfigError, match=r"splits_string=100,0,0 leaves none of the 8 prompts for validation"):
        check_rs_config(cfg)
    cfg.model.data.splits_string = "0,100,0"
    with pytest.raises(ConfigError, match="the 0 training prompts are fewer"):
        check_rs_config(cfg)


# ---- rewards


def test_reward_functions(files):
    target = "model.rs.reward.target"
    assert f"{target}='reward.py:score'" in refusal(f"{target}=reward.py:score")
    assert "there is no file" in refusal(f"{target}=missing.py:reward")
    assert "there is no module 'no_such_package'" in refusal(f"{target}=no_such_package.reward")
    message = refusal("model.rs.reward.kwargs={weigth: 2}")
    assert "model.rs.reward.kwargs sets ['weigth'], which the function does not take; it takes ['weight']" in message
    check_rs_config(config("model.rs.reward.kwargs={weight: 2}"))


def test_rewards_must_come_from_somewhere(files):
    assert "model.rs.reward.kwargs={'a': 1} is set, but not model.rs.reward.target" in refusal(
        "model.rs.reward.target=null", "model.rs.reward.kwargs={a: 1}"
    )
    message = refusal("model.rs.reward.target=null", "~remote_rm")
    assert message.startswith("neither model.rs.reward.target (a Python function) nor remote_rm (a server) is set")


def test_a_server_that_is_not_there_is_noticed_before_a_model_is_loaded(files, warnings):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    remote = ("model.rs.reward.target=null", f"remote_rm.reward_model.port={port}")
    not_there = f"no model 'reward_model' at http://localhost:{port} after 1 s; start the server, or correct "
    message = refusal(*remote, "remote_rm.wait_for_server_s=1")
    assert message.startswith(not_there + "remote_rm.reward_model.name, .ip and .port; remote_rm.wait_for_server_s")
    patient = config(*remote, "~remote_rm.wait_for_server_s")  # configs of the original NeMo-Aligner lack that key
    started = time.monotonic()
    check_rs_config(patient)
    assert time.monotonic() - started < 10
    assert len(warnings) == 1 and "waiting for up to 6000 s more once the policy is loaded" in warnings[0]


@pytest.mark.parametrize(
    "override, message",
    [
        ("remote_rm.reward_model.port=http", "remote_rm.reward_model.port='http' must be a port number"),
        ("remote_rm.reward_model.port=70000", "remote_rm.reward_model.port=70000 must be a port number"),
        ("remote_rm.reward_model.ip=null", "remote_rm.reward_model.ip=None must be a host name or IPv4 address"),
        ("remote_rm.request_timeout_s=0", "remote_rm.request_timeout_s=0 must be a number of seconds above 0"),
        ("+remote_rm.deadline=5", "remote_rm.deadline is not a known key; there are"),
        ("remote_rm.pad_to_length=0", "remote_rm.pad_to_length=0 must be a number of tokens, or null"),
    ],
)
def test_settings_of_the_reward_server(files, override, message):
    assert message in refusal("model.rs.reward.target=null", override)


def test_settings_of_several_rewards(files, warnings, monkeypatch):
    asked = []
    monkeypatch.setattr(build.HTTPCommunicator, "is_ready", lambda *server: asked.append(server) or True)
    single = "model.rs.reward.target=null"

    def several(entries):
        return f"model.rs.rewards={{{entries}}}"

    check_rs_config(
        config(
            single,
            several("fit: {weight: 0.5, target: 'reward.py:reward'}, judge: {weight: -1, remote_rm: '${remote_rm}'}"),
            "remote_rm.pad_to_length=8",
        )
    )
    assert asked == [("reward_model", "localhost", 5555, 5)]
    assert len(warnings) == 1 and "model.rs.rewards.judge.remote_rm.pad_to_length=8 is less than" in warnings[0]
    for entries, message in (
        ("a: 1", "model.rs.rewards.a=1 must be a mapping"),
        ("a: {target: 'reward.py:reward'}", "model.rs.rewards.a.weight=None must be a number"),
        ("a: {weight: nan, target: x}", "model.rs.rewards.a.weight=nan must be a number"),
        ("a: {weight: 1, remote_rm: 'localhost:5555'}", "a.remote_rm=localhost:5555 must be a section with"),
        ("a: {weight: 1}", "model.rs.rewards.a needs either target (a Python function) or remote_rm (a server)"),
        ("a: {weight: 1, target: x, remote_rm: {}}", "model.rs.rewards.a needs either target"),
        ("a: {weight: 1, targets: x}", "model.rs.rewards.a.targets is not a known key"),
        ("a: {weight: 1, target: 'reward.py:score'}", "model.rs.rewards.a.target='reward.py:score'"),
        (
            "a: {weight: 1, remote_rm: {reward_model: {name: m, ip: h}}}",
            "a.remote_rm.reward_model.port is not set; it must be a port",
        ),
    ):
        assert message in refusal(single, several(entries))
    assert "are both set; move the former into the latter" in refusal(several("a: {weight: 1, target: x}"))
