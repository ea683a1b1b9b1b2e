"""Training on packs against padded rows on a GPU, in float32 and, through variable-length attention, in bfloat16."""

import pytest
import torch
from omegaconf import OmegaConf

from nemo_aligner.compat import float32_accumulation, varlen_attention
from nemo_aligner.models.nlp.gpt import packed_attention
from nemo_aligner.models.nlp.gpt.packed_attention import PackedSequences
from nemo_aligner.models.nlp.gpt.packed_forward import TrainingSettings
from nemo_aligner.models.nlp.gpt.rotary import joined_gradient, turn_
from nemo_aligner.utils import logprobs
from tests.tiny import load_actor
from tests.unit.test_layer_spec import layer_norm_formula, norm, rms_formula
from tests.unit.test_loss import make_batch
from tests.unit.test_packing import ROWS


@pytest.fixture(scope="module", autouse=True)
def exact_matmuls():
    """Float32 means float32: no TF32 while these tests compare."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def training_step(actor, packing: bool):
    """(loss, {parameter: gradient}) of one training step without its update."""
    actor._training = TrainingSettings(packing=packing)
    actor.zero_grad()
    actor.prepare_for_training()
    actor.prepare_for_training_step()
    loss, _ = actor.get_loss_and_metrics(make_batch(ROWS), forward_only=False)
    actor.finish_training_step()
    (gpt_model,) = actor.get_model_module_list()
    gradients = {}
    for name, parameter in gpt_model.named_parameters():
        gradients[name] = (parameter.main_grad if parameter.grad is None else parameter.grad).float().clone()
    return loss, gradients


def assert_close(ours, theirs, rel_loss, rel):
    assert ours[0] == pytest.approx(theirs[0], rel=rel_loss)
    for name, gradient in theirs[1].items():
        assert gradient.norm() > 0
        assert (ours[1][name] - gradient).norm() <= rel * gradient.norm(), name


@pytest.mark.parametrize("entries", [logprobs.MAX_CHUNK_ENTRIES, 1000])
def test_packed_equals_padded_in_float32(tiny_nemo, monkeypatch, entries):
    actor = load_actor(tiny_nemo, micro_batch_size=4, global_batch_size=8)
    padded = training_step(actor, packing=False)
    monkeypatch.setattr(logprobs, "MAX_CHUNK_ENTRIES", entries)
    assert_close(training_step(actor, packing=True), padded, rel_loss=1e-5, rel=1e-5)


@pytest.mark.parametrize("fuses", [False, True])
def test_packed_is_close_to_padded_in_bfloat16(tiny_nemo, monkeypatch, fuses):
    from nemo_aligner.utils.train_script_utils import init_using_ptl

    optim = {"name": "mcore_distributed_optim", "lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.98]}
    actor = load_actor(
        tiny_nemo, precision="bf16", megatron_amp_O2=True, micro_batch_size=4, global_batch_size=8,
        gradient_as_bucket_view=True, gradient_accumulation_fusion=fuses, optim=OmegaConf.create(optim),
    )  # fmt: skip
    init_using_ptl(actor.trainer, actor, None, None)
    of_kernel = []

    def causal(*args, causal=varlen_attention.causal):
        of_kernel.append(args[0].dtype)
        return causal(*args)

    monkeypatch.setattr(varlen_attention, "causal", causal)
    padded = training_step(actor, packing=False)
    assert of_kernel == []
    # 8 bits each in another order through four layers
    assert_close(training_step(actor, packing=True), padded, rel_loss=1e-2, rel=5e-2)
    assert of_kernel == [torch.bfloat16] * 8  # four layers, two micro-batches


@pytest.mark.parametrize("num_groups", [2, 8])
def test_the_kernel_for_all_sequences_equals_one_after_the_other(monkeypatch, num_groups):
    generator = torch.Generator("cuda").manual_seed(1)
    sequences = PackedSequences.of([1, 130, 17, 260])
    sequences = PackedSequences(sequences.lengths, sequences.bounds.cuda())
    shapes = [(408, heads, 64) for heads in (8, num_groups, num_groups)]
    exact = [torch.randn(shape, device="cuda", generator=generator).bfloat16().double() for shape in shapes]
    grad = torch.randn(408, 8, 64, device="cuda", generator=generator).bfloat16()
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        qkv = [x.to(dtype).requires_grad_() for x in exact]
        assert varlen_attention.can_compute(qkv[0]) == (dtype == torch.bfloat16)
        context = packed_attention.packed_attention(*qkv, sequences, 0.0)
        context.backward(grad.to(dtype))
        results.append([context, *(x.grad for x in qkv)])
    for ours, expected in zip(results[1], results[0], strict=True):
        assert (ours.double() - expected).norm() <= 1e-2 * expected.norm()


def test_the_kernel_is_deterministic_where_asked():
    sequences = PackedSequences.of([500, 300])
    sequences = PackedSequences(sequences.lengths, sequences.bounds.cuda())
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
    # the result is rounded once; a shift that cancels leaves the rounding of what it cancelled
    torch.testing.assert_close(ours.double(), expected, rtol=2**-8, atol=2**-12)


def test_the_host_waits_for_the_gpu_once_a_step(tiny_nemo):
    """Between the first micro-batch and the last nothing asks for a value."""
    actor = load_actor(tiny_nemo, micro_batch_size=1, global_batch_size=8)
    training_step(actor, packing=True)
    waits = {}
    for num_rows in (4, 8):
        actor.cfg.global_batch_size = num_rows
        actor.prepare_for_training()
        rows = [row for row in ROWS if row[1] is not None][:1] * num_rows
        with torch.profiler.profile() as profile:
            actor.get_loss_and_metrics(make_batch(rows), forward_only=False)
        names = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
        waits[num_rows] = sum(event.count for event in profile.key_averages() if event.key in names)
    assert waits[8] == waits[4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("G", "Q", "D", "turned"), [(16, 1, 128, 128), (3, 3, 64, 32), (2, 4, 80, 80)])
def test_rotary_positions_and_their_gradient_are_those_of_the_cpu(dtype, G, Q, D, turned):
    generator = torch.Generator().manual_seed(0)
    qkv_TGXD = torch.randn(50, G, Q + 2, D, generator=generator).to(dtype)
    half = torch.rand(50, turned // 2, generator=generator) * 500
    angles = torch.cat([half, half], dim=1)
    bound = {"atol": 3e-2 if dtype == torch.bfloat16 else 1e-4, "rtol": 0}
    ours, expected = qkv_TGXD.cuda(), qkv_TGXD.double()
    turn_(ours, angles.cuda())
    turn_(expected, angles.double())
    torch.testing.assert_close(ours.cpu().double(), expected, **bound)
    parts = qkv_TGXD[:, :, :Q].flatten(1, 2), qkv_TGXD[:, :, Q], qkv_TGXD[:, :, Q + 1]
    ours = joined_gradient(*(part.cuda() for part in parts), angles.cuda())
    torch.testing.assert_close(
        ours.cpu().double(), joined_gradient(*(part.double() for part in parts), angles), **bound
    )
