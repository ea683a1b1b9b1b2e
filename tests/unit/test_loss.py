"""The actor's loss and gradients on the tiny model, compared with transformers and between batch layouts.

Legend: R rows of the global batch, S padded width; a token is trained on if the mask is 1 at the position before it.
"""

import pytest
import torch
from megatron.core import parallel_state

from nemo_aligner.convert.name_map import hf_names, pack
from nemo_aligner.generation import stages
from tests.tiny import load_actor

END_ID = 0
# Relative error of float32 gradients when a matrix product has another width, and thus another order of summation.
OTHER_ORDER = 5e-6
# (prompt, response) of each row; lengths differ, so that a mean of means is not the mean over tokens
ROWS = [([5, 6, 7], [8, 9, 10, 11, 12, END_ID]), ([13], [14, END_ID]), ([15, 16], [17, 18, 19]), ([20] * 5, [21])]


def make_batch(rows, width=None, padding=END_ID):
    """`response_tokens` [R, S] and `mask` [R, S - 1]; a response of None marks a row that is not trained on."""
    contents = [prompt + (response or [30, 31]) for prompt, response in rows]
    width = width or max(map(len, contents))
    tokens_RS = torch.full((len(rows), width), padding)
    mask_RS = torch.zeros(len(rows), width - 1)
    for row, ((prompt, response), content) in enumerate(zip(rows, contents, strict=True)):
        tokens_RS[row, : len(content)] = torch.tensor(content)
        mask_RS[row, len(prompt) - 1 : len(content) - 1] = response is not None
    return {"response_tokens": tokens_RS, "mask": mask_RS}


@pytest.fixture(scope="module")
def actor(tiny_nemo):
    actor = load_actor(tiny_nemo)
    assert actor.tokenizer.eos_id == END_ID
    return actor


@pytest.fixture(scope="module")
def hf_model(tiny_hf):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_hf).eval()


def training_step(actor, batch, micro_batch_size=1):
    """(loss, {parameter: gradient}) of one training step without the update."""
    actor.cfg.micro_batch_size, actor.cfg.global_batch_size = micro_batch_size, len(batch["mask"])
    actor.zero_grad()
    actor.prepare_for_training()
    actor.prepare_for_training_step()
    loss, metrics = actor.get_loss_and_metrics(batch, forward_only=False)
    actor.finish_training_step()
    assert metrics == {"loss": loss}
    return loss, {name: parameter.grad.clone() for name, parameter in actor.model.named_parameters()}


def hf_training_step(hf_model, actor, loss):
    """(loss, {the actor's parameter: gradient}) of a loss computed with transformers."""
    hf_model.zero_grad()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in hf_model.named_parameters()}
    names = [name for name, _ in actor.model.named_parameters()]
    return loss.item(), {name: pack([gradients[hf_name] for hf_name in hf_names(name)], num_groups=2) for name in names}


def hf_logprobs(hf_model, tokens_RS, allowed=None):
    """Log-probabilities [R, S - 1] of all tokens but the first; `allowed` [R, S, S]: who attends to whom."""
    blocked = None if allowed is None else torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]
    logprobs = hf_model(tokens_RS, attention_mask=blocked).logits[:, :-1].double().log_softmax(dim=-1)
    return logprobs.gather(-1, tokens_RS[:, 1:, None]).squeeze(-1)


def token_loss(logprobs, mask):
    return -(logprobs * mask).sum() / mask.sum()


def assert_same(ours, theirs, rel):
    """Compare two (loss, gradients); for gradients, norms of differences relative to the gradients' norms."""
    assert ours[0] == pytest.approx(theirs[0], rel=rel)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        assert theirs[1][name].norm() > 0
        assert (gradient - theirs[1][name]).norm() <= rel * theirs[1][name].norm(), name


