"""The training script as a user starts it: on the CPU, with a tiny model, in separate processes."""

import gzip
import json
import os
import signal
import string
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_aligner.testing.utils import Utils
from nemo_aligner.utils.phases import OTHER, PHASES, TOTAL
from nemo_aligner.utils.utils import extract_value_from_ckpt
from tests.tiny import END, load_actor

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples/nlp/gpt/train_gpt_rs_actor.py"
G, N, K, NUM_VAL = 2, 3, 2, 3
# So many of the tokenizer's 320 tokens end a response that about every second response ends within 8 tokens.
END_STRINGS = json.dumps(list(string.ascii_uppercase + string.digits))
REWARD = """
import time

def last_token(prompts, responses, *, response_tokens, records, seconds=0):
    time.sleep(seconds)
    assert all(prompt == record["text"] for prompt, record in zip(prompts, records))
    return [tokens[-1] % 10 for tokens in response_tokens]
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_nemo):
    """A folder with prompts and a reward function, in which the script is started."""
    folder = tmp_path_factory.mktemp("run")
    for name, count in (("train", 6), ("val", NUM_VAL)):
        lines = [json.dumps({"text": f"{END}the quick brown {name} {i}"}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "reward.py").write_text(REWARD)
    (folder / "tiny.nemo").symlink_to(tiny_nemo)
    return folder


def command(log_dir: str, *overrides: str) -> list[str]:
    settings = {
        "trainer.num_nodes": 1, "trainer.devices": 1, "trainer.accelerator": "cpu", "trainer.precision": 32,
        "trainer.rs.max_steps": 2, "trainer.rs.val_check_interval": 2,
        "exp_manager.explicit_log_dir": log_dir, "exp_manager.name": "tiny",
        "pretrained_checkpoint.restore_from_path": "tiny.nemo",
        "model.data.data_prefix": "{train: [train.jsonl], validation: [val.jsonl], test: [val.jsonl]}",
        "model.rs.reward.target": "reward.py:last_token",
        "model.rs.rollout_micro_batch_size": 1, "model.rs.num_rollout_samples": G,
        "model.rs.num_rollouts_per_prompt": N, "model.rs.top_n_rollouts": K,
        "model.rs.val_rollout_micro_batch_size": 2, "model.rs.num_val_samples": 4,
        "model.rs.length_params.max_length": 8, "model.rs.sampling_params.end_strings": END_STRINGS,
        "model.megatron_amp_O2": False, "model.global_batch_size": G,
        "model.encoder_seq_length": 128, "model.data.seq_length": 48,
        "model.optim.name": "adamw", "model.optim.lr": 1e-3, "model.optim.sched.warmup_steps": 0,
        "model.optim.sched.constant_steps": 0,
    }  # fmt: skip
    return [sys.executable, str(SCRIPT), *(f"{key}={value}" for key, value in settings.items()), *overrides]


def environment() -> dict:
    """This process's environment, without what earlier tests set for their own process groups."""
    group = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")
    own = {key: value for key, value in os.environ.items() if key not in group}
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**own, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def run_script(workplace: Path, log_dir: str, *overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(log_dir, *overrides), cwd=workplace, env=environment(), capture_output=True, text=True, timeout=300
    )


def rollouts(folder: Path, split: str, rank: int = 0) -> list[dict]:
    return [json.loads(line) for line in (folder / "rollouts" / f"{split}_rank{rank}.jsonl").read_text().splitlines()]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def finished_run(workplace):
    """The folder left by a run of two steps, the second of which is traced."""
    process = run_script(workplace, "finished", "--profile", "1")
    assert process.returncode == 0, process.stderr[-3000:]
    return workplace / "finished"


def test_the_best_and_the_last_checkpoint_carry_the_counters(finished_run):
    names = [path.name for path in (finished_run / "checkpoints").iterdir() if path.is_dir()]
    assert len(names) == 2 and sum(name.endswith("-last") for name in names) == 1
    for name in names:
        assert extract_value_from_ckpt("step", name) == 2
        assert extract_value_from_ckpt("consumed_samples", name) == 2 * G
        assert extract_value_from_ckpt("rs_optimization_step", name) == 2 * K


