"""`infer` on the tiny model with its own or with scripted logits; transformers and NeMo are the references.

Both backends have the same contract: each test below applies to both, unless its name says which one it is about.
"""

import pytest
import torch
from nemo.collections.nlp.modules.common.text_generation_utils import get_default_sampling_params

from nemo_aligner.generation import decode, rollouts, sampling
from nemo_aligner.generation.engine import Engine
from nemo_aligner.generation.lane import Lane
from nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor import MegatronGPTRSModel
from nemo_aligner.utils.text_generation_utils import TrackLengthGPTModelTextGenerationStrategy
from tests.tiny import load_actor, prompt_batch

RAGGED = [[5, 6, 7], [9, 10, 11, 12, 13], [40], [200, 3, 50, 60, 70, 80, 90, 8, 9]]


@pytest.fixture(scope="module")
def tiny(tiny_nemo):
    """One actor; tests change its generation settings through `configured`."""
    actor = load_actor(tiny_nemo, rs={"sampling_params.end_strings": []}, data={"seq_length": 128})
    actor.prepare_for_inference()
    return actor


@pytest.fixture(params=["engine", "nemo"])
def backend(request):
    return request.param


@pytest.fixture
def configured(tiny, backend, monkeypatch):
    """configured(max_length=..., min_length=..., any sampling parameter=...) -> the actor with these settings."""
    monkeypatch.setattr(tiny._rollout_generator, "_settings", rollouts.GenerationSettings(backend))

    def change(**changes):
        for key, value in changes.items():
            section = tiny._length_params if key in ("max_length", "min_length") else tiny._sampling_params
            monkeypatch.setitem(section, key, value)
        return tiny

    return change


@pytest.fixture
def scripted(configured, monkeypatch):
    """scripted(prompts, responses, **settings) -> what `infer` returns if the model predicts exactly `responses`.

    After the end of a response, the model predicts token 99.
    """

    def run(prompts, responses, **settings):
        actor = configured(**settings)

        def logits_at(steps_of_rows):
            """The logits of (row, step) pairs, with steps counted from the end of the prompt."""
            logits_BV = torch.zeros(len(steps_of_rows), 384)
            for logits_V, (row, step) in zip(logits_BV, steps_of_rows, strict=True):
                logits_V[responses[row][step] if 0 <= step < len(responses[row]) else 99] = 10.0
            return logits_BV

        def of_group(self, output):
            return logits_at([(row, self.t - len(prompt)) for row, prompt in enumerate(prompts)])

        def of_engine(self, num_rows, max_context):
            return logits_at([(all_rows.index(row), len(row.generated)) for row in self.in_flight])

        def generate(self, rows, *options):
            all_rows.extend(rows)
            return engine_generate(self, rows, *options)

        all_rows, engine_generate = [], Engine.generate
        monkeypatch.setattr(decode._Group, "_next_logits", of_group)
        monkeypatch.setattr(Lane, "_next_logits", of_engine)
        monkeypatch.setattr(Engine, "generate", generate)
        return actor.infer(prompt_batch(prompts, actor.tokenizer.eos_id, actor._length_params["max_length"]))

    return run


def responses_of(rollouts) -> list[list[int]]:
    bounds = zip(rollouts["prompt_lengths"].tolist(), rollouts["response_lengths"].tolist(), strict=True)
    return [row[start:end].tolist() for row, (start, end) in zip(rollouts["response_tokens"], bounds, strict=True)]


def assert_well_formed(rollouts, prompts, eos_id):
    """Each row is its prompt, its response, then end-of-text ids, and the matrix is no wider than the longest row."""
    lengths = rollouts["response_lengths"].tolist()
    assert rollouts["response_tokens"].dtype == rollouts["response_lengths"].dtype == torch.int64
    assert rollouts["response_tokens"].shape == (len(prompts), max(lengths))
    assert rollouts["prompt_lengths"].tolist() == [len(prompt) for prompt in prompts]
    for row, prompt, length in zip(rollouts["response_tokens"].tolist(), prompts, lengths, strict=True):
        assert row[: len(prompt)] == prompt
        assert all(token == eos_id for token in row[length:])


# With the model's own logits


