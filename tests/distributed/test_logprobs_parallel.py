"""Vocab-parallel log-probabilities and entropy, values and gradients, against one process that holds all logits.

The reference is `torch.log_softmax` in float64. The tolerances are those of the interface, except that bfloat16 values
may be off only by their final rounding, half of 2^-7: the interface promises float32 arithmetic up to that point.
"""

import dataclasses

import pytest
import torch

from nemo_aligner.testing.utils import Utils
from nemo_aligner.utils import logprobs
from nemo_aligner.utils.distributed import (
    DistributedLogprob,
    calculate_distributed_entropy,
    from_parallel_logits_to_logprobs,
)
from nemo_aligner.utils.parallel_state import get_data_parallel_rank, get_tensor_model_parallel_rank
from nemo_aligner.utils.ppo_utils import calculate_entropy
from tests.distributed.launch import run_ranks

VALUE_TOLERANCE = {torch.float32: {"atol": 1e-8, "rtol": 1e-5}, torch.bfloat16: {"atol": 1e-6, "rtol": 2**-8}}
GRADIENT_TOLERANCE = {torch.float32: {"atol": 1e-8, "rtol": 1e-5}, torch.bfloat16: {"atol": 5e-3, "rtol": 1e-2}}
B, S, V = 2, 5, 16


@dataclasses.dataclass
class Case:
    logits: torch.Tensor  # [B, S, V]
    target: torch.Tensor  # [B, S]
    weight: torch.Tensor  # [B, S], gradient of the loss for each log-probability
    ignore_last: bool = True
    higher_stability: bool = False
    max_chunk_entries: int = logprobs.MAX_CHUNK_ENTRIES


def make_cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(B, S, V, generator=generator)
    target = torch.randint(0, V, (B, S), generator=generator)
    weight = torch.randn(B, S, generator=generator)
    # First and last id of every shard, for two and for four ranks.
    borders = torch.tensor([[0, 3, 4, 7, 8], [15, 12, 11, 8, 7]])
    # One logit is 1e4 above the rest (first row) or below it (second row): the target's or another one, in the target's
    # shard or in a different one.
    gap = logits.clone()
    gap[0, :, 9] += 1e4
    gap[1, :, 0] -= 1e4
    gap_target = torch.tensor([[9, 9, 10, 0, 9], [0, 1, 0, 15, 0]])
    infinite = logits.clone()
    infinite[:, :, 5] = -torch.inf
    infinite_target = torch.where(target == 5, 6, target)
    bf16 = torch.bfloat16
    return {
        "float32": Case(logits, target, weight),
        "float32, stable": Case(logits, target, weight, higher_stability=True),
        "float32, shifted labels": Case(logits, target, weight, ignore_last=False),
        "bfloat16": Case(logits.to(bf16), target, weight),
        "bfloat16, shifted labels, stable": Case(logits.to(bf16), target, weight, False, True),
        "targets on borders": Case(logits, borders, weight),
        "targets on borders, shifted labels": Case(logits, borders, weight, ignore_last=False),
        "gap of 1e4": Case(gap, gap_target, weight),
        "gap of 1e4, shifted labels": Case(gap, gap_target, weight, ignore_last=False),
        "gap of 1e4, bfloat16": Case(gap.to(bf16), gap_target, weight),
        "gap of 1e4, bfloat16, shifted labels": Case(gap.to(bf16), gap_target, weight, ignore_last=False),
        "all logits large": Case(logits + 1e4, target, weight),
        "a filtered id": Case(infinite, infinite_target, weight),
        "in chunks": Case(logits, target, weight, max_chunk_entries=2 * V),
        "one position": Case(logits[:, :1], target[:, :1], weight[:, :1], ignore_last=False),
    }


CASES = make_cases()


