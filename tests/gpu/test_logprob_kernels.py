"""The log-probability kernels against float64, compared with torch's own functions in the same precision.

They also run on a CPU, in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/gpu/test_logprob_kernels.py`.

Legend: R positions, V vocabulary, C entries of a piece, H hidden size.
"""

import pytest
import torch

from nemo_aligner.utils import logprobs, target_logprobs
from nemo_aligner.utils.target_logprobs import TargetLogprobs
from tests.gpu.conftest import INTERPRETED
from tests.gpu.test_layer_kernels import DEVICE, DTYPES, SUMMED, check, error, on_device
from tests.tiny import load_actor

logprob_kernels = pytest.importorskip("nemo_aligner.utils.logprob_kernels")

RUNS_INTERPRETED = True


def nothing_seen(num_positions: int, dtype=torch.float32) -> list[torch.Tensor]:
    """Maxima, sums and target logits before the first piece."""
    zeros = torch.zeros(2, num_positions, dtype=dtype)
    return [on_device(x) for x in (torch.full((num_positions,), torch.finfo(dtype).min, dtype=dtype), *zeros)]


def through_pieces(logits_RV, targets_R, sizes: list[int], add_piece_) -> list[torch.Tensor]:
    seen, first = nothing_seen(len(logits_RV), torch.promote_types(logits_RV.dtype, torch.float32)), 0
    for piece_RC in logits_RV.split(sizes, dim=1):
        add_piece_(*seen, on_device(piece_RC.contiguous()), on_device(targets_R), first)
        first += piece_RC.size(1)
    return [x.cpu() for x in seen]


