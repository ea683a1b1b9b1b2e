"""Packs worked out by hand, and the actor's packed batches compared with padded ones and with plain PyTorch.

Legend: as in nemo_aligner/models/nlp/gpt/packing.py.
"""

import itertools

import pytest
import torch
from nemo.core.optim.optimizer_with_main_params import MainParamsOptimizerWrapper
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_aligner.compat import float32_accumulation, varlen_attention
from nemo_aligner.models.nlp.gpt import megatron_gpt_rs_actor, packed_forward, packing
from nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor import MegatronGPTRSModel
from nemo_aligner.models.nlp.gpt.packed_attention import PackedSequences, packed_attention
from nemo_aligner.models.nlp.gpt.training_settings import TrainingSettings
from nemo_aligner.utils import logprobs
from nemo_aligner.utils.target_logprobs import TargetLogprobs, add_piece_
from tests.tiny import load_actor, save_gpt2_like
from tests.unit.test_loss import END_ID, assert_same, make_batch, training_step

# Relative error of float32 gradients from a different order of summation.
OTHER_ORDER = 1e-5
# with small packs, a micro-batch of n rows has room for n times ROW_WIDTH tokens; the longest row has LONGEST
ROW_WIDTH = 24
LONGEST = 23
# lengths from 2 to 23 tokens, including rows without a response
ROWS = [
    ([5, 6, 7], [8, 9, 10, 11, 12, END_ID]),
    ([13], [14]),
    ([15, 16] * 4, [17, 18, 19] * 5),
    ([50, 51, 52], None),
    ([20] * 5, [21, 22]),
    ([23], [24, 25, 26, 27, 28, 29, 30, END_ID]),
    ([31, 32], [33] * 9),
    ([34], None),
]


def with_small_packs(actor, tokens_of_a_row: int):
    """The actor, its packs limited to `tokens_of_a_row` per row of a micro-batch, so a small batch makes several."""
    actor._max_tokens_of_a_pack = lambda width: actor.cfg.micro_batch_size * tokens_of_a_row
    return actor


# Packs


def test_the_longest_rows_are_dealt_first_to_the_emptiest_pack():
    assert packing.deal_to_packs([7, 5, 0, 4, 4, 3, 0], 3) == [[0], [1, 5], [3, 4]]
    assert packing.deal_to_packs([2, 2, 2], 2) == [[0, 2], [1]]  # ties: the first row, the first pack
    assert packing.deal_to_packs([0, 0], 2) == [[], []]


def test_a_pack_holds_what_the_loss_depends_on():
    tokens_BS = torch.tensor([[1, 2, 3, 4, 9], [5, 6, 9, 9, 9], [7, 8, 10, 11, 12]])
    mask_BS = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0.0, 0, 0, 0]])
    mask_BS[0, 2] = 0.5
    (pack,) = packing.pack_batch(tokens_BS, mask_BS, 1, multiple=6)
    assert pack.tokens_1T.tolist() == [[1, 2, 3, 5, 0, 0]]  # up to the last token that predicts a trained one
    assert pack.position_ids_1T.tolist() == [[0, 1, 2, 0, 0, 0]]
    assert pack.sequences.lengths == [3, 1, 2]
    assert pack.sequences.cu_seqlens.tolist() == [0, 3, 4, 6] and pack.sequences.cu_seqlens.dtype == torch.int32
    assert pack.loss_positions_R.tolist() == [1, 2, 3]
    assert pack.targets_R.tolist() == [3, 4, 6]
    assert pack.weights_R.tolist() == [1.0, 0.5, 1.0]


def test_packs_in_order_of_equal_length_and_never_empty():
    batch = make_batch(ROWS)
    packs = packing.pack_batch(batch["response_tokens"], batch["mask"], 4, in_order=True)
    assert [pack.sequences.lengths for pack in packs] == [[8, 1], [22], [6, 8], [10]]
    packs = packing.pack_batch(batch["response_tokens"], batch["mask"], 4, equal_lengths=True, multiple=4)
    assert [pack.tokens_1T.size(1) for pack in packs] == [24] * 4
    nothing = packing.pack_batch(batch["response_tokens"], torch.zeros_like(batch["mask"]), 2)
    assert [pack.tokens_1T.size(1) for pack in nothing] == [1, 1]
    assert [len(pack.loss_positions_R) for pack in nothing] == [0, 0]


