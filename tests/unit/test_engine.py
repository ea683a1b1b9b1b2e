"""The generation engine on the tiny model, compared with Megatron's schedule, transformers and the training forward.

What `infer` promises, whichever backend generates, is in test_generation.py.
"""

import logging
import string
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from nemo_aligner.generation import kv_cache
from nemo_aligner.generation import lane as lane_module
from nemo_aligner.generation.cuda_graph import StepGraphs
from nemo_aligner.generation.ends import EndStrings
from nemo_aligner.generation.engine import Engine
from nemo_aligner.generation.invalid_logits import INVALID_TOKEN
from nemo_aligner.generation.lane import Lane
from nemo_aligner.generation.rollouts import GenerationSettings, RolloutGenerator
from nemo_aligner.generation.rows import Decoding, DeviceRows, Row
from nemo_aligner.generation.sampling import SamplingParams
from nemo_aligner.generation.weights import find_weights, unsupported_by_engine
from nemo_aligner.models.nlp.gpt import megatron_gpt_rs_actor
from nemo_aligner.utils.text_generation_utils import TrackLengthGPTModelTextGenerationStrategy, ends_with_text
from tests.tiny import load_actor, prompt_batch
from tests.unit.test_sampling import PROBABILITIES, assert_drawn_from, uniforms

NUM_PROMPTS, NUM_NEW_TOKENS = 64, 64


@pytest.fixture(scope="module")
def actor(tiny_nemo):
    rs = {"length_params.max_length": NUM_NEW_TOKENS, "sampling_params.end_strings": []}
    actor = load_actor(tiny_nemo, rs=rs, micro_batch_size=2, global_batch_size=4)
    actor.prepare_for_inference()
    return actor


@pytest.fixture
def generating(actor, monkeypatch):
    """generating(backend, max_rows) -> the actor with these settings and its own engine."""

    def change(backend="engine", max_rows=256):
        monkeypatch.setattr(actor, "_rollout_generator", RolloutGenerator(actor, GenerationSettings(backend, max_rows)))
        return actor

    return change


