"""The reward server: two ranks that stay in sync, and one served by PyTriton to well-behaved and hostile clients."""

import http.client
import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from pytriton.client.exceptions import PyTritonClientInferenceServerError

from nemo_aligner.algorithms.reward_server import RewardModelServer
from nemo_aligner.servers.constants import ServerSignal
from tests.distributed.launch import run_ranks
from tests.distributed.serving import MODEL, bytes_column, client, server_process, tokens_request


def letters(sentences):
    return torch.ones(len(sentences), 9, dtype=torch.int64), torch.tensor([len(text) for text in sentences])


def error_of(server, inputs):
    try:
        server.infer(**inputs)
    except Exception as error:
        return type(error).__name__, str(error)


def serve(rank):
    """Reward = sum of a row's ids + its replica / 10; also records the shapes this replica saw."""
    parallel_state.initialize_model_parallel()
    shapes = []

    def infer_fn(inputs):
        tokens, lengths = inputs
        shapes.append(list(tokens.shape))
        if (tokens == 66).any():
            raise MemoryError("no room")
        content = torch.arange(tokens.shape[1]) < lengths[:, None]
        return ((tokens * content).sum(dim=1, keepdim=True) + rank / 10).bfloat16()

    def make_server():
        return RewardModelServer(infer_fn, letters, "reward_model", 0, 2, 2, 4, vocab_size=100)

    server, failing = make_server(), make_server()
    if rank == 1:
        return {"ended": [how_it_ends(server), how_it_ends(failing)], "shapes": shapes}

    answers = [server.infer(**tokens_request([1, 2, 3]))["rewards"]]
    refused = [
        error_of(server, {"tokens": np.array([[1]])}),
        error_of(server, tokens_request([1, 100])),
        error_of(server, {"tokens": np.array([[1]]), "sequence_lengths": np.array([[2]])}),
    ]
    answers.append(server.infer(**tokens_request(*[[row] * 5 for row in range(1, 6)]))["rewards"])
    answers.append(server.infer(sentences=np.array([[b"abcde"], [b"fg"]], dtype=np.object_))["rewards"])
    torch.distributed.broadcast(torch.tensor([ServerSignal.INVALID]), src=0, group=server._signal_group)
    return {
        "answers": [answer.tolist() for answer in answers],
        "dtypes": {str(answer.dtype) for answer in answers},
        "refused": refused,
        "failed": error_of(failing, tokens_request([66], [66])),
        "idle_timeout": server._signal_group._get_backend(torch.device("cpu")).options._timeout,
        "is_unlocked": not server.lock.locked() and not failing.lock.locked(),
        "shapes": shapes,
    }


def how_it_ends(server):
    try:
        server.run_server()
    except (RuntimeError, MemoryError) as error:
        return str(error)


def test_requests_are_answered_refused_and_survived():
    first, second = run_ranks(serve, 2, timeout_s=60)
    # Rows per replica for requests of: one row, padded to two; five, padded to eight; two sentences; two that fail.
    # Columns are stripped to a multiple of four, but never widened. Refused requests reach no replica.
    assert first["shapes"] == second["shapes"] == [[1, 3], [4, 5], [1, 8], [1, 1]]
    lone, many, sentences = first["answers"]
    assert lone == [[6.0]]
    # rows 0 to 3 are replica 0's, row 4 is replica 1's: 25.1 in bfloat16
    assert many == [[5.0], [10.0], [15.0], [20.0], [25.125]]
    np.testing.assert_allclose(sentences, [[5.0], [2.1]], atol=0.01)
    assert first["dtypes"] == {"float32"} and first["is_unlocked"]
    assert [name for name, _ in first["refused"]] == ["ValueError"] * 3
    assert "missing: sequence_lengths" in first["refused"][0][1]
    assert "the id 100; the vocabulary has 100 entries" in first["refused"][1][1]
    assert "must lie in 1..1" in first["refused"][2][1]
    assert first["failed"] == ("PyTritonUnrecoverableError", "the forward pass failed: MemoryError: no room")
    assert "expected the signal" in second["ended"][0] and "got 3" in second["ended"][0]
    assert second["ended"][1] == "no room"
    # A training phase lies between two requests; with the default group's timeout of 60 s here, rank 1 would give up.
    assert first["idle_timeout"] > timedelta(days=30)


