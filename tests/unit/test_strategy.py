"""Where responses end according to the generation strategy, and the checks of finished responses."""

import pytest
import torch

from nemo_aligner.generation.ends import check_end_strings
from nemo_aligner.models.nlp.gpt.hf_tokenizer import load_tokenizer
from nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor import MegatronGPTRSModel
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.text_generation_utils import (
    TrackLengthGPTModelTextGenerationStrategy,
    ends_with_text,
    has_content,
    tokenize_batch,
    verify_is_valid_and_clamp_range_,
)
from tests.tiny import END, load_actor

E = 0  # the end-of-document id


@pytest.fixture(scope="module")
def actor(tiny_nemo):
    actor = load_actor(tiny_nemo)
    actor.prepare_for_inference()
    assert actor.tokenizer.eos_id == E
    return actor


@pytest.fixture(scope="module")
def ids(actor):
    """ids(text) -> list of token ids."""
    return actor.tokenizer.text_to_ids


@pytest.fixture
def run(actor):
    """run(rows, prompt lengths, ...) -> (flags of every position, final lengths, which rows ended).

    Rows are presented position by position from the end of the shortest prompt, as in the decoding loop.
    """

    def show(rows, prompt_lengths, max_length, end_strings=(), min_length=0):
        tokens = torch.tensor(rows)
        lengths = torch.tensor(prompt_lengths)
        strategy = TrackLengthGPTModelTextGenerationStrategy(actor, lengths, max_length, min_length)
        flags = [
            strategy.end_of_generation_condition(tokens[:, : t + 1], tokens[:, t], E, list(end_strings)).tolist()
            for t in range(min(prompt_lengths), tokens.size(1))
        ]
        assert strategy.get_lengths().dtype == torch.int64 and strategy.get_is_end().dtype == torch.bool
        return flags, strategy.get_lengths().tolist(), strategy.get_is_end().tolist()

    return show


def test_the_end_token_counts_with_and_without_end_strings(run):
    for end_strings in ([], [END], ["Q"], ["STOP"]):
        flags, lengths, is_end = run([[5, 6, E], [5, 6, 7]], [1, 1], 2, end_strings)
        assert flags == [[False, False], [True, False]]
        assert lengths == [3, 3] and is_end == [True, False]


def test_flags_inside_a_prompt_are_ignored(run):
    _, lengths, is_end = run([[5, 6, 7, E], [5, E, E, 8]], [1, 3], 3)
    assert lengths == [4, 6] and is_end == [True, False]


def test_later_flags_are_ignored(run):
    _, lengths, is_end = run([[5, 6, E, E, 7, E], [5, 6, 7, 8, E, E]], [2, 2], 4)
    assert lengths == [3, 5] and is_end == [True, True]


def test_an_end_beyond_the_budget_is_ignored(run):
    # The budgets of 2 end at positions 2 and 4; the first row's end comes at position 3.
    _, lengths, is_end = run([[5, 6, 7, E, E], [5, 5, 5, 6, E]], [1, 3], 2)
    assert lengths == [3, 5] and is_end == [False, True]


def test_an_end_before_the_minimum_is_ignored(run):
    _, lengths, is_end = run([[5, E, 6, 7], [5, E, 6, E]], [1, 1], 3, min_length=2)
    assert lengths == [4, 4] and is_end == [False, True]


def test_a_row_that_no_position_was_shown_of_has_not_ended(actor):
    strategy = TrackLengthGPTModelTextGenerationStrategy(actor, torch.tensor([3, 5]), 4)
    assert strategy.get_lengths().tolist() == [7, 9] and strategy.get_is_end().tolist() == [False, False]


def test_end_strings_of_one_and_of_several_tokens(run, ids):
    assert len(ids("Q")) == 1 and len(ids("STOP")) == 4
    rows = [[5, *ids("STOP"), 6], [5, 6, *ids("Q"), 6, 6, 6], [5, *ids("STO"), 6, 6]]
    rows[1] = rows[1][:6]
    flags, lengths, is_end = run(rows, [1, 1, 1], 5, ["Q", "STOP"])
    assert lengths == [5, 3, 6] and is_end == [True, True, False]
    assert flags == [[False] * 3, [False, True, False], [False] * 3, [True, False, False], [False] * 3]


@pytest.mark.parametrize("text", [f"{END}\n", f"the dog{END}", f"{END}{END}"])
def test_a_special_token_among_others_is_refused_before_there_is_a_model(monkeypatch, tiny_nemo, text):
    monkeypatch.setattr(MegatronGPTRSModel, "model_provider_func", None)
    with pytest.raises(ConfigError) as refused:
        load_actor(tiny_nemo, rs={"sampling_params.end_strings": ["the dog", END, text]})
    assert str(refused.value) == (
        f"model.rs.sampling_params.end_strings: no response can end with {text!r}, as texts are without special tokens "
        f"such as {END!r}; write {END!r} alone, which ends a response by itself"
    )


def test_texts_and_single_special_tokens_are_end_strings(tiny_hf):
    with pytest.raises(ConfigError, match=r"^end_strings='abc' must be a list of strings$"):
        check_end_strings("abc", None, key="end_strings")
    check_end_strings([END, " ", "\n\n", "<extra_id_1>", "the dog", "€"], load_tokenizer(tiny_hf), key="end_strings")


