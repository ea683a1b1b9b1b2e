"""Parallel layouts and their combinations match one process over gloo, from rollouts to the saved model.

Each launch of processes runs several layouts in turn, because importing NeMo takes longer than running a tiny model.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from omegaconf import OmegaConf

from tests.distributed.launch import run_ranks
from tests.tiny import load_actor, prompt_batch, save_gpt2_like

PROMPTS = ["the quick brown", "one two three four five six", "a good", "kind and it ends"]
# prompt and response lengths of the training rows; the longest row has 23 tokens, an odd width
ROW_LENGTHS = [(3, 14), (6, 9), (1, 20), (4, 17), (2, 21), (5, 5), (8, 3), (7, 12)]
# tokens that fit into a pack, as micro-batches have one row
ROW_WIDTH = 24
CLIP_VALUE, LEARNING_RATE = 0.2, 1e-3
ERROR = 1e-5


@dataclass
class Layout:
    """`model` is "llama" (tied embeddings, RoPE, RMSNorm) or "gpt2" (separate output layer, learned positions,
    LayerNorm, biases; twice as many layers)."""

    model: str
    tp: int = 1
    pp: int = 1
    overrides: dict = field(default_factory=dict)

    def load(self, archives: dict[str, str], world_size: int):
        from megatron.core import parallel_state
        from nemo.utils import AppState

        virtual = self.overrides.get("virtual_pipeline_model_parallel_size")
        parallel_state.initialize_model_parallel(self.tp, self.pp, virtual)
        AppState().data_parallel_rank = parallel_state.get_data_parallel_rank()  # as NeMo does when creating groups
        return load_actor(
            archives[self.model], world_size, rs={"training.max_tokens_per_pack": ROW_WIDTH},
            tensor_model_parallel_size=self.tp, pipeline_model_parallel_size=self.pp,
            micro_batch_size=1, global_batch_size=len(ROW_LENGTHS), **self.overrides,
        )  # fmt: skip


VPP = {"virtual_pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}
FULL = {"activations_checkpoint_granularity": "full", "activations_checkpoint_num_layers": 1}
UNIFORM, BLOCK = ({**FULL, "activations_checkpoint_method": method} for method in ("uniform", "block"))
SELECTIVE = {"activations_checkpoint_granularity": "selective"}
OF_ONE = {"llama": Layout("llama"), "gpt2": Layout("gpt2")}
OF_TWO = {
    "TP=2": Layout("llama", tp=2),
    "TP=2 SP": Layout("llama", tp=2, overrides=SP),
    "PP=2": Layout("llama", pp=2),
    "DP=2": Layout("llama"),
    "PP=2 VPP=2": Layout("llama", pp=2, overrides=VPP),
}
OF_FOUR = {
    "PP=4": Layout("llama", pp=4),
    "PP=4 VPP=2": Layout("gpt2", pp=4, overrides={**VPP, **BLOCK}),
    "TP=2 PP=2": Layout("llama", tp=2, pp=2, overrides=UNIFORM),
    "TP=2 DP=2": Layout("gpt2", tp=2, overrides=SELECTIVE),
    "TP=2 SP DP=2": Layout("gpt2", tp=2, overrides=SP),
    "TP=2 SP PP=2 VPP=2": Layout("gpt2", tp=2, pp=2, overrides={**SP, **VPP, **UNIFORM}),
    "PP=2 VPP=2 DP=2": Layout("llama", pp=2, overrides={**VPP, **SELECTIVE}),
}


def run_layouts(rank: int, archives: dict[str, str], folder: str, world_size: int, layouts: dict[str, Layout]) -> dict:
    """Name of each layout -> this rank's outcome."""
    from megatron.core import parallel_state

    outcomes = {}
    for name, layout in layouts.items():
        outcomes[name] = run_layout(layout.load(archives, world_size), f"{folder}/{name}.nemo")
        parallel_state.destroy_model_parallel()
    return outcomes


