"""A training layer's kernels against float64, compared with torch's own functions in the same precision.

They also run on a CPU, in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/gpu/test_layer_kernels.py`. It
truncates to bfloat16 where a GPU rounds.

Legend: T tokens, H hidden size, F width of the MLP, Z parts of a sum.
"""

import copy
import functools

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.nn import functional as F

from nemo_aligner.models.nlp.gpt import fused_layer, layer_ops, rotary
from nemo_aligner.models.nlp.gpt.activation import Activation, activate
from nemo_aligner.models.nlp.gpt.layer_spec import Norm
from tests.gpu.conftest import INTERPRETED
from tests.tiny import load_actor, save_gpt2_like
from tests.unit.test_fused_layer import MODELS, assert_same, outcome
from tests.unit.test_layer_spec import norm

layer_kernels = pytest.importorskip("nemo_aligner.models.nlp.gpt.layer_kernels")
rotary_kernels = pytest.importorskip("nemo_aligner.models.nlp.gpt.rotary_kernels")

RUNS_INTERPRETED = True
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
# Error of sums in float32.
SUMMED = 2e-6
NUM_PARTS = 5


def on_device(x):
    """Copy to DEVICE, so that kernels may overwrite it."""
    return x.clone().to(DEVICE) if isinstance(x, torch.Tensor) else x


def parts(*widths: int | None) -> list[torch.Tensor | None]:
    """Buffers for sums, side by side as in a layer; NaN reveals entries that are not written."""
    of_all = torch.full((NUM_PARTS, sum(width or 0 for width in widths)), torch.nan, device=DEVICE)
    pieces = of_all.split([width or 0 for width in widths], dim=1)
    return [None if width is None else piece for width, piece in zip(widths, pieces, strict=True)]


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    assert exact.norm() > 0 and ours.shape == exact.shape
    return ((ours.cpu().double() - exact).norm() / exact.norm()).item()


def check(ours: torch.Tensor, of_torch: torch.Tensor, exact: torch.Tensor, record_property, name: str) -> None:
    """Ours must be no farther from the exact values than torch's result in the same precision."""
    dtype = ours.dtype
    assert of_torch.dtype == dtype
    ours, of_torch = error(ours, exact), error(of_torch, exact)
    record_property(name, ours)
    record_property("torch's", of_torch)
    cut_off = 5 if INTERPRETED and dtype == torch.bfloat16 else 1
    assert ours <= max(1.01 * cut_off * of_torch, SUMMED), name


def check_sums(part: torch.Tensor, exact: torch.Tensor) -> None:
    assert error(part.sum(0), exact) <= SUMMED


def a_norm(normal, size: int, is_rms: bool, zero_centered: bool, dtype) -> Norm:
    made = norm("RMSNorm" if is_rms else "LayerNorm", zero_centered, dtype=dtype)
    made.shape = (size,)
    for name, parameter in list(made.named_parameters()):
        setattr(made, name, torch.nn.Parameter(normal(size, dtype=dtype)))
        assert parameter.dtype == dtype
    return made


NORMS = pytest.mark.parametrize("is_rms", [True, False], ids=["rms", "layer"])
CENTERS = pytest.mark.parametrize("zero_centered", [True, False], ids=["zero", "one"])


