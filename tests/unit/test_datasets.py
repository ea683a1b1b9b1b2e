import numpy as np
import pytest
from nemo.utils import logging
from omegaconf import OmegaConf

from nemo_aligner.data.nlp.datasets import BlendedDataset, RLHFDataset, blend_rows
from nemo_aligner.data.nlp.samplers import PaddingRow
from nemo_aligner.utils.errors import ConfigError


class LetterTokenizer:
    """One token per character: a is 1, b is 2, and so on."""

    eos_id = 0
    vocab_size = 27

    def text_to_ids(self, text):
        return [ord(character) - ord("a") + 1 for character in text]

    def ids_to_text(self, ids):
        return "".join(chr(ord("a") + id - 1) for id in ids)


def make_dataset(texts, max_length=6, seq_length=10, documents=None, data=None, **data_switches):
    cfg = OmegaConf.create({"data": data_switches, "rs": {"length_params": {"max_length": max_length}}})
    data = [{"text": text, "answer": i} for i, text in enumerate(texts)] if data is None else data
    documents = np.arange(len(data)) if documents is None else documents
    return RLHFDataset(cfg, LetterTokenizer(), "train", "prompts.jsonl", documents, data, seq_length, seed=1)


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(logging, "warning", messages.append)
    return messages


def test_item():
    item = make_dataset(["abc", "d"])[0]
    assert item["text"].tolist() == [1, 2, 3]
    assert str(item["text"].dtype) == "torch.int64"
    del item["text"]
    assert item == {"length": 3, "loss_multiplier": True, "prompt_index": 0, "is_padding": False}


def test_documents_choose_the_rows():
    dataset = make_dataset(["a", "b", "c"], documents=np.array([2, 0]))
    assert len(dataset) == 2
    assert [dataset[i]["text"].tolist() for i in (0, 1)] == [[3], [1]]
    assert [dataset[i]["prompt_index"] for i in (0, 1)] == [0, 1]
    assert dataset.record(0) == {"text": "c", "answer": 2}


@pytest.mark.parametrize("documents", [[0, 3], [-1, 0]])
def test_documents_outside_the_data_are_refused(documents):
    with pytest.raises(ValueError, match=r"rows .* were asked for, but prompts\.jsonl has 3"):
        make_dataset(["a", "b", "c"], documents=documents)


def test_no_documents_are_refused():
    with pytest.raises(ValueError, match="train: no prompts"):
        make_dataset(["a"], documents=[])


def test_indices_wrap():
    dataset = make_dataset(["a", "b", "c"])
    assert dataset[4]["prompt_index"] == 1
    assert dataset.record(5)["text"] == "c"
    with pytest.raises(NotImplementedError, match="-1"):
        dataset[-1]


def test_equal_prompts_stay_apart():
    dataset = make_dataset(["a", "a"])
    assert [dataset[i]["prompt_index"] for i in (0, 1)] == [0, 1]


def test_padding_row_is_flagged():
    dataset = make_dataset(["a", "b"])
    assert dataset[PaddingRow(1)]["is_padding"] is True
    assert dataset[PaddingRow(1)]["text"].tolist() == [2]
    assert dataset[1]["is_padding"] is False


def test_encode():
    assert make_dataset(["a"]).encode("ab") == ([1, 2], 2)
    with_end = make_dataset(["a"], append_eod=True)
    assert with_end.encode("ab") == ([1, 2, 0], 3)
    assert with_end.encode("") == ([], 0)