def ragged_prompts(number: int = NUM_PROMPTS, longest: int = 30) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens; some adjacent ones are equal."""
    generator = torch.Generator().manual_seed(7)
    prompts = []
    while len(prompts) < number:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        prompt = torch.randint(1, 300, (length,), generator=generator).tolist()
        prompts += [prompt] * int(torch.randint(1, 4, (), generator=generator))
    return prompts[:number]


def responses_of(rollouts) -> list[list[int]]:
    bounds = zip(rollouts["prompt_lengths"].tolist(), rollouts["response_lengths"].tolist(), strict=True)
    return [row[start:end].tolist() for row, (start, end) in zip(rollouts["response_tokens"], bounds, strict=True)]


def batch_of(actor, prompts, **more):
    return {**prompt_batch(prompts, actor.tokenizer.eos_id, actor._length_params["max_length"]), **more}


# The tokens


@pytest.fixture(scope="module")
def hf_responses(tiny_hf, actor):
    """Greedy responses of transformers to the ragged prompts, padded with the end token."""
    model = LlamaForCausalLM.from_pretrained(tiny_hf).eval()
    prompts, eos_id = ragged_prompts(), actor.tokenizer.eos_id
    width = max(map(len, prompts))
    tokens = torch.tensor([[eos_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generated = model.generate(
        tokens, attention_mask=mask, max_new_tokens=NUM_NEW_TOKENS, do_sample=False, pad_token_id=eos_id,
        suppress_tokens=list(range(actor.tokenizer.vocab_size, 384)),
    )  # fmt: skip
    return generated[:, width:].tolist()


def single_token_ends(actor, responses: list[list[int]], number: int) -> tuple[list[str], set[int]]:
    """Some of the more frequent tokens of `responses` as end strings, and the ids that then end a row."""
    strategy = TrackLengthGPTModelTextGenerationStrategy(actor, torch.zeros(1, dtype=torch.int64), 1)
    eos_id, texts, ids = actor.tokenizer.eos_id, [], {actor.tokenizer.eos_id}
    for token in torch.tensor(responses).flatten().bincount().argsort(descending=True)[10:].tolist():
        text = actor.tokenizer.ids_to_text([token])
        if len(texts) < number and text and strategy.end_token_ids(eos_id, [text]) == sorted({eos_id, token}):
            texts.append(text)
            ids.add(token)
    return texts, ids


def test_greedy_tokens_equal_the_schedules_and_transformers_with_rows_ending_and_joining_at_all_times(
    generating, hf_responses, monkeypatch
):
    """64 ragged prompts, up to 64 new tokens each, with at most 7 rows in flight in the engine, or all."""
    actor = generating()
    texts, ends = single_token_ends(actor, hf_responses, number=5)
    monkeypatch.setitem(actor._sampling_params, "end_strings", texts)
    expected = [until_one_of(row, ends) for row in hf_responses]
    assert len({len(row) for row in expected}) > 10 and max(map(len, expected)) == NUM_NEW_TOKENS
    for backend, max_rows in (("engine", 7), ("engine", 256), ("nemo", 1)):
        rollouts = generating(backend, max_rows).infer(batch_of(actor, ragged_prompts()))
        assert responses_of(rollouts) == expected
        assert rollouts["is_end"].tolist() == [row[-1] in ends for row in expected]


@pytest.mark.parametrize("step", [1, 64])
def test_padding_behind_the_prompts_changes_no_token(actor, hf_responses, monkeypatch, step):
    sizes, forward = [], lane_module.forward

    def recording(weights, tokens_M, positions_M, attend, *rest):
        if isinstance(attend, lane_module.PrefillAttention):
            sizes.append(len(tokens_M))
        return forward(weights, tokens_M, positions_M, attend, *rest)

    monkeypatch.setattr(lane_module, "forward", recording)
    ids, num_tokens = actor.tokenizer.eos_id, actor.tokenizer.vocab_size
    decoding = Decoding(SamplingParams(use_greedy=True), NUM_NEW_TOKENS, 0, (ids,), num_tokens)
    rows = [Row(prompt, torch.zeros(NUM_NEW_TOKENS, dtype=torch.float64), 0) for prompt in ragged_prompts()]
    monkeypatch.setattr(lane_module, "MAX_PROMPTS_PER_PREFILL", 10)
    engine = Engine(actor.model, max_rows=10)
    assert engine.lanes[0]._prefill_step == 1  # on a CPU
    engine.lanes[0]._prefill_step = step
    list(engine.generate(rows, decoding, EndStrings([], actor.tokenizer)))
    assert [row.generated for row in rows] == [until_one_of(row, {ids}) for row in hf_responses]
    assert len(set(sizes)) > 1 and all(size % step == 0 for size in sizes)


def until_one_of(row: list[int], ends: set[int]) -> list[int]:
    return next((row[: index + 1] for index, token in enumerate(row) if token in ends), row)


def test_sampled_tokens_equal_the_schedules(generating, monkeypatch):
    filters = {"use_greedy": False, "temperature": 1.3, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2}
    ids = torch.arange(20)[:, None]
    results = []
    for backend, max_rows in (("nemo", 1), ("engine", 256), ("engine", 3)):
        actor = generating(backend, max_rows)
        for key, value in filters.items():
            monkeypatch.setitem(actor._sampling_params, key, value)
        actor.seed_sampling(5)
        results.append(responses_of(actor.infer(batch_of(actor, ragged_prompts(20), rollout_id=ids))))
    assert results[1] == results[0] and results[2] == results[0]
    assert len({tuple(row) for row in results[0]}) == 20


def test_log_probabilities_while_decoding_are_those_of_the_training_forward(generating, monkeypatch):
    actor = generating(max_rows=5)
    prompts, eos_id = ragged_prompts(12), actor.tokenizer.eos_id
    seen = {}
    next_logits = Lane._next_logits

    def recording(self, num_rows, max_context):
        logits_BV = next_logits(self, num_rows, max_context)
        for row, logits_V in zip(self.in_flight, logits_BV.log_softmax(-1), strict=True):
            seen.setdefault(id(row), (row, []))[1].append(logits_V)
        return logits_BV

    monkeypatch.setattr(Lane, "_next_logits", recording)
    rollouts = actor.infer(batch_of(actor, prompts))
    assert len(seen) == len(prompts)
    assert {tuple(row.generated) for row, _ in seen.values()} == {tuple(row) for row in responses_of(rollouts)}
    for row, logprobs in seen.values():
        tokens = torch.tensor([row.prompt + row.generated])
        with torch.no_grad():
            logits = actor.model(tokens, torch.arange(tokens.size(1))[None], None, labels=None)[0]
        trained = logits[len(row.prompt) - 1 : -1].log_softmax(-1)
        generated = torch.tensor(row.generated)[:, None]
        difference = torch.stack(logprobs).gather(1, generated) - trained.gather(1, generated)
        assert difference.abs().max() <= 1e-4 and eos_id not in row.prompt


FILTERED = [
    (SamplingParams(), PROBABILITIES),
    (SamplingParams(temperature=0.5), [p**2 / sum(q**2 for q in PROBABILITIES) for p in PROBABILITIES]),
    (SamplingParams(top_k=2), [0, 0.4 / 0.69, 0, 0, 0.29 / 0.69, 0]),
    (SamplingParams(top_p=0.8), [0, 0.4 / 0.84, 0.15 / 0.84, 0, 0.29 / 0.84, 0]),
]


def many_device_rows(decoding: Decoding) -> tuple[DeviceRows, torch.Tensor]:
    """20,000 rows that follow a prompt of two tokens, and their logits."""
    numbers = uniforms(11)
    rows = DeviceRows(len(numbers), 6, decoding, torch.device("cpu"))
    rows.put_(list(range(len(numbers))), [Row([4, 1], number[None].expand(3), 0) for number in numbers])
    return rows, (torch.tensor([*PROBABILITIES, 1e9]).log() + 3).repeat(len(numbers), 1)


@pytest.mark.parametrize(("sampling", "expected"), FILTERED)
def test_draws_follow_the_filtered_distribution_over_the_ids_that_have_a_token(sampling, expected):
    rows, logits = many_device_rows(Decoding(sampling, 3, 0, (5,), num_tokens=6))
    assert_drawn_from(rows.sample(logits, 2), expected)


def test_draws_before_the_minimum_length_leave_out_what_ends_a_row():
    rows, logits = many_device_rows(Decoding(SamplingParams(), 3, 1, (1, 5), num_tokens=6))
    rest = 1 - PROBABILITIES[1] - PROBABILITIES[5]
    assert_drawn_from(rows.sample(logits, 2), [0 if i in (1, 5) else p / rest for i, p in enumerate(PROBABILITIES)])


def test_draws_with_a_repetition_penalty_count_the_rows_own_tokens_and_no_others():
    rows, _ = many_device_rows(Decoding(SamplingParams(repetition_penalty=2.0), 3, 0, (5,), num_tokens=6))
    rows.tokens_RT[:, 2:] = 3  # left over from an earlier row in this slot
    logits = torch.tensor([1.0, 2.0, 0.5, 1.5, -1.0, 0.0]).repeat(len(rows.position_R), 1)
    penalized = torch.tensor([1.0, 1.0, 0.5, 1.5, -2.0, 0.0])  # the prompt's tokens 4 and 1 are penalized
    assert_drawn_from(rows.sample(logits, 4), penalized.softmax(0))


# What rows share, and who waits


def test_a_prompt_is_prefilled_once_for_all_its_rollouts_even_if_they_join_late(generating, monkeypatch):
    actor = generating(max_rows=3)
    prefilled = []
    attention = lane_module.PrefillAttention

    def recording(weights, rotary, cache, lengths, num_padding):
        prefilled.extend(lengths)
        return attention(weights, rotary, cache, lengths, num_padding)

    monkeypatch.setattr(lane_module, "PrefillAttention", recording)
    monkeypatch.setattr(lane_module, "MAX_PROMPTS_PER_PREFILL", 2)
    prompts = [[5, 6, 7]] * 5 + [[8]] * 4 + [[9, 10]] * 5 + [[5, 6, 7]]
    rollouts = actor.infer(batch_of(actor, prompts))
    assert prefilled == [2, 0, 1, 2]  # all but the last token, which is left to the rows' decoding
    monkeypatch.setattr(lane_module, "PrefillAttention", attention)
    alone = [responses_of(actor.infer(batch_of(actor, [prompt])))[0] for prompt in ([5, 6, 7], [8], [9, 10])]
    assert responses_of(rollouts) == [alone[0]] * 5 + [alone[1]] * 4 + [alone[2]] * 5 + [alone[0]]


def test_rows_of_later_batches_take_the_places_of_ended_ones_and_batches_come_when_complete(generating, monkeypatch):
    actor = generating(max_rows=4)
    monkeypatch.setitem(actor._sampling_params, "end_strings", list(string.ascii_lowercase[:6]))
    monkeypatch.setitem(actor._sampling_params, "use_greedy", False)
    prompts = ragged_prompts(24)
    batches = [
        batch_of(actor, prompts[start : start + 8], rollout_id=torch.arange(start, start + 8)[:, None])
        for start in (0, 8, 16)
    ]
    num_rows, step = [], Lane._step

    def counted(self, rows):
        num_rows.append(rows)
        return step(self, rows)

    monkeypatch.setattr(Lane, "_step", counted)
    actor.seed_sampling(2)
    apart = [responses_of(actor.infer(batch)) for batch in batches]
    steps_apart = len(num_rows)
    num_rows.clear()
    stream = actor.infer_each(batches)
    first = responses_of(next(stream))
    steps_to_the_first = len(num_rows)
    together = [first, *map(responses_of, stream)]
    assert together == apart
    assert steps_to_the_first < len(num_rows) < steps_apart
    num_generated = sum(len(row) for rows in together for row in rows)
    assert sum(num_rows) == num_generated  # no ended row is decoded
    assert len({len(row) for rows in together for row in rows}) > 5


def test_a_host_that_runs_ahead_queues_no_step_that_no_row_can_need(generating, monkeypatch):
    """On the CPU, the host is made to look at tokens as late as on a GPU."""
    actor, prompts = generating(max_rows=5), ragged_prompts(13)
    expected = responses_of(actor.infer(batch_of(actor, prompts)))
    engine = actor._rollout_generator._engine
    engine.lanes[0]._steps_a_turn, engine.lanes[0]._snapshots_behind = 2, 1
    monkeypatch.setattr(Lane, "_max_context", lambda self: self._cache.capacity)
    num_rows, step = [], Lane._step

    def counted(self, rows):
        num_rows.append(rows)
        return step(self, rows)

    monkeypatch.setattr(Lane, "_step", counted)
    assert responses_of(actor.infer(batch_of(actor, prompts))) == expected
    assert {len(row) for row in expected} == {NUM_NEW_TOKENS}
    assert num_rows == [5] * (2 * NUM_NEW_TOKENS) + [3] * NUM_NEW_TOKENS
    monkeypatch.setitem(actor._sampling_params, "end_strings", list(string.ascii_lowercase[:6]))
    ending = responses_of(actor.infer(batch_of(actor, prompts)))
    assert engine is actor._rollout_generator._engine
    assert ending == responses_of(generating("nemo").infer(batch_of(actor, prompts)))
    assert len({len(row) for row in ending}) > 3


def test_too_little_memory_lowers_the_rows_in_flight_and_says_so_once(generating, monkeypatch, caplog):
    prompts = ragged_prompts(9)
    expected = responses_of(generating().infer(batch_of(generating(), prompts)))
    actor = generating()
    actor.infer(batch_of(actor, prompts))
    whole = actor._rollout_generator._engine.lanes[0]
    enough_for_two = 2 * whole._cache.num_bytes // 9 + whole._prompts.num_bytes
    for memory, num_rows in ((0, 1), (enough_for_two, 2)):
        actor._rollout_generator.release()
        monkeypatch.setattr(lane_module, "usable_memory", lambda device, memory=memory: memory)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "nemo_logger"):
            assert responses_of(actor.infer(batch_of(actor, prompts))) == expected
            assert responses_of(actor.infer(batch_of(actor, prompts))) == expected
        engine = actor._rollout_generator._engine
        assert engine.lanes[0]._cache.num_rows == num_rows
        assert sum(f"{num_rows} rows in flight instead of 9" in message for message in caplog.messages) == 1


def segment(device, pool, total, allocated):
    return {"device": device, "segment_pool_id": pool, "total_size": total, "allocated_size": allocated}


def test_memory_that_captured_graphs_hold_is_not_usable(monkeypatch):
    segments = [
        segment(0, (0, 0), 1000, 400),
        segment(0, (0, 3), 100, 10),  # of graphs that still exist
        segment(0, (0, 2), 50, 0),  # of graphs that no longer exist
        segment(1, (0, 0), 7000, 0),
    ]
    assert kv_cache.cached_memory(segments, 0, {(0, 3)}) == 600 + 50
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    graphs = StepGraphs(lambda num_rows: None, reads=(), warm=set())
    graphs._pool = (0, 3)
    assert kv_cache.usable_memory(torch.device("cuda", 0)) == int(0.85 * 2650)
    del graphs
    assert kv_cache.usable_memory(torch.device("cuda", 0)) == int(0.85 * 2740)


def test_rows_that_memory_limits_stay_as_many_from_one_phase_to_the_next(generating, monkeypatch):
    """Graphs fit a cache of one size; they are dropped before memory is measured only if they have become useless."""
    actor, prompts = generating(), ragged_prompts(40)
    actor.infer(batch_of(actor, prompts))
    engine = actor._rollout_generator._engine
    per_row, of_prompts = engine.lanes[0]._cache.num_bytes // 40, engine.lanes[0]._prompts.num_bytes
    found = []
    for num_fitting in (20, 22, 20, 19, 21, 24, 40):

        def measured(device, num_fitting=num_fitting):
            found.append([engine.lanes[0]._graphs is not None])
            return num_fitting * per_row + of_prompts

        actor._rollout_generator.release()
        monkeypatch.setattr(lane_module, "usable_memory", measured)
        rows = engine.lanes[0]._device_rows
        actor.infer(batch_of(actor, prompts))
        found[-1] += [engine.lanes[0]._cache.num_rows, engine.lanes[0]._device_rows is rows]
    assert found == [
        [True, 20, False], [True, 20, True], [True, 20, True], [True, 19, False], [True, 19, True], [True, 24, False],
        [True, 40, False],
    ]  # fmt: skip
    actor._rollout_generator.release()
    actor.infer(batch_of(actor, prompts[:3]))
    assert found[-1] == [False]


class FakeMemory:
    """Has room for the keys and values of `num_rows` rows only, and records how many were asked for."""

    def __init__(self, num_rows: int):
        self.num_rows, self.asked = num_rows, []
        self.make = lane_module.KVCache

    def __call__(self, *, num_rows, **more):
        self.asked.append(num_rows)
        if num_rows > self.num_rows:
            raise torch.OutOfMemoryError("as from an allocator")
        return self.make(num_rows=num_rows, **more)


def test_rows_in_flight_are_halved_until_there_is_memory_for_them_and_one_line_says_so(generating, monkeypatch, caplog):
    prompts = ragged_prompts(9)
    expected = responses_of(generating().infer(batch_of(generating(), prompts)))
    actor, memory = generating(), FakeMemory(num_rows=2)
    monkeypatch.setattr(lane_module, "KVCache", memory)
    with caplog.at_level(logging.WARNING, "nemo_logger"):
        assert responses_of(actor.infer(batch_of(actor, prompts))) == expected
        assert responses_of(actor.infer(batch_of(actor, prompts))) == expected
    assert memory.asked == [9, 4, 2, 2]  # the last request is for the prompts
    assert [message for message in caplog.messages if "instead of" in message] == [
        "rollouts: memory for the keys and values of 2 rows in flight instead of 9; the others wait for a free slot"
    ]


def test_too_little_memory_on_one_rank_lowers_the_rows_of_all(generating, monkeypatch):
    actor, memory = generating(), FakeMemory(num_rows=9)
    monkeypatch.setattr(lane_module, "KVCache", memory)
    of_the_other_rank = iter([9, 0, 0, 1])  # its estimate of rows, then whether each allocation succeeded
    monkeypatch.setattr(lane_module, "min_over_ranks", lambda number: min(number, next(of_the_other_rank)))
    actor.infer(batch_of(actor, ragged_prompts(9)))
    assert actor._rollout_generator._engine.lanes[0]._cache.num_rows == 2 and next(of_the_other_rank, None) is None


def test_memory_for_not_even_one_row_is_a_clear_error(generating, monkeypatch):
    actor = generating()
    monkeypatch.setattr(lane_module, "KVCache", FakeMemory(num_rows=0))
    # 128 positions for the row and 64 for its prompt, 2 * 4 layers * 2 groups * 16 channels * 4 bytes each
    message = r"keys and values of a single row of 128 tokens and its prompt, 0 MiB; lower model\.rs\.length_params"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        actor.infer(batch_of(actor, ragged_prompts(9)))


def test_memory_cut_for_few_long_rows_is_cut_anew_for_more_shorter_ones(generating, monkeypatch):
    actor, prompts, long_prompt = generating(), ragged_prompts(9), [5] * 150
    actor.infer(batch_of(actor, [long_prompt]))
    engine = actor._rollout_generator._engine
    per_long_row, of_prompts = engine.lanes[0]._cache.num_bytes, engine.lanes[0]._prompts.num_bytes
    expected = responses_of(actor.infer(batch_of(actor, prompts)))
    actor._rollout_generator.release()
    monkeypatch.setattr(lane_module, "usable_memory", lambda device: 4 * per_long_row + of_prompts)
    found, caches = [], []
    for batch in ([long_prompt] * 6, prompts, prompts[:3], prompts):
        found.append(responses_of(actor.infer(batch_of(actor, batch))))
        caches.append(actor._rollout_generator._engine.lanes[0]._cache)
    assert [(cache.num_rows, cache.capacity) for cache in caches[:2]] == [(4, 256), (6, 128)]
    assert caches[1] is caches[2] is caches[3]
    assert found[1] == found[3] == expected and found[2] == expected[:3]


def test_what_was_broken_off_leaves_nothing_behind(generating):
    """The device state of rows is kept across phases."""
    actor = generating()

    def stop():
        raise KeyError

    with pytest.raises(KeyError):
        list(actor.infer_each([batch_of(actor, ragged_prompts(9))], check=stop))
    rows = actor._rollout_generator._engine.lanes[0]._device_rows
    assert (rows.position_R > 0).all() and not rows.is_done_R.any()
    slots = []
    put_ = DeviceRows.put_

    def noting(self, *args):
        slots.append((self.position_R.tolist(), self.is_done_R.all().item()))
        put_(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceRows, "put_", noting)
        actor.infer(batch_of(actor, ragged_prompts(9)))
    assert actor._rollout_generator._engine.lanes[0]._device_rows is rows and slots[0] == ([0] * 9, True)


def test_keys_and_values_are_given_back_behind_inference(tiny_nemo):
    actor = load_actor(tiny_nemo)
    actor.prepare_for_inference()
    actor.infer(batch_of(actor, [[5, 6]]))
    engine = actor._rollout_generator._engine
    assert engine.lanes[0]._cache.num_bytes > 0
    actor.finish_inference()
    assert engine.lanes[0]._cache is None and engine.lanes[0]._prompts is None


def test_whoever_waits_for_the_last_rows_hears_of_them_once(generating):
    """Five rows of 2 to 10 tokens, four at a time: the callback is called when two are left."""
    actor, in_flight, calls = generating(max_rows=4), [], []
    decoding = Decoding(SamplingParams(use_greedy=True), 10, 0, (actor.tokenizer.eos_id,), actor.tokenizer.vocab_size)
    rows = [Row([5, 6 + number], torch.zeros(10, dtype=torch.float64), 0) for number in range(5)]

    class Ends:
        """The n-th row ends after 2 n + 2 tokens."""

        def are_completed_by(self, prompt, generated):
            return len(generated) == 2 * (prompt[-1] - 6) + 2

    engine = Engine(actor.model, max_rows=4)
    for _ in engine.generate(rows, decoding, Ends(), on_last_rows=lambda: calls.append(len(engine.lanes[0].in_flight))):
        in_flight.append(len(engine.lanes[0].in_flight))
    assert in_flight == [4, 3, 2, 1, 0] and calls == [2]


@pytest.mark.parametrize(("room", "comes"), [(99, False), (100, True)])
def test_optimizer_states_come_back_beside_rollouts_if_there_is_room(generating, monkeypatch, room, comes):
    actor, calls = generating(max_rows=3), []
    actor.infer(batch_of(actor, ragged_prompts(3)))
    offload = SimpleNamespace(num_bytes_away=100, start_onload=lambda: calls.append("onload"))
    monkeypatch.setattr(actor, "_optimizer_offload", offload)
    monkeypatch.setattr(actor, "distributed_adam_offload_manager", offload)
    monkeypatch.setattr(megatron_gpt_rs_actor, "usable_memory", lambda device: room)
    actor.prefetch_adam_states(beside_rollouts=True)
    assert calls == ["onload"] * comes and actor._rollout_generator._engine.lanes[0]._cache is not None
    calls.clear()
    actor.prefetch_adam_states()
    assert calls == ["onload"] and actor._rollout_generator._engine.lanes[0]._cache is None


def test_what_is_checked_between_tokens_can_end_the_generation(generating):
    """As on SIGTERM: complete batches were already yielded, the rest is dropped, and the engine remains usable."""
    actor = generating(max_rows=3)
    prompts = ragged_prompts(9)
    batches = [batch_of(actor, prompts[start : start + 3]) for start in (0, 3, 6)]
    expected = [responses_of(rollouts) for rollouts in actor.infer_each(batches)]
    num_steps, found = [], []

    def check():
        engine = actor._rollout_generator._engine
        num_steps.append(sum(len(row.generated) for row in engine.lanes[0].in_flight))
        if len(num_steps) == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        for rollouts in actor.infer_each(batches, check):
            found.append(responses_of(rollouts))
    # three rows of 64 tokens at a time: checked halfway, at their end, and halfway through the next three
    assert num_steps == [3 * 32, 0, 3 * 32] and found == expected[:1]
    assert [responses_of(rollouts) for rollouts in actor.infer_each(batches)] == expected


# Logits that are NaN


@pytest.mark.parametrize("use_greedy", [True, False])
def test_a_row_without_finite_logits_ends_the_run_with_its_prompt_and_token(generating, monkeypatch, use_greedy):
    actor = generating(max_rows=3)
    monkeypatch.setitem(actor._sampling_params, "use_greedy", use_greedy)
    prompts = [*ragged_prompts(6), actor.tokenizer.text_to_ids("one two three")]
    next_logits = Lane._next_logits

    def spoiling(self, num_rows, max_context):
        logits_BV = next_logits(self, num_rows, max_context)
        for row, logits_V in zip(self.in_flight, logits_BV, strict=True):
            if row.prompt == prompts[-1] and len(row.generated) == 4:
                logits_V[7] = torch.nan
        return logits_BV

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "_next_logits", spoiling)
        with pytest.raises(FloatingPointError, match=r"token 5 of a response to 'one two three' are NaN .*optim.lr"):
            actor.infer(batch_of(actor, prompts))
    assert actor._rollout_generator._engine.lanes[0]._cache is None  # its keys and values may be NaN
    assert len(responses_of(actor.infer(batch_of(actor, prompts)))[-1]) > 4


@pytest.mark.parametrize("backend", ["engine", "nemo"])
def test_weights_that_are_nan_end_the_run(generating, backend):
    actor = generating(backend)
    weight = actor.model.decoder.final_layernorm.weight
    values = weight.data.clone()
    try:
        weight.data[3] = torch.nan
        with pytest.raises(FloatingPointError, match=r"token 1 of a response to .* are NaN or infinite"):
            actor.infer(batch_of(actor, ragged_prompts(3)))
    finally:
        weight.data.copy_(values)


def test_a_row_that_is_done_or_elsewhere_is_not_broken_by_logits_of_its_place():
    decoding = Decoding(SamplingParams(), max_length=4, min_length=0, end_ids=(2,), num_tokens=9)
    rows = DeviceRows(5, 20, decoding, torch.device("cpu"))
    rows.put_([0, 1, 2], [Row([3] * length, torch.zeros(4, dtype=torch.float64), 0) for length in (1, 2, 3)])
    rows.advance_(torch.tensor([2, 5, 6, INVALID_TOKEN]))
    rows.advance_(torch.tensor([INVALID_TOKEN, INVALID_TOKEN, 7, INVALID_TOKEN]))
    assert rows.is_invalid_R.tolist() == [False, True, False, False, False]
    assert rows.is_done_R.tolist() == [True, True, False, True, True]
    assert rows.position_R.tolist() == [1, 2, 4, 0, 0]  # the position of each row's newest token
    assert (rows.tokens_RT >= 0).all()
    rows.move_(0, 1), rows.put_([1], [Row([4], torch.zeros(4, dtype=torch.float64), 0)])
    assert rows.is_invalid_R.tolist() == [True, False, False, False, False]


# The weights


def test_the_next_rollout_uses_the_weights_of_an_optimizer_step(tiny_nemo, generating):
    actor = load_actor(tiny_nemo, rs={"sampling_params.end_strings": []}, micro_batch_size=2, global_batch_size=4)
    prompts = ragged_prompts(6)

    def rollouts(backend):
        actor._rollout_generator = RolloutGenerator(actor, GenerationSettings(backend))
        actor.prepare_for_inference()
        found = responses_of(actor.infer(batch_of(actor, prompts)))
        actor.finish_inference()
        return found

    before = rollouts("engine")
    optimizer = torch.optim.AdamW(actor.parameters(), lr=0.05)
    tokens = torch.randint(1, 300, (4, 12), generator=torch.Generator().manual_seed(1))
    actor.prepare_for_training()
    actor.get_loss_and_metrics({"response_tokens": tokens, "mask": torch.ones(4, 11)}, forward_only=False)
    optimizer.step()
    assert rollouts("engine") == rollouts("nemo") != before


def test_parameters_that_were_moved_or_replaced_are_found_within_a_phase(generating):
    actor = generating()
    prompts = ragged_prompts(4)
    before = responses_of(actor.infer(batch_of(actor, prompts)))
    linear = actor.model.decoder.layers[1].mlp.linear_fc2
    parameter, values = linear.weight, linear.weight.data
    addresses = find_weights(actor.model).pointers()

    def rollouts():
        assert find_weights(actor.model).pointers() != addresses
        ours, engine = responses_of(actor.infer(batch_of(actor, prompts))), actor._rollout_generator
        theirs = responses_of(generating("nemo").infer(batch_of(actor, prompts)))
        actor._rollout_generator = engine
        assert ours == theirs
        return ours

    try:
        parameter.data = -values
        moved = rollouts()
        linear.weight = torch.nn.Parameter(0.5 * values)
        replaced = rollouts()
    finally:
        parameter.data = values
        linear.weight = parameter
    assert moved != before != replaced != moved
    assert find_weights(actor.model).pointers() == addresses


def test_norms_that_transformer_engine_has_fused_into_the_next_layer_are_read_from_there(tiny_nemo):
    actor = load_actor(tiny_nemo, rs={"sampling_params.end_strings": []})
    actor.prepare_for_inference()
    prompts = ragged_prompts(4)
    plain = responses_of(actor.infer(batch_of(actor, prompts)))
    for layer in actor.model.decoder.layers:
        for name, linear in (
            ("input_layernorm", layer.self_attention.linear_qkv), ("pre_mlp_layernorm", layer.mlp.linear_fc1)
        ):  # fmt: skip
            linear.layer_norm_weight = getattr(layer, name).weight
            del linear._parameters["bias"]
            linear.bias = torch.empty(0)
            setattr(layer, name, torch.nn.Identity())
    assert unsupported_by_engine(actor.model) is None
    assert responses_of(actor.infer(batch_of(actor, prompts))) == plain


def test_what_the_engine_does_not_know_goes_through_the_schedule_with_one_line(tiny_nemo, caplog):
    actor = load_actor(tiny_nemo, rs={"sampling_params.end_strings": []})
    actor.prepare_for_inference()
    prompts = ragged_prompts(3)
    expected = responses_of(actor.infer(batch_of(actor, prompts)))
    actor.finish_inference()
    actor.model.decoder.layers[2].post_norm = torch.nn.LayerNorm(64)
    assert unsupported_by_engine(actor.model) == "the parameter decoder.layers.2.post_norm.weight"
    actor.model.config.enable_autocast = True
    assert unsupported_by_engine(actor.model) == "mixed precision without model.megatron_amp_O2"
    actor.model.config.enable_autocast = False
    actor.prepare_for_inference()
    with caplog.at_level(logging.WARNING, "nemo_logger"):
        for _ in range(2):
            assert responses_of(actor.infer(batch_of(actor, prompts))) == expected
    assert actor._rollout_generator._engine.lanes[0]._cache is None
    assert sum("decoder.layers.2.post_norm.weight" in message for message in caplog.messages) == 1


# End strings


def test_the_shortcut_by_the_newest_token_misses_no_end_string(actor):
    tokenizer = actor.tokenizer
    generator = torch.Generator().manual_seed(3)
    texts = ["a", "the", "é", "e ", "\n"]
    ends = EndStrings(texts, tokenizer)
    pieces = [tokenizer.text_to_ids(text) for text in ("the end", "é", "a", "e ", "\n", "one two", "fox jumps")]
    found = 0
    for _ in range(300):
        row = [5]
        for index in torch.randint(len(pieces), (3,), generator=generator).tolist():
            row += pieces[index]
        generated = row[1:]
        brute = any(ends_with_text(torch.tensor(row), text, tokenizer) for text in texts)
        assert ends.are_completed_by(row[:1], generated) == brute
        found += brute
    assert 50 < found < 290
