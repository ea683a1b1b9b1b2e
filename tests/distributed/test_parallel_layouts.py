"""Tensor, pipeline and data parallelism over gloo give one process's loss, gradients and greedy rollouts."""

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.tiny import load_actor, prompt_batch

PROMPTS = ["the quick brown", "one two three four five six", "a good", "kind and it ends"]
ROW_LENGTHS = [(3, 14), (6, 9), (1, 20), (4, 17)]  # prompt and response lengths of the training rows


def run_layout(rank: int, nemo_path: str, world_size: int, tp: int, pp: int) -> dict:
    """Loss and gradients over four fixed rows, and greedy rollouts of four prompts, as this rank sees them."""
    from megatron.core import parallel_state

    model = load_actor(
        nemo_path, world_size, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        micro_batch_size=1, global_batch_size=4,
    )  # fmt: skip
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    model.prepare_for_inference()
    rows = [model.tokenizer.text_to_ids(prompt) for prompt in PROMPTS]
    rollouts = model.infer(prompt_batch(rows, model.tokenizer.eos_id, max_length=16))
    by_engine = model._rollout_generator._engine is not None
    model.finish_inference()

    model.prepare_for_training()
    batch = {key: value.chunk(dp_size)[dp_rank] for key, value in training_batch().items()}
    loss, _ = model.get_loss_and_metrics(batch, forward_only=False)
    model.finish_training_step()
    return {
        "loss": loss,
        "gradients": {name: gradient.tolist() for name, gradient in local_gradients(model).items()},
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
        "by_engine": by_engine,
        "rollouts": {key: value.tolist() for key, value in rollouts.items()},
    }


def training_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 300, (4, 22), generator=generator)
    mask = torch.zeros(4, 21)
    for row, (prompt_length, response_length) in enumerate(ROW_LENGTHS):
        mask[row, prompt_length - 1 : response_length - 1] = 1
    return {"response_tokens": tokens, "mask": mask}


def local_gradients(model) -> dict[str, torch.Tensor]:
    """This rank's gradients under global layer numbers; the gate and up halves of a gated MLP apart."""
    module = model.get_model_module_list()[0]
    first_layer = module.decoder.layers[0].layer_number - 1
    gradients = {}
    for name, parameter in module.named_parameters():
        if ".layers." in name:
            head, number, tail = name.split(".layers.")[0], *name.split(".layers.")[1].split(".", 1)
            name = f"{head}.layers.{int(number) + first_layer}.{tail}"
        if name.endswith("linear_fc1.weight"):
            gradients[f"{name}.gate"], gradients[f"{name}.up"] = parameter.grad.chunk(2)
        else:
            # the last stage's copy of tied embeddings is the first stage's parameter
            gradients["embedding.word_embeddings.weight" if name == "output_layer.weight" else name] = parameter.grad
    return gradients


def merged_gradients(outcomes: list[dict]) -> dict[str, torch.Tensor]:
    """Gradients of the whole model out of those of all ranks: shards side by side, copies checked to be equal."""
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
    if "layernorm" in name:
        return shards[0]
    is_row_parallel = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    return torch.cat(shards, dim=1 if is_row_parallel else 0)


@pytest.fixture(scope="module")
def one_process(tiny_nemo):
    return run_ranks(run_layout, 1, str(tiny_nemo), 1, 1, 1)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (1, 1)], ids=["TP=2", "PP=2", "DP=2"])
def test_two_processes_equal_one(tiny_nemo, one_process, tp, pp):
    outcomes = run_ranks(run_layout, 2, str(tiny_nemo), 2, tp, pp)
    expected = merged_gradients(one_process)
    actual = merged_gradients(outcomes)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm()
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
    for outcome in outcomes:
        assert outcome["loss"] == pytest.approx(one_process[0]["loss"], rel=1e-5)
        assert outcome["by_engine"] == (pp == 1)  # pipeline stages go through Megatron's schedule
        assert outcome["rollouts"] == one_process[0]["rollouts"]