def test_another_number_of_rows_is_an_error(actor):
    strategy = TrackLengthGPTModelTextGenerationStrategy(actor, torch.tensor([1, 1]), 4)
    with pytest.raises(RuntimeError, match="3 rows of tokens, but 2 prompt lengths"):
        strategy.end_of_generation_condition(torch.ones(3, 2, dtype=torch.int64), torch.ones(3), E, [])


def test_end_token_ids(actor, ids):
    strategy = TrackLengthGPTModelTextGenerationStrategy(actor, torch.tensor([1]), 4)
    assert strategy.end_token_ids(E, []) == [E]
    assert strategy.end_token_ids(E, [END]) == [E]
    assert strategy.end_token_ids(E, ["STOP", "Q"]) == [E, *ids("Q")]


# Text


def test_a_text_is_found_at_the_end_only(actor, ids):
    def ends(text, end):
        return ends_with_text(torch.tensor(ids(text)), end, actor.tokenizer)

    assert ends("a good answer STOP", "STOP") and ends("STOP", "STOP")
    assert not ends("STOP it", "STOP") and not ends("STO", "STOP") and not ends("TOP", "STOP")
    assert ends("the dog sleeps in the sun and STOP" * 5, "STOP")


def test_a_character_split_over_several_tokens(actor, ids):
    tokens = ids("x\u20ac")  # the euro sign is three bytes long
    assert len(tokens) == 4
    found = [ends_with_text(torch.tensor(tokens[:n]), "\u20ac", actor.tokenizer) for n in range(1, 5)]
    assert found == [False, False, False, True]
    # the window of tokens that is decoded to text may begin in the middle of a character
    assert ends_with_text(torch.tensor(ids("\u20ac" * 20)), "\u20ac\u20ac", actor.tokenizer)
    assert not ends_with_text(torch.tensor(ids("\u20ac" * 20)[:-1]), "\u20ac", actor.tokenizer)


def test_tokens_that_decode_to_nothing_do_not_hide_the_text(actor, ids):
    text_behind_specials = torch.tensor([*ids("STOP"), *[E] * 30])
    assert actor.tokenizer.ids_to_text([E] * 30) == ""
    assert ends_with_text(text_behind_specials, "STOP", actor.tokenizer)


def test_tokenize_batch_pads_and_cuts(actor, ids):
    fox, a = ids("the quick brown fox"), ids("a")
    assert len(fox) > 3 and len(a) == 1
    tokens, lengths = tokenize_batch(["the quick brown fox", "a", ""], actor.tokenizer, 3)
    assert tokens.dtype == lengths.dtype == torch.int64
    assert tokens.tolist() == [fox[:3], [*a, E, E], [E, E, E]]
    assert lengths.tolist() == [3, 1, 0]


def test_tokenize_batch_adds_bos_and_eos_before_it_cuts(actor, ids):
    class WithBOS:
        bos_id, eos_id, text_to_ids = 9, E, staticmethod(ids)

    tokens, lengths = tokenize_batch(["the quick brown fox", "a"], WithBOS, 3, add_BOS=True, add_EOS=True)
    assert tokens.tolist() == [[9, *ids("the quick brown fox")[:2]], [9, *ids("a"), E]]
    assert lengths.tolist() == [3, 3]


def verify(actor, tokens, lengths, end_strings=None):
    strategy = TrackLengthGPTModelTextGenerationStrategy(actor, lengths, 4)
    return verify_is_valid_and_clamp_range_(tokens, lengths, strategy, actor.tokenizer, end_strings).tolist()


def test_only_rows_that_end_are_valid(actor, ids):
    stop = ids("STOP")
    rows = [[5, 6, E, E, E, E], [5, 6, 7, E, E, E], [5, *stop, E], [5, *stop, 6], [5, E, 6, 7, 8, 9], [5, *stop, 6]]
    lengths = torch.tensor([3, 3, 5, 6, 6, 5])
    # the second row stops without an end token, although end-of-document padding follows
    assert verify(actor, torch.tensor(rows), lengths, ["STOP"]) == [True, False, True, False, False, True]
    assert verify(actor, torch.tensor(rows), lengths) == [True, False, False, False, False, False]
    assert verify(actor, torch.tensor([[E, E], [5, E]]), torch.tensor([0, 0])) == [False, False]


def test_ids_outside_the_vocabulary_are_clamped_and_invalid(actor):
    vocab_size = actor.tokenizer.vocab_size
    tokens = torch.tensor([[5, vocab_size - 1, E], [5, vocab_size, E], [-1, 5, E], [5, E, 10**9]])
    assert verify(actor, tokens, torch.tensor([3, 3, 3, 2])) == [True, False, False, False]
    assert tokens.tolist() == [[5, vocab_size - 1, E], [5, vocab_size - 1, E], [0, 5, E], [5, E, vocab_size - 1]]


def test_a_response_of_nothing_but_its_end_has_no_content(actor, ids):
    stop = ids("STOP")
    rows = [
        [5, 6, E, E, E, E, E],
        [5, 6, 7, E, E, E, E],
        [5, 6, *stop, E],
        [5, 6, 8, *stop],
        [5, 6, *ids("Q"), E, E, E, E],
    ]
    prompts, lengths = torch.full((5,), 2), torch.tensor([3, 4, 6, 7, 3])
    content = has_content(torch.tensor(rows), prompts, lengths, actor.tokenizer, ["STOP", "Q"])
    assert content.tolist() == [False, True, False, True, False]
    without_strings = has_content(torch.tensor(rows), prompts, lengths, actor.tokenizer, [])
    assert without_strings.tolist() == [False, True, True, True, False]