CONTEXT, VOCABULARY, LIMIT = 64, 100, 512


def serve_sums(port, shapes_file):
    """Serve rewards that are the sum of a row's ids; the shapes of the batches that ran are written to a file."""
    from nemo_aligner.compat import cpu

    cpu.enable()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()

    def infer_fn(inputs):
        tokens, lengths = inputs
        with open(shapes_file, "a") as shapes:
            print(*tokens.shape, file=shapes)
        content = torch.arange(tokens.shape[1]) < lengths[:, None]
        return (tokens * content).sum(dim=1, keepdim=True).float()

    RewardModelServer(
        infer_fn, letters, MODEL, port, 64, 64, None, max_queue_delay_microseconds=20_000, vocab_size=VOCABULARY,
        max_length=CONTEXT, max_request_tokens=LIMIT,
    ).run_server()  # fmt: skip


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    shapes = tmp_path_factory.mktemp("shapes") / "shapes"
    with server_process(serve_sums, shapes) as (port, _):
        yield port, shapes


def ask(port, **inputs):
    """The rewards, or the server's error message."""
    with client(port) as asker:
        try:
            return asker.infer_batch(**inputs)["rewards"].tolist()
        except PyTritonClientInferenceServerError as error:
            return str(error).partition("Message: ")[2]


