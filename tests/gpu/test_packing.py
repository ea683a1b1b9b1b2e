"""Training on packs on a GPU, in float32 and, through variable-length attention, in bfloat16.

Packs may change only how sums are rounded. So the gradients on packs and on padded rows are both compared with more
exact ones, and those on packs may not be farther off than those on padded rows, except by chance.
"""

import threading

import pytest
import torch
from omegaconf import OmegaConf
from transformers import LlamaForCausalLM

from nemo_aligner.compat import float32_accumulation, varlen_attention
from nemo_aligner.models.nlp.gpt import megatron_gpt_rs_actor, packed_attention
from nemo_aligner.models.nlp.gpt.packed_attention import PackedSequences
from nemo_aligner.models.nlp.gpt.rotary import apply_rotary_, qkv_gradient
from nemo_aligner.models.nlp.gpt.training_settings import TrainingSettings
from nemo_aligner.utils import logprobs
from tests.tiny import load_actor
from tests.unit.test_layer_spec import layer_norm_formula, norm, rms_formula
from tests.unit.test_loss import hf_logprobs, hf_training_step, make_batch, token_loss
from tests.unit.test_packing import ROW_WIDTH, ROWS

# The batch of 8 rows, in micro-batches of two, becomes two packs.
SETTINGS = {"micro_batch_size": 2, "global_batch_size": 8}
NUM_PACKS = 2


@pytest.fixture(scope="module")
def float32(tiny_nemo):
    return load_actor(tiny_nemo, **SETTINGS)


@pytest.fixture(scope="module")
def of_rounded_weights(tiny_nemo):
    """(loss, gradients) in float32 on padded rows, with weights rounded to bfloat16."""
    actor = load_actor(tiny_nemo, **SETTINGS)
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.copy_(parameter.bfloat16())
    return training_step(actor, packing=False)


def training_step(actor, packing: bool):
    """(loss, {parameter: gradient}) of one training step without its update."""
    actor._training = TrainingSettings(packing=packing, max_tokens_per_pack=2 * ROW_WIDTH)
    actor.zero_grad()
    actor.prepare_for_training()
    actor.prepare_for_training_step()
    loss, _ = actor.get_loss_and_metrics(make_batch(ROWS), forward_only=False)
    actor.finish_training_step()
    (gpt_model,) = actor.get_model_module_list()
    gradients = {}
    for name, parameter in gpt_model.named_parameters():
        gradients[name] = (parameter.main_grad if parameter.grad is None else parameter.grad).double()
    return loss, gradients


@pytest.mark.usefixtures("own_layers")
def test_the_backward_pass_stays_in_the_thread_of_its_caller(float32):
    threads = set()
    (gpt_model,) = float32.get_model_module_list()
    weight = gpt_model.decoder.final_layernorm.weight
    hook = weight.register_hook(lambda gradient: threads.add(threading.get_ident()))
    training_step(float32, packing=True)
    hook.remove()
    assert threads == {threading.get_ident()}


def check_errors(packed, padded, exact, record_property) -> None:
    """For each parameter and overall, the errors of packs are no larger than those of padded rows, within tolerance."""
    errors = {}
    for name, gradient in exact[1].items():
        assert gradient.norm() > 0
        errors[name] = [((of[1][name] - gradient).norm() / gradient.norm()).item() for of in (packed, padded)]
    of_packed, of_padded = torch.tensor(list(errors.values())).norm(dim=0).tolist()
    record_property("error packed", of_packed)
    record_property("error padded", of_padded)
    assert of_packed <= 1.25 * of_padded
    too_large = {name: pair for name, pair in errors.items() if pair[0] > 2 * pair[1] + 1e-6}
    assert not too_large, f"relative errors [packed, padded]: {too_large}"


