"""The operations around a layer's matrix products in plain torch, compared with autograd in float64.

Legend: T tokens, H hidden size, F width of the MLP, C columns, Z parts of a sum.
"""

import pytest
import torch
from torch.nn import functional as F

from nemo_aligner.models.nlp.gpt.activation import Activation, activate
from nemo_aligner.models.nlp.gpt.layer_ops import ColumnSums, activation_gradient, norm_and_residual, norm_gradient
from nemo_aligner.models.nlp.gpt.rotary import qkv_gradient
from tests.unit.test_layer_spec import norm

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def normal():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


def part(width: int) -> torch.Tensor:
    """Room for sums in three parts; entries that are not written would be noticed."""
    return torch.full((3, width), torch.nan)


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), **FLOAT32)


@pytest.mark.parametrize("zero_centered", [True, False])
@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_norm_gradient_beside_a_residual_connection(normal, name, zero_centered):
    module = norm(name, zero_centered)
    x, grad, residual_grad = normal(3, 5, 8).unbind()
    exact_x, scale = x.double().requires_grad_(), module.weight.detach().double().requires_grad_()
    if name == "RMSNorm":
        exact = F.rms_norm(exact_x, (8,), scale + zero_centered, module.eps)
    else:
        shift = module.bias.detach().double().requires_grad_()
        exact = F.layer_norm(exact_x, (8,), scale + zero_centered, shift, module.eps)
    (exact * grad).sum().backward()
    exact_gradient = exact_x.grad + residual_grad

    parts = [part(8) for _ in range(4)]
    if name == "RMSNorm":
        parts[1] = None
    normed, gradient = norm_gradient(module, x, grad.clone(), residual_grad, *parts)
    assert_close(normed, exact)
    assert_close(gradient, exact_gradient)
    assert_close(parts[0].sum(0), scale.grad)
    if name == "LayerNorm":
        assert_close(parts[1].sum(0), shift.grad)
    assert_close(parts[2].sum(0), residual_grad.sum(0))
    assert_close(parts[3].sum(0), exact_gradient.sum(0))
    for ours, same in zip(norm_gradient(module, x, grad, residual_grad, None, None), (normed, gradient), strict=True):
        assert torch.equal(ours, same)


def test_a_bias_is_added_beside_a_norm(normal):
    module, x, bias = norm("LayerNorm"), normal(5, 8), normal(8)
    kept = x.clone()
    for given, expected in ((bias, x + bias), (None, x)):
        normed, residual = norm_and_residual(module, kept, given)
        assert torch.equal(normed, module(x)) and torch.equal(residual, expected)
        residual += 1
        assert torch.equal(kept, x)


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("function", [F.silu, lambda x: F.relu(x) ** 2], ids=["silu", "squared relu"])
def test_activation_gradient(normal, function, is_gated):
    activation = Activation(None, function, is_gated)
    inner, grad, sums = normal(5, 6 * (1 + is_gated)), normal(5, 6), part(6 * (1 + is_gated))
    exact_inner = inner.double().requires_grad_()
    exact = activate(exact_inner, activation)
    (exact * grad).sum().backward()
    activated, gradient = activation_gradient(inner, grad, activation, sums)
    assert_close(activated, exact)
    assert_close(gradient, exact_inner.grad)
    assert_close(sums.sum(0), exact_inner.grad.sum(0))


def test_the_sums_of_a_query_key_value_gradient(normal):
    parts, sums = [normal(5, 4, 6), normal(5, 2, 6), normal(5, 2, 6)], part(2 * 4 * 6)
    for angles in (None, normal(5, 2).repeat(1, 2)):
        gradient = qkv_gradient(*parts, angles, sums)
        assert_close(sums.sum(0), gradient.flatten(1).sum(0))


def test_only_trained_vectors_get_sums_each_its_own(normal):
    vectors = [torch.nn.Parameter(normal(size)) for size in (2, 3, 4)]
    vectors[1].requires_grad_(False)
    sums = ColumnSums([*vectors, None], normal(5, 8))
    first, frozen, last, absent = sums.parts
    assert frozen is None and absent is None
    first.copy_(torch.tensor([1.0, 2.0])), last.copy_(torch.tensor([3.0, 4.0, 5.0, 6.0]))
    of_first, frozen, of_last, absent = sums.finish(fuse=False)
    assert of_first.tolist() == [1, 2] and of_last.tolist() == [3, 4, 5, 6] and frozen is None and absent is None
    assert ColumnSums([vectors[1], None], normal(5, 8)).finish(fuse=False) == [None, None]


def test_half_precision_is_summed_in_float32_and_rounded_only_for_parameters_in_half_precision(normal):
    grad, value = normal(5, 2).bfloat16(), 1 + 2**-10
    half, single = torch.nn.Parameter(normal(2).bfloat16()), torch.nn.Parameter(normal(2))
    for vectors, expected in (([half], 1.0), ([half, single], value)):
        sums = ColumnSums(vectors, grad)
        for room in sums.parts:
            room.fill_(value)
        assert sums.finish(fuse=False)[-1].tolist() == [expected] * 2


@pytest.mark.parametrize("is_wrapped", [True, False], ids=["megatron-core's wrapper", "others"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_added_to_the_optimizers_buffers(normal, is_wrapped, dtype):
    vectors = [torch.nn.Parameter(normal(size).to(dtype)) for size in (2, 3)]
    for vector in vectors:
        vector.main_grad = torch.full(vector.shape, 3.0)
        if is_wrapped:
            vector.grad_added_to_main_grad = False
    sums = ColumnSums([vectors[0], None, vectors[1]], normal(5, 8).to(dtype))
    for room, value in zip((sums.parts[0], sums.parts[2]), (1.0, 2**-12), strict=True):
        room.fill_(value)
    returned = sums.finish(fuse=True)
    assert [vector.main_grad.tolist() for vector in vectors] == [[4.0] * 2, [3.0 + 2**-12] * 3]
    assert [x is None for x in returned] == ([False, True, False] if is_wrapped else [True] * 3)
    assert not is_wrapped or all(vector.grad_added_to_main_grad for vector in vectors)

    del vectors[0].main_grad
    assert sums.finish(fuse=True)[0].tolist() == [1.0] * 2
    assert vectors[1].main_grad.tolist() == [3.0 + 2**-12] * 3
