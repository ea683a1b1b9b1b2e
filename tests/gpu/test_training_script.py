"""The training script on a GPU: a tiny model, two steps, with what optimizers are installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aligner.utils.checkpoints import newest_complete_checkpoint, read_counters

ROOT = Path(__file__).parents[2]
REWARD = """
def reward(prompts, responses):
    return [float(len(response)) for response in responses]
"""


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(
            ["model.optim.name=adamw", "trainer.precision=32", "model.megatron_amp_O2=False"], id="adamw-fp32"
        ),
        pytest.param(
            ["model.optim.name=distributed_fused_adam", "trainer.precision=bf16", "model.megatron_amp_O2=True"],
            id="distributed_fused_adam-bf16-O2",
            marks=pytest.mark.skipif(importlib.util.find_spec("apex") is None, reason="needs Apex"),
        ),
    ],
)
def test_two_steps_and_a_third_after_a_restart(tiny_nemo, tmp_path, optimizer):
    (tmp_path / "reward.py").write_text(REWARD)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": f"one two three {i}"}) + "\n" for i in range(8)))
    command = [
        sys.executable, ROOT / "examples/nlp/gpt/train_gpt_rs_actor.py", "trainer.num_nodes=1", "trainer.devices=1",
        "trainer.rs.val_check_interval=1", "trainer.rs.max_epochs=2", "+model.optim.sched.max_steps=9",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
        f"pretrained_checkpoint.restore_from_path={tiny_nemo}",
        f"model.rs.reward.target={tmp_path / 'reward.py'}:reward",
        f"model.data.data_prefix={{train: [{prompts}], validation: [{prompts}], test: [{prompts}]}}",
        "model.encoder_seq_length=128", "model.rs.length_params.max_length=16", "model.global_batch_size=4",
        "model.rs.num_rollout_samples=4", "model.rs.rollout_micro_batch_size=2",
        "exp_manager.checkpoint_callback_params.save_top_k=0", *optimizer,
    ]  # fmt: skip
    # without the rendezvous of the process group that this process may hold itself
    rendezvous = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in rendezvous}
    for max_steps in (2, 3):
        finished = subprocess.run(
            [*command, f"trainer.rs.max_steps={max_steps}"], capture_output=True, text=True, cwd=ROOT, env=environment
        )
        assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-5000:]
    rollouts = [json.loads(line) for line in (tmp_path / "run/rollouts/train_rank0.jsonl").open()]
    assert len(rollouts) == 3 * 4 * 4 and {rollout["step"] for rollout in rollouts} == {0, 1, 2}
    assert sum(rollout["kept"] for rollout in rollouts) == 3 * 4
    saved = newest_complete_checkpoint(tmp_path / "run/checkpoints")
    assert read_counters(saved) == {"step": 3, "consumed_samples": 12, "epoch": 1, "rs_optimization_step": 3}
    assert (tmp_path / "run/checkpoints/megatron_gpt_rs_actor.nemo").is_file()