@pytest.mark.usefixtures("own_layers")
@pytest.mark.parametrize("entries", [logprobs.MAX_CHUNK_ENTRIES, 1000])
def test_packs_in_float32(float32, tiny_hf, monkeypatch, record_property, entries):
    batch = {key: value.cuda() for key, value in make_batch(ROWS).items()}
    hf_model = LlamaForCausalLM.from_pretrained(tiny_hf, torch_dtype=torch.float64).cuda().eval()
    loss = token_loss(hf_logprobs(hf_model, batch["response_tokens"]), batch["mask"])
    exact = hf_training_step(hf_model, float32, loss)
    padded = training_step(float32, packing=False)
    monkeypatch.setattr(logprobs, "MAX_CHUNK_ENTRIES", entries)
    packed = training_step(float32, packing=True)
    assert packed[0] == pytest.approx(exact[0], rel=1e-5)
    check_errors(packed, padded, exact, record_property)


def load_in_bfloat16(tiny_nemo, kind: str):
    from nemo_aligner.utils.train_script_utils import init_using_ptl

    if kind == "autocast":
        return load_actor(tiny_nemo, precision="bf16", **SETTINGS)
    optim = {"name": "mcore_distributed_optim", "lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.98]}
    actor = load_actor(
        tiny_nemo, precision="bf16", megatron_amp_O2=True, gradient_as_bucket_view=True,
        gradient_accumulation_fusion=kind == "O2 fused", optim=OmegaConf.create(optim), **SETTINGS,
    )  # fmt: skip
    init_using_ptl(actor.trainer, actor, None, [])
    return actor


@pytest.mark.usefixtures("own_layers")
@pytest.mark.parametrize("kind", ["O2", "O2 fused", "autocast"])
def test_packs_in_bfloat16(tiny_nemo, of_rounded_weights, monkeypatch, record_property, kind):
    actor = load_in_bfloat16(tiny_nemo, kind)
    of_kernel = []

    def kernel(*args, kernel=varlen_attention._kernel):
        of_kernel.append(args[0].dtype)
        return kernel(*args)

    monkeypatch.setattr(varlen_attention, "_kernel", kernel)
    padded = training_step(actor, packing=False)
    assert of_kernel == []
    packed = training_step(actor, packing=True)
    assert of_kernel == [torch.bfloat16] * 4 * NUM_PACKS  # four layers
    assert packed[0] == pytest.approx(of_rounded_weights[0], rel=1e-2)
    check_errors(packed, padded, of_rounded_weights, record_property)


@pytest.mark.parametrize("num_groups", [2, 8])
@pytest.mark.parametrize("lengths", [[1, 130, 17, 260], [1], [1, 1, 1]])
def test_the_kernel_for_all_sequences_equals_one_after_the_other(record_property, lengths, num_groups):
    generator = torch.Generator("cuda").manual_seed(1)
    sequences = PackedSequences.of(lengths)
    sequences = PackedSequences(sequences.lengths, sequences.cu_seqlens.cuda())
    shapes = [(sum(lengths), heads, 64) for heads in (8, num_groups, num_groups)]
    exact = [torch.randn(shape, device="cuda", generator=generator).bfloat16().double() for shape in shapes]
    grad = torch.randn(sum(lengths), 8, 64, device="cuda", generator=generator).bfloat16()
    results, rounding = [], {torch.float64: 1e-12, torch.bfloat16: 2**-7}
    for dtype in rounding:
        qkv = [x.detach().to(dtype).requires_grad_() for x in exact]
        assert varlen_attention.can_compute(qkv[0]) == (dtype == torch.bfloat16)
        context = packed_attention.packed_attention(*qkv, sequences, 0.0)
        context.backward(grad.to(dtype))
        results.append([context, *(x.grad for x in qkv)])
        context, gradient = packed_attention.packed_attention_and_gradient(*qkv, sequences)
        for of_function, of_autograd in zip([context, *gradient(grad.to(dtype))], results[-1], strict=True):
            torch.testing.assert_close(of_function, of_autograd, rtol=rounding[dtype], atol=rounding[dtype])
    for name, ours, expected in zip(("context", "query", "key", "value"), *reversed(results), strict=True):
        error, size = (ours.double() - expected).norm().item(), expected.norm().item()
        record_property(name, error / size if size > 0 else error)
        # a lone token attends only to itself, so gradients of its query and key are zero up to float32 sums
        assert error <= 1e-2 * size + 1e-5 * grad.double().norm().item(), (name, error, size)


def test_the_kernel_is_deterministic_where_asked():
    sequences = PackedSequences.of([500, 300])
    sequences = PackedSequences(sequences.lengths, sequences.cu_seqlens.cuda())
    torch.use_deterministic_algorithms(True)
    try:
        gradients = []
        for _ in range(5):
            generator = torch.Generator("cuda").manual_seed(1)
            qkv = [
                torch.randn(800, 8, 64, device="cuda", generator=generator).bfloat16().requires_grad_()
                for _ in range(3)
            ]
            packed_attention.packed_attention(*qkv, sequences, 0.0).sum().backward()
            gradients.append(torch.cat([x.grad for x in qkv]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_products_are_added_in_float32():
    generator = torch.Generator("cuda").manual_seed(1)
    left = torch.randn(64, 512, device="cuda", generator=generator).bfloat16()
    right = torch.randn(512, 32, device="cuda", generator=generator).bfloat16()
    buffer = torch.full((96, 32), 3.0, device="cuda")
    float32_accumulation.add_product_(buffer[32:], left, right)
    expected = 3.0 + left.double() @ right.double()
    assert (buffer[32:].double() - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(buffer[:32], torch.full_like(buffer[:32], 3.0))


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_norms_in_bfloat16_compute_in_float32(name):
    module = norm(name, dtype=torch.bfloat16).cuda()
    hidden = (torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 300 + 50).bfloat16()
    assert module._has_kernel(hidden.cuda())
    scale = module.weight.detach().cpu().bfloat16()
    expected = rms_formula(hidden, scale) if name == "RMSNorm" else None
    if expected is None:
        expected = layer_norm_formula(hidden, scale, module.bias.detach().cpu())
    ours = module(hidden.cuda()).cpu()
    assert ours.dtype == torch.bfloat16
    # the result is rounded once; where the shift cancels the rest, that rest's rounding error remains
    torch.testing.assert_close(ours.double(), expected, rtol=2**-8, atol=2**-12)


@pytest.mark.usefixtures("own_layers")
def test_nothing_in_the_loop_over_packs_makes_the_host_wait(tiny_nemo, monkeypatch):
    """Anything that made it wait would raise an error showing where."""
    actor = load_in_bfloat16(tiny_nemo, "O2 fused")
    training_step(actor, packing=True)
    num_packs = []
    run = megatron_gpt_rs_actor.get_forward_backward_func()

    def forward_backward(num_microbatches, **kwargs):
        num_packs.append(num_microbatches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(num_microbatches=num_microbatches, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(megatron_gpt_rs_actor, "get_forward_backward_func", lambda: forward_backward)
    training_step(actor, packing=True)
    assert num_packs == [NUM_PACKS]

    def loss_that_waits(self, total, *args, loss=megatron_gpt_rs_actor.MegatronGPTRSModel._normalized_loss):
        total.item()
        return loss(self, total, *args)

    monkeypatch.setattr(megatron_gpt_rs_actor.MegatronGPTRSModel, "_normalized_loss", loss_that_waits)
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        training_step(actor, packing=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("G", "Q", "D", "turned"), [(16, 1, 128, 128), (3, 3, 64, 32), (2, 4, 80, 80)])
def test_rotary_positions_and_their_gradient_are_those_of_the_cpu(dtype, G, Q, D, turned):
    generator = torch.Generator().manual_seed(0)
    qkv_TGXD = torch.randn(50, G, Q + 2, D, generator=generator).to(dtype)
    half = torch.rand(50, turned // 2, generator=generator) * 500
    angles = torch.cat([half, half], dim=1)
    bound = {"atol": 3e-2 if dtype == torch.bfloat16 else 1e-4, "rtol": 0}
    ours, expected = qkv_TGXD.cuda(), qkv_TGXD.double()
    apply_rotary_(ours, angles.cuda())
    apply_rotary_(expected, angles.double())
    torch.testing.assert_close(ours.cpu().double(), expected, **bound)
    parts = qkv_TGXD[:, :, :Q].flatten(1, 2), qkv_TGXD[:, :, Q], qkv_TGXD[:, :, Q + 1]
    ours = qkv_gradient(*(part.cuda() for part in parts), angles.cuda())
    torch.testing.assert_close(ours.cpu().double(), qkv_gradient(*(part.double() for part in parts), angles), **bound)
