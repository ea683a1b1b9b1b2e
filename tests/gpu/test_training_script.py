"""The training script on GPUs: every optimizer, precision and layout, from start to resume."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_aligner import compat
from nemo_aligner.utils.checkpoints import newest_complete_checkpoint, read_counters
from tests.distributed.test_training_script import scalars

compat.apply()

ROOT = Path(__file__).parents[2]
NUM_STEPS = 4
# With `ENDS`, most rows end by themselves after a few tokens; rows that do not end would not be trained on.
REWARD = """
def reward(prompts, responses):
    return [-abs(len(response) - 6.0) for response in responses]
"""
ENDS = "[e,o,a,d,n]"
needs_apex = pytest.mark.skipif(importlib.util.find_spec("apex") is None, reason="needs Apex")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
OPTIMIZERS = [
    pytest.param("adamw", id="adamw"),
    pytest.param("fused_adam", id="fused_adam", marks=needs_apex),
    pytest.param("distributed_fused_adam", id="distributed_fused_adam", marks=needs_apex),
    pytest.param("mcore_distributed_optim", id="mcore_distributed_optim"),
]
DIFFERENT_ACROSS_RANKS = [parameter for parameter in OPTIMIZERS if parameter.id != "fused_adam"]  # same as adamw
# NeMo applies weight decay to Transformer Engine's norms in all optimizers except megatron-core's, which has its own
# rules.
NO_DECAY = ["model.optim.weight_decay=0"] if importlib.util.find_spec("transformer_engine") is not None else []
OVERLAP = ["model.optim.overlap_grad_sync=True", "+model.optim.overlap_param_sync=True"]
PRECISIONS = {
    "fp32": ["trainer.precision=32", "model.megatron_amp_O2=False"],
    "fp32_O2": ["trainer.precision=32", "model.megatron_amp_O2=True"],
    "bf16": ["trainer.precision=bf16", "model.megatron_amp_O2=False"],
    "bf16_O2": ["trainer.precision=bf16", "model.megatron_amp_O2=True"],
}
LAYOUTS = {
    "one": ["trainer.devices=1"],
    "dp2": ["trainer.devices=2"],
    "tp2": ["trainer.devices=2", "model.tensor_model_parallel_size=2"],
    "pp2": ["trainer.devices=2", "model.pipeline_model_parallel_size=2"],
}


@pytest.fixture(scope="module")
def workplace(made_once, request):
    def make(folder: Path) -> None:
        folder.mkdir()
        prompts = [json.dumps({"text": f"one two three {number}"}) for number in range(8)]
        (folder / "prompts.jsonl").write_text("\n".join(prompts))
        (folder / "reward.py").write_text(REWARD)
        (folder / "tiny.nemo").symlink_to(request.getfixturevalue("tiny_nemo"))

    return made_once("training_script", make)


def run_script(workplace: Path, name: str, *overrides: str) -> Path:
    prompts = workplace / "prompts.jsonl"
    command = [
        sys.executable, ROOT / "examples/nlp/gpt/train_gpt_rs_actor.py", "trainer.num_nodes=1",
        "trainer.rs.val_check_interval=1", "trainer.rs.max_epochs=2", f"+model.optim.sched.max_steps={NUM_STEPS}",
        f"exp_manager.explicit_log_dir={workplace / name}", "exp_manager.name=tiny",
        f"pretrained_checkpoint.restore_from_path={workplace / 'tiny.nemo'}",
        f"model.rs.reward.target={workplace / 'reward.py'}:reward",
        f"model.data.data_prefix={{train: [{prompts}], validation: [{prompts}], test: [{prompts}]}}",
        "model.encoder_seq_length=128", "model.rs.length_params.max_length=16",
        f"model.rs.sampling_params.end_strings={ENDS}", "model.global_batch_size=4",
        "model.rs.num_rollout_samples=4", "model.rs.rollout_micro_batch_size=2",
        "model.optim.lr=1e-3", "model.optim.sched.warmup_steps=0", "model.optim.sched.constant_steps=0",
        "exp_manager.checkpoint_callback_params.save_top_k=0", *NO_DECAY, *overrides,
    ]  # fmt: skip
    # without the rendezvous of a process group that this process itself may have
    rendezvous = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in rendezvous}
    environment["NVIDIA_TF32_OVERRIDE"] = "0"
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert finished.returncode == 0, finished.stderr[-5000:]
    assert "no CUDA graphs" not in finished.stdout + finished.stderr  # not even with tensor parallelism
    return workplace / name


def rollouts(run: Path) -> list[tuple]:
    lines = map(json.loads, (run / "rollouts/train_rank0.jsonl").open())
    return sorted((line["step"], line["prompt_index"], line["response"], line["kept"]) for line in lines)


def losses(run: Path) -> list[float]:
    """Losses step by step, including those of earlier starts, whose logs NeMo moves aside."""
    starts = [*sorted(run.glob("run_*")), run]
    return [loss for start in starts for _, loss in scalars(start)["train_optim/loss"]]


@pytest.fixture(scope="module")
def undisturbed(workplace, made_once):
    """The losses, step by step, of a run with torch's AdamW in float32 on one GPU."""

    def make(path: Path) -> None:
        settings = ["model.optim.name=adamw", *PRECISIONS["fp32"], *LAYOUTS["one"]]
        run = run_script(workplace, "undisturbed", f"trainer.rs.max_steps={NUM_STEPS}", *settings)
        path.write_text(json.dumps(losses(run)))

    return json.loads(made_once("undisturbed.json", make).read_text())


