"""A user's reward function: found or refused before the run, called with the arguments it names, results checked."""

import copy
import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nemo_aligner.rewards.python_reward import RewardError, decode_rollouts, load_reward_function, score
from nemo_aligner.utils.errors import ConfigError

PROMPTS = ["one plus one?", "two plus\ntwo?"]
RESPONSES = ["two", "five"]
COLUMNS = {
    "response_tokens": [[7, 0], [8, 9, 9]],
    "records": [{"text": PROMPTS[0], "answer": "two"}, {"text": PROMPTS[1], "answer": "four"}],
    "finished": [True, False],
}


@pytest.fixture
def reward_file(tmp_path):
    """Write Python source to a file and return its path."""

    def write(source, name="my_reward.py"):
        file = tmp_path / name
        file.write_text(source)
        return file

    return write


def one_line_error(target, kwargs=None):
    with pytest.raises(ConfigError) as caught:
        load_reward_function(target, kwargs)
    message = str(caught.value)
    assert message.startswith(f"model.rs.reward.target={target!r}: ") and "\n" not in message
    return message


def score_with(function):
    return score(function, PROMPTS, RESPONSES, **COLUMNS)


def reward_error(function):
    with pytest.raises(RewardError) as caught:
        score_with(function)
    assert "\n" not in str(caught.value)
    return caught.value


def test_function_of_a_file_gets_the_arguments_it_names(reward_file):
    file = reward_file(
        "def exact(prompts, responses, *, records, finished, weight):\n"
        "    right = [record['answer'] == text for record, text in zip(records, responses)]\n"
        "    return [weight * ok + end for ok, end in zip(right, finished)]\n"
    )
    function = load_reward_function(f"{file}:exact", OmegaConf.create({"weight": 2.5}))
    rewards = score_with(function)
    assert rewards.dtype == torch.float32 and rewards.tolist() == [3.5, 0.0]


def test_function_of_a_module_with_positional_extras_and_plain_config_values(reward_file, monkeypatch):
    file = reward_file(
        "def longest(prompts, responses, response_tokens, bonuses=()):\n"
        "    assert type(bonuses) is list\n"
        "    return [len(ids) + sum(bonuses) for ids in response_tokens]\n",
        name="reward_module_on_the_path.py",
    )
    monkeypatch.syspath_prepend(file.parent)
    kwargs = OmegaConf.create({"bonuses": [1, 2]})
    function = load_reward_function("reward_module_on_the_path.longest", kwargs)
    assert score_with(function).tolist() == [5.0, 6.0]


def test_a_file_is_executed_once(reward_file, tmp_path):
    log = tmp_path / "log"
    source = "def reward(prompts, responses):\n    return [1.0] * len(prompts)\n"
    file = reward_file(f"open({str(log)!r}, 'a').write('x')\n{source}")
    for _ in range(2):
        load_reward_function(f"{file}:reward")
    assert log.read_text() == "x"


def test_function_with_open_keywords_gets_everything(reward_file):
    file = reward_file("def count(prompts, responses, **rest):\n    return [len(rest)] * len(prompts)\n")
    assert score_with(load_reward_function(f"{file}:count", {"scale": 1})).tolist() == [4.0, 4.0]


def test_a_callable_object_is_a_function(reward_file):
    file = reward_file(
        "class Reward:\n    def __call__(self, prompts, responses):\n        return [1.0, 2.0]\n\nreward = Reward()\n"
    )
    assert score_with(load_reward_function(f"{file}:reward")).tolist() == [1.0, 2.0]
    assert "is a class" in one_line_error(f"{file}:Reward")


@pytest.mark.parametrize(
    "target",
    ["", "reward", "my_reward.py", "package:reward", "a/b.reward", "my_reward.py:", "x.py:a.b", ".reward", None, 3],
)
def test_malformed_target(target):
    message = one_line_error(target)
    assert 'write "package.module.function" or "path/to/file.py:function"' in message


def test_what_cannot_be_found_is_named(reward_file):
    file = reward_file("answer = 42\n")
    assert "there is no file" in one_line_error(f"{file.parent}/other.py:reward")
    assert "there is no module 'no_such_package'" in one_line_error("no_such_package.module.reward")
    assert "there is no module 'json.nothing'" in one_line_error("json.nothing.reward")
    assert "has no attribute 'reward'" in one_line_error(f"{file}:reward")
    assert "has no attribute 'reward'" in one_line_error("json.decoder.reward")
    assert "is a int" in one_line_error(f"{file}:answer")