def test_one_bad_request_of_a_merged_batch_leaves_the_others_alone(sums):
    port, shapes = sums
    requests = [
        tokens_request([1, 2, 3], [4, 5]),
        tokens_request([VOCABULARY]),
        tokens_request([7] * 10),
        {"tokens": np.array([[1, -2]]), "sequence_lengths": np.array([[2]])},
        {"sentences": bytes_column("abc", "de")},
        {"sentences": bytes_column(b"\xff")},
    ]
    wanted = [
        [[6.0], [9.0]],
        "tokens holds the id 100; the vocabulary has 100 entries",
        [[70.0]],
        "tokens holds the negative id -2",
        [[3.0], [2.0]],
        "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    ]
    shapes.write_text("")
    with ThreadPoolExecutor(len(requests)) as threads:
        for number in range(50):
            assert list(threads.map(lambda request: ask(port, **request), requests)) == wanted
            # Three rows of two requests, padded to the wider one: merged if they arrived within the batcher's 20 ms.
            is_merged = "3 10" in shapes.read_text().splitlines()
            if is_merged and number >= 4:
                break
    assert is_merged


def test_requests_have_limits(sums):
    port, _ = sums
    ones = np.ones((8, CONTEXT), dtype=np.int64)
    lengths = np.full((8, 1), CONTEXT)
    assert ask(port, tokens=ones, sequence_lengths=lengths) == [[64.0]] * 8
    too_large = "a request of 9 rows, 64 wide, is larger than inference.max_request_tokens=512 of this server"
    assert ask(port, tokens=np.ones((9, CONTEXT), dtype=np.int64), sequence_lengths=np.full((9, 1), 1)) == too_large
    assert ask(port, sentences=bytes_column(*"abcdefghi")) == too_large
    wide = np.ones((1, CONTEXT + 1), dtype=np.int64)
    assert ask(port, tokens=wide, sequence_lengths=np.array([[CONTEXT + 1]])) == (
        "a row has 65 tokens; the model takes at most 64"
    )
    assert ask(port, tokens=wide, sequence_lengths=np.array([[CONTEXT]])) == [[64.0]]  # surplus padding is cut
    assert ask(port, tokens=ones[:1], sequence_lengths=np.array([[0]])) == (
        "sequence_lengths must lie in 1..64 (the width of tokens), got 0..0"
    )
    assert ask(port, tokens=ones) == "send either sentences, or tokens and sequence_lengths; missing: sequence_lengths"
    assert ask(port, tokens=ones, sequence_lengths=np.ones((8, 2), dtype=np.int64)) == (
        "sequence_lengths must have shape (8, 1) like tokens, got (8, 2)"
    )


def int64(name, rows, **declared):
    """An input's header and its bytes."""
    array = np.array(rows, dtype=np.int64)
    header = {"name": name, "shape": list(array.shape), "datatype": "INT64"}
    return {**header, "parameters": {"binary_data_size": array.nbytes}, **declared}, array.tobytes()


def body(*inputs, **fields):
    """A binary request and the size of its header."""
    header = json.dumps({"inputs": [header for header, _ in inputs], **fields}).encode()
    return header + b"".join(payload for _, payload in inputs), len(header)


def valid(rng):
    rows, width = rng.randint(1, 4), rng.randint(1, 9)
    ids = [[rng.randrange(VOCABULARY) for _ in range(width)] for _ in range(rows)]
    return int64("tokens", ids), int64("sequence_lengths", [[width]] * rows)


def junk(rng, depth=0):
    """A random JSON value."""
    kind = rng.randrange(9 if depth < 3 else 7)
    if kind == 7:
        return [junk(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        names = ["inputs", "outputs", "name", "shape", "datatype", "data", "parameters", "id", "x"]
        return {rng.choice(names): junk(rng, depth + 1) for _ in range(rng.randrange(4))}
    huge = rng.choice([2**31, 2**40, 2**63, 2**64 + 1, -(2**63), 10**30])
    word = rng.choice(["tokens", "sequence_lengths", "sentences", "rewards", "INT64", "BYTES", "\u0000", "\ud800", "é"])
    return [None, rng.random() < 0.5, rng.randint(-3, 3), huge, rng.random() * 1e300, word, ""][kind]


# Each function returns a body and the size claimed for its header, or None for no claim.
def random_bytes(rng):
    return rng.randbytes(rng.randrange(300)), rng.choice([None, 1, 5, -1, 10**15, "x"])


def random_json(rng):
    text = json.dumps({"inputs": junk(rng), "outputs": junk(rng)} if rng.random() < 0.5 else junk(rng)).encode()
    return text + rng.randbytes(rng.randrange(20)), rng.choice([None, len(text)])


def junk_in_a_valid_header(rng):
    tokens, lengths = valid(rng)
    place = rng.choice(["name", "shape", "datatype", "parameters", "data"])
    rng.choice([tokens, lengths])[0][place] = junk(rng)
    return body(tokens, lengths)


def truncated(rng):
    content, size = body(*valid(rng))
    return content[: rng.randrange(len(content))], size


def flipped_bits(rng):
    content, size = body(*valid(rng))
    content = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content), size


def huge_declared_shape(rng):
    shape = rng.choice([[10**9, 20], [2**40, 2**40], [2**61, 1], [9999999, 9999], [1] * 99, [1, 10**30]])
    tokens, lengths = valid(rng)
    tokens[0]["shape"] = shape
    if rng.random() < 0.5:  # as JSON: Triton would allocate the declared size
        header = {"name": "tokens", "shape": shape, "datatype": "INT64", "data": [1, 2]}
        return body((header, b""), lengths)
    return body(tokens, lengths)


def huge_declared_size(rng):
    tokens, lengths = valid(rng)
    lengths[0]["parameters"] = {"binary_data_size": rng.choice([10**9, 2**62, 2**63, 2**64])}
    return body(tokens, lengths)


def deep_json(rng):
    return rng.choice([b"[", b'{"inputs":[', b'{"a":']) * rng.randrange(2_000, 20_000), None


def wrong_dtype(rng):
    tokens, lengths = valid(rng)
    rng.choice([tokens, lengths])[0]["datatype"] = rng.choice(["INT32", "FP64", "BYTES", "BOOL", "int64", "", None])
    return body(tokens, lengths)


def empty_batch(rng):
    shape = rng.choice([(0, 5), (0, 0), (3, 0)])
    return body(int64("tokens", np.zeros(shape)), int64("sequence_lengths", np.zeros((shape[0], 1))))


def bad_lengths(rng):
    (tokens, content), _ = valid(rng)
    rows, width = tokens["shape"]
    wrong = rng.choice([0, -1, -(2**63), width + 1, 2**63 - 1])
    return body((tokens, content), int64("sequence_lengths", [[wrong]] * rows))


def bad_ids(rng):
    wrong = rng.choice([VOCABULARY, -1, 2**63 - 1, -(2**63), 2**31])
    return body(int64("tokens", [[1, wrong]]), int64("sequence_lengths", [[2]]))


def wrong_inputs(rng):
    tokens, lengths = valid(rng)
    return body(*rng.choice([[tokens], [lengths], [tokens, tokens, lengths], [], [int64("records", [[1]])]]))


def bad_strings(rng):
    content = rng.choice([b"\xff\xff\xff\xff", b"\x05\0\0\0ab", b"\x01\0\0\0\xff", b"", b"\0\0\0\0"])
    header = {"name": "sentences", "shape": [1, 1], "datatype": "BYTES"}
    return body(({**header, "parameters": {"binary_data_size": len(content)}}, content))


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ("Content-Length: 1000000000000", b"abc", 413),
        ("Content-Length: 10", b"abc", 400),  # and the client closes its side of the connection
        ("Content-Length: -1", b"abc", 400),
        ("Content-Length: 99999999999999999999", b"abc", 400),
        ("Transfer-Encoding: chunked", b"ffffffffffff\r\nabc", 415),
        ("Content-Encoding: gzip\r\nContent-Length: 3", b"abc", 415),
        ("", b"", 400),
    ],
)
def test_bodies_of_a_wrong_length(sums, headers, content, status):
    port, _ = sums
    route = f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(route.replace("\r\n\r\n\r\n", "\r\n\r\n").encode() + content)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile("rb").read()
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()) and b'"error"' in answer


