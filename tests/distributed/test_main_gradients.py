"""A bf16 model with fp32 gradients: they are reduced over the replicas exactly once, in each of the ways to do it.

The first replica has two packs, the second has one: a reduction per pack would wait in vain for the other replica.
"""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tests.distributed.launch import run_ranks
from tests.tiny import load_actor

ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.98]}
WAYS = {
    "sent in the backward pass": {"optim": ADAMW, "async_grad_allreduce": True},
    "sent behind it": {"optim": ADAMW, "async_grad_allreduce": False},
    "reduced by megatron-core behind it": {"optim": {**ADAMW, "name": "mcore_distributed_optim"}},
    "reduced by megatron-core in it": {
        "optim": {**ADAMW, "name": "mcore_distributed_optim", "overlap_grad_sync": True}
    },
}
# tokens of each row that the loss depends on; a pack has room for 12
LENGTHS = [11, 11, 5, 6]


def in_all_ways(rank: int, nemo_path: str, world_size: int) -> dict[str, tuple]:
    from megatron.core import parallel_state

    found = {}
    for way in WAYS:
        found[way] = main_gradients(nemo_path, world_size, way)
        parallel_state.destroy_model_parallel()
    return found


def main_gradients(nemo_path: str, world_size: int, way: str) -> tuple[int, float, list[np.ndarray]]:
    """This replica's number of packs, the norm of all gradients, and the gradients that its optimizer would use."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    from nemo_aligner.utils.train_script_utils import init_using_ptl
    from nemo_aligner.utils.train_utils import clip_gradients

    model = load_actor(
        nemo_path, world_size, precision="bf16", megatron_amp_O2=True, micro_batch_size=1, global_batch_size=4,
        gradient_as_bucket_view=True, rs={"training.max_tokens_per_pack": 12},
        **{key: OmegaConf.create(value) if key == "optim" else value for key, value in WAYS[way].items()},
    )  # fmt: skip
    init_using_ptl(model.trainer, model, None, [])
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    generator = torch.Generator().manual_seed(5)
    mask = (torch.arange(11) < torch.tensor(LENGTHS)[:, None]).float()
    batch = {"response_tokens": torch.randint(1, 300, (4, 12), generator=generator), "mask": mask}
    share = {key: value.chunk(dp_size)[dp_rank] for key, value in batch.items()}
    model.prepare_for_training()
    model._optimizer.zero_grad()
    model.prepare_for_training_step()
    model.get_loss_and_metrics(share, forward_only=False)
    model.finish_training_step()
    gradients = []
    if not model.use_mcore_dist_optim:  # with it, each replica holds only a part of the sum
        gradients = [parameter.grad.numpy().copy() for parameter in model._optimizer.get_parameters_with_grad()]
    return len(model._packs(share, get_num_microbatches())), clip_gradients(model, 1e9), gradients


@pytest.fixture(scope="module")
def of_one_and_two(tiny_nemo):
    return [run_ranks(in_all_ways, world_size, str(tiny_nemo), world_size) for world_size in (1, 2)]


@pytest.mark.parametrize("way", WAYS)
def test_two_replicas_have_the_gradients_of_one(of_one_and_two, way):
    ((num_packs, norm, expected),), results = ([found[way] for found in ranks] for ranks in of_one_and_two)
    assert (num_packs, *(of_replica[0] for of_replica in results)) == (3, 2, 1)
    # both round each pack's gradient to bf16 (8 bits); a different order of float32 sums adds next to nothing
    assert [of_replica[1] for of_replica in results] == pytest.approx([norm, norm], rel=2**-8)
    first, second = (of_replica[2] for of_replica in results)
    assert len(first) == len(expected) and (len(expected) > 0) == ("megatron-core" not in way)
    for gradient, other, of_one in zip(first, second, expected, strict=True):
        assert np.array_equal(gradient, other)
        assert np.linalg.norm(gradient - of_one) <= 2**-8 * np.linalg.norm(of_one)
