"""A Python reward function behind HTTP: what it sees, what its errors cause, how its server starts and stops."""

import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import psutil
import pytest
from omegaconf import OmegaConf
from pytriton.client.exceptions import PyTritonClientInferenceServerError

from nemo_aligner.algorithms import python_reward_server
from nemo_aligner.algorithms.python_reward_server import PythonRewardServer
from nemo_aligner.models.nlp.gpt.hf_tokenizer import load_tokenizer
from nemo_aligner.rewards.python_reward import RewardError, load_reward_function
from nemo_aligner.utils.errors import ConfigError
from tests.distributed.serving import JOB_VARIABLES, bytes_column, client, tokens_request, wait_until_ready
from tests.hurtable_server import skip_if_triton_cannot_run
from tests.ports import free_port
from tests.tiny import END, TEXTS

SCRIPTS = Path(__file__).parents[2] / "examples/nlp/gpt"
FUNCTIONS = """
seen = []

def length(prompts, responses):
    seen.append((list(prompts), list(responses)))
    return [None if "?" in response else len(response) for response in responses]

def exact(prompts, responses, *, records, finished):
    seen.append((list(prompts), list(responses)))
    return [record["answer"] == response and ended for record, response, ended in zip(records, responses, finished)]

def spoilt(prompts, responses, *, response_tokens):
    if any("raise" in response for response in responses):
        raise KeyError("no such\\nkey")
    if any("short" in response for response in responses):
        return []
    return [float("nan") if "nan" in response else len(ids) for response, ids in zip(responses, response_tokens)]

def everything(prompts, responses, **columns):
    return [0] * len(responses)
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "functions.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture(scope="module")
def tokenizer(tiny_hf):
    return load_tokenizer(tiny_hf)


@pytest.fixture
def make(functions, tokenizer):
    """A server for one of the functions, not started, and the list of (prompts, responses) of each call."""

    def build(name, **settings):
        function = load_reward_function(f"{functions}:{name}")
        seen = sys.modules["rs_reward_functions"].seen
        seen.clear()
        return PythonRewardServer(function, tokenizer, "reward_model", 0, (END, "DONE"), **settings), seen

    return build


@pytest.fixture
def rollouts(tokenizer):
    """Turns (prompt, response) pairs into `tokens`, `sequence_lengths` and `prompt_lengths`."""

    def build(*pairs):
        ids = [(tokenizer.text_to_ids(prompt), tokenizer.text_to_ids(response)) for prompt, response in pairs]
        request = tokens_request(*[prompt + response for prompt, response in ids])
        return {**request, "prompt_lengths": np.array([[len(prompt)] for prompt, _ in ids])}

    return build


def flags(*values):
    return np.array(values).reshape(-1, 1)


def records(*values):
    return bytes_column(*[json.dumps(value) for value in values])


def rewards_of(answer):
    assert answer["rewards"].dtype == np.float32 and answer["judged"].dtype == np.bool_
    return [value if judged else None for (value,), (judged,) in zip(answer["rewards"], answer["judged"], strict=True)]


def test_the_function_sees_what_it_would_see_in_the_trainer(make, rollouts):
    server, seen = make("exact")
    request = rollouts(("the dog", f" is kind{END}"), ("one", " two DONE"), ("one", " two DONE"))
    first = {"text": f"{END}the dog", "answer": " is kind"}  # the prompt as written in its file
    request |= {"finished": flags(True, True, False), "records": records(first, {"answer": " is kind"}, {"answer": 0})}
    (answer,) = server.answer([request])
    # The end string is cut off a finished response, but is part of the text in an unfinished one.
    assert seen == [([f"{END}the dog", "one", "one"], [" is kind", " two ", " two DONE"])]
    assert rewards_of(answer) == [1, 0, 0]


def test_merged_requests_are_scored_with_one_call_and_split(make, rollouts):
    server, seen = make("length")
    requests = [rollouts(("a", "bcd"), ("a", "?")), {"sentences": bytes_column("äb")}, rollouts(("abc", "e"))]
    answers = server.answer(requests)
    assert [rewards_of(answer) for answer in answers] == [[3, None], [2], [1]]
    assert np.isnan(answers[0]["rewards"][1, 0])
    assert seen == [(["a", "a", "", "abc"], ["bcd", "?", "äb", "e"])]


def test_older_clients_send_no_prompts(make, rollouts, monkeypatch):
    warnings = []
    monkeypatch.setattr(python_reward_server.logging, "warning", warnings.append)
    server, seen = make("length")
    request = rollouts(("the dog", "sleeps"))
    del request["prompt_lengths"]
    request["records"] = records({"text": "the dog"})
    assert rewards_of(server.answer([request])[0]) == [13]
    server.answer([request, {"sentences": bytes_column("ab")}])
    assert seen == [([""], ["the dogsleeps"]), (["", ""], ["the dogsleeps", "ab"])]
    assert warnings == ["a client sends no prompt_lengths: prompts are empty, whole texts are the responses"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"records": None}, "the reward function takes records, which this request lacks; send a column for each"),
        ({"records": None, "finished": None}, "takes records and finished, which this request lacks"),
        ({"records": bytes_column("{", "{}")}, "records must be JSON objects in UTF-8"),
        ({"records": bytes_column(b"\xff", "{}")}, "records must be JSON objects in UTF-8"),
        ({"records": bytes_column("[" * 100_000, "{}")}, "records must be JSON objects in UTF-8"),
        ({"records": bytes_column("{}", "[1]")}, "records must be JSON objects, got a list"),
        ({"records": bytes_column("{}")}, r"records must have shape \(2, 1\), got \(1, 1\)"),
        ({"finished": np.ones((2, 2), dtype=bool)}, r"finished must have shape \(2, 1\), got \(2, 2\)"),
        ({"prompt_lengths": flags(1, 99)}, r"prompt_lengths must lie in 0\.\.sequence_lengths; row 1 has 99 of 2"),
        ({"prompt_lengths": flags(-1, 1)}, "row 0 has -1 of 2"),
        ({"tokens": flags(1, 2)}, r"sequence_lengths must lie in 1\.\.1"),
        ({"tokens": np.full((2, 2), 10**6)}, "tokens holds the id 1000000; the vocabulary has"),
        ({"tokens": None}, "missing: tokens"),
        ({"sentences": bytes_column("a", "b")}, "prompt_lengths count tokens: send tokens and sequence_lengths"),
        ({"tokens": np.ones((2, 40), dtype=np.int64)}, "a request of 2 rows, 40 wide, is larger"),
    ],
)
def test_malformed_requests_are_refused_and_others_answered(make, rollouts, change, message):
    server, _ = make("exact", max_request_tokens=64)
    good = rollouts(("a", "b"), ("a", "c")) | {
        "finished": flags(True, True),
        "records": records(*[{"answer": "b"}] * 2),
    }
    bad = {name: value for name, value in {**good, **change}.items() if value is not None}
    first, refused, last = server.answer([good, bad, good])
    assert rewards_of(first) == rewards_of(last) == [1, 0]
    assert isinstance(refused, ValueError)
    with pytest.raises(ValueError, match=message):
        raise refused


def test_a_function_that_takes_everything_is_given_nothing_made_up(make, rollouts):
    server, _ = make("everything")
    (refused,) = server.answer([rollouts(("a", "b"))])
    assert "takes records and finished, which this request lacks" in str(refused)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("raise", "the reward function raised KeyError: 'no such\\nkey' for row 1 of 2, prompt 'one'"),
        ("nan", "the reward function returned nan, which is not a finite float32, for row 1 of 2, prompt 'one'"),
        ("short", "the reward function returned 0 rewards for 2 responses; the batch begins with row 0 of 2, prompt"),
    ],
)
def test_a_function_that_fails_is_the_answer_to_that_request_alone(make, rollouts, word, message):
    server, _ = make("spoilt")
    good = rollouts(("the dog", "a"))
    first, failed, last = server.answer([good, rollouts(("good", "a"), ("one", f"{word} two")), good])
    assert rewards_of(first) == rewards_of(last) == [1]
    assert isinstance(failed, RewardError) and str(failed).startswith(message) and "\n" not in str(failed)


def environment():
    return {name: value for name, value in os.environ.items() if name not in JOB_VARIABLES}


@pytest.fixture(scope="module")
def script(functions, tiny_nemo):
    """The port of a server started by the script with an archive's tokenizer."""
    skip_if_triton_cannot_run()
    port = free_port()
    command = [
        sys.executable, SCRIPTS / "serve_python_reward.py", "reward.target=functions.py:exact",
        f"tokenizer={tiny_nemo}", f"inference.port={port}", "end_strings=[DONE]",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=functions.parent, env=environment())
    try:
        with client(port) as asker:
            wait_until_ready(asker, lambda: process.poll() is None)
        yield port
    finally:
        process.terminate()
        assert process.wait(40) == 0