@pytest.fixture(scope="module")
def first_loss_in_bf16(workplace, made_once):
    """The first loss on one GPU with padded rows and rollouts from the given backend.

    Tokens drawn in bf16 differ from those in float32, between backends, and between the two kinds of bf16.
    """

    def of(backend: str, precision: str) -> list[float]:
        name = f"{precision}_{backend}"

        def make(path: Path) -> None:
            settings = [f"model.rs.generation.backend={backend}", "model.rs.training.packing=False"]
            settings += ["model.optim.name=adamw", *PRECISIONS[precision], *LAYOUTS["one"]]
            run = run_script(workplace, name, "trainer.rs.max_steps=1", *settings)
            path.write_text(json.dumps(losses(run)))

        return json.loads(made_once(f"{name}.json", make).read_text())

    return of


@pytest.fixture
def check_losses(undisturbed, record_property):
    """Compare the losses of a run's first steps with those of the undisturbed run and record the largest deviation."""

    def check(run: Path, num_steps: int, tolerance: float, expected: list[float] = undisturbed):
        measured, expected = losses(run)[:num_steps], expected[:num_steps]
        deviations = [abs(loss / reference - 1) for loss, reference in zip(measured, expected, strict=True)]
        record_property("largest relative deviation", max(deviations))
        assert max(deviations) <= tolerance

    return check


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_half_a_run_and_the_rest_after_a_restart(workplace, check_losses, first_loss_in_bf16, optimizer, precision):
    name, settings = (
        f"{optimizer}_{precision}",
        [f"model.optim.name={optimizer}", *PRECISIONS[precision], *LAYOUTS["one"]],
    )
    for max_steps in (NUM_STEPS // 2, NUM_STEPS):
        folder = run_script(workplace, name, f"trainer.rs.max_steps={max_steps}", *settings)
    if precision.startswith("fp32"):
        check_losses(folder, NUM_STEPS, 1e-5)
    else:  # later steps are sampled from different logits
        check_losses(folder, 1, 0.02, first_loss_in_bf16("engine", precision))
    lines = [json.loads(line) for line in (folder / "rollouts/train_rank0.jsonl").open()]
    assert len(lines) == NUM_STEPS * 4 * 4 and sum(line["kept"] for line in lines) == NUM_STEPS * 4
    counters = {"step": 4, "consumed_samples": 16, "epoch": 2, "rs_optimization_step": 4}
    assert read_counters(newest_complete_checkpoint(folder / "checkpoints")) == counters
    assert (folder / "checkpoints/tiny.nemo").is_file()


@needs_two_gpus
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", DIFFERENT_ACROSS_RANKS)
def test_half_a_run_on_two_replicas_goes_on_in_every_layout(workplace, check_losses, optimizer, layout):
    settings = [f"model.optim.name={optimizer}", *PRECISIONS["fp32"]]
    overlap = OVERLAP if "distributed" in optimizer else []
    name = f"{optimizer}_{layout}"
    run_script(workplace, name, f"trainer.rs.max_steps={NUM_STEPS // 2}", *settings, *overlap, *LAYOUTS["dp2"])
    folder = run_script(workplace, name, f"trainer.rs.max_steps={NUM_STEPS}", *settings, *LAYOUTS[layout])
    check_losses(folder, NUM_STEPS, 1e-5)


@needs_two_gpus
@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
@pytest.mark.parametrize("optimizer", DIFFERENT_ACROSS_RANKS)
def test_bf16_on_two_gpus(workplace, check_losses, first_loss_in_bf16, optimizer, layout):
    folder = run_script(
        workplace, f"{optimizer}_{layout}_bf16_O2", f"trainer.rs.max_steps={NUM_STEPS // 2}",
        f"model.optim.name={optimizer}", *PRECISIONS["bf16_O2"], *LAYOUTS[layout],
    )  # fmt: skip
    # rows are only about the same, as logits are rounded differently
    check_losses(folder, 1, 0.1, first_loss_in_bf16("engine", "bf16_O2"))


@needs_two_gpus
def test_stages_with_few_slots_generate_what_one_gpu_does(workplace, check_losses):
    """With three slots per stage, a prompt's four rows are split between both stages and leave while others wait."""
    runs = {}
    for layout in ("one", "pp2"):
        runs[layout] = run_script(
            workplace, f"few_slots_{layout}", "trainer.rs.max_steps=2", "model.optim.name=adamw",
            "model.rs.num_rollout_samples=8", "model.global_batch_size=8", "model.rs.generation.max_rows_in_flight=6",
            *PRECISIONS["fp32"], *LAYOUTS[layout],
        )  # fmt: skip
    check_losses(runs["pp2"], 2, 1e-5, losses(runs["one"]))
    assert rollouts(runs["pp2"]) == rollouts(runs["one"]) and len(rollouts(runs["one"])) == 2 * 8 * 4


@needs_apex
@pytest.mark.parametrize("layout", ["one", pytest.param("dp2", marks=needs_two_gpus)])
def test_a_state_that_passes_through_the_gpu_gives_the_same_losses(workplace, record_property, layout):
    """Also across a save and a restart, for which the state is on the GPU."""
    settings = ["model.optim.name=distributed_fused_adam", *PRECISIONS["bf16_O2"], *LAYOUTS[layout], *OVERLAP]
    name = f"streamed_{layout}"
    resident = run_script(workplace, f"resident_{layout}", f"trainer.rs.max_steps={NUM_STEPS}", *settings)
    settings.append("model.rs.training.stream_adam_states=True")
    run_script(workplace, name, f"trainer.rs.max_steps={NUM_STEPS // 2}", *settings)
    streamed = run_script(workplace, name, f"trainer.rs.max_steps={NUM_STEPS}", *settings)
    record_property("last loss", losses(streamed)[-1])
    assert losses(streamed) == losses(resident)


@pytest.mark.parametrize("layout", ["one", pytest.param("tp2", marks=needs_two_gpus)])
def test_adapters_train_and_generate(workplace, record_property, layout):
    """The engine's graphs with adapters, whose weights change in every step, against NeMo's decoding."""
    found = {}
    for backend in ("engine", "nemo"):
        found[backend] = losses(run_script(
            workplace, f"lora_{backend}_{layout}", f"trainer.rs.max_steps={NUM_STEPS}", "model.optim.name=adamw",
            "model.peft.peft_scheme=lora", f"model.rs.generation.backend={backend}", *PRECISIONS["fp32"],
            *LAYOUTS[layout],
        ))  # fmt: skip
    deviation = max(abs(a / b - 1) for a, b in zip(found["engine"], found["nemo"], strict=True))
    record_property("largest relative deviation", deviation)
    assert len(found["engine"]) == NUM_STEPS and deviation <= 1e-5