def run_layout(model, save_path: str) -> dict:
    """Rollouts, losses and gradients over fixed rows, and one step of AdamW, after which the model is saved."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    from nemo_aligner.utils.train_utils import clip_gradients

    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    before = settings(model)
    model.prepare_for_inference()
    with pytest.raises(ValueError, match="an empty prompt"):
        model.infer(prompt_batch([[]], model.tokenizer.eos_id, max_length=16))
    model.prepare_for_inference()
    during = settings(model)
    rows = [model.tokenizer.text_to_ids(prompt) for prompt in PROMPTS]
    rollouts = model.infer(prompt_batch(rows, model.tokenizer.eos_id, max_length=16))
    model._sampling_params["use_greedy"] = False
    batch = prompt_batch(rows, model.tokenizer.eos_id, max_length=16)
    with_ids = model.infer({**batch, "rollout_id": torch.arange(8).reshape(4, 2)})
    without_ids = model.infer(batch)
    model._sampling_params["use_greedy"] = True
    by_engine = model._rollout_generator._engine is not None
    model.finish_inference()
    after = settings(model)

    recompute = mock.patch.object(tensor_parallel, "checkpoint", wraps=tensor_parallel.checkpoint)
    batch = training_batch(model, dp_rank, dp_size)
    model.prepare_for_training()
    model.setup_optimizer_param_groups()
    # eps exceeds the rounding errors of gradients; the gradients of key biases consist of nothing else
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=1e-6)
    validation_loss, _ = model.get_loss_and_metrics(batch, forward_only=True)
    padded_loss, padded_gradients = padded_step(model, batch)
    model.prepare_for_training_step()
    with recompute as recomputed:
        loss, metrics = model.get_loss_and_metrics(batch, forward_only=False)
    model.finish_training_step()
    gradients = local_gradients(model)
    padded_errors = {name: relative_error(padded_gradients[name], gradient) for name, gradient in gradients.items()}
    gradients = {name: gradient.tolist() for name, gradient in gradients.items()}
    grad_norm = clip_gradients(model, CLIP_VALUE)
    clipped_norm = clip_gradients(model, CLIP_VALUE)
    optimizer.step()
    model.save_to(save_path)
    model.prepare_for_inference()
    trained_rollouts = model.infer(prompt_batch(rows, model.tokenizer.eos_id, max_length=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(FloatingPointError) as error:
        model.infer(prompt_batch(rows, model.tokenizer.eos_id, max_length=16))
    model.finish_inference()
    assert metrics == {"loss": loss}
    return {
        "numbers": [loss, validation_loss, grad_norm, clipped_norm],
        "gradients": gradients,
        "padded_loss": padded_loss,
        "padded_errors": padded_errors,
        "is_packing": model._is_packing(),
        "num_packs": (dp_rank, len(model._packs(batch, get_num_microbatches()))),
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "by_engine": by_engine,
        "rollouts": {key: value.tolist() for key, value in rollouts.items()},
        "trained_rollouts": {key: value.tolist() for key, value in trained_rollouts.items()},
        "sampled": with_ids["response_tokens"].tolist(),
        "sampled_without_ids": (dp_rank, without_ids["response_tokens"].tolist()),
        "width": batch["response_tokens"].size(1),
        "changed_by_inference": [key for key, value in before.items() if key not in after or after[key] != value],
        "on_in_training": training_only(before),
        "on_in_inference": training_only(during),
        "recomputes": recomputed.call_count > 0,
        "error_of_nan": str(error.value),
    }


def padded_step(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of this rank on padded rows; clears the gradients afterwards."""
    packed, model._training = model._training, replace(model._training, packing=False)
    model.prepare_for_training_step()
    loss, _ = model.get_loss_and_metrics(batch, forward_only=False)
    model.finish_training_step()
    gradients = {name: gradient.clone() for name, gradient in local_gradients(model).items()}
    model.zero_grad()
    model._training = packed
    return loss, gradients


def settings(model) -> dict[str, object]:
    """Every plain value in the model's config, in Megatron's configs and in the modules."""
    from megatron.core import ModelParallelConfig

    owners = {"cfg": OmegaConf.to_container(model.cfg), "parallel": vars(model.model_parallel_config)}
    for number, chunk in enumerate(model.get_model_module_list()):
        for name, module in chunk.named_modules():
            owners[f"{number}.{name}"] = vars(module)
            if isinstance(getattr(module, "config", None), ModelParallelConfig):
                owners[f"{number}.{name}.config"] = vars(module.config)
    return {
        f"{owner}:{key}": value
        for owner, values in owners.items()
        for key, value in values.items()
        if isinstance(value, (bool, int, float, str, type(None))) and key != "input_tensor"  # an activation
    }