def test_the_script_serves_the_wire_format(script, rollouts):
    request = rollouts(("one", " two DONE"), ("one", " three")) | {"finished": flags(True, False)}
    with client(script) as asker:
        declared = {spec.name: (spec.shape, spec.dtype) for spec in asker.model_config.inputs}
        assert declared == {
            "sentences": ((-1,), np.bytes_), "tokens": ((-1,), np.int64), "sequence_lengths": ((-1,), np.int64),
            "prompt_lengths": ((1,), np.int64), "finished": ((1,), np.bool_), "records": ((1,), np.bytes_),
        }  # fmt: skip
        answer = asker.infer_batch(**request, records=records({"answer": " two "}, {"answer": " three"}))
        assert rewards_of(answer) == [1, 0]
        with pytest.raises(PyTritonClientInferenceServerError, match="takes records, which this request lacks"):
            asker.infer_batch(**request)
        failure = r"Message: the reward function raised KeyError: 'answer' for row 1 of 2, prompt 'one', record .*1}$"
        with pytest.raises(PyTritonClientInferenceServerError, match=failure):
            asker.infer_batch(**request, records=records({"answer": " two "}, {"question": 1}))
        assert rewards_of(asker.infer_batch(**request, records=records(*[{"answer": 0}] * 2))) == [0, 0]