@pytest.fixture
def logits_and_targets(normal):
    """Logits with -inf entries, and pieces of only -inf, in the first and last rows; targets in every shard."""

    def make(num_positions: int, num_entries: int, dtype):
        logits_RV = normal(num_positions, num_entries, dtype=dtype) * 3
        logits_RV[0, : num_entries // 2] = -torch.inf
        logits_RV[-1, num_entries // 2 :: 3] = -torch.inf
        targets_R = torch.arange(num_positions) * 7919 % (3 * num_entries) - num_entries
        targets_R[0] = num_entries - 1
        return logits_RV, targets_R

    return make


SIZES = [(1, [5]), (5, [1, 130, 1]), (37, [128, 256, 77]), (4, [5000, 3000])]


@DTYPES
@pytest.mark.parametrize(("R", "sizes"), SIZES)
def test_maxima_sums_and_target_logits(logits_and_targets, dtype, R, sizes):
    logits_RV, targets_R = logits_and_targets(R, sum(sizes), dtype)
    maxima_R, exp_sums_R, target_logits_R = through_pieces(logits_RV, targets_R, sizes, logprob_kernels.add_piece_)
    assert maxima_R.dtype == torch.float32
    assert torch.equal(maxima_R, logits_RV.amax(1).float())
    log_sums_R = maxima_R.double() + exp_sums_R.double().log()
    torch.testing.assert_close(log_sums_R, logits_RV.double().logsumexp(1), rtol=0, atol=SUMMED)
    is_here = (targets_R >= 0) & (targets_R < sum(sizes))
    assert is_here.any() and (R < 30 or not is_here.all())
    of_target = logits_RV.gather(1, targets_R.clamp(0, sum(sizes) - 1)[:, None]).squeeze(1).float()
    assert torch.equal(target_logits_R, torch.where(is_here, of_target, 0))


@DTYPES
@pytest.mark.parametrize(("R", "sizes"), SIZES)
def test_gradient_of_a_piece(normal, logits_and_targets, record_property, dtype, R, sizes):
    logits_RV, targets_R = logits_and_targets(R, sum(sizes), dtype)
    grad_R = normal(R, dtype=torch.float32) + 0.5
    exact_RV = logits_RV.double().requires_grad_()
    is_here = (targets_R >= 0) & (targets_R < sum(sizes))
    of_target_R = exact_RV.gather(1, targets_R.clamp(0, sum(sizes) - 1)[:, None]).squeeze(1)
    ((torch.where(is_here, of_target_R, 0) - exact_RV.logsumexp(1)) * grad_R).sum().backward()
    maxima_R, first = logits_RV.amax(1).float(), 0
    exp_sums_R = (logits_RV.double() - maxima_R[:, None].double()).exp().sum(1).float()
    ours, of_torch = [], []
    for piece_RC in logits_RV.split(sizes, dim=1):
        given = (piece_RC.contiguous(), targets_R, first, maxima_R, exp_sums_R, grad_R)
        of_torch.append(target_logprobs.piece_gradient(*given))
        ours.append(logprob_kernels.piece_gradient(*(on_device(x) for x in given)).cpu())
        first += piece_RC.size(1)
    ours, of_torch = torch.cat(ours, dim=1), torch.cat(of_torch, dim=1)
    assert (exact_RV.grad == 0).any() and (ours[exact_RV.grad == 0] == 0).all()
    check(ours, of_torch, exact_RV.grad, record_property, "gradient")


def test_the_place_of_the_logits_is_used_again(logits_and_targets):
    logits_RC, targets_R = (on_device(x) for x in logits_and_targets(3, 10, torch.float32))
    ones_R = torch.ones(3, device=DEVICE)
    gradient = logprob_kernels.piece_gradient(logits_RC, targets_R, 0, ones_R, ones_R, ones_R)
    assert gradient.data_ptr() == logits_RC.data_ptr()


def test_what_is_not_a_number_stays_seen():
    logits_RC = torch.tensor([[1.0, torch.nan, 2.0], [torch.inf, 1.0, 2.0], [0.0, 1.0, 2.0]])
    targets_R = torch.tensor([2, 2, 2])
    maxima_R, exp_sums_R, target_logits_R = through_pieces(logits_RC, targets_R, [3], logprob_kernels.add_piece_)
    assert (target_logits_R - maxima_R - exp_sums_R.log()).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("num_positions", [0, 1, 23])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_log_probabilities_and_gradients(normal, tiny_nemo, monkeypatch, record_property, dtype, num_positions):
    """Everything between hidden states and log-probabilities, for an incoming gradient without memory of its own."""
    load_actor(tiny_nemo)  # creates the process groups
    monkeypatch.setattr(logprobs, "MAX_CHUNK_ENTRIES", 130 * max(1, num_positions))
    num_calls = 0

    def counted(kernel):
        def call(*args):
            nonlocal num_calls
            num_calls += 1
            return kernel(*args)

        return call

    given = [normal(num_positions, 16, dtype=dtype), normal(333, 16, dtype=dtype)]
    targets_R = torch.arange(num_positions) * 7919 % 333

    def outcome(dtype, device, function):
        hidden_RH, weight_VH = (x.to(device, dtype, copy=True).requires_grad_() for x in given)
        logprobs_R = function(hidden_RH, weight_VH, targets_R.to(device))
        logprobs_R.sum().backward()
        return [x.detach().cpu() for x in (logprobs_R, hidden_RH.grad, weight_VH.grad)]

    def ours(hidden_RH, weight_VH, targets_R):
        return TargetLogprobs.apply(hidden_RH, weight_VH, targets_R, False, False)

    def plain(hidden_RH, weight_VH, targets_R):
        logits_RV = hidden_RH @ weight_VH.t()
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
        return logits_RV.log_softmax(1).gather(1, targets_R[:, None]).squeeze(1)

    exact, of_torch = outcome(torch.float64, "cpu", plain), outcome(dtype, "cpu", plain)
    for name in ("add_piece_", "piece_gradient"):
        # with the interpreter, tensors are on the CPU, where the kernels would not be called
        kernel = counted(getattr(logprob_kernels, name))
        monkeypatch.setattr(target_logprobs if INTERPRETED else logprob_kernels, name, kernel)
    found = outcome(dtype, DEVICE, ours)
    assert num_calls == 2 * 3  # pieces of 128, 128 and 77
    for name, ours_, torch_, exact_ in zip(("logprobs", "hidden", "weight"), found, of_torch, exact, strict=True):
        assert ours_.dtype == torch_.dtype
        if exact_.norm() == 0:
            assert num_positions == 0 and ours_.norm() == 0
        elif dtype == torch.float64:
            assert error(ours_, exact_) <= 1e-12
        else:
            ours_, torch_ = error(ours_, exact_), error(torch_, exact_)
            record_property(name, ours_)
            record_property("torch's", torch_)
            assert torch_ <= (1e-6 if dtype == torch.float32 else 0.02)
            # products round differently on a GPU; the interpreter truncates to bfloat16
            assert ours_ <= max((5 if INTERPRETED else 1.25) * torch_, SUMMED), name