def training_only(values: dict[str, object]) -> set[str]:
    """The switches among `settings` that must be off during inference but are on."""
    found = set()
    for path, value in values.items():
        key = path.split(":")[-1]
        is_switch = key in ("sequence_parallel", "reduce_scatter_embeddings", "checkpoint_core_attention", "training")
        if value and (is_switch or "recompute_" in key or key.startswith("activations_checkpoint_")):
            found.add(key)
    return found


def training_batch(model, dp_rank: int, dp_size: int) -> dict[str, torch.Tensor]:
    """This replica's share of eight rows, as the trainer stacks them."""
    from nemo_aligner.algorithms.rs import RSTrainer

    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor(ROW_LENGTHS)
    rollouts = {
        "response_tokens": torch.randint(1, 300, (len(lengths), int(lengths.sum(dim=1).max())), generator=generator),
        "prompt_tokens": torch.ones(len(lengths), 8, dtype=torch.int64),
        "prompt_lengths": lengths[:, 0],
        "response_lengths": lengths.sum(dim=1),
    }
    share = {key: value.chunk(dp_size)[dp_rank] for key, value in rollouts.items()}
    return RSTrainer.generate_rs_data(SimpleNamespace(model=model, rollout_batch_seq_length=None), [share])[0]


def local_gradients(model) -> dict[str, torch.Tensor]:
    """This rank's gradients under global layer numbers, with the gate and up halves of a gated MLP separated."""
    gradients = {}
    for chunk in model.get_model_module_list():
        first_layer = chunk.decoder.layers[0].layer_number - 1
        for name, parameter in chunk.named_parameters():
            if ".layers." in name:
                head, number, tail = name.split(".layers.")[0], *name.split(".layers.")[1].split(".", 1)
                name = f"{head}.layers.{int(number) + first_layer}.{tail}"
            if name.endswith("linear_fc1.weight") and model.cfg.activation == "fast-swiglu":
                gradients[f"{name}.gate"], gradients[f"{name}.up"] = parameter.grad.chunk(2)
            elif name == "output_layer.weight" and model.cfg.share_embeddings_and_output_weights:
                gradients["embedding.word_embeddings.weight"] = parameter.grad  # the first stage's parameter
            else:
                gradients[name] = parameter.grad
    return gradients


def merged_gradients(outcomes: list[dict]) -> dict[str, torch.Tensor]:
    """Gradients of the whole model from those of all ranks: shards concatenated, copies checked to be equal."""
    shards = {}
    for outcome in outcomes:
        for name, gradient in outcome["gradients"].items():
            copies = shards.setdefault(name, {})
            gradient = torch.tensor(gradient)
            if outcome["tp_rank"] in copies:
                torch.testing.assert_close(gradient, copies[outcome["tp_rank"]], rtol=1e-6, atol=1e-9, msg=name)
            copies[outcome["tp_rank"]] = gradient
    return {name: merge(name, [copies[rank] for rank in sorted(copies)]) for name, copies in shards.items()}


def merge(name: str, shards: list[torch.Tensor]) -> torch.Tensor:
    if "layernorm" in name or "position" in name or name.endswith(("linear_proj.bias", "linear_fc2.bias")):
        for shard in shards:
            torch.testing.assert_close(shard, shards[0], rtol=1e-6, atol=1e-9, msg=name)
        return shards[0]
    is_row_parallel = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    return torch.cat(shards, dim=1 if is_row_parallel else 0)


