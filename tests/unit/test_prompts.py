import os
import pickle
import re

import pytest

from nemo_aligner.data.nlp.prompts import PromptFile
from nemo_aligner.utils.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write_file(content: bytes) -> str:
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(content)
        return str(path)

    return write_file


def test_records_by_row_with_all_their_keys(write):
    path = write('{"text": "grüße", "answer": 4}\n{"text": ""}\n{"text": "last, no line break"}'.encode())
    prompts = PromptFile(path)
    assert list(prompts) == [{"text": "grüße", "answer": 4}, {"text": ""}, {"text": "last, no line break"}]
    assert prompts[2]["text"] == "last, no line break"
    assert len(prompts) == 3


def test_blank_lines_are_no_rows(write):
    prompts = PromptFile(write(b'\n  \t\n{"text": "a"}\n\r\n{"text": "b"}\r\n\n'))
    assert [record["text"] for record in prompts] == ["a", "b"]


def test_byte_order_mark_is_accepted(write):
    assert list(PromptFile(write(b'\xef\xbb\xbf{"text": "a"}\n'))) == [{"text": "a"}]


def test_a_copy_sent_to_a_worker_reads_the_same(write):
    prompts = PromptFile(write(b'{"text": "a"}\n{"text": "b"}\n'))
    assert list(pickle.loads(pickle.dumps(prompts))) == list(prompts)


def test_both_halves_of_a_surrogate_pair_are_a_character(write):
    assert PromptFile(write(b'{"text": "\\ud83d\\ude00"}\n'))[0]["text"] == "\U0001f600"


@pytest.mark.parametrize("content", [b'{"text": "aa"}\n{"text": "b"}\n', b'{"text": "b"}\n{"text": "a"}\n'])
def test_a_file_that_changed_after_it_was_opened_is_refused(write, content):
    path = write(b'{"text": "a"}\n{"text": "b"}\n')
    prompts = pickle.loads(pickle.dumps(PromptFile(path)))
    assert prompts[1] == {"text": "b"}
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns - 1))  # at any clock resolution, the next write's time differs
    prompts = PromptFile(path)
    write(content)
    with pytest.raises(ConfigError, match=f"^{path}: the prompt file has changed since this run opened it; start"):
        prompts[1]


def test_a_file_that_was_only_touched_is_read_on(write):
    path = write(b'{"text": "a"}\n{"text": "b"}\n')
    prompts = PromptFile(path)
    os.utime(path, ns=(0, 0))
    assert list(prompts) == [{"text": "a"}, {"text": "b"}]


# the error is in the second line of each file, unless it concerns the whole file
BROKEN = [
    (b'{"text": "a"}\n{"text": "b"\n', "line 2: not valid JSON (Expecting ',' delimiter, column 13)"),
    (b'{"text": "a"}\n["b"]\n', "line 2: a list, not an object"),
    (b'{"text": "a"}\n"b"\n', "line 2: a str, not an object"),
    (b'{"text": "a"}\n{"prompt": "b"}\n', "line 2: no \"text\" among the keys ['prompt']"),
    (b'{"text": "a"}\n{"text": null}\n', 'line 2: "text" is a NoneType'),
    (b'{"text": "a"}\n{"text": ["b"]}\n', 'line 2: "text" is a list'),
    (b'{"text": "a"}\n{"text": "\xe4"}\n', "line 2: not UTF-8"),
    (
        b'{"text": "a"}\n{"text": "b \\ud83d"}\n',
        "line 2: \"text\" holds '\\ud83d', half of a surrogate pair; write both",
    ),
    (b'{"text": "a"}\n{"text": "b", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 2: JSON nested too deeply"),
    (
        b'{"text": "a"}\n{"text": "b", "x": ' + b"1" * 5000 + b"}",
        "line 2: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; write",
    ),
    (b'\n\n{"text": 1}\n', 'line 3: "text" is a int'),
    (b"", "the prompt file holds no records"),
    (b"\n \n", "the prompt file holds no records"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_errors_name_file_and_line_in_one_line(write, content, message):
    path = write(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        PromptFile(path)
    assert path in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.jsonl", ""])  # "" is the folder itself
def test_missing_file(tmp_path, name):
    with pytest.raises(ValueError, match=r"no such prompt file.*model\.data\.data_prefix"):
        PromptFile(str(tmp_path / name))
