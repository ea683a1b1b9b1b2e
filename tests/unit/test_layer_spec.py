"""Layers in plain torch compared with the formulas they implement, and a GPT of another family built from them.

Shapes as in the module: hidden_SBH, query_SBND, key_SBGD.
"""

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from nemo_aligner.models.nlp.gpt.layer_spec import Norm, ScaledDotProductAttention, get_block_spec
from nemo_aligner.models.nlp.gpt.packed_attention import PackedSequences
from tests.tiny import load_actor, prompt_batch, save_gpt2_like


def config(**changes):
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 4, "num_query_groups": 2}
    return TransformerConfig(**{**sizes, "use_cpu_initialization": True, **changes})


# Norms

HIDDEN = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)) * 5 + 1
SCALE = torch.linspace(-1.0, 2.0, 8)
SHIFT = torch.linspace(0.5, -0.5, 8)


def norm(name, zero_centered=False, eps=1e-3, dtype=torch.float32):
    made = Norm(config(normalization=name, layernorm_zero_centered_gamma=zero_centered, params_dtype=dtype), 8, eps)
    with torch.no_grad():
        made.weight.copy_(SCALE)
        if made.bias is not None:
            made.bias.copy_(SHIFT)
    return made


def rms_formula(hidden, scale, eps=1e-3):
    hidden = hidden.double()
    return hidden / (hidden.square().mean(-1, keepdim=True) + eps).sqrt() * scale.double()


def layer_norm_formula(hidden, scale, shift, eps=1e-3):
    hidden = hidden.double()
    centered = hidden - hidden.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt() * scale.double() + shift.double()


def test_rms_norm():
    assert norm("RMSNorm").bias is None
    expected = rms_formula(HIDDEN, SCALE)
    torch.testing.assert_close(norm("RMSNorm")(HIDDEN).double(), expected, rtol=1e-6, atol=1e-6)


def test_layer_norm_and_the_variant_that_stores_its_scale_less_one():
    for zero_centered, scale in ((False, SCALE), (True, SCALE + 1)):
        expected = layer_norm_formula(HIDDEN, scale, SHIFT)
        ours = norm("LayerNorm", zero_centered)(HIDDEN)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_a_new_norm_scales_by_one(name, zero_centered):
    fresh = Norm(config(normalization=name, layernorm_zero_centered_gamma=zero_centered), 8, 1e-5)
    normed = fresh(HIDDEN)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(3, 2), rtol=1e-3, atol=0)


def test_half_precision_is_normed_in_float32():
    # the square of 300 exceeds float16's range; summed in bfloat16, the squares lose most of their digits
    hidden = HIDDEN * 300
    for dtype, rtol in ((torch.bfloat16, 2**-8), (torch.float16, 2**-10)):
        ours = norm("RMSNorm", dtype=dtype)(hidden.to(dtype))
        assert ours.dtype == dtype
        expected = rms_formula(hidden.to(dtype), SCALE.to(dtype))
        torch.testing.assert_close(ours.double(), expected, rtol=rtol, atol=0)


def test_norm_parameters_are_marked_for_sequence_parallel_reduction():
    parallel = config(normalization="LayerNorm")
    parallel.sequence_parallel = True
    assert all(parameter.sequence_parallel for parameter in Norm(parallel, 8).parameters())
    assert not any(parameter.sequence_parallel for parameter in norm("LayerNorm").parameters())


# Attention


def attention(**changes):
    return ScaledDotProductAttention(config(**changes), 1, AttnMaskType.causal, "self").eval()