def saved_weights(path: Path) -> dict[str, torch.Tensor]:
    """Parameters of an archive restored in one process."""
    one = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, **dict.fromkeys(VPP), **SP}
    model = load_actor(path, **{**one, "sequence_parallel": False})
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def archives(tiny_hf, tiny_nemo, tmp_path_factory):
    path = save_gpt2_like(
        tiny_hf, tmp_path_factory.mktemp("layouts") / "gpt2.nemo", num_layers=8, encoder_seq_length=64,
        max_position_embeddings=64, share_embeddings_and_output_weights=False,
    )  # fmt: skip
    return {"llama": str(tiny_nemo), "gpt2": str(path)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def of_one(archives, folder):
    (outcomes,) = run_ranks(run_layouts, 1, archives, str(folder), 1, OF_ONE)
    return {model: (outcome, saved_weights(folder / f"{model}.nemo")) for model, outcome in outcomes.items()}


@pytest.fixture(scope="module")
def of_two(archives, folder):
    return run_ranks(run_layouts, 2, archives, str(folder), 2, OF_TWO)


@pytest.fixture(scope="module")
def of_four(archives, folder):
    return run_ranks(run_layouts, 4, archives, str(folder), 4, OF_FOUR)


@pytest.mark.parametrize("name", OF_TWO)
def test_two_processes_equal_one(of_one, of_two, folder, name):
    check(OF_TWO[name], [outcomes[name] for outcomes in of_two], of_one, folder / f"{name}.nemo")


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_equal_one(of_one, of_four, folder, name):
    check(OF_FOUR[name], [outcomes[name] for outcomes in of_four], of_one, folder / f"{name}.nemo")


def check(layout: Layout, outcomes: list[dict], of_one: dict, archive: Path) -> None:
    expected, expected_weights = of_one[layout.model]
    expected_gradients, gradients = merged_gradients([expected]), merged_gradients(outcomes)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert relative_error(gradients[name], gradient) <= ERROR, name
    assert expected["numbers"][2] > CLIP_VALUE and expected["numbers"][3] == pytest.approx(CLIP_VALUE, rel=ERROR)
    for outcome in outcomes:
        assert outcome["numbers"] == pytest.approx(expected["numbers"], rel=ERROR)
        assert outcome["is_packing"]
        assert outcome["padded_loss"] == pytest.approx(outcome["numbers"][0], rel=ERROR)
        assert all(error <= ERROR for error in outcome["padded_errors"].values()), outcome["padded_errors"]
        # virtual stages use Megatron's schedule instead
        assert outcome["by_engine"] == ("virtual_pipeline_model_parallel_size" not in layout.overrides)
        assert outcome["rollouts"] == expected["rollouts"]
        assert outcome["trained_rollouts"] == expected["trained_rollouts"]
        assert re.search(r"token 1 of a response to '.*' are NaN or infinite", outcome["error_of_nan"])
        check_switches(layout.overrides, outcome)
    check_num_packs(layout, outcomes)
    assert expected["trained_rollouts"] != expected["rollouts"]
    check_sampling(outcomes, expected)
    weights = saved_weights(archive)
    for name, weight in expected_weights.items():
        assert relative_error(weights[name], weight) <= ERROR, name


def check_num_packs(layout: Layout, outcomes: list[dict]) -> None:
    """Without pipeline stages, each replica has its own number of packs."""
    of_replica = dict(outcome["num_packs"] for outcome in outcomes)
    assert all(of_replica[dp_rank] == num_packs for dp_rank, num_packs in (o["num_packs"] for o in outcomes))
    if layout.pp > 1:
        assert set(of_replica.values()) == {len(ROW_LENGTHS) // len(of_replica)}
    else:
        assert of_replica == ({0: 7} if len(of_replica) == 1 else {0: 4, 1: 3})


def check_sampling(outcomes: list[dict], expected: dict) -> None:
    """A rollout's id determines what is drawn; rollouts without ids agree within a replica but not between replicas."""
    assert all(outcome["sampled"] == expected["sampled"] for outcome in outcomes)
    of_replica = {}
    for dp_rank, tokens in (outcome["sampled_without_ids"] for outcome in outcomes):
        assert of_replica.setdefault(dp_rank, tokens) == tokens
    assert of_replica[0] == expected["sampled_without_ids"][1]
    assert len({str(tokens) for tokens in of_replica.values()}) == len(of_replica)


def check_switches(overrides: dict, outcome: dict) -> None:
    granularity = overrides.get("activations_checkpoint_granularity")
    assert outcome["width"] == (24 if "sequence_parallel" in overrides else 23)
    assert outcome["changed_by_inference"] == [] and outcome["on_in_inference"] == set()
    assert outcome["recomputes"] == (granularity is not None)
    assert ("sequence_parallel" in outcome["on_in_training"]) == ("sequence_parallel" in overrides)
    assert ("recompute_granularity" in outcome["on_in_training"]) == (granularity is not None)
    assert ("checkpoint_core_attention" in outcome["on_in_training"]) == (granularity == "selective")
    assert "training" in outcome["on_in_training"]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()