@pytest.fixture(scope="module")
def hf_greedy(tiny_hf, tiny):
    """Greedy responses of transformers, prompt by prompt, restricted to the ids that the tokenizer has."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_hf).eval()
    eos_id, vocab_size = tiny.tokenizer.eos_id, tiny.tokenizer.vocab_size

    def generate(prompts, max_length, **options):
        responses = []
        for prompt in prompts:
            tokens = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=max_length,
                do_sample=False,
                suppress_tokens=list(range(vocab_size, 384)),
                pad_token_id=eos_id,
                **options,
            )
            responses.append(tokens[0, len(prompt) :].tolist())
        return responses

    return generate


def test_greedy_tokens_equal_those_of_transformers(configured, hf_greedy):
    actor = configured(max_length=20)
    rollouts = actor.infer(prompt_batch(RAGGED, actor.tokenizer.eos_id, 20))
    assert_well_formed(rollouts, RAGGED, actor.tokenizer.eos_id)
    assert responses_of(rollouts) == hf_greedy(RAGGED, 20)


def test_greedy_with_repetition_penalty_equals_transformers(configured, hf_greedy):
    actor = configured(max_length=20, repetition_penalty=1.7)
    rollouts = actor.infer(prompt_batch(RAGGED, actor.tokenizer.eos_id, 20))
    assert responses_of(rollouts) == hf_greedy(RAGGED, 20, repetition_penalty=1.7)
    assert responses_of(rollouts) != hf_greedy(RAGGED, 20)


def test_greedy_tokens_and_lengths_equal_those_of_nemos_generate(configured):
    actor = configured(max_length=12)
    batch = prompt_batch(RAGGED, actor.tokenizer.eos_id, 12)
    rollouts = actor.infer(batch)
    strategy = TrackLengthGPTModelTextGenerationStrategy(actor, batch["length"], 12)
    theirs = actor.generate(
        inputs=(batch["text"].clone(), batch["length"]),
        length_params={"max_length": 12, "min_length": 0},
        sampling_params={**get_default_sampling_params(), "use_greedy": True},
        strategy=strategy,
    )
    assert strategy.get_lengths().tolist() == rollouts["response_lengths"].tolist()
    for row, tokens in enumerate(theirs["token_ids"]):
        length = rollouts["response_lengths"][row]
        assert rollouts["response_tokens"][row, :length].tolist() == tokens[:length]


def test_a_row_does_not_depend_on_its_batch(configured):
    actor = configured(max_length=10)
    together = responses_of(actor.infer(prompt_batch(RAGGED, actor.tokenizer.eos_id, 10)))
    alone = [responses_of(actor.infer(prompt_batch([row], actor.tokenizer.eos_id, 10)))[0] for row in RAGGED]
    assert together == alone


def test_changed_weights_are_seen_by_the_next_rollout(configured, hf_greedy):
    actor = configured(max_length=8)
    batch = prompt_batch(RAGGED, actor.tokenizer.eos_id, 8)
    weight = actor.model.decoder.final_layernorm.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.neg_()
    try:
        changed = responses_of(actor.infer(batch))
    finally:
        weight.data.copy_(before)
    assert changed != hf_greedy(RAGGED, 8)
    assert responses_of(actor.infer(batch)) == hf_greedy(RAGGED, 8)


def test_greedy_tokens_with_document_resets_equal_a_forward_pass_without_cache(tiny_nemo):
    actor = load_actor(tiny_nemo, rs={"length_params.max_length": 6}, **{"data.reset_attention_mask": True})
    actor.prepare_for_inference()
    eos_id = actor.tokenizer.eos_id
    prompts = [[5, 6, eos_id, 7, 8], [9, 10, eos_id], [11, 12]]
    rollouts = actor.infer(prompt_batch(prompts, eos_id, 6))
    for prompt, response in zip(prompts, responses_of(rollouts), strict=True):
        # the mask hides everything before the last end token
        document = prompt[prompt.index(eos_id) + 1 :] if eos_id in prompt else prompt
        if not document:
            continue
        row = list(document)
        for token in response:
            tokens = torch.tensor([row])
            with torch.no_grad():
                logits = actor.model(tokens, torch.arange(len(row))[None], None, labels=None)[0, -1]
            assert int(logits[: actor.tokenizer.vocab_size].argmax()) == token
            row.append(token)


def test_what_the_engine_does_not_know_is_generated_for_in_nemos_way_with_one_line(tiny, log_lines, monkeypatch):
    monkeypatch.setitem(tiny._length_params, "max_length", 2)
    monkeypatch.setitem(tiny.resets, "reset_position_ids", True)
    monkeypatch.setattr(rollouts, "Engine", None)
    batch = prompt_batch(RAGGED, tiny.tokenizer.eos_id, 16)
    for _ in range(2):
        assert len(responses_of(tiny.infer(batch))) == len(RAGGED)
    (line,) = log_lines
    assert "reset_position_ids" in line and "falling back to NeMo's slower decoder" in line


# Where responses end


def test_an_end_token_at_once_later_and_never(scripted, tiny):
    eos = tiny.tokenizer.eos_id
    prompts = [[5, 6], [7, 8], [9, 10]]
    rollouts = scripted(prompts, [[eos], [20, 21, eos], [20, 21, 22, 23]], max_length=4)
    assert_well_formed(rollouts, prompts, eos)
    assert responses_of(rollouts) == [[eos], [20, 21, eos], [20, 21, 22, 23]]
    assert rollouts["response_lengths"].tolist() == [3, 5, 6]
    assert rollouts["is_end"].tolist() == [True, True, False]


def test_a_batch_of_one(scripted, tiny):
    eos = tiny.tokenizer.eos_id
    rollouts = scripted([[5]], [[20, eos]], max_length=4)
    assert rollouts["response_tokens"].tolist() == [[5, 20, eos]]
    assert rollouts["response_lengths"].tolist() == [3] and rollouts["is_end"].tolist() == [True]


def test_an_end_string_of_one_and_of_several_tokens(scripted, tiny):
    eos, ids = tiny.tokenizer.eos_id, tiny.tokenizer.text_to_ids
    assert len(ids("Q")) == 1 and len(ids("STOP")) == 4
    prompts = [[5, 6]] * 4
    wanted = [ids("STOP"), [20, *ids("STOP")], [20, *ids("Q")], [20, *ids("STO"), *ids("X")]]
    rollouts = scripted(prompts, wanted, max_length=6, end_strings=["STOP", "Q"])
    assert_well_formed(rollouts, prompts, eos)
    assert responses_of(rollouts) == [*wanted[:3], [*wanted[3], 99]]
    assert rollouts["response_lengths"].tolist() == [6, 7, 4, 8]
    assert rollouts["is_end"].tolist() == [True, True, True, False]


def test_every_row_has_its_own_budget(scripted, tiny):
    eos = tiny.tokenizer.eos_id
    prompts = [[5], [6] * 5, [7] * 3]
    # The first row would end at its fifth token, while the second is still being decoded: beyond its budget.
    rollouts = scripted(prompts, [[20, 21, 22, 23, eos], [30, 31, 32, 33], [40, 41, 42, eos]], max_length=4)
    assert_well_formed(rollouts, prompts, eos)
    assert responses_of(rollouts) == [[20, 21, 22, 23], [30, 31, 32, 33], [40, 41, 42, eos]]
    assert rollouts["response_lengths"].tolist() == [5, 9, 7]
    assert rollouts["is_end"].tolist() == [False, False, True]


@pytest.mark.parametrize("backend", ["nemo"], indirect=True)
def test_finished_rows_go_on_with_end_tokens_in_nemos_way(scripted, tiny, monkeypatch):
    eos = tiny.tokenizer.eos_id
    generated = []

    def generate(*args, **options):
        generated.append(decode.generate(*args, **options))
        return generated[0]

    monkeypatch.setattr(rollouts, "generate", generate)
    # the first row ends on its own, the second at its budget of 3, the third is decoded up to the last column
    scripted([[5], [6], [7] * 4], [[20, eos], [30, 31, 32, 33], [40, 41, 42]], max_length=3)
    assert generated[0].tolist() == [
        [5, 20, eos, eos, eos, eos, eos],
        [6, 30, 31, 32, eos, eos, eos],
        [7, 7, 7, 7, 40, 41, 42],
    ]


def test_end_tokens_inside_a_prompt_end_nothing(scripted, tiny):
    eos = tiny.tokenizer.eos_id
    prompts = [[5], [6, eos, 6, eos]]
    rollouts = scripted(prompts, [[20, eos], [30, eos]], max_length=3)
    assert_well_formed(rollouts, prompts, eos)
    assert rollouts["response_lengths"].tolist() == [3, 6]
    assert rollouts["is_end"].tolist() == [True, True]


@pytest.mark.parametrize("backend", ["nemo"], indirect=True)
def test_nemos_way_stops_when_all_rows_are_done(scripted, tiny, monkeypatch):
    eos = tiny.tokenizer.eos_id
    positions = []

    def sample(logits_BV, previous_BT, *options):
        positions.append(previous_BT.size(1))
        return sampling.sample(logits_BV, previous_BT, *options)

    monkeypatch.setattr(decode, "sample", sample)
    scripted([[5], [6, 6, 6]], [[eos], [30, eos]], max_length=50)
    assert positions == [1, 2, 3, 4]  # from the end of the shorter prompt to the last end token


@pytest.mark.parametrize("backend", ["engine"], indirect=True)
def test_in_the_engine_rows_leave_when_they_are_done(scripted, tiny, monkeypatch):
    eos = tiny.tokenizer.eos_id
    num_rows, step = [], Lane._step

    def counted(self, rows):
        num_rows.append(rows)
        return step(self, rows)

    monkeypatch.setattr(Lane, "_step", counted)
    rollouts = scripted([[5], [6, 6, 6], [7]], [[eos], [30, 31, eos], [40, eos]], max_length=50)
    assert num_rows == [3, 2, 1]
    assert responses_of(rollouts) == [[eos], [30, 31, eos], [40, eos]]


def test_min_length_holds_for_every_kind_of_end(scripted, tiny):
    eos, ids = tiny.tokenizer.eos_id, tiny.tokenizer.text_to_ids
    prompts = [[5], [6, 6], [7]]
    stop, q = ids("STOP"), ids("Q")
    # A forbidden single token is replaced by the next best; an end string that is completed too early does not count.
    wanted = [[eos] * 9, q * 9, [*stop, 20, *stop]]
    settings = {"max_length": 12, "min_length": 5, "end_strings": ["STOP", "Q"]}
    rollouts = scripted(prompts, wanted, **settings)
    responses = responses_of(rollouts)
    assert_well_formed(rollouts, prompts, eos)
    assert rollouts["is_end"].tolist() == [True, True, True]
    assert [len(response) for response in responses] == [6, 6, 9]
    assert eos not in responses[0][:5] and responses[0][5] == eos
    assert q[0] not in responses[1][:5] and responses[1][5] == q[0]
    assert responses[2] == wanted[2]


def test_a_prompt_at_the_length_limit(configured, hf_greedy):
    actor = configured(max_length=4)
    assert actor.cfg.encoder_seq_length == 128
    prompts = [[(7 * i) % 200 + 1 for i in range(124)], [5]]
    rollouts = actor.infer(prompt_batch(prompts, actor.tokenizer.eos_id, 4))
    assert responses_of(rollouts) == hf_greedy(prompts, 4)


def test_learned_positions_have_an_end(tiny_nemo):
    actor = load_actor(tiny_nemo, rs={"length_params.max_length": 4})
    actor.cfg.position_embedding_type = "learned_absolute"
    with pytest.raises(ValueError, match=r"prompt of 125 tokens and rs.length_params.max_length=4 exceed .* 128"):
        actor.infer(prompt_batch([[5] * 125, [5]], actor.tokenizer.eos_id, 4))


# Sampling


def test_ids_without_a_token_are_never_drawn(configured):
    actor = configured(max_length=16, use_greedy=False, temperature=100.0)
    vocab_size = actor.tokenizer.vocab_size
    assert vocab_size < 384
    # At this temperature all 384 ids are about equally likely; 512 draws miss the sixth without a token once in 1e40.
    rollouts = actor.infer(prompt_batch([[5, 6]] * 32, actor.tokenizer.eos_id, 16))
    assert rollouts["response_tokens"].max() < vocab_size
    assert rollouts["response_tokens"].unique().numel() > vocab_size // 2


def test_the_same_key_gives_the_same_rollouts(configured):
    actor = configured(max_length=16, use_greedy=False)
    batch = prompt_batch([[5, 6], [7]] * 4, actor.tokenizer.eos_id, 16)

    def rollouts(*key):
        actor.seed_sampling(*key)
        return responses_of(actor.infer(batch))

    first = rollouts(3, 1)
    assert rollouts(3, 1) == first
    others = [rollouts(*key) for key in [(3, 2), (1, 3), (4, 1), (3,)]]
    assert all(other != first for other in others)
    assert first[0] != first[2]  # equal prompts, independent draws
    actor.seed_sampling(3, 1)
    assert [responses_of(actor.infer(batch)) for _ in range(2)][1] != first  # the random stream continues


def test_a_rollout_depends_on_its_id_and_not_on_its_batch(configured):
    actor = configured(max_length=16, use_greedy=False)
    rows, ids = [[5, 6], [7], [5, 6], [9, 3, 4]], torch.tensor([[0, 0], [1, 0], [0, 1], [2, 0]])

    def rollouts(picked):
        actor.seed_sampling(3)
        batch = prompt_batch([rows[row] for row in picked], actor.tokenizer.eos_id, 16)
        return responses_of(actor.infer({**batch, "rollout_id": ids[picked]}))

    together = rollouts([0, 1, 2, 3])
    assert together[0] != together[2]
    assert rollouts([3, 2]) == [together[3], together[2]]
    assert rollouts([1]) == [together[1]]


def test_low_temperature_and_top_k_one_are_greedy(configured):
    batch = prompt_batch(RAGGED, configured().tokenizer.eos_id, 10)
    greedy = responses_of(configured(max_length=10).infer(batch))
    assert responses_of(configured(use_greedy=False, top_k=1).infer(batch)) == greedy
    assert responses_of(configured(use_greedy=False, top_k=0, top_p=1e-6).infer(batch)) == greedy
    assert responses_of(configured(use_greedy=False, top_p=1.0, temperature=1e-4).infer(batch)) == greedy


def test_options_without_meaning_for_rollouts_are_harmless(configured):
    batch = prompt_batch(RAGGED, configured().tokenizer.eos_id, 6)
    plain = responses_of(configured(max_length=6).infer(batch))
    assert responses_of(configured(compute_logprob=True, all_probs=True, add_BOS=True).infer(batch)) == plain


def test_an_infer_of_ones_own_need_not_say_which_rows_have_ended(configured, monkeypatch):
    actor = configured(max_length=6)
    batch = prompt_batch(RAGGED, actor.tokenizer.eos_id, 6)
    expected = actor.infer(batch)
    expected["response_tokens"][0, expected["response_lengths"][0] - 1] = actor.tokenizer.eos_id

    class WithItsOwnWay(MegatronGPTRSModel):
        def infer(self, inference_batch):
            return {key: value.clone() for key, value in expected.items() if key != "is_end"}

    monkeypatch.setattr(actor, "__class__", WithItsOwnWay)
    (rollouts,) = actor.infer_each([batch])
    last_tokens = expected["response_tokens"].gather(1, expected["response_lengths"][:, None] - 1).squeeze(1)
    assert torch.equal(rollouts["is_end"], last_tokens == actor.tokenizer.eos_id)
    assert rollouts["is_end"][0] and not rollouts["is_end"].all()


# What inference leaves behind


def test_the_callers_tensors_stay_as_they_are(configured):
    actor = configured(max_length=6)
    batch = prompt_batch(RAGGED, actor.tokenizer.eos_id, 6)
    batch["text"][0, 10] = 77  # `infer` ignores whatever follows a prompt
    kept = {key: value.clone() for key, value in batch.items()}
    rollouts = actor.infer(batch)
    assert all(torch.equal(batch[key], kept[key]) for key in kept)
    assert all(value.data_ptr() != batch["text"].data_ptr() for value in rollouts.values())
    clean = actor.infer(prompt_batch(RAGGED, actor.tokenizer.eos_id, 6))
    assert torch.equal(rollouts["response_tokens"], clean["response_tokens"])


def test_inference_settings_come_in_pairs(tiny_nemo):
    checkpointing = {
        "activations_checkpoint_granularity": "full",
        "activations_checkpoint_method": "uniform",
        "activations_checkpoint_num_layers": 1,
    }
    actor = load_actor(tiny_nemo, **checkpointing)
    training = {key: actor.cfg[key] for key in checkpointing}
    assert training == checkpointing and actor.model.config.recompute_granularity == "full"
    actor.prepare_for_inference()
    actor.prepare_for_inference()
    assert actor.cfg.activations_checkpoint_granularity is None and not actor.model.training
    assert actor.model.config.recompute_granularity is None
    actor.finish_inference()
    assert {key: actor.cfg[key] for key in checkpointing} == checkpointing
    assert actor.model.config.recompute_granularity == "full" and actor.model.training