def test_a_real_batch_is_dealt_evenly():
    lengths = torch.randint(60, 350, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    loads = [sum(lengths[row] for row in rows) for rows in packing.deal_to_packs(lengths, 8)]
    assert sum(loads) == sum(lengths)
    assert max(loads) <= 1.02 * min(loads)


def test_as_few_packs_as_hold_the_rows():
    lengths = [7, 5, 0, 4, 4, 3, 0]  # 23 tokens in 5 rows
    assert packing.deal_to_fewest(lengths, 7, 23) == [[0, 1, 3, 4, 5]]
    assert packing.deal_to_fewest(lengths, 7, 12) == packing.deal_to_packs(lengths, 2)
    assert packing.deal_to_fewest(lengths, 7, 11) == packing.deal_to_packs(lengths, 3)  # two packs would hold 11 and 12
    # two packs would be padded to 15
    assert packing.deal_to_fewest(lengths, 7, 12, multiple=5) == packing.deal_to_packs(lengths, 3)
    assert packing.deal_to_fewest(lengths, 7, 1) == packing.deal_to_packs(lengths, 5)  # none is left empty
    assert packing.deal_to_fewest(lengths, 2, 1) == packing.deal_to_packs(lengths, 2)
    assert packing.deal_to_fewest([0, 0], 2, 10) == [[]]


def test_packs_never_hold_more_than_the_rows_they_stand_for():
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(500):
        most, rows_each, multiple = draw(1, 8), draw(1, 8), draw(1, 3)
        longest = draw(1, 40) * multiple
        lengths = [draw(draw(0, longest), longest) for _ in range(most * rows_each)]
        rows_of = packing.deal_to_fewest(lengths, most, rows_each * longest, multiple)
        assert sorted(itertools.chain(*rows_of)) == [row for row, length in enumerate(lengths) if length]
        widths = [-(-sum(lengths[row] for row in rows) // multiple) * multiple for rows in rows_of]
        assert max(widths) <= rows_each * longest and len(rows_of) <= most
        assert len(rows_of) == 1 or all(rows_of)


# Loss and gradients


def padded_step(actor, *args, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actor, "_training", TrainingSettings(packing=False))
        patch.setattr(megatron_gpt_rs_actor, "packed_forward", None)
        return training_step(actor, *args, **kwargs)


@pytest.fixture(scope="module")
def archives(tiny_hf, tiny_nemo, tmp_path_factory):
    path = tmp_path_factory.mktemp("packing") / "gpt2.nemo"
    untied = {"num_layers": 2, "encoder_seq_length": 64, "max_position_embeddings": 64}
    save_gpt2_like(tiny_hf, path, **untied, share_embeddings_and_output_weights=False)
    return {"llama": tiny_nemo, "gpt2": path}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def actor(request, archives):
    """Grouped queries, RMSNorm, RoPE, tied embeddings; or none of these, but learned positions, LayerNorm, biases."""
    return with_small_packs(load_actor(archives[request.param]), ROW_WIDTH)


@pytest.fixture(scope="module")
def llama(tiny_nemo):
    return with_small_packs(load_actor(tiny_nemo), ROW_WIDTH)


@pytest.mark.parametrize("micro_batch_size, num_packs", [(1, 3), (2, 2), (8, 1)])
def test_packed_equals_padded(actor, monkeypatch, micro_batch_size, num_packs):
    batch = make_batch(ROWS, width=30)
    padded = padded_step(actor, batch, micro_batch_size)
    packs = []

    def pack_batch(*args, **kwargs):
        packs.extend(packing.pack_batch(*args, **kwargs))
        return packs

    monkeypatch.setattr(megatron_gpt_rs_actor, "pack_batch", pack_batch)
    assert_same(training_step(actor, batch, micro_batch_size), padded, rel=OTHER_ORDER)
    assert len(packs) == num_packs
    assert max(pack.tokens_1T.size(1) for pack in packs) <= micro_batch_size * ROW_WIDTH


def test_gradients_are_sent_with_the_last_pack_alone(llama, monkeypatch):
    """Replicas may have different numbers of packs: sending with each pack would wait for one that never comes."""
    optimizer = MainParamsOptimizerWrapper.__new__(MainParamsOptimizerWrapper)
    optimizer._async_grad_allreduce = optimizer._require_backward_grad_sync = True
    monkeypatch.setattr(llama, "_optimizer", optimizer)
    sends = []
    weight = llama.model.embedding.word_embeddings.weight
    hook = weight.register_post_accumulate_grad_hook(lambda _: sends.append(optimizer._require_backward_grad_sync))
    training_step(llama, make_batch(ROWS), 1)
    hook.remove()
    assert sends == [False, False, True]


def test_what_the_decoder_is_given(llama, monkeypatch):
    """Of 8 rows of 60 tokens, those up to the last one that predicts a trained token; angles restart with every row."""
    decode, seen = llama.model.decoder.forward, []

    def spy(**kwargs):
        seen.append((kwargs["hidden_states"].shape, kwargs["packed_seq_params"].lengths, kwargs["rotary_pos_emb"]))
        return decode(**kwargs)

    monkeypatch.setattr(llama.model.decoder, "forward", spy)
    training_step(llama, make_batch(ROWS, width=60), 2)
    table = llama.model.rotary_pos_emb(30).squeeze(1)
    for (shape, lengths, angles), expected in zip(seen, ([22, 6], [8, 1, 8, 10]), strict=True):
        assert shape == (sum(expected), 1, 64) and lengths == expected
        assert torch.equal(angles, torch.cat([table[:length] for length in expected]))


def test_weights_other_than_one_and_gaps_in_the_mask(llama):
    batch = make_batch(ROWS)
    batch["mask"][2, 9:12] = torch.tensor([0.5, 0.0, 2.0])
    assert_same(training_step(llama, batch, 2), padded_step(llama, batch, 2), rel=OTHER_ORDER)


def test_micro_batch_normalization(archives):
    actor = load_actor(archives["gpt2"], rs={"loss_normalization": "micro_batch"})
    batch = make_batch(ROWS)
    assert_same(training_step(actor, batch, 2), padded_step(actor, batch, 2), rel=OTHER_ORDER)


@pytest.mark.parametrize(
    ("recompute", "rel"),
    [
        ({"granularity": "selective"}, OTHER_ORDER),  # through the layers' modules, which recompute the attention
        ({"granularity": "full", "method": "uniform", "num_layers": 2}, 1e-7),
        ({"granularity": "full", "method": "block", "num_layers": 1}, 1e-7),
    ],
)
def test_recomputation(llama, archives, recompute, rel):
    batch = make_batch(ROWS)
    overrides = {f"activations_checkpoint_{key}": value for key, value in recompute.items()}
    actor = with_small_packs(load_actor(archives["llama"], **overrides), ROW_WIDTH)
    assert_same(training_step(actor, batch, 2), training_step(llama, batch, 2), rel)


def test_forward_pass_in_a_small_piece_of_the_vocabulary_at_a_time(actor, monkeypatch):
    batch = make_batch(ROWS)
    whole = training_step(actor, batch, 2)
    monkeypatch.setattr(logprobs, "MAX_CHUNK_ENTRIES", 500)
    assert_same(training_step(actor, batch, 2), whole, rel=OTHER_ORDER)


FULL_RECOMPUTATION = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize(("settings", "factor"), [({}, 2), ({"hidden_dropout": 0.1}, 1), (FULL_RECOMPUTATION, 1)])
def test_a_pack_holds_twice_a_padded_micro_batch_where_a_token_takes_half(llama, monkeypatch, settings, factor):
    """With dropout, layers are not fused and keep as much per token as in padded batches; so do recomputed layers."""
    for name, value in settings.items():
        monkeypatch.setattr(llama.model.config, name, value)
    given = []

    def pack_batch(*args, max_tokens, **kwargs):
        given.append(max_tokens)
        return packing.pack_batch(*args, max_tokens=max_tokens, **kwargs)

    monkeypatch.setattr(megatron_gpt_rs_actor, "pack_batch", pack_batch)
    monkeypatch.delattr(llama, "_max_tokens_of_a_pack")
    for batch in (make_batch(ROWS), make_batch(ROWS, width=30)):
        training_step(llama, batch, 2)
    monkeypatch.setattr(llama, "_training", TrainingSettings(max_tokens_per_pack=25))
    training_step(llama, make_batch(ROWS), 2)
    assert given == [factor * 2 * LONGEST, factor * 2 * 30, 25]


def test_backward_runs_in_its_caller(llama, monkeypatch):
    """On a GPU, backward runs in another thread by default, which costs the host more."""
    seen, decode = [], llama.model.decoder.forward

    def spy(**kwargs):
        seen.append(torch.autograd.is_multithreading_enabled())
        return decode(**kwargs)

    monkeypatch.setattr(llama.model.decoder, "forward", spy)
    training_step(llama, make_batch(ROWS), 2)
    assert seen == [False, False] and torch.autograd.is_multithreading_enabled()


def test_the_model_is_left_as_it_was(llama, monkeypatch):
    training_step(llama, make_batch(ROWS), 4)
    assert "forward" not in vars(llama.model.output_layer)
    its_own = llama.model.output_layer.forward
    monkeypatch.setattr(llama.model.output_layer, "forward", its_own)
    training_step(llama, make_batch(ROWS), 4)
    assert vars(llama.model.output_layer)["forward"] is its_own
    assert not llama.model.rotary_pos_emb._forward_hooks


def test_what_cannot_be_packed_goes_the_padded_way_with_one_line(llama, archives, log_lines, monkeypatch):
    batch = make_batch(ROWS)
    monkeypatch.setattr(megatron_gpt_rs_actor, "packed_forward", None)

    class WithItsOwnWay(MegatronGPTRSModel):
        def get_actor_forward_output_and_loss_func(self):
            return super().get_actor_forward_output_and_loss_func()

    padded = padded_step(llama, batch, 4)
    monkeypatch.setattr(llama, "__class__", WithItsOwnWay)
    for _ in range(2):  # normalized over the global batch
        assert_same(training_step(llama, batch, 4), padded, rel=1e-7)
    monkeypatch.setattr(llama, "__class__", MegatronGPTRSModel)
    (line,) = log_lines
    assert "WithItsOwnWay.get_actor_forward_output_and_loss_func" in line and "padded" in line
    with monkeypatch.context() as patch:
        patch.setattr(llama, "get_actor_forward_output_and_loss_func", lambda: None, raising=False)
        assert "get_actor_forward_output_and_loss_func" in llama._why_not_packed()
    assert llama._why_not_packed() is None
    for name, value, reason in (
        ("rotary_interleaved", True, "rotary_interleaved"), ("apply_rope_fusion", True, "apply_rope_fusion"),
    ):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(llama.model.config, name, value)
            assert reason in packed_forward.unsupported_by_packing(llama.model)
    monkeypatch.setattr(packed_forward, "ScaledDotProductAttention", ())
    assert packed_forward.unsupported_by_packing(llama.model) == "ScaledDotProductAttention"


# Log-probabilities from hidden states


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest floating-point result of any operator."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.entries = max(self.entries, tensor.numel())
        return result


def test_log_probabilities_of_a_large_vocabulary_in_bounded_memory(llama, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    num_entries, width, num_positions = 128_256, 8, 512
    hidden_RH = torch.randn(num_positions, width, generator=generator, requires_grad=True)
    weight_VH = torch.randn(num_entries, width, generator=generator, requires_grad=True)
    targets_R = torch.randint(num_entries, (num_positions,), generator=generator)
    targets_R[:2] = torch.tensor([0, num_entries - 1])
    grad_R = torch.randn(num_positions, generator=generator)
    monkeypatch.setattr(logprobs, "MAX_CHUNK_ENTRIES", 2**20)
    with LargestTensor() as largest:
        logprobs_R = TargetLogprobs.apply(hidden_RH, weight_VH, targets_R, False, False)
        logprobs_R.backward(grad_R)
    assert largest.entries <= max(2**20, weight_VH.numel())  # the weight's gradient has its size
    assert num_positions * num_entries > 60 * 2**20
    ours = [logprobs_R, hidden_RH.grad, weight_VH.grad]
    exact, plain = (plain_logprobs(hidden_RH, weight_VH, targets_R, grad_R, dtype) for dtype in DTYPES)
    for ours_, exact_, plain_ in zip(ours, exact, plain, strict=True):
        assert (ours_ - exact_).norm() <= 1e-4 * exact_.norm()
        assert (ours_ - exact_).norm() <= 1.5 * (plain_ - exact_).norm()  # long float32 sums are not exact


DTYPES = (torch.float64, torch.float32)


def plain_logprobs(hidden_RH, weight_VH, targets_R, grad_R, dtype):
    """Log-probabilities and the gradients of hidden states and weights."""
    hidden_RH, weight_VH = (x.detach().to(dtype).requires_grad_() for x in (hidden_RH, weight_VH))
    logprobs_R = (hidden_RH @ weight_VH.t()).log_softmax(-1).gather(1, targets_R[:, None]).squeeze(1)
    logprobs_R.backward(grad_R.to(dtype))
    return logprobs_R, hidden_RH.grad, weight_VH.grad


def test_a_piece_may_be_impossible():
    logits_RV = torch.tensor([[-torch.inf, -torch.inf, 1.0, 2.0], [1.0, 2.0, -torch.inf, -torch.inf]])
    seen = torch.full((2,), torch.finfo(torch.float32).min), torch.zeros(2), torch.zeros(2)
    for first in (0, 2):
        add_piece_(*seen, logits_RV[:, first : first + 2], torch.tensor([3, 2]), first)
    maxima_R, exp_sums_R, target_logits_R = seen
    torch.testing.assert_close(maxima_R + exp_sums_R.log(), logits_RV.logsumexp(1))
    assert target_logits_R.tolist() == [2.0, -torch.inf]


def test_a_frozen_output_layer_gets_no_gradient(llama):
    hidden_RH, weight_VH = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    TargetLogprobs.apply(hidden_RH, weight_VH, torch.tensor([0, 4, 2]), False, False).sum().backward()
    hidden = hidden_RH.detach().requires_grad_()
    (hidden @ weight_VH.t()).log_softmax(-1)[range(3), [0, 4, 2]].sum().backward()
    torch.testing.assert_close(hidden_RH.grad, hidden.grad)
    assert weight_VH.grad is None


# torch's GPU kernels, which are replaced on a CPU


@pytest.mark.parametrize("num_groups", [2, 4])
def test_the_kernel_is_asked_for_causal_attention_within_sequences(num_groups):
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(7, heads, 8, generator=generator) for heads in (4, num_groups, num_groups))
    sequences = PackedSequences.of([3, 4])
    calls = []

    def kernel(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask):
        calls.append((cum_seq_q.tolist(), cum_seq_k.tolist(), max_q, max_k, dropout_p, is_causal, return_debug_mask))
        nothing = torch.empty(0)
        return packed_attention(query, key, value, sequences, 0.0), nothing, nothing, nothing, nothing

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", kernel, "CPU")
        ours = varlen_attention.causal(query, key, value, sequences.cu_seqlens, 4)
    torch.testing.assert_close(ours, packed_attention(query, key, value, sequences, 0.0), rtol=0, atol=0)
    assert calls == [([0, 3, 7], [0, 3, 7], 4, 4, 0.0, True, False)]


def test_the_kernel_has_the_arguments_and_the_gradient_that_we_rely_on():
    """The name is not public: if this fails, adapt compat/varlen_attention.py to torch's change."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    assert [f"{argument.type} {argument.name}" for argument in schema.arguments if not argument.kwarg_only] == [
        "Tensor query", "Tensor key", "Tensor value", "Optional[Tensor] cum_seq_q", "Optional[Tensor] cum_seq_k",
        "int max_q", "int max_k", "float dropout_p", "bool is_causal", "bool return_debug_mask",
    ]  # fmt: skip
    assert all(argument.has_default_value() for argument in schema.arguments if argument.kwarg_only)
    results = [result.name for result in schema.returns]
    assert results == ["output", "softmax_logsumexp", "rng_state", "unused", "debug_attn_mask"]
    schema = torch.ops.aten._flash_attention_backward.default._schema
    assert [f"{argument.type} {argument.name}" for argument in schema.arguments if not argument.kwarg_only] == [
        "Tensor grad_out", "Tensor query", "Tensor key", "Tensor value", "Tensor out", "Tensor logsumexp",
        "Tensor cum_seq_q", "Tensor cum_seq_k", "int max_q", "int max_k", "float dropout_p", "bool is_causal",
        "Tensor rng_state", "Tensor unused",
    ]  # fmt: skip
    assert all(argument.has_default_value() for argument in schema.arguments if argument.kwarg_only)
    options = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value = (torch.empty(7, heads, 8, **options) for heads in (4, 2, 2))
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
    context = varlen_attention.causal(query, key, value, cu_seqlens, 4)
    assert type(context.grad_fn).__name__ == "FlashAttentionBackward0"  # from C++
    context.sum().backward()
    assert [context.shape, key.grad.shape] == [query.shape, key.shape]
    context, gradient = varlen_attention.causal_and_gradient(query, key, value, cu_seqlens, 4)
    assert not context.requires_grad
    assert [x.shape for x in gradient(context)] == [query.shape, key.shape, value.shape]


class KernelCalls(TorchDispatchMode):
    """The arguments of the kernel's gradient; tensors are named as in the kernel's inputs and results."""

    def __init__(self, inputs: dict[str, torch.Tensor]):
        super().__init__()
        self.names = {x.untyped_storage()._cdata: name for name, x in inputs.items()}
        self.alive, self.seen = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._flash_attention_backward.default:
            assert not kwargs
            self.seen.append([self._name(x) if isinstance(x, torch.Tensor) else x for x in args[1:]])
        results = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._flash_attention_forward.default:
            self.alive.append(results)
            named = zip(("output", "logsumexp", "random state", "unused"), results, strict=False)
            self.names.update({x.untyped_storage()._cdata: name for name, x in named})
        return results

    def _name(self, x: torch.Tensor) -> str:
        return self.names[x.untyped_storage()._cdata]


def test_the_gradient_is_asked_for_as_autograd_does():
    options = {"device": "meta", "dtype": torch.bfloat16, "requires_grad": True}
    inputs = {name: torch.empty(7, 4, 8, **options) for name in ("query", "key", "value")}
    inputs["cu_seqlens"] = torch.empty(3, dtype=torch.int32, device="meta")
    with KernelCalls(inputs) as calls:
        varlen_attention.causal(*inputs.values(), 5).sum().backward()
        context, gradient = varlen_attention.causal_and_gradient(*inputs.values(), 5)
        gradient(torch.empty_like(context))
    assert len(calls.seen) == 2 and calls.seen[0] == calls.seen[1]
    assert calls.seen[0][:7] == ["query", "key", "value", "output", "logsumexp", "cu_seqlens", "cu_seqlens"]


def test_the_public_way_to_the_kernel_is_still_in_python():
    """If this fails, check whether it now costs the host less; then compat/varlen_attention.py can be deleted."""
    assert isinstance(varlen._varlen_attn, torch.library.CustomOpDef)


def test_products_are_added_in_float32():
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(5, 7, generator=generator).bfloat16(), torch.randn(7, 3, generator=generator).bfloat16()
    for dtype, rtol in ((torch.float32, 2**-8), (torch.bfloat16, 2**-7)):
        total = torch.full((5, 3), 100.0, dtype=dtype)
        float32_accumulation.add_product_(total, left, right)
        torch.testing.assert_close(total.double(), 100 + left.double() @ right.double(), rtol=rtol, atol=0.05)
    with pytest.raises(RuntimeError, match="'CPU' backend"):  # if this fails, one call works on all devices
        torch.addmm(torch.zeros(5, 3), left, right, out_dtype=torch.float32)
