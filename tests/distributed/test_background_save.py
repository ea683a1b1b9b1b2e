"""Two ranks save in the background: a slow rank is waited for, and both learn of a rank that cannot write."""

import errno
import math
import threading
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.dist_checkpointing.strategies import filesystem_async

from tests.distributed.launch import run_ranks

ERRORS = {
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "broken": OSError(errno.EIO, "Input/output error"),
}  # fmt: skip


def save_beside_others(rank: int, nemo_path: str, folder: str) -> dict:
    """What this rank sees when the other is slow, and when one of them cannot write."""
    from benchmarks.checkpoint import Checkpoints, build
    from tests.unit.test_background_save import OVERRIDES

    settings = [*OVERRIDES, "trainer.devices=2", "model.tensor_model_parallel_size=2"]  # so that both write tensors
    run = Checkpoints(*build(Path(nemo_path), Path(folder), settings))
    found = {"slow": beside_a_slow_rank(run, is_slow=rank == 1)}
    found["host memory"] = run.callback.background_save._memory.num_bytes
    tensors = load_tensors_metadata(str(run.path)).values()
    found["saved"] = sum(math.prod(tensor.global_shape) * tensor.dtype.itemsize for tensor in tensors)
    for failing_rank in (0, 1):
        for name, error in ERRORS.items():
            found[name, failing_rank] = beside_a_failing_rank(run, error if rank == failing_rank else None)
    return found


def beside_a_slow_rank(run, is_slow: bool) -> list:
    """Steps of the checkpoints on disk, and whether a save is pending: after the copy, a moment later, at the end."""
    from nemo_aligner.utils.checkpoints import advance_save, saving_in_background

    may_write, write_item = threading.Event(), filesystem_async._write_item

    def write_later(*args, **kwargs):
        assert may_write.wait(60)
        return write_item(*args, **kwargs)

    def seen():
        return steps(run), run.callback.background_save.is_pending

    run.save(val_global_rewards=0.0)
    filesystem_async._write_item = write_later if is_slow else write_item
    with saving_in_background(run.callback):
        run.save(val_global_rewards=1.0)
        found = [seen()]
        advance_save(run.callback)
        found.append(seen())
        may_write.set()
    filesystem_async._write_item = write_item
    return [*found, seen()]


def beside_a_failing_rank(run, error: OSError | None) -> dict:
    """The failure's message, and steps of the checkpoints on disk before it, after it and after the next save.

    "books" are the steps of the checkpoints that the callback keeps track of after the failure.
    """
    from nemo_aligner.utils import background_save, checkpoints
    from nemo_aligner.utils.checkpoints import advance_save, saving_in_background

    def fail(*args, **kwargs):
        raise error

    write_item, complain = filesystem_async._write_item, checkpoints.logging.error
    found = {"before": steps(run), "message": None, "complaints": []}
    checkpoints.logging.error = found["complaints"].append
    if error is not None:
        filesystem_async._write_item = fail
        background_save.open = fail  # for common.pt, which rank 0 writes first
    try:
        with saving_in_background(run.callback):
            run.save(val_global_rewards=float(run.step))
            advance_save(run.callback, wait=True)
    except OSError as raised:
        found["message"] = raised.strerror
    if error is not None:
        filesystem_async._write_item = write_item
        del background_save.open
    checkpoints.logging.error = complain
    found["after"] = steps(run)
    books = [*run.callback.best_k_models, run.callback.last_model_path]
    found["books"] = sorted(int(Path(path).name.split("step=")[1].split("-")[0]) for path in books)
    run.save(val_global_rewards=float(run.step))
    return {**found, "next": steps(run), "saved": run.step}


def steps(run) -> list[int]:
    from nemo_aligner.utils.checkpoints import read_counters

    return sorted(read_counters(path)["step"] for path in Path(run.callback.dirpath).glob("[!.]*"))


@pytest.fixture(scope="module")
def found(tiny_nemo, tmp_path_factory):
    return run_ranks(save_beside_others, 2, str(tiny_nemo), str(tmp_path_factory.mktemp("two")), timeout_s=60)


def test_a_slow_rank_is_waited_for(found):
    for of_rank in found:
        assert of_rank["slow"] == [([1, 1], True), ([1, 1], True), ([2, 2], False)]


def test_each_tensor_is_copied_by_the_rank_that_writes_it(found):
    assert 1 <= sum(of_rank["host memory"] for of_rank in found) / found[0]["saved"] < 1.02


@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize("error", ERRORS)
def test_a_rank_that_cannot_write_is_known_to_both(found, failing_rank, error):
    for rank, of_rank in enumerate(of_rank[error, failing_rank] for of_rank in found):
        is_told = error == "full" and rank == 0
        assert [f"rank {failing_rank}: [Errno 28] " in line for line in of_rank["complaints"]] == [True] * is_told
        if error == "full":
            assert of_rank["message"] is None  # the run continues
        else:
            assert f"written: rank {failing_rank}: [Errno 5] Input/output error" in of_rank["message"]
        assert of_rank["books"] == of_rank["after"] == of_rank["before"]
        assert of_rank["next"] == [of_rank["saved"]] * 2
