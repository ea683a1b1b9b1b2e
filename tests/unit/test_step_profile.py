"""Traces of a few steps: which steps, how large, and what is reported when tracing fails."""

import gzip
import json

import pytest
import torch

from nemo_aligner.testing.utils import Utils
from nemo_aligner.utils import step_profile
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.phases import OTHER, PHASES, TOTAL
from nemo_aligner.utils.step_profile import StepProfile
from nemo_aligner.utils.train_script_utils import with_profile_as_override
from tests.fake_trainer import make_trainer

SECONDS = {**dict.fromkeys((*PHASES, OTHER), 0.1), TOTAL: 1.0}


@pytest.fixture(autouse=True, scope="module")
def one_process():
    Utils.initialize_model_parallel()
    yield
    Utils.destroy_model_parallel()


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(step_profile.logging, "warning", said.append)
    return said


def run(profile: StepProfile, steps) -> None:
    for step in steps:
        with profile.trace("training", step):
            torch.ones(2, 2) @ torch.ones(2, 2)
        profile.record(step, SECONDS)
    profile.close()


def test_the_first_step_of_a_resumed_run_is_warm_up_and_the_next_ones_are_traced(tmp_path, warnings):
    run(StepProfile(2, tmp_path / "profile"), range(7, 12))
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "phases.txt", "step8-rank0-training.json.gz", "step9-rank0-training.json.gz",
    ]  # fmt: skip
    events = json.loads(gzip.decompress((tmp_path / "profile/step8-rank0-training.json.gz").read_bytes()))[
        "traceEvents"
    ]
    assert "aten::matmul" in {event.get("name") for event in events}
    title = (tmp_path / "profile/phases.txt").read_text().splitlines()[0]
    assert title.split("  ")[-1].strip() == "step 9, traced" and "step 7, warm-up" in title and "step 10" not in title
    assert not warnings


def test_off_it_writes_and_says_nothing(tmp_path, warnings):
    run(StepProfile(False, tmp_path / "profile"), range(1, 3))
    assert not (tmp_path / "profile").exists() and not warnings


def test_a_run_that_is_too_short_says_so(tmp_path, warnings):
    run(StepProfile(3, tmp_path), range(1, 3))
    (warning,) = warnings
    assert "1 of 3 step(s) were traced" in warning


def test_a_trace_that_nobody_could_open_is_not_kept(tmp_path, warnings, monkeypatch):
    monkeypatch.setattr(step_profile, "MAX_TRACE_BYTES", 100)
    run(StepProfile(1, tmp_path), range(1, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["phases.txt"]
    (warning,) = warnings
    assert warning.startswith("step2-rank0-training.json would have")


def test_without_a_log_folder_it_is_refused():
    with pytest.raises(ConfigError, match=r"trainer\.rs\.profile writes to the log folder"):
        make_trainer(profile=True)


def test_the_flag_is_an_override():
    assert with_profile_as_override(["script.py", "a=1", "--profile", "b=2"]) == [
        "script.py", "a=1", "++trainer.rs.profile=true", "b=2",
    ]  # fmt: skip
    assert with_profile_as_override(["--profile=3"]) == ["++trainer.rs.profile=3"]
    assert with_profile_as_override(["--profile", "3", "b=2"]) == ["++trainer.rs.profile=3", "b=2"]
    assert with_profile_as_override(["--profile", "-c", "job"]) == ["++trainer.rs.profile=true", "-c", "job"]
    assert with_profile_as_override(["--profile", "three"]) == [
        "++trainer.rs.profile=three"
    ]  # which check_profile refuses
    assert with_profile_as_override(["--profile", "~b"]) == ["++trainer.rs.profile=true", "~b"]
    assert with_profile_as_override(["--profiles", "x=--profile"]) == ["--profiles", "x=--profile"]