def test_every_rollout_is_on_disk_and_k_of_each_prompt_are_kept(finished_run):
    lines = rollouts(finished_run, "train")
    generated = Counter((line["step"], line["prompt_index"]) for line in lines)
    kept = Counter((line["step"], line["prompt_index"]) for line in lines if line["kept"])
    assert len(generated) == 2 * G and len({index for _, index in generated}) == 2 * G
    assert set(generated.values()) == {N} and set(kept.values()) == {K} and len(kept) == 2 * G
    assert {line["step"] for line in lines} == {0, 1}
    for line in lines:
        assert line["prompt"] == f"{END}the quick brown train {line['prompt_index']}"
        assert line["reward"] in range(10) and 1 <= line["num_tokens"] <= 8
        assert line["finished"] or line["num_tokens"] == 8
    assert {line["finished"] for line in lines} == {True, False}


def test_every_validation_prompt_is_scored_once(finished_run):
    lines = rollouts(finished_run, "val")
    assert sorted(line["prompt_index"] for line in lines) == list(range(NUM_VAL))
    assert {line["step"] for line in lines} == {2}


def test_metrics_reach_tensorboard(finished_run):
    logged = scalars(finished_run)
    rewards = {0: [], 1: []}
    for line in rollouts(finished_run, "train"):
        rewards[line["step"]].append(line["reward"])
    means = [(step, pytest.approx(sum(values) / len(values))) for step, values in rewards.items()]
    assert logged["train_rollouts/global_rewards"] == means
    assert [step for step, _ in logged["val_rollouts/global_rewards"]] == [2]
    # G * K rows per step in batches of G: two optimizer steps in each of two RS steps
    assert [step for step, _ in logged["train_optim/loss"]] == [0, 1, 2, 3]
    assert all(loss > 0 for _, loss in logged["train_optim/loss"])
    rates = [rate for _, rate in logged["train_optim/lr"]]
    assert rates[0] == pytest.approx(1e-3) and rates == sorted(rates, reverse=True)
    # halfway down the cosine, from 1e-3 to 9e-8, after two of four optimizer steps
    assert rates[2] == pytest.approx(1e-3 / 2, rel=1e-3)


def test_the_phases_of_a_step_add_up(finished_run):
    logged = scalars(finished_run)
    phases = {tag.removeprefix("timers/phase_"): values for tag, values in logged.items() if "/phase_" in tag}
    assert set(phases) == {*PHASES, OTHER, TOTAL}
    assert {tuple(step for step, _ in values) for values in phases.values()} == {(1, 2)}
    first, second = ({name: values[i][1] for name, values in phases.items()} for i in range(2))
    for step in (first, second):
        assert sum(step[name] for name in (*PHASES, OTHER)) == pytest.approx(step[TOTAL], rel=1e-5)
        assert step["rollout"] > 0 and step["forward_backward"] > 0 and step["optimizer"] > 0
    assert first["validation"] == 0 and first["checkpoint"] < second["checkpoint"]
    assert second["validation"] == pytest.approx(logged["timers/validation_time"][0][1], rel=0.1)
    assert first["rollout"] + first["select"] + first["offload"] <= logged["timers/rollout_time"][0][1]
    assert first["forward_backward"] + first["optimizer"] <= logged["timers/train_time"][0][1]


def test_profile_writes_traces_and_the_table_of_phases(finished_run):
    folder = finished_run / "profile"
    names = {"phases.txt", "step2-rank0-rollouts.json.gz", "step2-rank0-training.json.gz"}
    assert {path.name for path in folder.iterdir()} == names
    rollouts_trace, training_trace = (
        {event.get("name") for event in json.loads(gzip.decompress((folder / name).read_bytes()))["traceEvents"]}
        for name in sorted(names)[1:]
    )
    assert "aten::embedding" in rollouts_trace and not any("Backward" in str(name) for name in rollouts_trace)
    assert any("Backward" in str(name) for name in training_trace)
    title, *lines = (folder / "phases.txt").read_text().splitlines()
    assert title.split() == ["phase", "step", "1,", "warm-up", "step", "2,", "traced"]
    assert [line.split()[0] for line in lines][-2:] == [OTHER, TOTAL]
    assert {"rollout", "forward_backward", "checkpoint", "validation"} <= {line.split()[0] for line in lines}


