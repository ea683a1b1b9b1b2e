"""Weight gradients accumulated into the optimizer's buffers by the matrix product itself, compared with autograd's.

Legend: R positions, H hidden size, V vocabulary.
"""

import inspect
from unittest import mock

import pytest
import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, layers
from omegaconf import OmegaConf

from nemo_aligner.models.nlp.gpt import embedding
from nemo_aligner.models.nlp.gpt.embedding import embed
from nemo_aligner.utils import logprobs
from nemo_aligner.utils.target_logprobs import TargetLogprobs
from tests.tiny import load_actor, save_gpt2_like
from tests.unit.test_loss import make_batch
from tests.unit.test_packing import ROW_WIDTH, ROWS


@pytest.fixture(scope="module")
def groups(tiny_nemo):
    """Create the process groups by loading a model."""
    load_actor(tiny_nemo)


def linear(fuses: bool, main_grad_dtype=torch.float32) -> ColumnParallelLinear:
    config = ModelParallelConfig(use_cpu_initialization=True, gradient_accumulation_fusion=fuses)
    layer = ColumnParallelLinear(6, 5, config=config, init_method=lambda weight: weight.fill_(0.5), bias=False)
    layer.weight.main_grad = torch.full((5, 6), 3.0, dtype=main_grad_dtype)
    return layer


def test_a_linear_layer_adds_to_the_buffer(groups):
    inputs = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(0))
    fusing, plain = linear(True), linear(False)
    for layer in (fusing, plain):
        layer(inputs)[0].sin().sum().backward()
    assert fusing.weight.grad is None
    torch.testing.assert_close(fusing.weight.main_grad, 3.0 + plain.weight.grad)


def test_apex_is_preferred(monkeypatch):
    from nemo_aligner.compat import gradient_fusion

    extension = object()
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", extension)
    gradient_fusion.apply()
    assert layers.fused_weight_gradient_mlp_cuda is extension


def test_the_extension_is_still_needed():
    """If this fails, compat/gradient_fusion.py can be deleted."""
    assert "import fused_weight_gradient_mlp_cuda" in inspect.getsource(layers)


@pytest.mark.parametrize("convention", ["none", "replaced", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_layer_adds_to_the_buffer_piece_by_piece(groups, monkeypatch, convention, dtype):
    monkeypatch.setattr(logprobs, "MAX_CHUNK_ENTRIES", 12)
    generator = torch.Generator().manual_seed(1)
    hidden_RH, weight_VH = (torch.randn(rows, 6, generator=generator).to(dtype) for rows in (4, 11))
    targets_R = torch.tensor([0, 10, 3, 3])
    gradients = []
    for fuses in (False, True):
        hidden, weight = hidden_RH.clone().requires_grad_(), torch.nn.Parameter(weight_VH.clone())
        weight.main_grad = torch.full((11, 6), 3.0)
        if convention != "none":
            weight.grad_added_to_main_grad = False
            weight.zero_out_wgrad = convention == "tied"
        TargetLogprobs.apply(hidden, weight, targets_R, False, fuses).sin().sum().backward()
        gradients.append((hidden.grad, weight))
    (hidden_grad, plain), (fused_hidden_grad, fusing) = gradients
    assert torch.equal(fused_hidden_grad, hidden_grad)
    rtol = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(fusing.main_grad, 3.0 + plain.grad.float(), rtol=rtol, atol=rtol)
    if convention == "none":
        assert fusing.grad is None
    else:
        assert fusing.grad_added_to_main_grad
    if convention == "tied":  # what autograd adds to it counts
        assert torch.equal(fusing.grad, torch.zeros_like(fusing.grad))


@pytest.mark.parametrize("convention", ["none", "replaced", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_add_their_rows_to_the_buffer(convention, dtype):
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(11, 6, generator=generator).to(dtype))
    plain_weight = torch.nn.Parameter(weight.detach().float())
    weight.main_grad = torch.full((11, 6), 3.0)
    if convention != "none":
        weight.grad_added_to_main_grad = False
        weight.zero_out_wgrad = convention == "tied"
    ids = torch.tensor([[0, 10, 3, 3, 3]])
    rows, plain = embed(ids, weight), plain_weight[ids]
    assert torch.equal(rows.float(), plain)
    grad = torch.randn(rows.shape, generator=generator).to(dtype)
    rows.backward(grad), plain.backward(grad.float())
    torch.testing.assert_close(weight.main_grad, 3.0 + plain_weight.grad)
    if convention == "none":
        assert weight.grad is None
    else:
        assert weight.grad_added_to_main_grad
    if convention == "tied":  # what autograd adds to it counts
        assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("optimizer", ["mcore_distributed_optim", "adamw"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_model_in_bf16(tiny_hf, tiny_nemo, tmp_path, optimizer, model):
    """Tied and separate output layers, with both of the wrappers that keep gradients in float32."""
    from nemo_aligner.utils.train_script_utils import init_using_ptl

    path = tiny_nemo
    if model == "gpt2":
        path = save_gpt2_like(tiny_hf, tmp_path / "gpt2.nemo", share_embeddings_and_output_weights=False)
    gradients = {}
    for fuses in (False, True):
        optim = {"name": optimizer, "lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.98]}
        actor = load_actor(
            path, rs={"training.max_tokens_per_pack": ROW_WIDTH}, precision="bf16", megatron_amp_O2=True,
            micro_batch_size=1, global_batch_size=8, gradient_as_bucket_view=True, gradient_accumulation_fusion=fuses,
            optim=OmegaConf.create(optim),
        )  # fmt: skip
        assert actor.cfg.gradient_accumulation_fusion == fuses
        init_using_ptl(actor.trainer, actor, None, [])
        actor.prepare_for_training()
        actor._optimizer.zero_grad()
        actor.prepare_for_training_step()
        kernels = layers.fused_weight_gradient_mlp_cuda
        with (
            mock.patch.object(kernels, "wgrad_gemm_accum_fp32", wraps=kernels.wgrad_gemm_accum_fp32) as accumulate,
            mock.patch.object(embedding, "add_rows_", wraps=embedding.add_rows_) as add_rows_,
        ):
            actor.get_loss_and_metrics(make_batch(ROWS), forward_only=False)
        # three packs, each with four matrices in each of four layers and the output layer
        assert accumulate.call_count == (3 * (4 * 4 + 1) if fuses else 0)
        assert add_rows_.call_count == (3 if fuses else 0)
        actor.finish_training_step()
        parameters = actor.get_model_module_list()[0].named_parameters()
        gradients[fuses] = {name: parameter.main_grad.clone() for name, parameter in parameters}
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[False].items():
        # without fusion, each micro-batch's gradient was rounded to bf16 before it was added
        assert gradient.norm() > 0
        assert (gradients[True][name] - gradient).norm() <= 2**-8 * gradient.norm(), name
        assert gradients[True][name].dtype == torch.float32
