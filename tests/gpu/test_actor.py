"""The actor on a GPU against Hugging Face's implementation of the same tiny model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_aligner.convert.name_map import hf_names, pack
from tests.tiny import load_actor, prompt_batch

PROMPTS = ["the quick brown", "one two three four five six", "a good", "kind and it ends"]
ROW_LENGTHS = [(3, 14), (6, 9), (1, 20), (4, 17)]  # prompt and response lengths of the training rows


@pytest.fixture(scope="module")
def actor(tiny_nemo):
    return load_actor(tiny_nemo, micro_batch_size=2, global_batch_size=4)


@pytest.fixture(scope="module")
def reference(tiny_hf):
    return AutoModelForCausalLM.from_pretrained(tiny_hf, torch_dtype=torch.float32).cuda().eval()


def test_greedy_rollouts_equal_hugging_face(actor, reference):
    rows = [actor.tokenizer.text_to_ids(prompt) for prompt in PROMPTS]
    actor.prepare_for_inference()
    rollouts = actor.infer(prompt_batch(rows, actor.tokenizer.eos_id, max_length=16))
    actor.finish_inference()
    assert rollouts["response_tokens"].is_cuda
    for row, ids in enumerate(rows):
        expected = reference.generate(
            torch.tensor([ids]).cuda(), max_new_tokens=16, do_sample=False, bad_words_ids=[[i] for i in range(320, 384)]
        )[0]
        length = int(rollouts["response_lengths"][row])
        assert rollouts["response_tokens"][row, :length].tolist() == expected.tolist()


def test_loss_and_gradients_equal_hugging_face(actor, reference):
    tokens = torch.randint(1, 300, (4, 22), generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(4, 21)
    for row, (prompt_length, response_length) in enumerate(ROW_LENGTHS):
        mask[row, prompt_length - 1 : response_length - 1] = 1

    actor.prepare_for_training()
    loss, _ = actor.get_loss_and_metrics({"response_tokens": tokens, "mask": mask}, forward_only=False)
    logprobs = reference(tokens.cuda()).logits[:, :-1].log_softmax(-1).gather(2, tokens.cuda()[:, 1:, None]).squeeze(2)
    expected_loss = -(logprobs * mask.cuda()).sum() / mask.sum()
    expected_loss.backward()

    assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
    hf_gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in actor.get_model_module_list()[0].named_parameters():
        expected = pack([hf_gradients[hf_name] for hf_name in hf_names(name)], num_groups=2)
        assert (parameter.grad - expected).norm() / expected.norm() <= 1e-4, name