def test_loss_and_gradients_equal_plain_pytorch(actor, hf_model):
    batch = make_batch(ROWS)
    expected = token_loss(hf_logprobs(hf_model, batch["response_tokens"]), batch["mask"])
    assert_same(training_step(actor, batch, 2), hf_training_step(hf_model, actor, expected), rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_micro_batch_size_does_not_matter(actor, micro_batch_size):
    batch = make_batch(ROWS)
    assert_same(training_step(actor, batch, micro_batch_size), training_step(actor, batch, 1), rel=1e-6)


def test_padding_does_not_matter(actor):
    plain = training_step(actor, make_batch(ROWS), 2)
    assert_same(training_step(actor, make_batch(ROWS, width=23), 2), plain, rel=OTHER_ORDER)
    assert_same(training_step(actor, make_batch(ROWS, width=23, padding=77), 2), plain, rel=OTHER_ORDER)


def test_keys_that_are_not_needed_are_ignored(actor):
    batch = make_batch(ROWS)
    extra = {**batch, "prompt_tokens": torch.zeros(4, 2), "attention_mask": "anything"}
    assert training_step(actor, extra)[0] == training_step(actor, batch)[0]


def test_rows_without_masked_tokens_add_nothing(actor):
    chosen = [ROWS[0], ROWS[2]]
    with_unfit = [ROWS[0], ([50, 51, 52], None), ([53], None), ROWS[2]]
    assert_same(training_step(actor, make_batch(with_unfit), 2), training_step(actor, make_batch(chosen), 2), rel=1e-6)
    # rows and micro-batches without a token count in no mean
    assert_same(training_step(actor, make_batch(with_unfit), 1), training_step(actor, make_batch(chosen), 1), rel=1e-6)


def test_a_batch_without_masked_tokens_gives_exactly_zero(actor):
    loss, gradients = training_step(actor, make_batch([([50, 51], None), ([52], None)]))
    assert loss == 0.0
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients.values())


def test_extreme_logits(actor):
    weight = actor.model.decoder.final_layernorm.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1e4)  # gaps of about 10^5 nats: the log of a softmax would always be -inf
    try:
        loss, gradients = training_step(actor, make_batch(ROWS))
    finally:
        weight.data.copy_(before)
    assert 1e4 < loss < 1e7
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert sum(gradient.abs().sum() for gradient in gradients.values()) > 0


def test_validation_leaves_no_gradients(actor):
    batch = make_batch(ROWS)
    loss, _ = training_step(actor, batch)
    actor.zero_grad()
    assert actor.get_loss_and_metrics(batch, forward_only=True)[0] == pytest.approx(loss, rel=1e-7)
    assert all(parameter.grad is None for parameter in actor.parameters())


def test_gradients_of_two_batches_accumulate(actor):
    batch = make_batch(ROWS)
    _, once = training_step(actor, batch)
    actor.get_loss_and_metrics(batch, forward_only=False)
    for name, parameter in actor.model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-5, atol=1e-6)


def test_rows_that_cannot_be_split_are_refused(actor):
    training_step(actor, make_batch(ROWS), 2)
    with pytest.raises(ValueError, match=r"3 rows cannot be split into 2 micro-batches of model.micro_batch_size=2"):
        actor.get_loss_and_metrics(make_batch(ROWS[:3]), forward_only=True)


@pytest.mark.parametrize(("micro_batch_size", "groups"), [(1, [[0], [1], [2], [3]]), (2, [[0, 1], [2, 3]])])
def test_micro_batch_normalization_is_a_mean_of_means(tiny_nemo, hf_model, micro_batch_size, groups):
    actor = load_actor(tiny_nemo, rs={"loss_normalization": "micro_batch"})
    batch = make_batch(ROWS)
    logprobs = hf_logprobs(hf_model, batch["response_tokens"])
    expected = torch.stack([token_loss(logprobs[group], batch["mask"][group]) for group in groups]).mean()
    assert expected.item() != pytest.approx(token_loss(logprobs, batch["mask"]).item(), rel=1e-3)
    ours = training_step(actor, batch, micro_batch_size)
    assert_same(ours, hf_training_step(hf_model, actor, expected), rel=1e-5)


