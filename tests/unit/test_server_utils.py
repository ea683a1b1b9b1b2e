"""Requests to the reward server: admitted, checked, padded, stripped; its configuration; and small helpers."""

import json
import socket
import threading

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nemo_aligner.algorithms.reward_server import MODEL_KEYS
from nemo_aligner.servers.constants import ServerSignal
from nemo_aligner.servers.gate import Refused, check_header, split_body
from nemo_aligner.servers.triton_endpoint import check_inference_config, check_port_is_free
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.server_utils import (
    FutureResult,
    answer_separately,
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
        ({"sentences": np.array([[b"a", b"b"]], dtype=np.object_)}, r"sentences must be \[B, 1\], got shape \(1, 2\)"),
        ({"sentences": np.array([[b"a\xff"]], dtype=np.object_)}, "can't decode byte 0xff in position 1"),
    ],
)
def test_malformed_requests_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        process_inputs(inputs, letters)


def test_sound_requests_are_scored_together_and_the_others_answered_in_their_places():
    calls = []

    def read(request):
        return 1 / request

    def score(contents):
        calls.append(contents)
        return [10 * content for content in contents]

    first, *errors, last = answer_separately([2, 0, "x", 4], read, score)
    assert (first, last) == (5.0, 2.5) and calls == [[0.5, 0.25]]
    assert [type(error) for error in errors] == [ZeroDivisionError, TypeError]
    assert isinstance(answer_separately([0], read, score)[0], ZeroDivisionError) and len(calls) == 1


def header(*shapes, **fields):
    return json.dumps({"inputs": [{"name": "tokens", "shape": shape} for shape in shapes], **fields}).encode()


def test_a_header_keeps_its_meaning_and_loses_its_ambiguity():
    text = b'{"id": "7", "inputs": [{"shape": [999999999], "shape": [2, 3], "name": "tokens", "datatype": "INT64"}]}'
    checked = check_header(text, body_size=6)
    assert json.loads(checked) == {"id": "7", "inputs": [{"shape": [2, 3], "name": "tokens", "datatype": "INT64"}]}
    assert checked.count(b"shape") == 1
    assert split_body(b"headerpayload", "6") == (b"header", b"payload")
    assert split_body(b"header", None) == (b"header", b"")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "the header is not JSON"),
        (b"\xff", "the header is not JSON"),
        (b"[" * 100_000, "the header is not JSON"),
        (b"1" * 5000, "the header is not JSON"),
        (b"[]", "the header must list inputs"),
        (b"{}", "the header must list inputs"),
        (header(), "the header must list inputs"),
        (b'{"inputs": [1]}', "the header must list inputs"),
        (b'{"inputs": [{}]}', "each input needs a shape"),
        (header([1.0, 2]), "each input needs a shape"),
        (header([True]), "each input needs a shape"),
        (header([1] * 9), "each input needs a shape"),
        (header([2, 2], [3, 2]), r"declares the shape \[3, 2\], the body has 5 bytes"),
        (header([-2, -2]), r"declares the shape \[-2, -2\]"),
        (header([0, 7]), r"declares the shape \[0, 7\]"),
        (header([2**40, 2**40]), "the body has 5 bytes"),
    ],
)
def test_headers_that_triton_might_not_survive(text, reason):
    with pytest.raises(Refused, match=reason) as refused:
        check_header(text, body_size=5)
    assert refused.value.status == 400


@pytest.mark.parametrize("size", ["0", "14", "-1", "1e3", "", "9" * 30, "\u0663"])
def test_sizes_that_do_not_fit_the_body(size):
    with pytest.raises(Refused, match=r"must lie in 1\.\.13"):
        split_body(b"headerpayload", size)


ENDPOINT = {"port": 5555, "model_name": "reward_model"}
SECTION = {**ENDPOINT, "inference_micro_batch_size": 4, "strip_sequence_length_to_multiple": None}


def test_a_section_of_the_configuration_in_order():
    section = OmegaConf.create({"sizes": [2, 4], "inference": {**SECTION, "inference_micro_batch_size": "${sizes}"}})
    settings = check_inference_config(section.inference, MODEL_KEYS)
    assert settings == {**SECTION, "inference_micro_batch_size": [2, 4]}
    assert check_inference_config(OmegaConf.create(ENDPOINT)) == ENDPOINT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"batch": 1},
            "inference.batch is not known; the keys are port, model_name, .*, strip_sequence.*, max_request_tokens",
        ),
        ({"port": 0}, "inference.port=0 must be a port number, 1 to 65535"),
        ({"port": 65536}, "inference.port=65536 must be a port number"),
        ({"port": "5555"}, "inference.port='5555' must be a port"),
        ({"address": ""}, "inference.address='' must be an IPv4 address or name"),
        ({"address": None}, "inference.address=None must be an IPv4 address or name"),
        ({"model_name": "a b"}, "inference.model_name='a b' must be a name of letters"),
        ({"max_queue_delay_microseconds": -1}, "inference.max_queue_delay_microseconds=-1 must be a whole number"),
        ({"max_request_tokens": 0}, "inference.max_request_tokens=0 must be a positive whole number"),
        ({"inference_micro_batch_size": 0}, "inference.inference_micro_batch_size=0 must be a positive whole number"),
        ({"inference_micro_batch_size": []}, r"inference.inference_micro_batch_size=\[\] must be"),
        ({"inference_micro_batch_size": [4, -1]}, r"inference.inference_micro_batch_size=\[4, -1\] must be"),
        ({"inference_micro_batch_size": True}, "inference.inference_micro_batch_size=True must be"),
        ({"strip_sequence_length_to_multiple": 0}, "inference.strip_sequence_length_to_multiple=0 must be"),
    ],
)
def test_mistakes_in_the_section(change, message):
    section = OmegaConf.create({**SECTION, **change})
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        check_inference_config(section, MODEL_KEYS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", [None, "word"])
def test_the_section_has_to_be_one(section):
    with pytest.raises(ConfigError, match=rf"^inference={section!r} must be a section with keys, of port, "):
        check_inference_config(section)


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("port", "a port number, 1 to 65535"),
        ("inference_micro_batch_size", "a positive whole number or a list of them"),
        ("strip_sequence_length_to_multiple", "a positive whole number or null"),
    ],
)
def test_a_missing_key_of_the_section(key, wanted):
    section = OmegaConf.create({name: value for name, value in SECTION.items() if name != key})
    with pytest.raises(ConfigError, match=rf"^inference\.{key} is not set; it must be {wanted}$"):
        check_inference_config(section, MODEL_KEYS)


def test_a_port_must_be_free():
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", 0))
        port = occupant.getsockname()[1]
        occupant.listen()
        with pytest.raises(
            ConfigError, match=rf"inference\.port={port}: cannot listen there \(Address already in use\)"
        ):
            check_port_is_free("127.0.0.1", port)
    check_port_is_free("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"inference\.address=192\.0\.2\.1, .* cannot listen there"):
        check_port_is_free("192.0.2.1", port)


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
