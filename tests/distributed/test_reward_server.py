"""Two ranks serve together: rank 0 takes requests, rank 1 follows its signals, and nothing puts them out of step."""

from datetime import timedelta

import numpy as np
import torch
from megatron.core import parallel_state

from nemo_aligner.algorithms.reward_server import RewardModelServer
from nemo_aligner.servers.constants import ServerSignal
from tests.distributed.launch import run_ranks


def letters(sentences):
    return torch.ones(len(sentences), 9, dtype=torch.int64), torch.tensor([len(text) for text in sentences])


def request(*rows):
    width = max(map(len, rows))
    tokens = np.array([[*row, *[0] * (width - len(row))] for row in rows])
    return {"tokens": tokens, "sequence_lengths": np.array([[len(row)] for row in rows])}


def error_of(server, inputs):
    try:
        server.infer(**inputs)
    except Exception as error:
        return type(error).__name__, str(error)


def serve(rank):
    """Reward = sum of a row's ids + its replica / 10; also notes the shapes this replica saw."""
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

    answers = [server.infer(**request([1, 2, 3]))["rewards"]]
    refused = [
        error_of(server, {"tokens": np.array([[1]])}),
        error_of(server, request([1, 100])),
        error_of(server, {"tokens": np.array([[1]]), "sequence_lengths": np.array([[2]])}),
    ]
    answers.append(server.infer(**request(*[[row] * 5 for row in range(1, 6)]))["rewards"])
    answers.append(server.infer(sentences=np.array([[b"abcde"], [b"fg"]], dtype=np.object_))["rewards"])
    torch.distributed.broadcast(torch.tensor([ServerSignal.INVALID]), src=0, group=server._signal_group)
    return {
        "answers": [answer.tolist() for answer in answers],
        "dtypes": {str(answer.dtype) for answer in answers},
        "refused": refused,
        "failed": error_of(failing, request([66], [66])),
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
    # Rows per replica: of one, padded to two; of five, padded to eight; of two sentences; of two that fail.
    # Columns are stripped to a multiple of four, but never widened. What is refused reaches no replica.
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
    # Between two requests lies a training phase; the default group, with its 60 s here, would give up on rank 1.
    assert first["idle_timeout"] > timedelta(days=30)
