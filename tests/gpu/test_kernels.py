"""The Triton kernels against the same operations in plain torch, in float32 on the same inputs.

They also run on a CPU, in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/gpu/test_kernels.py`. The
interpreter's bfloat16 products are wrong, so float16 is used there instead.

Legend: B rows, G key/value groups, Q query heads per group, T positions of the cache, D channels per head, V ids.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from nemo_aligner.compat import varlen_attention
from nemo_aligner.generation import sampling, torch_ops
from nemo_aligner.generation.attention import FusedPrefillAttention, PrefillAttention, RotaryTable
from nemo_aligner.generation.invalid_logits import INVALID_TOKEN
from nemo_aligner.generation.kv_cache import KVCache
from nemo_aligner.generation.rows import Decoding, DeviceRows, Row
from nemo_aligner.generation.sampling import SamplingParams
from nemo_aligner.generation.weights import Norm
from nemo_aligner.models.nlp.gpt.activation import Activation
from tests.gpu.conftest import INTERPRETED

triton_launch = pytest.importorskip("nemo_aligner.generation.triton_launch")
triton_ops = pytest.importorskip("nemo_aligner.generation.triton_ops")
triton_attention = pytest.importorskip("nemo_aligner.generation.triton_attention")
triton_sampling = pytest.importorskip("nemo_aligner.generation.triton_sampling")

RUNS_INTERPRETED = True
DEVICE = "cpu" if INTERPRETED else "cuda"
# Bounds: one rounding of the result, and in attention also of keys and queries after rotation by their positions.
HALF = torch.float16 if INTERPRETED else torch.bfloat16
BOUND = {torch.float32: 1e-6, HALF: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["fp32", "half"])


@pytest.fixture
def normal():
    generator = torch.Generator(DEVICE).manual_seed(0)
    return lambda *shape, dtype: torch.randn(*shape, device=DEVICE, generator=generator).to(dtype)


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(triton_ops, "num_multiprocessors", lambda device: 132)
        for module in (triton_ops, triton_attention):
            monkeypatch.setattr(module, "shared_memory", lambda device: 227 * 1024)


def assert_close(ours, expected, dtype):
    ours, expected = ours.double(), expected.double()
    assert (ours - expected).norm() <= BOUND[dtype] * expected.norm()


@DTYPES
@pytest.mark.parametrize("size", [64, 576, 2048])
@pytest.mark.parametrize("is_rms", [True, False], ids=["rms", "layer"])
@pytest.mark.parametrize("zero_centered", [True, False])
def test_residual_and_norm(normal, dtype, size, is_rms, zero_centered):
    hidden, delta, bias = normal(33, size, dtype=dtype) + 1, normal(33, size, dtype=dtype), normal(size, dtype=dtype)
    weight, shift = normal(size, dtype=dtype), None if is_rms else normal(size, dtype=dtype)
    in_float = Norm(weight.float(), None if is_rms else shift.float(), 1e-5, is_rms, zero_centered)
    for given in ((None, None), (delta, None), (delta, bias)):
        expected = torch_ops.add_norm(hidden.float(), *(None if x is None else x.float() for x in given), in_float)
        ours = triton_ops.add_norm(hidden.clone(), *given, Norm(weight, shift, 1e-5, is_rms, zero_centered))
        for one, other in zip(ours, expected, strict=True):
            assert_close(one, other, dtype)


@pytest.mark.parametrize(("rows", "size_in", "size_out"), [(64, 2048, 2048), (3, 8192, 1024), (64, 512, 96)])
def test_products_in_parts_are_summed_with_the_residual(normal, rows, size_in, size_out):
    dtype = HALF
    x, weight = normal(rows, size_in, dtype=dtype), normal(size_out, size_in, dtype=dtype) / size_in**0.5
    hidden, bias = normal(rows, size_out, dtype=dtype), normal(size_out, dtype=dtype)
    ones = torch.ones(size_out, device=DEVICE)
    parts = triton_ops.product(x, weight)
    assert parts.shape == (2, rows, size_out)
    expected = hidden.float() + x.float() @ weight.float().T + bias.float()
    summed, normed = triton_ops.add_norm(hidden.clone(), parts, bias, Norm(ones.to(dtype), None, 1e-5, True, False))
    assert_close(summed, expected, dtype)
    assert_close(normed, torch_ops.add_norm(expected, None, None, Norm(ones, None, 1e-5, True, False))[1], dtype)


@pytest.mark.parametrize(("rows", "size_in", "size_out"), [(64, 2048, 6144), (3, 128, 64), (17, 640, 192)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_have_their_bias(normal, rows, size_in, size_out, with_bias):
    x, weight = normal(rows, size_in, dtype=HALF), normal(size_out, size_in, dtype=HALF) / size_in**0.5
    bias = normal(size_out, dtype=HALF)
    expected = x.float() @ weight.float().T + with_bias * bias.float()
    assert_close(triton_ops.biased_product(x, weight, bias if with_bias else None), expected, HALF)


@pytest.mark.parametrize(
    ("name", "capability", "has_functions", "is_early"),
    [
        ("cuda", (9, 0), True, True),
        ("cuda", (10, 0), True, True),
        ("cuda", (8, 9), True, False),
        ("cuda", (9, 0), False, False),  # an older Triton
        ("cpu", None, True, False),
    ],
)
def test_kernels_are_launched_early_where_gpu_and_triton_can(monkeypatch, name, capability, has_functions, is_early):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton_launch, "gdc_wait", object() if has_functions else None)
    options = triton_launch.early_launch.__wrapped__(torch.device(name))
    assert options == ({"EARLY": True, "launch_pdl": True} if is_early else {"EARLY": False})


def test_many_rows_and_odd_sizes_are_left_to_cublas(normal):
    for rows, size_in, size_out in ((65, 512, 64), (4, 500, 64), (4, 512, 70), (4, 512, 48), (4, 512, 32768)):
        x, weight = normal(rows, size_in, dtype=HALF), normal(size_out, size_in, dtype=HALF)
        assert torch.equal(triton_ops.product(x, weight), F.linear(x, weight))
        assert torch.equal(triton_ops.biased_product(x, weight, None), F.linear(x, weight))


@pytest.mark.parametrize("num_rows", [1, 5, 64])
def test_rows_advance_as_on_the_cpu(num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    decoding = Decoding(SamplingParams(), max_length=4, min_length=0, end_ids=(2, 5), num_tokens=9)
    on_cpu, on_gpu = (DeviceRows(64, 20, decoding, torch.device(name)) for name in ("cpu", DEVICE))
    rows = [Row([3] * (1 + index % 7), torch.zeros(4, dtype=torch.float64), 0) for index in range(num_rows)]
    for state in (on_cpu, on_gpu):
        state.put_(list(range(num_rows)), rows)
    for _ in range(6):
        drawn = torch.randint(9, (num_rows,), generator=generator)
        drawn[torch.rand(num_rows, generator=generator) < 0.1] = INVALID_TOKEN
        on_cpu.advance_(drawn)
        triton_sampling.advance_(
            on_gpu.tokens_RT, on_gpu.position_R[:num_rows], on_gpu.prompt_length_R, on_gpu.is_done_R[:num_rows],
            on_gpu.is_invalid_R, drawn.to(DEVICE), on_gpu.is_end_V, decoding.max_length,
        )  # fmt: skip
        for name in ("tokens_RT", "position_R", "is_done_R", "is_invalid_R"):
            assert torch.equal(getattr(on_cpu, name), getattr(on_gpu, name).cpu()), name
    assert on_cpu.is_done_R.all()


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_what_is_seen_of_rows_is_what_the_cpu_sees(num_steps):
    generator = torch.Generator().manual_seed(num_steps)
    state = DeviceRows(40, 20, Decoding(SamplingParams(), 4, 0, (2,), 9), torch.device("cpu"))
    state.tokens_RT.random_(9, generator=generator), state.position_R.random_(20, generator=generator)
    state.position_R[:3] = torch.tensor([0, 1, 19])
    state.is_invalid_R.random_(2, generator=generator)
    on_device = (x.to(DEVICE) for x in (state.tokens_RT, state.position_R, state.is_invalid_R))
    ours, theirs = triton_sampling.seen(*on_device, 33, num_steps).cpu(), state.seen(33, num_steps)
    assert torch.equal(ours, theirs) and theirs.shape == (33, 2 + num_steps)
    assert theirs[2].tolist() == [19, int(state.is_invalid_R[2]), *state.tokens_RT[2, 20 - num_steps :].tolist()]


@DTYPES
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_activation(normal, dtype, is_gated, name):
    function = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[name]
    x, activation = normal(33, 3000, dtype=dtype), Activation(name, function, is_gated)
    assert_close(triton_ops.activate(x, activation), torch_ops.activate(x.float(), activation), dtype)


@pytest.mark.parametrize(("rows", "size_in", "size"), [(64, 2048, 8192), (3, 256, 192), (65, 256, 192), (4, 250, 190)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_products_are_activated(normal, rows, size_in, size, with_bias, is_gated, name):
    dtype = HALF
    function = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[name]
    x, activation = normal(rows, size_in, dtype=dtype), Activation(name, function, is_gated)
    size_out = size * (1 + is_gated)
    weight, bias = normal(size_out, size_in, dtype=dtype) / size_in**0.5, normal(size_out, dtype=dtype)
    product = (x.float() @ weight.float().T + with_bias * bias.float()).to(dtype).float()
    ours = triton_ops.activated_product(x, weight, bias if with_bias else None, activation)
    assert_close(ours, torch_ops.activate(product, activation), dtype)


@DTYPES
@pytest.mark.parametrize(
    ("B", "G", "Q", "D", "T", "turned"),
    [
        (64, 16, 1, 128, 384, 128),
        (3, 2, 1, 64, 2000, 64),  # few rows: positions are split
        (5, 3, 3, 64, 512, 64),  # SmolLM2's heads
        (2, 1, 4, 128, 4096, 128),
        (2, 2, 4, 256, 300, 256),  # in float32, three pipeline stages are too many for an H100
        (4, 2, 2, 80, 300, 32),  # channels are not a power of two, and only some are rotated
        (1, 8, 8, 128, 192, 0),  # learned positions
    ],
)
def test_attention_reads_what_is_filled_and_keeps_the_new_token(normal, dtype, B, G, Q, D, T, turned):
    keys, values = normal(B, G, T, D, dtype=dtype), normal(B, G, T, D, dtype=dtype)
    positions = torch.randint(0, T, (B,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    positions[0] = T - 1
    positions[-1] = 0 if B > 1 else T - 1
    qkv, angles = normal(B, G * (Q + 2) * D, dtype=dtype), None
    if turned:
        sign = torch.ones(turned, device=DEVICE)
        sign[: turned // 2] = -1
        angle = normal(T, turned // 2, dtype=torch.float32).repeat(1, 2)
        angles = (angle.cos().to(dtype), (angle.sin() * sign).to(dtype))
    row = torch.arange(B, device=DEVICE)
    heads = qkv.float().view(B, G, Q + 2, D)
    query, key, value = heads[:, :, :-2].flatten(1, 2), heads[:, :, -2], heads[:, :, -1]
    if turned:
        query, key = (torch_ops.rotate(x, *(table.float()[positions] for table in angles)) for x in (query, key))
    expected_keys, expected_values = keys.float(), values.float()
    expected_keys.transpose(1, 2)[row, positions] = key
    expected_values.transpose(1, 2)[row, positions] = value
    is_filled = torch.arange(T, device=DEVICE) <= positions[:, None]
    expected = torch_ops.decode_attention(query.unflatten(1, (G, Q)), expected_keys, expected_values, is_filled)
    # unfilled positions must not be read
    hidden = (torch.arange(T, device=DEVICE) > positions[:, None])[:, None, :, None]
    keys.masked_fill_(hidden, torch.nan), values.masked_fill_(hidden, torch.nan)

    context = triton_attention.row_attention(qkv, keys, values, positions, angles, Q)

    assert_close(context, expected, dtype)
    for ours, theirs in ((keys, expected_keys), (values, expected_values)):
        assert_close(ours[row, :, positions], theirs[row, :, positions], dtype)
        assert ours[~hidden.expand_as(ours)].isfinite().all() and ours[hidden.expand_as(ours)].isnan().all()


@pytest.mark.parametrize("V", [96, 384, 32000, 49152, 128256])
def test_draws_are_those_of_the_cpu_for_the_same_numbers(normal, V):
    logits = (normal(64, 2, V, dtype=torch.float32) * 3)[:, 1]  # rows are not adjacent in memory
    logits[:, 5] = logits[:, 128:256] = -torch.inf
    numbers = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    numbers[0], numbers[1] = 0.0, 1 - 2**-53
    ours, theirs = (
        triton_sampling.sample_token(logits, numbers.to(DEVICE)).cpu(),
        sampling.sample_token(logits.cpu(), numbers),
    )
    assert (ours != theirs).sum() <= 1  # where a number is on the border of two tokens, to float32's last digit
    assert (ours != 5).all() and (ours < V).all()


@pytest.mark.parametrize("V", [384, 32000])
def test_no_token_is_drawn_from_logits_that_are_nan_or_infinite(normal, V):
    logits = normal(5, V, dtype=torch.float32)
    logits[0], logits[1, V // 2], logits[2, V - 1], logits[3] = torch.nan, torch.nan, torch.inf, -torch.inf
    drawn = triton_sampling.sample_token(logits, torch.full((5,), 0.5, dtype=torch.float64, device=DEVICE))
    assert drawn[:4].tolist() == [INVALID_TOKEN] * 4 and 0 <= drawn[4] < V


@DTYPES
@pytest.mark.parametrize(("temperature", "min_length"), [(1.0, 0), (0.7, 0), (1.0, 3)])
@pytest.mark.parametrize(("num_tokens", "V"), [(300, 384), (32000, 32000), (49000, 49152)])
def test_the_next_tokens_are_those_of_the_cpu_for_the_same_rows(normal, dtype, temperature, min_length, num_tokens, V):
    decoding = Decoding(SamplingParams(temperature=temperature), 4, min_length, (2, 5), num_tokens)
    on_cpu, on_gpu = (DeviceRows(64, 20, decoding, torch.device(name)) for name in ("cpu", DEVICE))
    numbers = torch.rand(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows = [Row([3] * (1 + index % 7), number, 0) for index, number in enumerate(numbers)]
    on_cpu.put_(list(range(40)), rows), on_gpu.put_(list(range(40)), rows)
    num_generated = torch.arange(40) % 6  # two rows in six have reached their end and are still decoded
    for state in (on_cpu, on_gpu):
        state.position_R[:40] += num_generated.to(state.position_R.device)
    logits = normal(40, V, dtype=torch.float32).to(dtype)
    logits[:, 2] += 12  # an end token that nearly every row would draw
    logits[:, num_tokens:] += 30
    theirs = on_cpu.sample(logits.cpu().clone(), 20)
    ours = triton_sampling.draw_next(
        logits, on_gpu.uniform_RL, num_tokens, temperature, min_length, on_gpu.position_R[:40], on_gpu.prompt_length_R,
        on_gpu.is_end_V,
    ).cpu()  # fmt: skip
    assert (ours != theirs).sum() <= 1 and (ours < num_tokens).all()
    assert ((ours == 2).sum() > 20) == (min_length == 0) and not (ours[num_generated < min_length] == 2).any()


@DTYPES
@pytest.mark.parametrize("num_padding", [0, 9])
@pytest.mark.parametrize(("G", "Q", "D", "turned"), [(4, 1, 128, 128), (3, 3, 64, 64), (2, 2, 80, 32), (2, 4, 64, 0)])
def test_prompts_are_placed_for_attention_and_in_the_cache_as_on_the_cpu(
    normal, monkeypatch, dtype, num_padding, G, Q, D, turned
):
    of_one_kernel, causal = [], varlen_attention.causal
    monkeypatch.setattr(varlen_attention, "causal", lambda *args: of_one_kernel.append(args[0].dtype) or causal(*args))
    lengths, capacity = [5, 0, 17, 1], 32
    num_tokens = sum(lengths)
    rotary, in_float = (RotaryTable(SimpleNamespace(rotary=None), capacity) for _ in range(2))
    if turned:
        angle = normal(capacity, turned // 2, dtype=torch.float32).repeat(1, 2)
        sign = torch.ones(turned, device=DEVICE)
        sign[: turned // 2] = -1
        rotary.cos_TD, rotary.sin_TD = angle.cos().to(dtype), (angle.sin() * sign).to(dtype)
        in_float.cos_TD, in_float.sin_TD = rotary.cos_TD.float(), rotary.sin_TD.float()
    qkv = normal(num_tokens + num_padding, G * (Q + 2) * D, dtype=dtype)
    made = []
    for attention, tables, x in ((PrefillAttention, in_float, qkv.float()), (FusedPrefillAttention, rotary, qkv)):
        weights = SimpleNamespace(
            num_groups=G, heads_per_group=Q, head_dim=D, dtype=x.dtype, device=torch.device(DEVICE)
        )
        cache = KVCache(2, 5, G, capacity, D, x.dtype, DEVICE)
        cache.keys_LRGTD.fill_(torch.nan), cache.values_LRGTD.fill_(torch.nan)
        attend = attention(weights, tables, cache, lengths, num_padding)
        attend(0, -x)  # the next layer must not see what this one leaves behind
        context = attend(1, x)
        made.append((context, cache.keys_LRGTD, cache.values_LRGTD))
    assert of_one_kernel == ([] if INTERPRETED or dtype == torch.float32 else [dtype] * 2)
    (plain, *plain_caches), (fused, *fused_caches) = made
    assert_close(fused[:num_tokens], plain[:num_tokens], dtype)
    assert fused.shape == qkv[:, : G * Q * D].shape and fused.isfinite().all()
    for ours, theirs in zip(fused_caches, plain_caches, strict=True):
        is_filled = theirs.isfinite()
        assert is_filled.sum() == 2 * num_tokens * G * D and torch.equal(ours.isfinite(), is_filled)
        assert_close(ours[is_filled], theirs[is_filled], dtype)
