"""LoRA in the training script, from the first step to a merged model, and in two processes."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_aligner.convert.nemo_to_hf import export
from nemo_aligner.models.nlp.gpt.lora import adapters_of, load_adapters_, read_adapters
from tests.distributed.launch import run_ranks
from tests.distributed.test_kill_and_resume import trajectory
from tests.distributed.test_parallel_layouts import training_batch
from tests.distributed.test_training_script import REWARD, SCRIPT, G, K, command, environment, rollouts
from tests.tiny import load_actor, prompt_batch

PROMPTS = ["the quick brown", "one two three four five six", "a good", "kind and it ends"]
LORA = {
    "target_modules": ["all"], "adapter_dim": 4, "alpha": 8, "adapter_dropout": 0.0, "column_init_method": "xavier",
    "row_init_method": "zero", "layer_selection": None, "weight_tying": False, "position_embedding_strategy": None,
}  # fmt: skip

# ---- the training script

STEPS = 3
OVERRIDES = (
    "model.peft.peft_scheme=lora", "model.peft.lora_tuning.target_modules=[all]",
    "model.peft.lora_tuning.adapter_dim=4", "++model.peft.lora_tuning.alpha=8",
    "model.optim.lr=0.02", "model.rs.sampling_params.use_greedy=True",
    f"trainer.rs.max_steps={STEPS}", "trainer.rs.val_check_interval=1",
)  # fmt: skip
# Runs the script and records the weights before and after its training loop.
SPY = f"""
import runpy, sys
if __name__ == "__main__":
    import nemo_aligner.compat.quiet_imports
    import torch
    from nemo_aligner.algorithms.rs import RSTrainer

    path, fit = sys.argv.pop(1), RSTrainer.fit

    def spied(self):
        chunks = self.model.get_model_module_list()
        prefixes = ["model"] if len(chunks) == 1 else [f"model_{{number}}" for number in range(len(chunks))]
        named = {{
            name: weight for prefix, chunk in zip(prefixes, chunks) for name, weight in chunk.named_parameters(prefix)
        }}
        before = {{name: weight.detach().clone() for name, weight in named.items()}}
        fit(self)
        groups = self.optimizer.param_groups
        if torch.distributed.get_rank() > 0:
            return
        torch.save({{
            "before": before, "after": {{name: weight.detach().clone() for name, weight in named.items()}},
            "num_optimized": sum(weight.numel() for group in groups for weight in group["params"]), "step": self.step,
            "adam_steps": sorted({{int(state["step"]) for state in self.optimizer.state.values()}}),
            "trainable": [name for name, weight in named.items() if weight.requires_grad],
        }}, path)

    RSTrainer.fit = spied
    runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_nemo):
    folder = tmp_path_factory.mktemp("lora")
    for name, count in (("train", 2 * STEPS), ("val", 3)):
        lines = [json.dumps({"text": f"the quick brown {name} {i}"}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "reward.py").write_text(REWARD)
    (folder / "spy.py").write_text(SPY)
    (folder / "tiny.nemo").symlink_to(tiny_nemo)
    return folder


def lora_command(log_dir: str, *overrides: str) -> list[str]:
    """Run the script under SPY, which saves its findings to `<log_dir>.pt`."""
    python, _, *settings = command(log_dir, *OVERRIDES, *overrides)
    return [python, "spy.py", f"{log_dir}.pt", *settings]


def run_lora(workplace: Path, log_dir: str, *overrides: str) -> dict:
    process = subprocess.run(
        lora_command(log_dir, *overrides), cwd=workplace, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return torch.load(workplace / f"{log_dir}.pt", weights_only=True)


@pytest.fixture(scope="module")
def run(workplace):
    return run_lora(workplace, "lora", "trainer.rs.val_at_start=True")


def archive(workplace: Path, log_dir: str = "lora") -> Path:
    return workplace / log_dir / "checkpoints/tiny.nemo"


def greedy(workplace: Path, log_dir: str, step: int) -> dict[int, str]:
    """The responses to the validation prompts at a step."""
    lines = [line for line in rollouts(workplace / log_dir, "val") if line["step"] == step]
    return {line["prompt_index"]: line["response"] for line in lines}


def assert_base_is_untouched(found: dict) -> None:
    base = [name for name in found["before"] if ".adapter_layer." not in name]
    assert base and all(torch.equal(found["before"][name], found["after"][name]) for name in base)


def assert_adapters_alone_have_learnt(found: dict) -> None:
    adapters = {name: weight for name, weight in found["before"].items() if ".adapter_layer." in name}
    assert len(adapters) == 4 * 4 * 2 and set(found["trainable"]) == adapters.keys()
    assert found["num_optimized"] == sum(weight.numel() for weight in adapters.values())
    changed = {name for name, weight in found["before"].items() if not torch.equal(weight, found["after"][name])}
    assert changed == adapters.keys()


def test_adapters_alone_learn(run):
    assert_adapters_alone_have_learnt(run)


def test_rollouts_use_what_was_learnt(run, workplace):
    before, after = greedy(workplace, "lora", 0), greedy(workplace, "lora", STEPS)
    assert set(before) == set(after) == {0, 1, 2} and before != after


def test_the_archive_with_its_base_gives_a_hf_model_with_these_rollouts(run, workplace):
    export(workplace / "tiny.nemo", workplace / "hf", lora_path=archive(workplace))
    llama = AutoModelForCausalLM.from_pretrained(workplace / "hf")
    tokenizer = AutoTokenizer.from_pretrained(workplace / "hf")
    for index, response in greedy(workplace, "lora", STEPS).items():
        ids = tokenizer(f"the quick brown val {index}", return_tensors="pt").input_ids
        padding = list(range(len(tokenizer), llama.config.vocab_size))
        answer = llama.generate(ids, max_new_tokens=8, do_sample=False, suppress_tokens=padding)[0, ids.size(1) :]
        assert response and tokenizer.decode(answer).startswith(response)  # it may have ended at an end string


def test_the_archive_holds_what_was_learnt_and_starts_another_run(run, workplace):
    found = read_adapters(archive(workplace))
    learnt = {name: weight for name, weight in run["after"].items() if ".adapter_layer." in name}
    assert found.keys() == learnt.keys()
    assert all(torch.equal(found[name], weight) for name, weight in learnt.items())
    again = run_lora(
        workplace, "again", "trainer.rs.val_at_start=True", "trainer.rs.max_steps=1",
        f"model.peft.restore_from_path={archive(workplace)}", "exp_manager.create_checkpoint_callback=False",
    )  # fmt: skip
    assert all(torch.equal(again["before"][name], run["after"][name]) for name in run["after"])
    assert greedy(workplace, "again", 0) == greedy(workplace, "lora", STEPS)


def test_a_killed_run_resumes_as_if_nothing_had_happened(run, workplace):
    slow = "model.rs.reward.kwargs={seconds: 1}"
    process = subprocess.Popen(
        lora_command("killed", "trainer.rs.val_at_start=True", slow), cwd=workplace, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoints = workplace / "killed/checkpoints"
    while process.poll() is None and not list(checkpoints.glob("*step=1*-last/metadata.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (workplace / "killed.pt").exists()

    resumed = run_lora(workplace, "killed", "trainer.rs.val_at_start=True")
    assert not all(torch.equal(resumed["before"][name], run["before"][name]) for name in run["before"])
    assert resumed["step"] == run["step"] == STEPS
    num_trained = sum(loss > 0 for loss in trajectory(workplace / "lora")["loss"].values())  # steps not skipped
    assert resumed["adam_steps"] == run["adam_steps"] == [num_trained] and num_trained >= STEPS
    for name, weight in run["after"].items():
        assert torch.equal(resumed["after"][name], weight), name


# ---- the distributed optimizer

MCORE = "model.optim.name=mcore_distributed_optim"
# One optimizer step per RS step, so that any number of replicas together train on the same rows. The eps keeps Adam
# from taking a full step on a gradient that is nothing but rounding error.
TOGETHER = (
    f"model.global_batch_size={G * K}", f"+model.optim.sched.max_steps={STEPS}", "+model.optim.eps=1e-4",
    "model.rs.sampling_params.use_greedy=False", "trainer.rs.gradient_clip_val=0.5",
)  # fmt: skip
TWO_REPLICAS = ("trainer.devices=2", "model.optim.overlap_grad_sync=True", "+model.optim.overlap_param_sync=True")
TWO_STAGES = ("trainer.devices=2", "model.pipeline_model_parallel_size=2")
LAYOUTS = {
    "dp2": TWO_REPLICAS, "pp2": TWO_STAGES, "pp2_vpp2": (*TWO_STAGES, "++model.virtual_pipeline_model_parallel_size=2"),
}  # fmt: skip


def test_the_distributed_optimizer_of_one_process_is_adamw(run, workplace):
    """Except for the order of summation in the norm used to clip gradients."""
    found = run_lora(workplace, "mcore", "trainer.rs.val_at_start=True", MCORE)
    assert_adapters_alone_have_learnt(found)
    for name, weight in run["after"].items():
        assert (found["after"][name] - weight).norm() <= 1e-6 * weight.norm(), name
    ours, theirs = read_adapters(archive(workplace, "mcore")), read_adapters(archive(workplace))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], found["after"][name]) for name in ours)


@pytest.fixture(scope="module")
def adamw(workplace):
    run_lora(workplace, "adamw", *TOGETHER)
    return workplace / "adamw"


@pytest.fixture(scope="module")
def two_steps(workplace):
    """A run of two replicas that ended one step early."""
    run_lora(workplace, "two_steps", *TOGETHER, MCORE, *TWO_REPLICAS, f"trainer.rs.max_steps={STEPS - 1}")
    return workplace / "two_steps"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_that_were_interrupted_are_one_with_adamw(workplace, adamw, two_steps, layout):
    folder = shutil.copytree(two_steps, workplace / f"resumed_{layout}")
    found = run_lora(workplace, folder.name, *TOGETHER, MCORE, *LAYOUTS[layout])
    assert_base_is_untouched(found)
    losses, expected = trajectory(folder)["loss"], trajectory(adamw)["loss"]
    assert losses == pytest.approx(expected, rel=1e-5) and len(losses) == STEPS and all(losses.values())
    ours, theirs = read_adapters(archive(workplace, folder.name)), read_adapters(archive(workplace, "adamw"))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


# ---- two processes


def run_layout(
    rank: int, nemo_path: str, adapters: str, folder: str, world_size: int, tp: int, pp: int, vpp: int | None = None
) -> dict:
    """Loss, gradients, and greedy rollouts before and after merging adapters from an archive; saves its own archive."""
    from megatron.core import dist_checkpointing, parallel_state

    from nemo_aligner.convert.merge_lora import merge_lora_
    from nemo_aligner.utils.train_script_utils import init_peft

    model = load_actor(
        nemo_path, world_size, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp, micro_batch_size=1, global_batch_size=8,
        peft={"peft_scheme": "lora", "restore_from_path": None, "lora_tuning": LORA},
    )  # fmt: skip
    init_peft(model, model.cfg)
    fresh = weights(model)
    load_adapters_(model, adapters)
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    first = infer(model)

    model.prepare_for_training()
    batch = training_batch(model, dp_rank, dp_size)
    loss, _ = model.get_loss_and_metrics(batch, forward_only=False)
    model.finish_training_step()
    gradients = weights(model, lambda parameter: parameter.grad)
    checkpoint = f"{folder}/checkpoint"  # written when there is one process
    if world_size == 1:
        Path(checkpoint).mkdir()
        dist_checkpointing.save(model.sharded_state_dict(), checkpoint)
    expected = {name: weight.clone() for name, weight in flat(model.state_dict()).items()}
    loaded = flat(dist_checkpointing.load(model.sharded_state_dict(), checkpoint))
    in_checkpoint = all(torch.equal(loaded[name], weight) for name, weight in expected.items())
    model.save_to(f"{folder}/adapters_{tp}_{pp}_{vpp}_{dp_size}.nemo")
    merge_lora_(model)
    return {
        "in_checkpoint": in_checkpoint,
        "loss": loss,
        "fresh": fresh,
        "gradients": gradients,
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "rollouts": first,
        "merged_rollouts": infer(model),
    }


def flat(state: dict) -> dict[str, torch.Tensor]:
    """The weights of all virtual stages in one dict, instead of one dict per stage."""
    if "model_0" not in state:
        return state
    return {f"{chunk} {name}": weight for chunk, weights in state.items() for name, weight in weights.items()}


def weights(model, of=lambda parameter: parameter) -> dict[str, list]:
    """This rank's shards of `of` each adapter parameter, under the names in the whole model."""
    return {
        adapter.whole_prefix + name: of(parameter).tolist()
        for adapter in adapters_of(model)
        for name, parameter in adapter.module.named_parameters()
    }


def infer(model) -> dict:
    model.prepare_for_inference()
    rows = [model.tokenizer.text_to_ids(prompt) for prompt in PROMPTS]
    output = model.infer(prompt_batch(rows, model.tokenizer.eos_id, max_length=16))
    model.finish_inference()
    return {key: value.tolist() for key, value in output.items()}


def whole(outcomes: list[dict], key: str) -> dict[str, torch.Tensor]:
    """Shards concatenated, copies checked to be equal. A Megatron-core shard of a gated fc1 holds gate above up."""
    shards = {}
    for outcome in outcomes:
        for name, shard in outcome[key].items():
            copies = shards.setdefault(name, {})
            if outcome["tp_rank"] in copies:
                torch.testing.assert_close(torch.tensor(shard), copies[outcome["tp_rank"]], rtol=1e-6, atol=1e-9)
            copies[outcome["tp_rank"]] = torch.tensor(shard)
    joined = {}
    for name, copies in shards.items():
        parts = [copies[rank] for rank in sorted(copies)]
        if "lora_hto4h_adapter.linear_out" in name:
            parts = [part.chunk(2)[half] for half in (0, 1) for part in parts]
        takes_split_input = "lora_dense" in name or "lora_4htoh" in name
        joined[name] = torch.cat(parts, dim=1 if takes_split_input and "linear_in" in name else 0)
    return joined


def write_adapters(rank: int, nemo_path: str, path: str) -> None:
    """An archive of random adapters."""
    from nemo_aligner.utils.train_script_utils import init_peft

    model = load_actor(nemo_path, peft={"peft_scheme": "lora", "restore_from_path": None, "lora_tuning": LORA})
    init_peft(model, model.cfg)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in adapters_of(model):
            for weight in adapter.module.parameters():
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    model.save_to(path)


@pytest.fixture(scope="module")
def adapters(tiny_nemo, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "random.nemo"
    run_ranks(write_adapters, 1, str(tiny_nemo), str(path))
    return path


@pytest.fixture(scope="module")
def one_process(tiny_nemo, adapters):
    return run_ranks(run_layout, 1, str(tiny_nemo), str(adapters), str(adapters.parent), 1, 1, 1)


@pytest.mark.parametrize(
    ("tp", "pp", "vpp"),
    [(2, 1, None), (1, 2, None), (1, 2, 2), (1, 1, None)],
    ids=["TP=2", "PP=2", "PP=2, VPP=2", "DP=2"],
)
def test_two_processes_equal_one(tiny_nemo, adapters, one_process, tp, pp, vpp):
    outcomes = run_ranks(run_layout, 2, str(tiny_nemo), str(adapters), str(adapters.parent), 2, tp, pp, vpp)
    expected, actual = whole(one_process, "gradients"), whole(outcomes, "gradients")
    assert actual.keys() == expected.keys() and len(expected) == 4 * 4 * 2
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm()
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
    for outcome in outcomes:
        assert outcome["loss"] == pytest.approx(one_process[0]["loss"], rel=1e-5)
        assert outcome["in_checkpoint"]
        assert outcome["rollouts"] == outcome["merged_rollouts"] == one_process[0]["rollouts"]

    # Newly initialized adapters are the same in both replicas; with TP, the joined shards are those of one process.
    fresh, of_one = whole(outcomes, "fresh"), whole(one_process, "fresh")
    assert all(weight.any() == ("linear_in" in name) for name, weight in fresh.items())
    assert pp == 2 or all(torch.equal(weight, of_one[name]) for name, weight in fresh.items())

    saved = adapters.parent / f"adapters_{tp}_{pp}_{vpp}_{2 // tp // pp}.nemo"
    first, again = read_adapters(adapters), read_adapters(saved)
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