def test_a_module_that_fails_to_import_is_told_from_a_missing_one(reward_file, monkeypatch):
    file = reward_file("import no_such_dependency\n", name="reward_with_a_missing_import.py")
    monkeypatch.syspath_prepend(file.parent)
    for target in (f"{file}:reward", "reward_with_a_missing_import.reward"):
        assert "raised ModuleNotFoundError: No module named 'no_such_dependency'" in one_line_error(target)
    broken = reward_file("def reward(:\n", name="broken.py")
    assert "raised SyntaxError" in one_line_error(f"{broken}:reward")


@pytest.mark.parametrize("code", ["0", "'no'"])
def test_a_module_that_exits_when_it_is_imported_ends_nothing_unnoticed(reward_file, code):
    file = reward_file(f"import sys\nsys.exit({code})\n", name=f"leaving_{len(code)}.py")
    assert "raised SystemExit: " in one_line_error(f"{file}:reward")


def test_arguments_that_do_not_fit_are_refused(reward_file):
    file = reward_file(
        "def reward(prompts, responses, *, records, weight=1.0):\n    return []\n"
        "def needy(prompts, responses, *, judge):\n    return []\n"
        "def narrow(prompts):\n    return []\n"
        "def open(prompts, responses, **rest):\n    return []\n"
    )
    message = one_line_error(f"{file}:reward", {"wieght": 2.0})
    assert "sets ['wieght'], which the function does not take; it takes ['weight']" in message
    assert "sets ['prompts']" in one_line_error(f"{file}:reward", {"prompts": []})
    assert "sets ['records'], which the trainer passes itself" in one_line_error(f"{file}:reward", {"records": []})
    assert "missing a required" in one_line_error(f"{file}:needy") and "'judge'" in one_line_error(f"{file}:needy")
    assert "too many positional arguments" in one_line_error(f"{file}:narrow")
    assert "multiple values for argument 'prompts'" in one_line_error(f"{file}:open", {"prompts": 1})
    assert "model.rs.reward.kwargs is [1]" in one_line_error(f"{file}:reward", [1])


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.5],
        (True, 0.5),
        [np.float64(1), torch.tensor(0.5)],
        torch.tensor([1, 0.5], dtype=torch.bfloat16, requires_grad=True),
        np.array([1, 0.5]),
    ],
)
def test_every_kind_of_number_is_taken(values):
    rewards = score_with(lambda prompts, responses, **columns: values)
    assert rewards.dtype == torch.float32 and rewards.tolist() == [1.0, 0.5]


def test_none_cannot_be_judged_and_becomes_nan():
    rewards = score_with(lambda prompts, responses, **columns: [None, 2])
    assert math.isnan(rewards[0]) and rewards[1] == 2.0
    assert score_with(lambda prompts, responses, **columns: [None, None]).isnan().all()


def test_an_empty_batch_is_not_sent_to_the_function():
    empty = {name: [] for name in COLUMNS}
    assert score(lambda *args, **kwargs: 1 / 0, [], [], **empty).shape == (0,)


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 1e39, 10**60, np.float32("nan")])
def test_a_value_that_is_not_finite_names_its_row(value):
    message = str(reward_error(lambda prompts, responses, **columns: [0.0, value]))
    assert "which is not a finite float32, for row 1 of 2, prompt 'two plus two?', record {'answer': 'four'}" in message


@pytest.mark.parametrize("value", ["1.0", [1.0], {}, 1j, np.array([1.0])])
def test_a_value_that_is_no_number_names_its_row(value):
    message = str(reward_error(lambda prompts, responses, **columns: [value, 0.0]))
    assert "which is not a number, for row 0 of 2, prompt 'one plus one?', record {'answer': 'two'}" in message


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([1.0], "1 rewards for 2 responses"),
        ([], "0 rewards for 2 responses"),
        ([1.0] * 3, "3 rewards for 2 responses"),
        (1.0, "a float instead of"),
        (None, "a NoneType instead of"),
        ({0: 1.0, 1: 2.0}, "a dict instead of"),
        (torch.zeros(2, 1), "shape (2, 1) instead of"),
        (np.float32(1), "shape () instead of"),
    ],
)
def test_a_wrong_number_of_values_names_the_first_prompt(values, found):
    message = str(reward_error(lambda prompts, responses, **columns: values))
    assert found in message and "prompt 'one plus one?'" in message