def test_the_trained_model_restores(finished_run, tiny_nemo):
    before = {name: value.clone() for name, value in load_actor(tiny_nemo).named_parameters()}
    trained = load_actor(finished_run / "checkpoints/tiny.nemo")
    after = dict(trained.named_parameters())
    assert before.keys() == after.keys()
    changes = [(before[name] - after[name]).abs().max().item() for name in before]
    # In each of the four steps Adam moves a weight that has a gradient by about the learning rate.
    assert max(changes) == pytest.approx(2.5e-3, abs=2e-3) and sum(change > 0 for change in changes) > len(changes) / 2
    assert trained.tokenizer.ids_to_text(trained.tokenizer.text_to_ids("the quick brown")) == "the quick brown"
    Utils.destroy_model_parallel()


@pytest.mark.parametrize(
    "override, line",
    [
        (
            "model.rs.top_n_rollouts=4",
            "model.rs.top_n_rollouts=4 must be between 1 and model.rs.num_rollouts_per_prompt=3, from which the best "
            "are chosen",
        ),
        (
            "model.tensor_model_parallel_size=null",
            "exp_manager.checkpoint_callback_params.model_parallel_size=${multiply:${model.tensor_model_parallel_size},"
            " ${model.pipeline_model_parallel_size}} needs model.tensor_model_parallel_size, which is None; it must be "
            "a positive whole number",
        ),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line_and_exit_code_2(workplace, override, line):
    process = run_script(workplace, "mistaken", override)
    assert process.returncode == 2
    assert process.stderr == f"error: {line}\n"
    assert not (workplace / "mistaken").exists()


def test_ctrl_c_ends_a_run_at_once_and_keeps_its_rollouts(workplace):
    # each of the 6 prompts is one reward call of 5 seconds; the interrupt comes after the first call
    slow = ("model.rs.num_rollout_samples=6", "model.rs.reward.kwargs={seconds: 5}", "trainer.rs.val_check_interval=0")
    process = subprocess.Popen(
        command("interrupted", *slow), cwd=workplace, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        # a shell starts background jobs, of which this suite may be one, with Ctrl-C ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    first_rollouts = workplace / "interrupted/rollouts/train_rank0.jsonl"
    while process.poll() is None and not (first_rollouts.exists() and first_rollouts.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    interrupted_at = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output[-3000:]
    assert time.monotonic() - interrupted_at < 16  # the running call is waited for, the other four are not
    assert "Traceback" not in output
    (message,) = [line for line in output.splitlines() if "interrupted" in line and "rollouts so far" in line]
    assert message.endswith("interrupted/rollouts")
    lines = rollouts(workplace / "interrupted", "train")
    assert len(lines) == 6 * N
    assert sum(line["reward"] is not None for line in lines) in (N, 2 * N)


def test_two_replicas_share_the_prompts(workplace):
    process = run_script(
        workplace, "two", "trainer.devices=2", "trainer.rs.max_steps=1", "trainer.rs.val_check_interval=0",
        "exp_manager.create_checkpoint_callback=False",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [rollouts(workplace / "two", "train", rank) for rank in (0, 1)]
    prompts = [{line["prompt_index"] for line in of_rank} for of_rank in lines]
    assert [len(of_rank) for of_rank in prompts] == [G // 2, G // 2] and not prompts[0] & prompts[1]
    assert [sum(line["kept"] for line in of_rank) for of_rank in lines] == [K * G // 2, K * G // 2]
    logged = scalars(workplace / "two")
    rewards = [line["reward"] for of_rank in lines for line in of_rank]
    assert logged["train_rollouts/global_rewards"] == [(0, pytest.approx(sum(rewards) / len(rewards)))]
    assert [step for step, _ in logged["train_optim/loss"]] == [0, 1]
