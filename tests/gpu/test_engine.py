"""The engine on a GPU with captured graphs: same tokens as Hugging Face, changing weights, precision in bf16."""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_aligner.compat.device import current_device
from nemo_aligner.generation import lane as lane_module
from nemo_aligner.generation.cuda_graph import StepGraphs, pools_in_use
from nemo_aligner.generation.kv_cache import usable_memory
from nemo_aligner.generation.lane import Lane
from nemo_aligner.generation.rollouts import GenerationSettings, RolloutGenerator
from tests.tiny import load_actor
from tests.unit.test_engine import batch_of, ragged_prompts, responses_of

NUM_NEW_TOKENS = 32


@pytest.fixture
def actor(tiny_nemo):
    rs = {"length_params.max_length": NUM_NEW_TOKENS, "sampling_params.end_strings": ["e"]}
    actor = load_actor(tiny_nemo, rs=rs, micro_batch_size=2, global_batch_size=4)
    actor.prepare_for_inference()
    return actor


def with_engine(actor, max_rows=256):
    actor._rollout_generator = RolloutGenerator(actor, GenerationSettings(max_rows_in_flight=max_rows))
    return actor


@pytest.fixture
def replays(monkeypatch):
    """The numbers of rows of all graph replays."""
    sizes, run = [], StepGraphs.run

    def counted(self, num_rows):
        if num_rows in self._graphs:
            sizes.append(num_rows)
        run(self, num_rows)

    monkeypatch.setattr(StepGraphs, "run", counted)
    return sizes


@torch.no_grad()
def greedy(model, prompt: list[int], ends: set[int], num_ids: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + NUM_NEW_TOKENS:
        logits = model(torch.tensor([tokens]).cuda()).logits[0, -1, :num_ids]
        tokens.append(int(logits.argmax()))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


def expected_responses(actor, tiny_hf) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(tiny_hf, torch_dtype=torch.float32).cuda().eval()
    ends = {actor.tokenizer.eos_id, *actor.tokenizer.text_to_ids("e")}
    return [greedy(model, prompt, ends, actor.tokenizer.vocab_size) for prompt in ragged_prompts(24)]


def test_greedy_tokens_equal_hugging_face_with_rows_ending_and_joining(actor, tiny_hf, replays):
    expected = expected_responses(actor, tiny_hf)
    assert len({len(row) for row in expected}) > 2
    for max_rows in (5, 256):
        rollouts = with_engine(actor, max_rows).infer(batch_of(actor, ragged_prompts(24)))
        assert rollouts["response_tokens"].is_cuda
        assert responses_of(rollouts) == expected
    assert len(set(replays)) > 2  # graphs for several numbers of rows


def test_prefills_have_few_sizes(actor, monkeypatch):
    sizes, forward = [], lane_module.forward

    def recording(weights, tokens_M, positions_M, attend, *rest):
        if isinstance(attend, lane_module.FusedPrefillAttention):
            sizes.append(len(tokens_M))
        return forward(weights, tokens_M, positions_M, attend, *rest)

    monkeypatch.setattr(lane_module, "forward", recording)
    for number in (3, 5, 8):
        actor.infer(batch_of(actor, [[5] * 100] * 2 + ragged_prompts(number)))
    assert sizes == [256] * 3


def test_a_rollout_is_the_same_in_any_batch(actor):
    actor._sampling_params.update(use_greedy=False, temperature=1.2, top_k=50, top_p=0.95)
    ids, prompts = torch.arange(24)[:, None], ragged_prompts(24)
    found = []
    for max_rows in (5, 256):
        with_engine(actor, max_rows).seed_sampling(3)
        found.append(responses_of(actor.infer(batch_of(actor, prompts, rollout_id=ids))))
    assert found[0] == found[1] and len({tuple(row) for row in found[0]}) == 24


def test_weights_that_changed_in_place_or_moved_are_seen_through_captured_graphs(actor, replays):
    prompts = ragged_prompts(8)

    def rollouts(backend):
        if backend == "nemo":
            ours, actor._rollout_generator = (
                actor._rollout_generator,
                RolloutGenerator(actor, GenerationSettings("nemo")),
            )
            found = responses_of(actor.infer(batch_of(actor, prompts)))
            actor._rollout_generator = ours
            return found
        return responses_of(actor.infer(batch_of(actor, prompts)))

    first = rollouts("engine")
    weight = actor.model.decoder.layers[1].mlp.linear_fc2.weight
    optimizer = torch.optim.AdamW(actor.parameters(), lr=0.02)
    for parameter in actor.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    replays.clear()
    stepped = rollouts("engine")
    # replays graphs captured in the first call, before the step
    assert len(replays) * 2 >= NUM_NEW_TOKENS and stepped == rollouts("nemo") != first
    weight.data = -weight.data
    assert rollouts("engine") == rollouts("nemo") != stepped


def forget_earlier_tests():
    """Free their actors, which reference cycles keep alive together with graphs and memory."""
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("memory", ["the same", "other"])
def test_graphs_are_captured_anew_only_if_other_memory_comes_back(actor, monkeypatch, memory):
    forget_earlier_tests()
    # torch allocates tensors above 10 MiB separately; smaller ones reuse what other tensors have left
    monkeypatch.setattr(lane_module, "CAPACITY_STEP", 2**14)
    captured, capture = [], StepGraphs._capture
    monkeypatch.setattr(StepGraphs, "_capture", lambda self, size: captured.append(size) or capture(self, size))
    batch = batch_of(actor, ragged_prompts(8))
    expected = responses_of(actor.infer(batch))
    actor.infer(batch)  # what ran for the first time is captured now
    num_bytes = actor._rollout_generator._engine.lanes[0]._cache.keys_LRGTD.nbytes
    assert num_bytes > 10 * 2**20
    actor.finish_inference()
    if memory == "other":
        taken = [torch.full((num_bytes,), 7, dtype=torch.uint8, device="cuda") for _ in range(32)]
    actor.prepare_for_inference()
    captured.clear()
    assert responses_of(actor.infer(batch)) == expected
    assert bool(captured) == (memory == "other")
    if memory == "other":
        assert all((tensor == 7).all() for tensor in taken)


def test_memory_that_captured_graphs_hold_is_not_usable(actor, monkeypatch):
    forget_earlier_tests()
    memory_info = torch.cuda.mem_get_info()  # other processes may use the same GPU
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: memory_info)
    device, batch = current_device(), batch_of(actor, ragged_prompts(8))
    actor.infer(batch)
    actor.infer(batch)  # what ran for the first time is captured now
    actor.finish_inference()
    torch.cuda.synchronize()

    def held_bytes(pools):
        segments = [each for each in torch.cuda.memory_snapshot() if each["segment_pool_id"] in pools]
        return sum(segment["total_size"] - segment["allocated_size"] for segment in segments)

    pools, usable = pools_in_use(), usable_memory(device)
    held = held_bytes(pools)
    assert len(pools) == 1 and held > 0
    actor._rollout_generator._engine.lanes[0]._graphs = None
    # the pool still exists, but torch could free it; the graphs' random state, two numbers, went with the graphs
    assert pools_in_use() == set() and usable_memory(device) == pytest.approx(usable + 0.85 * held, abs=2048)
    torch.cuda.empty_cache()
    assert held_bytes(pools) == 0