def random_qkv(num_queries=5, num_keys=5):
    generator = torch.Generator().manual_seed(1)
    shapes = ((num_queries, 2, 4, 3), (num_keys, 2, 2, 3), (num_keys, 2, 2, 3))
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def attention_formula(query_SBND, key_TBGD, value_TBGD, visible):
    """Head by head in float64; `visible(row, query, key)` is the mask. Heads 0 and 1 share group 0."""
    num_queries, num_rows, num_heads, width = query_SBND.shape
    context = torch.zeros(num_queries, num_rows, num_heads, width, dtype=torch.float64)
    for row in range(num_rows):
        for head in range(num_heads):
            for position in range(num_queries):
                seen = [t for t in range(key_TBGD.size(0)) if visible(row, position, t)]
                scores = key_TBGD[seen, row, head // 2].double() @ query_SBND[position, row, head].double()
                weights = (scores / width**0.5).softmax(0)
                context[position, row, head] = weights @ value_TBGD[seen, row, head // 2].double()
    return context.flatten(2)


def test_attention_is_causal_and_shares_keys_within_a_group():
    query, key, value = random_qkv()
    expected = attention_formula(query, key, value, lambda row, position, t: t <= position)
    ours = attention()(query, key, value, None)
    assert ours.shape == (5, 2, 12)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_mask_is_applied_as_it_stands():
    query, key, value = random_qkv()
    blocked = torch.ones(5, 5, dtype=torch.bool).triu(1).repeat(2, 1, 1, 1)
    blocked[1, 0, 3:, :2] = True
    expected = attention_formula(query, key, value, lambda row, position, t: not blocked[row, 0, position, t])
    ours = attention()(query, key, value, blocked)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_single_query_sees_the_whole_cache():
    query, key, value = random_qkv(num_queries=1)
    expected = attention_formula(query, key, value, lambda row, position, t: True)
    ours = attention()(query, key, value, None, attn_mask_type=AttnMaskType.no_mask)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


def test_dropout_in_training_only():
    tracker = get_cuda_rng_tracker()
    before = tracker.get_states()
    tracker.reset()
    tracker.add("model-parallel-rng", 1)
    query, key, value = random_qkv()
    dropping, plain = attention(attention_dropout=0.5), attention(attention_dropout=0.0)
    try:
        assert torch.equal(dropping.eval()(query, key, value, None), plain.eval()(query, key, value, None))
        assert torch.equal(plain.train()(query, key, value, None), plain.eval()(query, key, value, None))
        first, second = (dropping.train()(query, key, value, None) for _ in range(2))
        assert not torch.equal(first, second)
        # what is kept is scaled up: position 0 attends only to itself, with weight 1, which becomes 2 or 0
        ratio = first[0].unflatten(-1, (2, 2, 3)) / value[0].unsqueeze(2)
        assert ((ratio - 2).abs().lt(1e-5) | ratio.abs().lt(1e-5)).all()
        # in a pack of one-token sequences, the same holds for every position
        packed, singles = [x[:, 0] for x in (query, key, value)], PackedSequences.of([1] * 5)
        context = dropping(*packed, None, packed_seq_params=singles)
        ratio = context.unflatten(-1, (2, 2, 3)) / packed[2].unsqueeze(2)
        kept = (ratio - 2).abs().lt(1e-5)
        assert kept.any() and not kept.all() and (kept | ratio.abs().lt(1e-5)).all()
    finally:
        tracker.set_states(before)


def test_packed_sequences_attend_to_themselves_only():
    packed = [x[:, :1].squeeze(1) for x in random_qkv(7, 7)]
    sequence_of = [0, 0, 0, 1, 2, 2, 2]

    def is_visible(row, position, t):
        return t <= position and sequence_of[t] == sequence_of[position]

    expected = attention_formula(*(x.unsqueeze(1) for x in packed), is_visible).squeeze(1)
    ours = attention()(*packed, None, packed_seq_params=PackedSequences.of([3, 1, 3]))
    assert ours.shape == (7, 12)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


# The whole


def test_what_these_layers_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"model\.num_moe_experts"):
        get_block_spec(config(num_moe_experts=2))
    with pytest.raises(ValueError, match=r"model\.context_parallel_size"):
        get_block_spec(config(context_parallel_size=2))


@pytest.fixture(scope="module", params=["layernorm", "layernorm1p"])
def gpt2_like(request, tiny_hf, tmp_path_factory):
    """An actor with LayerNorm, learned positions, GELU and biases, all parameters random."""
    path = save_gpt2_like(
        tiny_hf, tmp_path_factory.mktemp("gpt2_like") / "model.nemo", normalization=request.param,
        encoder_seq_length=16, max_position_embeddings=16, num_layers=2,
    )  # fmt: skip
    actor = load_actor(path, rs={"length_params.max_length": 6})
    actor.prepare_for_inference()
    return actor


def gpt2_formula(actor, tokens) -> torch.Tensor:
    """Logits [S, V] of one row of tokens [S], computed in float64 from the named parameters."""
    weights = {name: parameter.detach().double() for name, parameter in actor.model.named_parameters()}
    one = 1.0 if actor.cfg.normalization == "layernorm1p" else 0.0

    def layer_norm(hidden, name):
        return layer_norm_formula(hidden, weights[f"{name}.weight"] + one, weights[f"{name}.bias"], eps=1e-6)

    def linear(hidden, name):
        return hidden @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    embedding = weights["embedding.word_embeddings.weight"]
    hidden = embedding[tokens] + weights["embedding.position_embeddings.weight"][: len(tokens)]
    causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    for layer in ("decoder.layers.0", "decoder.layers.1"):
        qkv = linear(layer_norm(hidden, f"{layer}.input_layernorm"), f"{layer}.self_attention.linear_qkv")
        # per group of two query heads: query, query, key, value of 16 channels each
        heads = []
        for group in qkv.unflatten(-1, (2, 4, 16)).unbind(1):
            *queries, key, value = group.unbind(1)
            for query in queries:
                scores = (query @ key.T / 4).masked_fill(~causal, -torch.inf)
                heads.append(scores.softmax(-1) @ value)
        hidden = hidden + linear(torch.cat(heads, dim=-1), f"{layer}.self_attention.linear_proj")
        inner = F.gelu(linear(layer_norm(hidden, f"{layer}.pre_mlp_layernorm"), f"{layer}.mlp.linear_fc1"))
        hidden = hidden + linear(inner, f"{layer}.mlp.linear_fc2")
    return layer_norm(hidden, "decoder.final_layernorm") @ embedding.T


def test_a_gpt_with_layer_norm_learned_positions_gelu_and_biases(gpt2_like):
    tokens = torch.tensor([[5, 6, 7, 8, 200, 9], [10, 10, 11, 12, 13, 14]])
    with torch.no_grad():
        logits = gpt2_like.model(tokens, torch.arange(6).expand_as(tokens), None, labels=None)
    for ours, row in zip(logits, tokens, strict=True):
        torch.testing.assert_close(ours.double(), gpt2_formula(gpt2_like, row), rtol=1e-4, atol=1e-4)


def test_its_greedy_responses(gpt2_like):
    eos_id, vocab_size = gpt2_like.tokenizer.eos_id, gpt2_like.tokenizer.vocab_size
    prompts = [[5, 6, 7, 8], [9], [10] * 10]  # the last one fills the table of 16 positions
    rollouts = gpt2_like.infer(prompt_batch(prompts, eos_id, 6))
    for row, length, prompt in zip(rollouts["response_tokens"], rollouts["response_lengths"], prompts, strict=True):
        expected = list(prompt)
        while len(expected) < len(prompt) + 6 and eos_id not in expected[len(prompt) :]:
            expected.append(int(gpt2_formula(gpt2_like, expected)[-1, :vocab_size].argmax()))
        assert row[:length].tolist() == expected
    with pytest.raises(ValueError, match="16 positions"):
        gpt2_like.infer(prompt_batch([[10] * 11], eos_id, 6))
