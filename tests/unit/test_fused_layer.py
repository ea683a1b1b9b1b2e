"""A fused layer over a pack, compared with the modules of the same layer, and when those are used instead."""

import weakref

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer

from nemo_aligner.models.nlp.gpt import fused_layer, layer_spec
from nemo_aligner.models.nlp.gpt.packed_attention import PackedSequences
from nemo_aligner.models.nlp.gpt.rotary import apply_rotary_, qkv_gradient
from tests.tiny import load_actor, save_gpt2_like

LENGTHS = [5, 1, 9]
# Relative float32 error from a different order of summation.
OTHER_ORDER = 2e-6


HALF_TURNED = {"position_embedding_type": "rope", "rotary_percentage": 0.5}
MODELS = {
    "gpt2": {"normalization": "layernorm1p", **HALF_TURNED},
    "gelu_tanh": {"bias_activation_fusion": True, **HALF_TURNED},
    "geglu_tanh": {"activation": "geglu", "bias_activation_fusion": True, **HALF_TURNED},
}


@pytest.fixture(scope="module", params=["llama", *MODELS])
def layer(request, tiny_hf, tiny_nemo, tmp_path_factory):
    """Grouped queries, RMSNorm, gated MLP, no biases; or LayerNorm, biases, half of the channels rotated and GELUs."""
    path = tiny_nemo
    if request.param != "llama":
        path = tmp_path_factory.mktemp("fused") / "model.nemo"
        save_gpt2_like(tiny_hf, path, **MODELS[request.param])
    return load_actor(path).model.decoder.layers[0].train()


