"""Requests of the reward server: checked, padded, stripped; and the small helpers around them."""

import threading

import numpy as np
import pytest
import torch

from nemo_aligner.servers.constants import ServerSignal
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.server_utils import (
    FutureResult,
    calculate_inference_batch_padding_multiple,
    decode_bytes_ndarray,
    lock_method,
    one_line,
    pad_batch_and_strip_sequence,
    pad_input,
    process_inputs,
)


def request(tokens, lengths):
    return {"tokens": np.array(tokens), "sequence_lengths": np.array(lengths)}


def letters(sentences):
    """One id per letter, padded with 0."""
    width = max(map(len, sentences))
    ids = [[ord(letter) for letter in sentence] + [0] * (width - len(sentence)) for sentence in sentences]
    return torch.tensor(ids), torch.tensor([len(sentence) for sentence in sentences])


def refuse_sentences(sentences):
    raise AssertionError("tokens were given")


def test_bytes_become_text():
    decoded = decode_bytes_ndarray(np.array([["äb".encode()], [b"c"]], dtype=np.object_))
    assert decoded.tolist() == ["äb", "c"]


@pytest.mark.parametrize(
    ("value", "size", "padded", "added"),
    [([1, 2, 3], 2, [1, 2, 3, 9], 1), ([1, 2], 2, [1, 2], 0), ([], 3, [], 0), ([1], 3, [1, 9, 9], 2)],
)
def test_pad_input(value, size, padded, added):
    before = list(value)
    assert pad_input(value, size, pad_value=9) == (padded, added)
    assert value == before


def test_lock_method_holds_the_lock_and_gives_it_back():
    class Counter:
        def __init__(self):
            self.lock = threading.Lock()

        @lock_method("self.lock")
        def is_locked(self, *, fail=False):
            if fail:
                raise KeyError
            return self.lock.locked()

    counter = Counter()
    assert counter.is_locked() and not counter.lock.locked()
    with pytest.raises(KeyError):
        counter.is_locked(fail=True)
    assert not counter.lock.locked()
    with pytest.raises(AssertionError, match=r'"self\.<attribute>", got \'lock\''):
        lock_method("lock")


def test_tokens_of_a_request():
    tokens, lengths = process_inputs(request([[5, 6], [7, 0]], [[2], [1]]), refuse_sentences)
    assert tokens.tolist() == [[5, 6], [7, 0]] and lengths.tolist() == [[2], [1]]
    assert tokens.dtype == lengths.dtype == torch.int64


def test_sentences_win_over_tokens():
    inputs = {**request([[5, 6]], [[2]]), "sentences": np.array([[b"ab"], [b"c"]], dtype=np.object_)}
    tokens, lengths = process_inputs(inputs, letters)
    assert tokens.tolist() == [[97, 98], [99, 0]] and lengths.tolist() == [[2], [1]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "missing: tokens, sequence_lengths"),
        ({"tokens": np.array([[1]])}, "missing: sequence_lengths"),
        ({"sequence_lengths": np.array([[1]])}, "missing: tokens"),
        (request([[1.5]], [[1]]), "tokens must be int64, got float64"),
        (request([[1]], [[True]]), "sequence_lengths must be int64, got bool"),
        (request([1, 2], [[1], [1]]), r"tokens must be \[B, S\] and not empty, got shape \(2,\)"),
        (request(np.zeros((0, 3), dtype=int), np.zeros((0, 1), dtype=int)), r"not empty, got shape \(0, 3\)"),
        (request([[1, 2]], [1]), r"must have shape \(1, 1\) like tokens, got \(1,\)"),
        (request([[1, 2]], [[1], [1]]), r"must have shape \(1, 1\) like tokens, got \(2, 1\)"),
        (request([[1, 2], [3, 4]], [[3], [1]]), r"must lie in 1\.\.2 \(the width of tokens\), got 1\.\.3"),
        (request([[1, 2], [3, 4]], [[2], [0]]), r"must lie in 1\.\.2 \(the width of tokens\), got 0\.\.2"),
        (request([[1, -7]], [[2]]), "negative id -7"),
        ({"sentences": np.array([[b"a"], [b""]], dtype=np.object_)}, r"must lie in 1\.\.1"),
    ],
)
def test_malformed_requests_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        process_inputs(inputs, letters)


@pytest.mark.parametrize(("rows", "multiple"), [(1, 4), (12, 4), (13, 12), (24, 12)])
def test_padding_multiple(monkeypatch, rows, multiple):
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: 4, raising=False)
    assert calculate_inference_batch_padding_multiple(rows, model_forward_micro_batch_size=3) == multiple


TOKENS = torch.arange(1, 22).reshape(3, 7)


def test_rows_are_added_with_length_zero():
    inputs, added, width = pad_batch_and_strip_sequence(TOKENS, torch.tensor([[1], [5], [2]]), pad_to_multiple=4)
    assert added == 1 and width == 7
    assert inputs["inputs"].tolist() == [*TOKENS.tolist(), [0] * 7]
    assert inputs["sequence_length"].tolist() == [[1], [5], [2], [0]]


@pytest.mark.parametrize(("multiple", "width"), [(None, 7), (1, 5), (2, 6), (4, 7), (64, 7)])
def test_the_width_is_stripped_to_a_multiple_but_never_widened(multiple, width):
    inputs, added, before = pad_batch_and_strip_sequence(TOKENS, torch.tensor([[1], [5], [2]]), 3, multiple)
    assert added == 0 and before == 7
    assert inputs["inputs"].tolist() == TOKENS[:, :width].tolist()


def test_one_line():
    assert one_line("a\n  b\t c ") == "a b c"
    assert one_line("abcdef", limit=5) == "ab..." and one_line("abcde", limit=5) == "abcde"


def test_future_result_is_abstract():
    with pytest.raises(TypeError):
        FutureResult()


def test_server_signals():
    assert {signal.name: signal.value for signal in ServerSignal} == {"FORWARD": 1, "TRAIN": 2, "INVALID": 3, "SAVE": 4}
    tensor = ServerSignal.SAVE.cuda()
    assert tensor.tolist() == [4] and tensor.dtype == torch.int64
