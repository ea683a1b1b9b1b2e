"""megatron-core's distributed optimizer without Apex, in our training loop: what is patched, and that it must be."""

import importlib.util
import inspect

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from nemo.core.optim import mcore_optim
from omegaconf import OmegaConf

from nemo_aligner.compat import device
from nemo_aligner.utils.train_script_utils import init_using_ptl
from nemo_aligner.utils.train_utils import clip_gradients
from tests.tiny import load_actor

without_apex = pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="Apex is installed")
WEIGHT_DECAY, EPS = 0.25, 1e-5


@pytest.fixture(scope="module")
def actor(tiny_nemo):
    """The tiny model with the optimizer set up."""
    optim = {
        "name": "mcore_distributed_optim", "lr": 1e-2, "weight_decay": WEIGHT_DECAY, "betas": [0.9, 0.98], "eps": EPS,
    }  # fmt: skip
    actor = load_actor(
        tiny_nemo, optim=OmegaConf.create(optim), micro_batch_size=2, global_batch_size=2, gradient_as_bucket_view=True
    )
    init_using_ptl(actor.trainer, actor, None, [])
    return actor


def train_one_step(actor) -> torch.Tensor:
    """Train one step; returns the gradients of all weights before the optimizer's step, as one vector."""
    actor.prepare_for_training()
    actor.prepare_for_training_step()
    generator = torch.Generator().manual_seed(3)
    batch = {"response_tokens": torch.randint(1, 300, (2, 12), generator=generator), "mask": torch.ones(2, 11)}
    actor.get_loss_and_metrics(batch, forward_only=False)
    actor.finish_training_step()
    gradients = torch.cat([p.main_grad.flatten() for p in actor.parameters()]).clone()
    actor._optimizer.step()
    return gradients


def groups_by_dimension(optimizer) -> dict[bool, float]:
    """Weight decay of matrices (True) and vectors (False)."""
    inner = optimizer.mcore_optimizer
    found = {}
    for group, parameters in zip(inner.optimizer.param_groups, inner.model_fp32_groups, strict=True):
        found |= {p.dim() > 1: group["weight_decay"] for p in parameters}
    return found


def fresh_copy_of(module):
    """The module loaded from its file again, without the changes of `compat`."""
    spec = importlib.util.spec_from_file_location("fresh_copy", module.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return fresh


def test_settings_reach_the_optimizer(actor):
    inner = actor._optimizer.mcore_optimizer
    assert groups_by_dimension(actor._optimizer) == {True: WEIGHT_DECAY, False: 0.0}
    assert {group["eps"] for group in inner.optimizer.param_groups} == {EPS}
    assert inner.config.clip_grad == 0.0


def test_gradients_start_from_zero_in_every_step(actor):
    first, second = train_one_step(actor), train_one_step(actor)
    assert first.norm() > 0 and second.norm() < 1.9 * first.norm()


def test_gradients_are_clipped_once_and_their_norm_reported(actor):
    actor.prepare_for_training_step()
    for parameter in actor.parameters():
        parameter.main_grad.zero_()
    first = next(iter(actor.parameters()))
    first.main_grad[0, :4] = 0.5
    assert clip_gradients(actor, 0.25) == pytest.approx(1.0, rel=1e-6)
    assert first.main_grad.norm().item() == pytest.approx(0.25, rel=1e-5)
    assert clip_gradients(actor, 0.3) == pytest.approx(0.25, rel=1e-5)
    assert first.main_grad.norm().item() == pytest.approx(0.25, rel=1e-5)
    assert clip_gradients(actor, None) is None


def test_groups_are_restored_by_what_they_hold_not_by_their_number(actor):
    optimizer = actor._optimizer.mcore_optimizer
    expected, other_stage_s = groups_by_dimension(actor._optimizer), optimizer.state_dict()
    other_stage_s["optimizer"]["param_groups"].reverse()
    optimizer.load_state_dict(other_stage_s)
    assert groups_by_dimension(actor._optimizer) == expected
    inspect.unwrap(DistributedOptimizer.load_state_dict)(optimizer, other_stage_s)
    assert groups_by_dimension(actor._optimizer) != expected, "megatron-core matches them itself"


@without_apex
def test_restored_parameters_count_their_steps_apart(actor):
    train_one_step(actor)
    optimizer = actor._optimizer.mcore_optimizer

    def steps() -> list[torch.Tensor]:
        return [state["step"] for state in optimizer.optimizer.state.values()]

    inspect.unwrap(DistributedOptimizer.load_state_dict)(optimizer, optimizer.state_dict())
    assert len(set(map(id, steps()))) == 1, "megatron-core no longer shares one"
    optimizer.load_state_dict(optimizer.state_dict())
    before = steps()[0].item()
    train_one_step(actor)
    assert {step.item() for step in steps()} == {before + 1}


@without_apex
def test_torch_s_adam_is_still_refused():
    assert "HAVE_APEX_OR_TE" in inspect.getsource(DistributedOptimizer.__init__.__wrapped__)


@without_apex
@pytest.mark.parametrize("name", ["sharded_param_state_fs_model_space", "load_parameter_state_from_fs_model_space"])
def test_steps_are_still_taken_for_shards(name):
    assert "**optim_state" in inspect.getsource(getattr(DistributedOptimizer, name).__wrapped__)


def test_nemo_s_wrapper_still_wants_a_closure_and_binds_checkpoints_to_a_layout():
    original = fresh_copy_of(mcore_optim).McoreDistributedOptimizer
    assert inspect.signature(original.step).parameters["closure"].default is inspect.Parameter.empty
    assert "dp_zero_gather_scatter" in inspect.getsource(original.sharded_state_dict)


@pytest.mark.skipif(not device.on_cpu(), reason="the suite runs on a GPU")
def test_parameters_say_the_type_that_they_would_have_on_a_gpu():
    assert torch.nn.Parameter(torch.zeros(1)).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert torch.nn.Parameter(torch.zeros(1)).type(torch.float64).dtype == torch.float64
