"""SmolLM2-135M-Instruct, converted to `.nemo`, compared with transformers reading the same GGUF file, in float32.

Legend: B prompts, S padded width, R rows that are trained on.
"""

import copy
import json
from pathlib import Path

import pytest
import torch

from nemo_aligner.convert.name_map import hf_names, pack
from tests.tiny import load_actor, prompt_batch

ROOT = Path(__file__).parents[2]
GGUF = ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
NEMO = ROOT / "models/SmolLM2-135M-Instruct.nemo"
PROMPTS = ROOT / "examples/quickstart/prompts_heldout.jsonl"
NUM_PROMPTS = 32
NUM_NEW_TOKENS = 48
# How many times larger our float32 error may be than transformers' own, both relative to float64. Rounding errors grow
# over 30 layers, and one float32 library for matrix products sums more accurately than another.
TIMES_ITS_ERROR = 3
END_ID = 2  # according to the file's metadata; transformers alone would read 1

pytestmark = pytest.mark.skipif(
    not (GGUF.is_file() and NEMO.is_file()), reason=f"{GGUF.name} or {NEMO.name} is not in models/: run `make model`"
)


@pytest.fixture(scope="module")
def reference():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, torch_dtype=torch.float32)
    # The end token doubles as padding, whose gradient an embedding keeps at 0; but here the token is content.
    model.model.embed_tokens.padding_idx = None
    return model.eval()


@pytest.fixture(scope="module")
def exact(reference):
    """The same model in float64."""
    return copy.deepcopy(reference).double()


@pytest.fixture(scope="module")
def actor():
    rs = {"length_params.max_length": NUM_NEW_TOKENS, "sampling_params.end_strings": ["<|im_end|>"]}
    return load_actor(NEMO, rs=rs, micro_batch_size=2, global_batch_size=4)


@pytest.fixture(scope="module")
def prompts(actor) -> list[list[int]]:
    with PROMPTS.open() as file:
        texts = [json.loads(line)["text"] for line in file][:NUM_PROMPTS]
    return [actor.tokenizer.text_to_ids(text) for text in texts]


def test_the_archive_carries_the_right_tokenizer(actor):
    assert actor.tokenizer.eos_id == END_ID and actor.tokenizer.ids_to_tokens([1, 2]) == ["<|im_start|>", "<|im_end|>"]
    assert actor.tokenizer.text_to_ids("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]
    assert actor.tokenizer.vocab_size == 49152


def test_logits_equal_those_of_transformers(reference, exact, actor, prompts):
    batch = prompt_batch(prompts, END_ID, max_length=0)
    is_content_BS = torch.arange(batch["text"].size(1)) < batch["length"][:, None]
    actor.prepare_for_inference()
    our_error = its_error = 0.0
    for tokens, is_content in zip(batch["text"].split(8), is_content_BS.split(8), strict=True):
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        with torch.no_grad():
            ours = actor.model(tokens, positions, None, labels=None)[is_content]
            theirs, expected = (model(tokens).logits[is_content] for model in (reference, exact))
        assert expected.std() > 1
        our_error = max(our_error, (ours - expected).abs().max().item())
        its_error = max(its_error, (theirs - expected).abs().max().item())
    actor.finish_inference()
    assert our_error <= TIMES_ITS_ERROR * its_error < 1e-3


def test_greedy_responses_equal_those_of_transformers(reference, actor, prompts):
    actor.prepare_for_inference()
    rollouts = actor.infer(prompt_batch(prompts, END_ID, NUM_NEW_TOKENS))
    actor.finish_inference()
    theirs = _generate(reference, prompts)
    for row, prompt in enumerate(prompts):
        length = int(rollouts["response_lengths"][row])
        response = rollouts["response_tokens"][row, len(prompt) : length].tolist()
        assert rollouts["response_tokens"][row, : len(prompt)].tolist() == prompt
        assert bool(rollouts["is_end"][row]) == (response[-1] == END_ID)
        assert response == theirs[row] or _differ_at_a_tie(reference, prompt, response, theirs[row])
    # the test covered ragged prompts and both kinds of endings
    assert len(set(rollouts["prompt_lengths"].tolist())) > 3
    assert 0 < rollouts["is_end"].sum() < NUM_PROMPTS


def _generate(reference, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy responses, each including its end token if it reached one."""
    width = max(map(len, prompts))
    tokens_BS = torch.tensor([[END_ID] * (width - len(prompt)) + prompt for prompt in prompts])
    is_content_BS = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generated = reference.generate(
        tokens_BS,
        attention_mask=is_content_BS,
        max_new_tokens=NUM_NEW_TOKENS,
        do_sample=False,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )[:, width:].tolist()
    return [row[: row.index(END_ID) + 1] if END_ID in row else row for row in generated]


def _differ_at_a_tie(reference, prompt: list[int], ours: list[int], theirs: list[int]) -> bool:
    """Whether the reference's two best logits where the responses diverge are too close for float32 to tell apart."""
    common = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    with torch.no_grad():
        best, second = reference(torch.tensor([prompt + theirs[:common]])).logits[0, -1].topk(2).values
    return bool(best - second <= 1e-4)


def test_loss_and_every_gradient_equal_plain_pytorch(reference, exact, actor, prompts):
    rows = [prompts[0], prompts[1][:30], prompts[2], prompts[3][:25]]
    first_response_positions = [20, 27, 30, 24]
    tokens_RS = prompt_batch(rows, END_ID, max_length=3)["text"]
    mask_RS = torch.zeros(tokens_RS.size(0), tokens_RS.size(1) - 1)
    for row, (ids, first) in enumerate(zip(rows, first_response_positions, strict=True)):
        mask_RS[row, first - 1 : len(ids) - 1] = 1
    _, its_gradients = _training_step(reference, tokens_RS, mask_RS)
    expected_loss, expected_gradients = _training_step(exact, tokens_RS, mask_RS)

    actor.prepare_for_training()
    actor.prepare_for_training_step()
    loss, metrics = actor.get_loss_and_metrics({"response_tokens": tokens_RS, "mask": mask_RS}, forward_only=False)
    actor.finish_training_step()

    assert loss == pytest.approx(expected_loss, rel=1e-6) and metrics == {"loss": loss}
    our_error = its_error = compared = 0
    for name, parameter in actor.model.named_parameters():
        its, expected = (
            pack([gradients[hf_name] for hf_name in hf_names(name)], num_groups=3)
            for gradients in (its_gradients, expected_gradients)
        )
        our_error = max(our_error, ((parameter.grad - expected).norm() / expected.norm()).item())
        its_error = max(its_error, ((its - expected).norm() / expected.norm()).item())
        compared += expected.numel()
    assert our_error <= TIMES_ITS_ERROR * its_error < 1e-4
    assert compared == sum(gradient.numel() for gradient in expected_gradients.values())


def _training_step(model, tokens_RS: torch.Tensor, mask_RS: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients by name; everything after the logits is in float64."""
    logprobs = model(tokens_RS).logits[:, :-1].double().log_softmax(dim=-1)
    logprobs = logprobs.gather(-1, tokens_RS[:, 1:, None]).squeeze(-1)
    loss = -(logprobs * mask_RS).sum() / mask_RS.sum()
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}