@pytest.mark.parametrize(
    ("method", "route", "status"),
    [
        ("GET", "/v2/health/ready", 200),
        ("GET", f"/v2/models/{MODEL}/config", 200),
        ("GET", "/v2/models/another/config", 404),
        ("GET", "/v2/logging", 404),
        ("POST", "/v2/repository/models/reward_model/unload", 404),
        ("POST", "/v2/models/another/infer", 404),
        ("POST", f"/v2/models/{MODEL}/generate", 404),
        ("DELETE", f"/v2/models/{MODEL}", 501),
    ],
)
def test_routes(sums, method, route, status):
    port, _ = sums
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, route)
    assert connection.getresponse().status == status
    connection.close()


ALWAYS_WRONG = [
    truncated, huge_declared_shape, huge_declared_size, deep_json, wrong_dtype, empty_batch, bad_lengths, bad_ids,
    wrong_inputs, bad_strings,
]  # fmt: skip
SOMETIMES_RIGHT = [random_bytes, random_json, junk_in_a_valid_header, flipped_bits]
NUM_HOSTILE, NUM_ATTACKERS = 10_000, 3


def attack(port, seed):
    """Send bodies over one connection as long as it stays open; returns a list of what went wrong."""
    rng = random.Random(seed)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    wrong = []
    for index in range(NUM_HOSTILE // NUM_ATTACKERS + 1):
        make = rng.choice(ALWAYS_WRONG + SOMETIMES_RIGHT)
        content, header_size = make(rng)
        headers = {} if header_size is None else {"Inference-Header-Content-Length": str(header_size)}
        try:
            connection.request("POST", f"/v2/models/{MODEL}/infer", content, headers)
            response = connection.getresponse()
            answer = response.read()
        except OSError as error:
            wrong.append((make.__name__, index, repr(error), content[:200]))
            connection.close()
            continue
        is_answered = response.status == 200 and make in SOMETIMES_RIGHT and b'"rewards"' in answer
        if not is_answered and not (400 <= response.status < 600 and b"error" in answer):
            wrong.append((make.__name__, index, response.status, answer[:200], content[:200]))
    return wrong


def test_ten_thousand_hostile_bodies_get_errors_and_a_good_client_its_scores(sums):
    port, _ = sums
    rng = random.Random(0)
    with ThreadPoolExecutor(NUM_ATTACKERS) as threads:
        attacks = [threads.submit(attack, port, seed) for seed in range(NUM_ATTACKERS)]
        num_right = 0
        with client(port) as good:
            while not all(future.done() for future in attacks) or num_right < 50:
                rows = [
                    [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 30))] for _ in range(rng.randint(1, 8))
                ]
                rewards = good.infer_batch(**tokens_request(*rows))["rewards"]
                assert rewards.tolist() == [[sum(row)] for row in rows]
                num_right += 1
    assert [future.result() for future in attacks] == [[]] * NUM_ATTACKERS