def test_an_exception_names_the_row_that_caused_it():
    def judge(prompts, responses, *, records, **columns):
        return [{"two": 1.0}[record["answer"]] for record in records]

    error = reward_error(judge)
    assert "raised KeyError: 'four' for row 1 of 2, prompt 'two plus two?'" in str(error)
    assert isinstance(error.__cause__, KeyError)


def test_a_function_that_changes_its_arguments_changes_nothing_else():
    before = copy.deepcopy((PROMPTS, RESPONSES, COLUMNS))

    def careless(prompts, responses, *, records, response_tokens, **columns):
        found = [float(len(ids)) for ids in response_tokens]
        prompts.pop(), responses.clear(), response_tokens[0].clear(), records[0].clear()
        return found

    first = score_with(careless).tolist()
    assert score_with(careless).tolist() == first and before == (PROMPTS, RESPONSES, COLUMNS)

    def careless_and_failing(prompts, responses, **columns):
        prompts.clear()
        raise KeyError("four")

    assert "raised KeyError: 'four' for row 0 of 2, prompt 'one plus one?'" in str(reward_error(careless_and_failing))


def test_an_exception_that_no_single_row_causes_names_the_batch():
    def no_batches(prompts, responses, **columns):
        if len(prompts) > 1:
            raise MemoryError("batch\ntoo large")
        return [1.0]

    message = str(reward_error(no_batches))
    assert "raised MemoryError: batch too large; the batch begins with row 0 of 2, prompt 'one plus one?'" in message


def test_a_long_prompt_is_shortened():
    columns = {**COLUMNS, "records": [{}, {}]}
    with pytest.raises(RewardError) as caught:
        score(lambda *args, **kwargs: [math.nan, 0.0], ["x" * 5000, "y"], RESPONSES, **columns)
    assert len(str(caught.value)) < 250 and str(caught.value).endswith("xxx...'")


def test_gradients_are_off_inside_the_function():
    def reward(prompts, responses, **columns):
        assert not torch.is_grad_enabled()
        return [0.0, 0.0]

    assert score_with(reward).tolist() == [0.0, 0.0]


class LetterTokenizer:
    """Id 1 is "a", 2 is "b", ...; id 0 ends a text and reads "<end>"."""

    eos_id = 0

    def ids_to_text(self, ids):
        return "".join("<end>" if i == 0 else chr(ord("a") + i - 1) for i in ids)


def rollouts(**changes):
    batch = {
        # "ab" + "c" ended by id 0; "b" + "cde" cut off; "abc" + only the end; "a" + nothing at all
        "response_tokens": torch.tensor(
            [[1, 2, 3, 0, 0, 0], [2, 3, 4, 5, 0, 0], [1, 2, 3, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
        ),
        "response_lengths": torch.tensor([4, 4, 4, 1]),
        "prompt_lengths": torch.tensor([2, 1, 3, 1]),
    }
    return {**batch, **changes}


def test_rollouts_are_cut_into_texts_and_ids():
    columns = decode_rollouts(rollouts(is_end=torch.tensor([True, False, True, False])), LetterTokenizer())
    assert columns == {
        "prompts": ["ab", "b", "abc", "a"],
        "responses": ["c", "cde", "", ""],
        "response_tokens": [[3, 0], [3, 4, 5], [0], []],
        "finished": [True, False, True, False],
    }


def test_a_prompt_is_the_text_of_its_record_where_that_has_one():
    records = [{"text": "<user>ab"}, {}, {"text": [1, 2, 3]}, {"text": ""}]
    columns = decode_rollouts(rollouts(records=records), LetterTokenizer())
    assert columns["prompts"] == ["<user>ab", "b", "abc", ""]


def test_without_is_end_the_last_token_tells_what_is_finished():
    assert decode_rollouts(rollouts(), LetterTokenizer())["finished"] == [True, False, True, False]


def test_only_a_finished_response_loses_its_end_string():
    ended = torch.tensor([True, True, True, False])
    columns = decode_rollouts(rollouts(is_end=ended), LetterTokenizer(), end_strings=["e", "de", ""])
    assert columns["responses"] == ["c", "c", "", ""] and columns["response_tokens"][1] == [3, 4, 5]
    columns = decode_rollouts(rollouts(is_end=~ended), LetterTokenizer(), end_strings=["de"])
    assert columns["responses"][:2] == ["c<end>", "cde"]