@pytest.mark.parametrize("use_greedy", [True, False])
def test_weights_that_are_nan_end_the_run_through_captured_graphs(actor, replays, use_greedy):
    actor._sampling_params["use_greedy"] = use_greedy
    prompts = ragged_prompts(8)
    whole = responses_of(actor.infer(batch_of(actor, prompts)))
    weight = actor.model.decoder.final_layernorm.weight
    values = weight.data.clone()
    weight.data.fill_(torch.nan)
    replays.clear()
    with pytest.raises(FloatingPointError, match=r"token 1 of a response to .* are NaN or infinite"):
        actor.infer(batch_of(actor, prompts))
    assert replays
    weight.data.copy_(values)
    if use_greedy:
        assert responses_of(actor.infer(batch_of(actor, prompts))) == whole


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_log_probabilities_while_decoding_are_those_of_the_training_forward(actor, monkeypatch, dtype, bound):
    actor.model.to(dtype)
    # This random model's logits reach 20, where bf16 is exact only to a sixteenth, so they are scaled to a few units.
    actor.model.decoder.final_layernorm.weight.data.mul_(0.25)
    seen, next_logits = {}, Lane._next_logits

    def recording(self, num_rows, max_context):
        logits_BV = next_logits(self, num_rows, max_context)
        for row, logits_V in zip(self.in_flight, logits_BV.float().log_softmax(-1), strict=False):
            seen.setdefault(id(row), (row, []))[1].append(logits_V)
        return logits_BV

    monkeypatch.setattr(Lane, "_next_logits", recording)
    # a graph would not call the recording function
    monkeypatch.setattr(StepGraphs, "run", lambda self, num_rows: self._step(num_rows))
    with_engine(actor, 5).infer(batch_of(actor, ragged_prompts(12)))
    differences = []
    for row, logprobs in seen.values():
        tokens = torch.tensor([row.prompt + row.generated]).cuda()
        with torch.no_grad():
            logits = actor.model(tokens, torch.arange(tokens.size(1)).cuda()[None], None, labels=None)[0].float()
        generated = torch.tensor(row.generated).cuda()[:, None]
        trained = logits[len(row.prompt) - 1 : -1].log_softmax(-1).gather(1, generated)
        differences.append(torch.stack(logprobs[: len(generated)]).gather(1, generated) - trained)
    differences = torch.cat(differences).abs()
    assert (differences.max() if dtype == torch.float32 else differences.mean()) <= bound