def reference(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [B, S or S-1] and gradient [B, S, V] in float64."""
    logits = case.logits.double().requires_grad_()
    target = case.target[:, 1:] if case.ignore_last else case.target
    log_probs = logits.log_softmax(-1)[:, : target.size(1)].gather(-1, target.unsqueeze(-1)).squeeze(-1)
    (log_probs * case.weight[:, : log_probs.size(1)]).sum().backward()
    return log_probs.detach(), logits.grad


def own_shard(logits: torch.Tensor, tp: int) -> torch.Tensor:
    return logits.chunk(tp, dim=-1)[get_tensor_model_parallel_rank()].clone()


def portable(tensor: torch.Tensor):
    """A tensor in a form that a queue between processes can carry safely, and its dtype."""
    return tensor.detach().double().numpy(), tensor.dtype


def rank_main(rank: int, world_size: int) -> dict:
    """Everything computed on ranks, in one launch because starting the ranks is slow."""
    Utils.initialize_model_parallel(world_size)
    results = {"cases": log_probs_of_all_cases(world_size), "entropy": entropy_and_gradient(world_size)}
    check_what_is_refused_and_saved(world_size)
    Utils.initialize_model_parallel(world_size // 2)
    results["replicas"] = log_probs_in_replicas(world_size // 2)
    return results


def log_probs_of_all_cases(tp: int) -> dict:
    """Values and this rank's gradient shard for each case."""
    results = {}
    for name, case in CASES.items():
        logprobs.MAX_CHUNK_ENTRIES = case.max_chunk_entries
        shard = own_shard(case.logits, tp).requires_grad_()
        before = shard.detach().clone()
        log_probs = from_parallel_logits_to_logprobs(
            shard, case.target, higher_stability=case.higher_stability, ignore_last=case.ignore_last
        )
        (log_probs * case.weight[:, : log_probs.size(1)].to(log_probs.dtype)).sum().backward()
        inferred = from_parallel_logits_to_logprobs(
            shard, case.target, True, higher_stability=case.higher_stability, ignore_last=case.ignore_last
        )
        assert torch.equal(inferred, log_probs) and not inferred.requires_grad
        assert torch.equal(shard.detach(), before), "the caller's logits were modified"
        results[name] = portable(log_probs), portable(shard.grad)
    return results


def check_what_is_refused_and_saved(tp: int) -> None:
    case = CASES["float32"]
    shard = own_shard(case.logits, tp).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        DistributedLogprob.apply(shard, case.target, False, False)
    wide = [tensor for tensor in saved if tensor.numel() >= shard.numel()]
    assert [tensor.data_ptr() for tensor in wide] == [shard.data_ptr()], "more than the logits is kept for backward"
    with pytest.raises(ValueError, match=rf"target \[2, 4\] must have the shape of the logits \[2, 5, {V // tp}\]"):
        from_parallel_logits_to_logprobs(shard, case.target[:, 1:])


def log_probs_in_replicas(tp: int) -> tuple:
    """Two replicas with different data."""
    case = CASES["float32"]
    shard = own_shard(case.logits * (1 + get_data_parallel_rank()), tp)
    return portable(DistributedLogprob.apply(shard, case.target, False, False))


MASK = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]])


def entropy_and_gradient(tp: int) -> list:
    """Entropy and gradient, without and with a mask."""
    results = []
    for mask in (None, MASK):
        shard = own_shard(CASES["float32"].logits, tp).requires_grad_()
        entropy = calculate_distributed_entropy(shard, mask)
        entropy.backward()
        results.append((portable(entropy), portable(shard.grad)))
    return results


@pytest.fixture(scope="module", params=[2, 4], ids=["TP2", "TP4"])
def ranks(request):
    return run_ranks(rank_main, request.param, request.param)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_those_of_one_process(ranks, name):
    case = CASES[name]
    log_probs, gradient = reference(case)
    dtype = case.logits.dtype
    for rank, results in enumerate(ranks):
        (values, values_dtype), (shard_gradient, gradient_dtype) = results["cases"][name]
        assert values_dtype == gradient_dtype == dtype
        assert torch.from_numpy(values).isfinite().all()
        torch.testing.assert_close(torch.from_numpy(values), log_probs, **VALUE_TOLERANCE[dtype])
        expected = gradient.chunk(len(ranks), dim=-1)[rank]
        torch.testing.assert_close(torch.from_numpy(shard_gradient), expected, **GRADIENT_TOLERANCE[dtype])
        assert (values == ranks[0]["cases"][name][0][0]).all(), "ranks disagree"


def test_replicas_do_not_mix(ranks):
    case = CASES["float32"]
    for rank, results in enumerate(ranks):
        replica = rank // (len(ranks) // 2)
        expected, _ = reference(dataclasses.replace(case, logits=case.logits * (1 + replica), ignore_last=False))
        torch.testing.assert_close(torch.from_numpy(results["replicas"][0]), expected, **VALUE_TOLERANCE[torch.float32])


def test_entropy_and_its_gradient_equal_those_of_one_process(ranks):
    for rank, results in enumerate(ranks):
        for mask, ((entropy, _), (shard_gradient, _)) in zip((None, MASK), results["entropy"], strict=True):
            logits = CASES["float32"].logits.double().requires_grad_()
            expected = calculate_entropy(logits[:, :-1].log_softmax(-1), mask)
            expected.backward()
            assert entropy == pytest.approx(expected.item(), rel=1e-5)
            expected_gradient = logits.grad.chunk(len(ranks), dim=-1)[rank]
            torch.testing.assert_close(torch.from_numpy(shard_gradient), expected_gradient, atol=1e-7, rtol=1e-5)