SERVER = """
import sys
import numpy as np
from pytriton.model_config import Tensor
from nemo_aligner.servers import triton_endpoint

if __name__ == "__main__":
    tensor = Tensor(name="rewards", shape=(1,), dtype=np.float32)
    triton_endpoint.serve(
        lambda requests: requests, [tensor], [tensor], model_name="reward_model", address="127.0.0.1",
        port=int(sys.argv[1]), max_queue_delay_microseconds=0,
    )
"""


@pytest.fixture
def servers(tmp_path):
    """Three servers: {signal: (port, process)}."""
    skip_if_triton_cannot_run()
    (tmp_path / "server.py").write_text(SERVER)
    started = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        port = free_port()
        command = [sys.executable, tmp_path / "server.py", str(port)]
        started[number] = port, subprocess.Popen(command, env=environment())
    yield started
    for _, process in started.values():
        process.kill()
        process.wait()


def test_a_stopped_server_leaves_no_process_behind(servers):
    family = []
    for port, process in servers.values():
        with client(port) as asker:
            wait_until_ready(asker, lambda: process.poll() is None)  # noqa: B023
            assert asker.infer_batch(rewards=np.ones((2, 1), dtype=np.float32))["rewards"].tolist() == [[1], [1]]
        children = psutil.Process(process.pid).children(recursive=True)
        assert "tritonserver" in [child.name() for child in children]
        family += children
    for number, (_, process) in servers.items():
        process.send_signal(number)
    codes = {number: process.wait(40) for number, (_, process) in servers.items()}
    assert codes == {signal.SIGTERM: 0, signal.SIGINT: 0, signal.SIGKILL: -signal.SIGKILL}
    _, left = psutil.wait_procs(family, timeout=20)
    assert left == []


def start(*command, cwd):
    return subprocess.Popen([sys.executable, *command], cwd=cwd, env=environment(), stderr=subprocess.PIPE, text=True)