# Document resets: rows of several documents, each ending with, and including, an end token

DOCUMENTS = [([5, 6, END_ID, 7], [8, END_ID, 9, END_ID]), ([10, END_ID], [11, 12]), ([13, 14], [15, END_ID])]


def same_document(tokens_RS):
    """[R, S, S]: whether a position may attend to another one, determined position by position."""
    allowed = torch.zeros(*tokens_RS.shape, tokens_RS.size(1), dtype=torch.bool)
    for row, tokens in enumerate(tokens_RS.tolist()):
        for query in range(len(tokens)):
            for key in range(query, -1, -1):
                if key < query and tokens[key] == END_ID:
                    break
                allowed[row, query, key] = True
    return allowed


@pytest.mark.parametrize("reset_position_ids", [False, True])
def test_attention_reset_per_document(actor, hf_model, monkeypatch, reset_position_ids):
    # Rotary positions are relative, so restarting the count in each document changes nothing within a document.
    batch = make_batch(DOCUMENTS)
    joined = training_step(actor, batch)
    monkeypatch.setitem(actor.resets, "reset_attention_mask", True)
    monkeypatch.setitem(actor.resets, "reset_position_ids", reset_position_ids)
    reset = training_step(actor, batch)
    tokens_RS = batch["response_tokens"]
    expected = token_loss(hf_logprobs(hf_model, tokens_RS, same_document(tokens_RS)), batch["mask"])
    assert_same(reset, hf_training_step(hf_model, actor, expected), rel=1e-5)
    assert reset[0] != pytest.approx(joined[0], rel=1e-3)
    assert_same(training_step(actor, make_batch(DOCUMENTS, width=20)), reset, rel=OTHER_ORDER)
    assert_same(training_step(actor, make_batch(DOCUMENTS, width=20), 3), reset, rel=OTHER_ORDER)


def test_resets_are_read_from_the_data_section(tiny_nemo):
    for keys in ({}, {"reset_attention_mask": True}, {"reset_position_ids": True}):
        actor = load_actor(tiny_nemo, data={"seq_length": 128, **keys})
        tokens = torch.tensor([[5, END_ID, 6]])
        mask, loss_mask, position_ids = actor.get_ltor_masks_and_position_ids(tokens)
        blocked = [[False, True, True], [False, False, True], [False, False, False]]
        if keys.get("reset_attention_mask"):
            blocked[2] = [True, True, False]
        assert mask.dtype == torch.bool and mask.tolist() == [[blocked]]
        assert loss_mask.tolist() == [[1, 1, 1]]
        assert position_ids.tolist() == [[0, 1, 0 if keys.get("reset_position_ids") else 2]]


def test_stages_send_what_the_next_one_expects(actor, monkeypatch):
    """In training and in generation, whatever dtype a stage computes in; the last stage's loss is float32."""
    monkeypatch.setattr(parallel_state, "is_pipeline_last_stage", lambda ignore_virtual=False: False)
    for config in (actor.model_parallel_config, actor.model.config):
        monkeypatch.setattr(config, "pipeline_dtype", torch.bfloat16)
    hidden = torch.zeros(1, 2, 3)
    step = actor.get_actor_forward_output_and_loss_func()
    output, _ = step(iter([make_batch(ROWS)]), lambda *args, **kwargs: hidden)
    sent = []
    monkeypatch.setattr(stages.distributed, "P2POp", lambda _, tensor, *where: sent.append(tensor.dtype))
    monkeypatch.setattr(stages.distributed, "batch_isend_irecv", lambda messages: [])
    assert stages.Pipeline([actor.model]).send_recv(hidden, received_shape=None) is None
    assert [output.dtype, *sent] == [torch.bfloat16] * 2

    batch = make_batch(ROWS)
    logits = torch.randn(*batch["response_tokens"].shape, 384).bfloat16()
    assert actor._loss(logits, batch, None, 1).dtype == torch.float32