@DTYPES
@NORMS
@CENTERS
@pytest.mark.parametrize(("T", "H"), [(1, 96), (37, 576), (3, 2048)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_norm_and_residual(normal, record_property, dtype, is_rms, zero_centered, T, H, with_bias):
    module = a_norm(normal, H, is_rms, zero_centered, dtype)
    x, bias = normal(T, H, dtype=dtype) * 3 + 1, normal(H, dtype=dtype) if with_bias else None
    normed_of_torch, residual_of_torch = layer_ops.norm_and_residual(module, x, bias)
    normed_exact = layer_ops.norm_and_residual(copy.deepcopy(module).double(), x.double(), None)[0]

    ours = on_device(x)
    normed, residual = layer_kernels.norm_and_residual(module.to(DEVICE), ours, on_device(bias))
    check(normed, normed_of_torch, normed_exact, record_property, "norm")
    if with_bias:
        check(residual, residual_of_torch, x.double() + bias.double(), record_property, "residual")
    else:
        assert torch.equal(residual.cpu(), x) and residual.data_ptr() != ours.data_ptr()
    assert torch.equal(ours.cpu(), x)


@DTYPES
@NORMS
@CENTERS
@pytest.mark.parametrize(
    ("T", "H", "summed"),
    [(1, 96, "all"), (777, 100, "all"), (9, 2048, "of the neighbours"), (9, 96, "of the norm"), (9, 96, "none")],
)
def test_norm_gradient(normal, record_property, dtype, is_rms, zero_centered, T, H, summed):
    module = a_norm(normal, H, is_rms, zero_centered, dtype)
    x, grad, residual_grad = (normal(T, H, dtype=dtype) * scale + 0.5 for scale in (3, 1, 2))
    of_norm, of_neighbours = summed in ("all", "of the norm"), summed in ("all", "of the neighbours")
    widths = [H if of_norm else None, H if of_norm and not is_rms else None, *[H if of_neighbours else None] * 2]
    of_torch = layer_ops.norm_gradient(module, x, grad, residual_grad, None, None)
    in_double = copy.deepcopy(module).double()
    x_exact = x.double().requires_grad_()
    scale = in_double.weight + 1 if zero_centered else in_double.weight
    if is_rms:
        exact = F.rms_norm(x_exact, (H,), scale, module.eps)
    else:
        exact = F.layer_norm(x_exact, (H,), scale, in_double.bias, module.eps)
    exact.backward(grad.double())
    grad_exact = x_exact.grad + residual_grad.double()

    places = parts(*widths)
    normed, grad_x = layer_kernels.norm_gradient(
        module.to(DEVICE), *(on_device(x) for x in (x, grad, residual_grad)), *places
    )
    check(normed, of_torch[0], exact.detach(), record_property, "norm")
    check(grad_x, of_torch[1], grad_exact, record_property, "gradient")
    of_parameters = [in_double.weight.grad, None if is_rms else in_double.bias.grad]
    for place, sums in zip(places, [*of_parameters, residual_grad.double().sum(0), grad_exact.sum(0)], strict=True):
        if place is not None:
            check_sums(place, sums)


FUNCTIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@DTYPES
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("is_gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize(("T", "size", "summed"), [(1, 96, True), (777, 100, True), (9, 3000, False)])
def test_activation_gradient(normal, record_property, dtype, name, is_gated, T, size, summed):
    activation = Activation(name, FUNCTIONS[name], is_gated)
    inner, grad = normal(T, size * (1 + is_gated), dtype=dtype) * 2, normal(T, size, dtype=dtype) + 0.5
    of_torch = layer_ops.activation_gradient(inner, grad, activation, None)
    inner_exact = inner.double().requires_grad_()
    exact = activate(inner_exact, activation)
    exact.backward(grad.double())

    (place,) = parts(inner.size(1) if summed else None)
    activated, grad_inner = layer_kernels.activation_gradient(on_device(inner), on_device(grad), activation, place)
    check(activated, of_torch[0], exact.detach(), record_property, "activated")
    check(grad_inner, of_torch[1], inner_exact.grad, record_property, "gradient")
    if summed:
        check_sums(place, inner_exact.grad.sum(0))


@DTYPES
@pytest.mark.parametrize(("G", "Q", "D", "turned"), [(4, 1, 32, 32), (3, 3, 64, 32), (2, 4, 80, 80)])
@pytest.mark.parametrize("T", [1, 57])
def test_sums_of_the_turned_gradient(normal, dtype, G, Q, D, turned, T):
    qkv = normal(T, G, Q + 2, D, dtype=dtype) + 0.5
    of_parts = [qkv[:, :, :Q].flatten(1, 2), qkv[:, :, Q], qkv[:, :, Q + 1]]
    angles = (normal(T, turned // 2, dtype=torch.float32) * 50).repeat(1, 2)
    exact = rotary.qkv_gradient(*(part.double() for part in of_parts), angles.double()).flatten(1).sum(0)
    given = [on_device(part) for part in (*of_parts, angles)]
    (place,) = parts(qkv[0].numel())
    summed = rotary_kernels.qkv_gradient(*given, place)
    assert torch.equal(summed, rotary_kernels.qkv_gradient(*given, None))
    # in float32 the angles themselves are no more accurate
    assert error(place.sum(0), exact) <= 1e-5


@DTYPES
@pytest.mark.parametrize(("num_parts", "size"), [(1, 1), (5, 100), (264, 130)])
def test_parts_are_added_up(normal, record_property, dtype, num_parts, size):
    given = normal(num_parts, size, dtype=torch.float32)
    exact = given.double().sum(0)
    check(layer_kernels.add_up(on_device(given), dtype), given.sum(0).to(dtype), exact, record_property, "sums")


def called_kernel(called: list[str], name: str, kernel, *args):
    called.append(name)
    return kernel(*args)


@pytest.mark.usefixtures("own_layers")
@pytest.mark.parametrize("kind", ["llama", *MODELS])
def test_a_layer(kind, tiny_hf, tiny_nemo, tmp_path, monkeypatch):
    """Gradients of all parameters, without and with frozen ones, against megatron-core's modules."""
    path = tiny_nemo if kind == "llama" else save_gpt2_like(tiny_hf, tmp_path / "model.nemo", **MODELS[kind])
    layer = load_actor(path).model.decoder.layers[0].train()
    called = []
    for name in ("norm_and_residual", "norm_gradient", "activation_gradient", "qkv_gradient"):
        module = rotary_kernels if name == "qkv_gradient" else layer_kernels
        spy = functools.partial(called_kernel, called, name, getattr(module, name))
        # with the interpreter, tensors are on the CPU, where the kernels would not be called
        monkeypatch.setattr(fused_layer if INTERPRETED else module, name, spy)
    if INTERPRETED:
        monkeypatch.setattr(layer_ops, "_num_parts", lambda device: NUM_PARTS)
    for frozen in ([], [layer.mlp.linear_fc1.weight, layer.mlp.linear_fc1.bias, layer.input_layernorm.weight]):
        for parameter in frozen:
            if parameter is not None:
                parameter.requires_grad_(False)
        expected = outcome(layer, TransformerLayer.forward)
        called.clear()
        assert_same(outcome(layer), expected)
        forward, backward = ["norm_and_residual"] * 2, ["norm_gradient", "qkv_gradient", "norm_gradient"]
        assert called == [*forward, "activation_gradient", *backward]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has one program after the other")
def test_sums_do_not_depend_on_chance(normal):
    x = on_device(normal(100, 256, dtype=torch.bfloat16))
    module = a_norm(normal, 256, False, False, torch.bfloat16).to(DEVICE)
    outcomes = []
    for _ in range(3):
        sums = layer_ops.ColumnSums([module.weight, module.bias], x)
        layer_kernels.norm_gradient(module, x, x.clone(), x, *sums.parts, None, None)
        outcomes.append(torch.cat(sums.finish(fuse=False)))
    assert all(torch.equal(sums, outcomes[0]) for sums in outcomes)