def refusal(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    return errors.strip().splitlines()[-1]


def test_the_script_refuses_an_end_string_that_no_response_can_have(functions, tiny_hf):
    settings = ["reward.target=functions.py:length", f"tokenizer={tiny_hf}", f"inference.port={free_port()}"]
    process = start(SCRIPTS / "serve_python_reward.py", *settings, f"end_strings=['{END}.']", cwd=functions.parent)
    assert refusal(process).startswith(f"error: end_strings: no response can end with '{END}.', as texts are without")


def test_the_scripts_refuse_an_occupied_port_and_unknown_keys_before_a_model_is_loaded(tmp_path):
    archive = tmp_path / "archive"
    (archive / "model_weights").mkdir(parents=True)
    (archive / "model_config.yaml").write_text("nothing: here\n")
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", 0))
        occupant.listen()
        port = f"inference.port={occupant.getsockname()[1]}"
        settings = (f"rm_model_file={archive}", "trainer.accelerator=cpu", "trainer.precision=32", port)
        occupied = start(SCRIPTS / "serve_reward_model.py", *settings, cwd=tmp_path)
        unknown = start(SCRIPTS / "serve_python_reward.py", "+inference.batch=3", cwd=tmp_path)
        assert refusal(occupied).startswith(f"error: inference.address=127.0.0.1, {port}: cannot listen there")
        assert refusal(unknown).startswith("error: inference.batch is not known; the keys are port, model_name,")


def test_tokenizers_of_folders_and_archives(tiny_hf, tiny_nemo, tmp_path, tokenizer):
    with tarfile.open(tiny_nemo) as archive:
        archive.extractall(tmp_path / "extracted", filter="data")
    ids = tokenizer.text_to_ids(TEXTS[0])
    for path in (tiny_nemo, tmp_path / "extracted"):
        loaded = load_tokenizer(path)
        assert loaded.text_to_ids(TEXTS[0]) == ids and loaded.ids_to_text(ids) == TEXTS[0]
        assert (loaded.eos_id, loaded.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)


def pack(path, tokenizer_section, *files):
    config = path.with_suffix(".yaml")
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    OmegaConf.save(OmegaConf.create({"tokenizer": tokenizer_section, **sizes}), config)
    with tarfile.open(path, "w:") as archive:
        archive.add(config, "./model_config.yaml")
        archive.add(config, "./model_weights.ckpt")  # never read
        for file in files:
            archive.add(file, f"./abc_{file.name}")
    return path


def test_a_sentencepiece_tokenizer_of_an_archive(tmp_path):
    import sentencepiece

    (tmp_path / "texts").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40, minloglevel=2
    )
    section = {"library": "sentencepiece", "model": "nemo:abc_tokenizer.model", "sentencepiece_legacy": False}
    loaded = load_tokenizer(pack(tmp_path / "model.nemo", section, tmp_path / "tokenizer.model"))
    plain = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    assert loaded.text_to_ids(TEXTS[2]) == plain.encode(TEXTS[2]) and loaded.eos_id == plain.eos_id()
    del section["sentencepiece_legacy"]  # NeMo's legacy mode has the end token only if the config adds it
    with pytest.raises(ConfigError, match="has no end token"):
        load_tokenizer(pack(tmp_path / "old.nemo", section, tmp_path / "tokenizer.model"))
    section["additional_special_tokens"] = {"eos_token": "</s>"}
    assert (
        load_tokenizer(pack(tmp_path / "mended.nemo", section, tmp_path / "tokenizer.model")).eos_id == plain.eos_id()
    )


def test_what_holds_no_tokenizer(tmp_path):
    named = pack(tmp_path / "named.nemo", {"library": "huggingface", "type": "meta-llama/Llama-2-7b-hf", "model": None})
    lost = pack(tmp_path / "lost.nemo", {"library": "sentencepiece", "model": "nemo:abc_tokenizer.model"})
    half = pack(
        tmp_path / "half.nemo", {"library": "huggingface", "files": {"tokenizer_json": "nemo:model_weights.ckpt"}}
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("no archive")
    for path, message in [
        (None, "is not set"),
        (tmp_path / "nothing", "nothing does not exist"),
        (tmp_path / "empty", "empty holds no tokenizer that transformers can load"),
        (tmp_path / "text", "text is not a complete .nemo archive"),
        (named, r"does not hold its tokenizer \(library huggingface\); give the Hugging Face folder"),
        (lost, r"lost.nemo: the member abc_tokenizer.model is missing, to which .* as tokenizer\.model"),
        (half, r"half.nemo lacks its tokenizer's tokenizer_config_json \(None\); convert"),
    ]:
        with pytest.raises(ConfigError, match=f"^tokenizer.*{message}") as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)