def angles(num_channels: int) -> torch.Tensor:
    """Rotary angles [T, 1, channels], laid out as in megatron-core's table."""
    half = torch.rand(sum(LENGTHS), num_channels // 2, generator=torch.Generator().manual_seed(3)) * 6
    return torch.cat([half, half], dim=1).unsqueeze(1)


def outcome(layer, forward=layer_spec.Layer.forward) -> dict[str, torch.Tensor]:
    """The output and all gradients, for a random input and a random gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    device = layer.pre_mlp_layernorm.weight.device
    hidden_T1H, grad_T1H = torch.randn(2, sum(LENGTHS), 1, 64, generator=generator).to(device)
    hidden_T1H.requires_grad_()
    layer.zero_grad()
    # 16 channels per head, half of them rotated in the second model
    turned = angles(16 if layer.config.normalization == "RMSNorm" else 8).to(device)
    output_T1H, context = forward(
        layer, hidden_T1H, None, rotary_pos_emb=turned, packed_seq_params=PackedSequences.of(LENGTHS)
    )
    assert output_T1H._base is None  # pipeline schedules refuse views
    output_T1H.backward(grad_T1H)
    assert context is None
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output_T1H.detach(), "input": hidden_T1H.grad, **gradients}


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if expected is None:
            assert ours[name] is None, name
        else:
            assert (ours[name] - expected).norm() <= OTHER_ORDER * expected.norm() > 0, name


@pytest.fixture
def calls(monkeypatch):
    """The layers that ran fused."""
    seen, fused_layer = [], layer_spec.fused_layer

    def spy(layer, *args):
        seen.append(layer)
        return fused_layer(layer, *args)

    monkeypatch.setattr(layer_spec, "fused_layer", spy)
    return seen


def test_output_and_gradients_are_those_of_the_modules(layer, calls):
    expected = outcome(layer, TransformerLayer.forward)
    assert not calls
    assert_same(outcome(layer), expected)
    assert calls == [layer]


def test_parameters_that_are_not_trained_get_no_gradient(layer):
    # megatron-core computes no gradient of the bias if the weight is frozen
    frozen = [*layer.self_attention.linear_qkv.parameters(), *layer.mlp.linear_fc1.parameters()]
    frozen.append(layer.input_layernorm.weight)
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        expected = outcome(layer, TransformerLayer.forward)
        assert sum(gradient is None for gradient in expected.values()) == len(frozen)
        assert_same(outcome(layer), expected)
    finally:
        for parameter in frozen:
            parameter.requires_grad_()


def test_hooks_see_each_gradient_once(layer):
    seen, weight = [], layer.pre_mlp_layernorm.weight
    handle = weight.register_hook(seen.append)
    outcome(layer)
    handle.remove()
    assert len(seen) == 1 and torch.equal(seen[0], weight.grad)


def test_queries_keys_and_values_are_let_go_with_the_backward_pass(layer, monkeypatch):
    """Even though the output, and with it the layer's part of the graph, is still alive."""
    of_attention, attend = [], fused_layer.packed_attention_and_gradient

    def spy(*args):
        context, gradient = attend(*args)
        of_attention.append(weakref.ref(gradient))
        return context, gradient

    monkeypatch.setattr(fused_layer, "packed_attention_and_gradient", spy)
    hidden_TH = torch.randn(sum(LENGTHS), 64, requires_grad=True)
    output_TH = fused_layer.fused_layer(layer, hidden_TH, None, PackedSequences.of(LENGTHS))
    assert of_attention[0]() is not None
    output_TH.sum().backward()
    assert output_TH.grad_fn is not None and of_attention[0]() is None


PARTS = [
    "input_layernorm", "self_attention", "self_attention.linear_qkv", "self_attention.core_attention",
    "self_attention.linear_proj", "pre_mlp_layernorm", "mlp", "mlp.linear_fc1", "mlp.linear_fc2",
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_modules_that_have_hooks_are_called(layer, calls, part, kind):
    called = []
    handle = getattr(layer.get_submodule(part), f"register_{kind}_hook")(lambda *args: called.append(part))
    outcome(layer)
    handle.remove()
    assert called == [part] and not calls


@pytest.mark.parametrize("part", PARTS)
def test_modules_that_were_replaced_or_have_another_forward_are_called(layer, calls, part):
    module = layer.get_submodule(part)
    kind, forward = type(module), module.forward
    module.__class__ = type("Other", (kind,), {})
    outcome(layer)
    module.__class__ = kind
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    outcome(layer)
    del module.forward
    assert not calls


def test_tensor_parallelism_and_selective_recomputation_are_left_to_the_modules(layer, monkeypatch):
    assert layer_spec.can_fuse(layer, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: 2)
        assert not layer_spec.can_fuse(layer, torch.float32)
    monkeypatch.setattr(layer.self_attention, "checkpoint_core_attention", True)
    assert not layer_spec.can_fuse(layer, torch.float32)


@pytest.mark.parametrize("key", ["hidden_dropout", "attention_dropout"])
def test_dropout_is_left_to_the_modules(layer, calls, monkeypatch, key):
    monkeypatch.setattr(layer.config, key, 0.1)
    assert not layer_spec.can_fuse(layer, torch.float32)
    layer.eval()
    assert layer_spec.can_fuse(layer, torch.float32)
    layer.train()


def test_other_dtypes_and_autocast_are_left_to_the_modules(layer):
    assert not layer_spec.can_fuse(layer, torch.bfloat16)
    with torch.autocast("cpu"):
        assert not layer_spec.can_fuse(layer, torch.float32)


def test_turning_is_complex_multiplication_and_its_gradient_undoes_it():
    qkv_TGXD = torch.randn(15, 2, 4, 16, generator=torch.Generator().manual_seed(0))
    turned, by = qkv_TGXD.clone(), angles(8).squeeze(1)
    apply_rotary_(turned, by)
    assert torch.equal(turned[:, :, 3], qkv_TGXD[:, :, 3]) and torch.equal(turned[..., 8:], qkv_TGXD[..., 8:])
    as_complex = torch.complex(qkv_TGXD[:, :, :3, :4].double(), qkv_TGXD[:, :, :3, 4:8].double())
    expected = as_complex * torch.exp(1j * by[:, None, None, :4].double())
    torch.testing.assert_close(turned[:, :, :3, :4], expected.real.float())
    torch.testing.assert_close(turned[:, :, :3, 4:8], expected.imag.float())
    parts = turned[:, :, :2].flatten(1, 2), turned[:, :, 2], turned[:, :, 3]
    torch.testing.assert_close(qkv_gradient(*parts, by), qkv_TGXD)
    assert torch.equal(qkv_gradient(*parts, None), turned)
