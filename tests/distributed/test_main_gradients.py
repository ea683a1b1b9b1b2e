"""AdamW with fp32 master weights of a model in bf16: gradients are reduced over the replicas once, in either way."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tests.distributed.launch import run_ranks
from tests.tiny import load_actor


def main_gradients(rank: int, nemo_path: str, world_size: int, async_grad_allreduce: bool) -> list[np.ndarray]:
    """The gradients that the optimizer would take its step with, after two micro-batches on each replica."""
    from megatron.core import parallel_state

    from nemo_aligner.utils.train_script_utils import init_using_ptl

    optim = OmegaConf.create({"name": "adamw", "lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.98]})
    model = load_actor(
        nemo_path, world_size, precision="bf16", megatron_amp_O2=True, optim=optim, micro_batch_size=1,
        global_batch_size=4, async_grad_allreduce=async_grad_allreduce, gradient_as_bucket_view=True,
    )  # fmt: skip
    init_using_ptl(model.trainer, model, None, None)
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    generator = torch.Generator().manual_seed(5)
    batch = {"response_tokens": torch.randint(1, 300, (4, 12), generator=generator), "mask": torch.ones(4, 11)}
    model.prepare_for_training()
    model._optimizer.zero_grad()
    model.prepare_for_training_step()
    model.get_loss_and_metrics({key: value.chunk(dp_size)[dp_rank] for key, value in batch.items()}, forward_only=False)
    model.finish_training_step()
    return [parameter.grad.numpy() for parameter in model._optimizer.get_parameters_with_grad()]


@pytest.mark.parametrize("async_grad_allreduce", [True, False])
def test_two_replicas_have_the_gradients_of_one(tiny_nemo, async_grad_allreduce):
    (expected,) = run_ranks(main_gradients, 1, str(tiny_nemo), 1, async_grad_allreduce)
    first, second = run_ranks(main_gradients, 2, str(tiny_nemo), 2, async_grad_allreduce)
    assert len(first) == len(expected) > 0
    for gradient, other, of_one in zip(first, second, expected, strict=True):
        assert np.array_equal(gradient, other)
        # each row's gradient is rounded to bf16 (8 bits) in both; sums in float32 in another order add next to nothing
        assert np.linalg.norm(gradient - of_one) <= 2**-8 * np.linalg.norm(of_one)