def test_ftfy_repairs_the_text(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"model\.data\.apply_ftfy"):
        make_dataset(["a"], apply_ftfy=True)
    (tmp_path / "ftfy.py").write_text("def fix_text(text):\n    return text.replace('x', 'a')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert make_dataset(["a"], apply_ftfy=True).encode("xb") == ([1, 2], 2)
    assert make_dataset(["a"]).encode("xb") == ([24, 2], 2)


@pytest.mark.parametrize(
    ("model", "seq_length", "expected"),
    [
        ({"rs": {"length_params": {"max_length": 7}}}, 10, 3),
        ({"length_params": {"max_length": 2}}, 10, 8),
        ({"length_params": {"max_length": 2}, "rs": {"length_params": {"max_length": 7}}}, 10, 8),
        ({}, 11, 5),
    ],
)
def test_longest_admitted_prompt(model, seq_length, expected):
    cfg = OmegaConf.create({"data": {}} | model)
    texts = [{"text": "a" * expected}, {"text": "a" * (expected + 1)}]
    dataset = RLHFDataset(cfg, LetterTokenizer(), "train", "p", [0, 1], texts, seq_length, seed=1)
    assert [dataset[i]["loss_multiplier"] for i in (0, 1)] == [True, False]


@pytest.mark.parametrize(("max_length", "seq_length"), [(10, 10), (11, 10)])
def test_no_room_for_a_prompt(max_length, seq_length):
    with pytest.raises(AssertionError, match=f"seq_length={seq_length} .* {max_length} tokens"):
        make_dataset(["a"], max_length, seq_length)


def test_over_long_and_empty_prompts_are_replaced(warnings):
    # up to 4 tokens are allowed; "" and "e..." are replaced, the latter (row 3) by wrapping around to the start
    dataset = make_dataset(["abcd", "", "b", "eeeee"])
    items = [dataset[i] for i in range(4)]
    assert [item["text"].tolist() for item in items] == [[1, 2, 3, 4], [2], [2], [1, 2, 3, 4]]
    assert [item["length"] for item in items] == [4, 1, 1, 4]
    assert [item["loss_multiplier"] for item in items] == [True, False, True, False]
    assert [item["prompt_index"] for item in items] == [0, 1, 2, 3]
    assert [dataset.record(i)["answer"] for i in range(4)] == [0, 2, 2, 0]
    assert len(warnings) == 2
    assert "prompt 1 has 0 tokens, outside 1 to 4; prompt 2 takes its place" in warnings[0]
    assert "prompt 3 has 5 tokens, outside 1 to 4; prompt 0 takes its place" in warnings[1]


def test_no_admissible_prompt_at_all():
    dataset = make_dataset(["", "abcde"])
    with pytest.raises(RuntimeError, match="every prompt is empty or longer than 4 tokens"):
        dataset[0]


def test_count_over_long(warnings):
    assert make_dataset(["abcd", "", "b", "eeeee", "ffffff"]).count_over_long() == 3
    assert len(warnings) == 1
    assert "3 of 5 prompts are empty or longer than 4 tokens" in warnings[0]
    assert make_dataset(["abcd", "b"]).count_over_long() == 0
    assert len(warnings) == 1


def test_prompts_of_which_none_is_admissible_are_refused_when_they_are_counted():
    with pytest.raises(ConfigError) as error:
        make_dataset(["", "abcde"]).count_over_long()
    assert str(error.value) == (
        "train: every prompt is empty or longer than 4 tokens; shorten the prompts, raise model.data.seq_length or "
        "lower model.rs.length_params.max_length"
    )


def test_end_token_counts_towards_the_limit(warnings):
    assert make_dataset(["abc", "abcd"], append_eod=True).count_over_long() == 1


def test_token_arrays_are_prompts_too(warnings):
    data = [np.array([3, 1, 2], dtype=np.uint16), np.array([1] * 9, dtype=np.uint16)]
    dataset = make_dataset(None, data=data)
    assert dataset[0]["text"].tolist() == [3, 1, 2]
    assert dataset[1]["text"].tolist() == [3, 1, 2]
    assert dataset.record(1) == {"text": "cab"}


def test_blend_rows_by_hand():
    # weights 2:1; turns (j + 1/2) / weight: a 3/4, 9/4, 15/4, 21/4; b 3/2, 9/2
    component, row = blend_rows([2, 1], [2, 5], 6)
    assert component.tolist() == [0, 1, 0, 0, 1, 0]
    assert row.tolist() == [0, 0, 1, 0, 1, 1]


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.7, 0.3], [5, 1, 1, 1], [0.98, 0.01, 0.01], [3, 2, 2, 2, 2, 1]])
def test_blend_rows_follow_sainte_lague(weights):
    lengths = [3 + i for i in range(len(weights))]
    counts = [0] * len(weights)
    component, row = blend_rows(weights, lengths, 200)
    for c, r in zip(component.tolist(), row.tolist(), strict=True):
        # the textbook formulation: the next seat goes to the largest weight / (2 * seats + 1)
        quotients = [weight / (2 * count + 1) for weight, count in zip(weights, counts, strict=True)]
        assert quotients[c] == pytest.approx(max(quotients))
        assert r == counts[c] % lengths[c]
        counts[c] += 1


def test_blended_dataset(warnings):
    blend = BlendedDataset([make_dataset(["a", "b"]), make_dataset(["c", "eeeee", "d"])], [2, 1], 6)
    assert len(blend) == 6
    assert [blend[i]["text"].tolist() for i in range(6)] == [[1], [3], [2], [1], [4], [2]]
    assert [blend[i]["prompt_index"] for i in range(6)] == [0, 1, 2, 3, 4, 5]
    assert [blend[i]["loss_multiplier"] for i in range(6)] == [True, True, True, True, False, True]
    assert [blend.record(i)["text"] for i in range(6)] == ["a", "c", "b", "a", "d", "b"]
    assert blend[7]["prompt_index"] == 1
    assert blend[PaddingRow(1)]["is_padding"] is True
    assert blend[1]["is_padding"] is False
    assert blend.count_over_long() == 1
    with pytest.raises(NotImplementedError, match="-1"):
        blend[-1]
