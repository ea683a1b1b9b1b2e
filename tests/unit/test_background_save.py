"""Checkpoints written while training goes on: what they hold, when they appear, and what failures leave behind."""

import contextlib
import copy
import errno
import io
import math
import operator
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from nemo.utils import AppState, exp_manager, logging
from torch.distributed.checkpoint.api import CheckpointException

from benchmarks.checkpoint import Checkpoints, build
from nemo_aligner.compat.checkpoint_writer import raise_on_all_ranks
from nemo_aligner.utils import background_save, checkpoints
from nemo_aligner.utils.background_save import PARTIAL, BackgroundSave, HostMemory, is_complete
from nemo_aligner.utils.checkpoints import (
    CALLBACK_STATE,
    advance_save,
    newest_complete_checkpoint,
    read_counters,
    saving_in_background,
)
from nemo_aligner.utils.errors import ConfigError

OVERRIDES = [
    "model.encoder_seq_length=128", "model.rs.length_params.max_length=8",
    "exp_manager.checkpoint_callback_params.save_top_k=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny_run(tiny_nemo, tmp_path_factory):
    before = dict(vars(AppState()))  # NeMo's experiment manager stores the run's folder there
    run = Checkpoints(*build(tiny_nemo, tmp_path_factory.mktemp("run"), OVERRIDES))
    run.empty_books = {name: getattr(run.callback, name) for name in CALLBACK_STATE}
    yield run
    vars(AppState()).clear()
    vars(AppState()).update(before)


@pytest.fixture
def run(tiny_run, tmp_path):
    """A run that has saved nothing yet, and saves to `tmp_path`."""
    tiny_run.callback.dirpath = str(tmp_path)
    vars(tiny_run.callback).update(tiny_run.empty_books, best_k_models={})
    tiny_run.step = 0
    return tiny_run


class Disk:
    """Blocks every write of a tensor until `go_on`, or makes it fail with `error`."""

    def __init__(self, monkeypatch):
        self.may_write, self.error = threading.Event(), None
        self.write_item = filesystem_async._write_item
        monkeypatch.setattr(filesystem_async, "_write_item", self)

    def __call__(self, *args, **kwargs):
        assert self.may_write.wait(60)
        if self.error is not None:
            raise self.error
        return self.write_item(*args, **kwargs)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def names(folder: Path) -> set[str]:
    """The checkpoints in a folder, in short form: the step, and "-last" if it is the last one."""
    return {f"{read_counters(path)['step']}{'-last' * path.name.endswith('-last')}" for path in folder.glob("[!.]*")}


def test_the_checkpoint_holds_the_state_of_its_moment_and_appears_when_it_is_written(run, disk, tmp_path):
    saved = [tensor.clone() for tensor in run.state()]
    with saving_in_background(run.callback):
        run.save(val_global_rewards=0.0)
        for tensor in run.state():
            tensor.add_(1)  # as an optimizer does, in place
        advance_save(run.callback)
        assert names(tmp_path) == set()
        disk.may_write.set()
    assert names(tmp_path) == {"1", "1-last"} and not (tmp_path / PARTIAL).exists()
    run.restore()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(run.state(), saved, strict=True))


def test_the_best_and_the_last_checkpoint_share_their_files(run, tmp_path, monkeypatch):
    run.save(val_global_rewards=0.0)
    best, last = sorted(tmp_path.glob("[!.]*"))
    files = [sorted(path.name for path in folder.iterdir()) for folder in (best, last)]
    assert files[0] == files[1] and len(files[0]) == 5
    assert all((best / name).samefile(last / name) for name in files[0] if name != "metadata.json")

    def refuse(*args):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    run.save(val_global_rewards=1.0)
    best, last = sorted(tmp_path.glob("[!.]*"))
    assert names(tmp_path) == {"2", "2-last"}
    assert all((best / name).read_bytes() == (last / name).read_bytes() for name in os.listdir(last))
    assert not any((best / name).samefile(last / name) for name in os.listdir(last))


def test_the_one_before_goes_only_when_the_next_is_there(run, disk, tmp_path):
    disk.may_write.set()
    run.save(val_global_rewards=0.0)
    disk.may_write.clear()
    with saving_in_background(run.callback):
        run.save(val_global_rewards=1.0)
        assert names(tmp_path) == {"1", "1-last"}
        disk.may_write.set()
        run.save(val_global_rewards=0.5)  # waits for the previous save
        assert names(tmp_path) == {"2", "2-last"}
    assert names(tmp_path) == {"2", "3-last"}
    assert [Path(path).name for path in run.callback.best_k_models] == [Path(run.callback.best_model_path).name]
    assert "step=2-" in run.callback.best_model_path and "step=3-" in run.callback.last_model_path


def test_outside_of_training_a_save_is_on_the_disk_on_return(run, tmp_path):
    run.save(val_global_rewards=0.0)
    assert names(tmp_path) == {"1", "1-last"}


def test_a_save_without_validation_is_not_among_the_best_and_has_no_reward_in_its_name(run, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(checkpoints.logging, "warning", warnings.append)
    run.save(val_global_rewards=-1.0)
    assert warnings == []
    run.save()
    assert len(warnings) == 1 and "monitor=val_global_rewards was not measured in this step" in warnings[0]
    assert names(tmp_path) == {"1", "2-last"}
    assert run.callback.last_model_path.endswith("epoch=0-val_global_rewards=nan-last.ckpt")
    assert list(run.callback.best_k_models.values()) == [torch.tensor(-1.0)]


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_save_whose_reward_is_no_number_is_not_among_the_best(run, tmp_path, monkeypatch, reward):
    """NeMo parses the values of the best checkpoints from their names, and fails on one that is not a number."""
    warnings = []
    monkeypatch.setattr(checkpoints.logging, "warning", warnings.append)
    run.save(val_global_rewards=-1.0)
    run.save(val_global_rewards=reward)
    assert len(warnings) == 1 and f"monitor=val_global_rewards is {reward} in this step" in warnings[0]
    assert names(tmp_path) == {"1", "2-last"}
    assert list(run.callback.best_k_models.values()) == [torch.tensor(-1.0)]


def test_memory_for_the_host_copy_is_got_before_the_first_save_and_kept(tiny_run, run, monkeypatch):
    save = tiny_run.callback.background_save = BackgroundSave(tiny_run.trainer)
    with monkeypatch.context() as nothing_is_kept:
        nothing_is_kept.setattr(run.callback, "save_last", False)
        nothing_is_kept.setattr(run.callback, "save_top_k", 0)
        advance_save(run.callback)
        save._memory.rewind()
        assert save._memory.num_bytes == 0
    advance_save(run.callback)  # as after an optimizer step
    save._memory.rewind()
    pieces = list(save._memory.pieces)
    needed = sum(-(-tensor.nbytes // 64) * 64 for tensor in run.state())
    assert [piece.nbytes for piece in pieces] == [needed]
    for reward in (0.0, 1.0):
        run.save(val_global_rewards=reward)
    assert all(map(operator.is_, save._memory.pieces, pieces)) and len(save._memory.pieces) == 1


def test_host_memory_that_is_too_small_grows_once():
    memory = HostMemory()
    memory.begin_to_grow(100)
    shapes = [(10,), (3, 5), (0,), (7,), (2,)]
    addresses = []
    for _ in range(2):
        memory.rewind()
        tensors = [memory.take(torch.Size(shape), torch.float32) for shape in shapes]
        for number, tensor in enumerate(tensors):
            tensor.fill_(number)
        assert [tensor.shape for tensor in tensors] == [torch.Size(shape) for shape in shapes]
        assert [tensor.unique().tolist() for tensor in tensors] == [[0], [1], [], [3], [4]]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
        addresses.append([tensor.data_ptr() for tensor in tensors])
    assert addresses[0] == addresses[1]
    assert memory.pieces[0].nbytes == 100 and addresses[0][0] == memory.pieces[0].data_ptr()


@pytest.fixture
def complaints(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "error", lines.append)
    return lines


FULL = OSError(errno.ENOSPC, "No space left on device")


class FullDisk(io.RawIOBase):
    """Has room for the first 1000 bytes of a file only."""

    room = 1000

    def writable(self):
        return True

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise FULL
        return len(data)


def test_a_disk_that_fills_up_under_torch_is_known_for_what_it_is(run):
    with pytest.raises(RuntimeError, match="unexpected pos") as failure:
        torch.save(torch.zeros(1000), FullDisk())
    with pytest.raises(OSError, match="No space left") as told:
        raise_on_all_ranks(failure.value)
    assert told.value.errno == errno.ENOSPC


@pytest.mark.parametrize("where", ["_write_item", "common.pt", ".metadata", "links", "metadata.json"])
def test_a_full_disk_leaves_the_checkpoints_and_the_books_as_they_were(run, tmp_path, monkeypatch, complaints, where):
    run.save(val_global_rewards=0.0)
    books = {name: copy.copy(getattr(run.callback, name)) for name in CALLBACK_STATE}

    def fail(*args, **kwargs):
        raise FULL

    with monkeypatch.context() as full, saving_in_background(run.callback):
        if where == "_write_item":
            full.setattr(filesystem_async, "_write_item", fail)
        elif where == "common.pt":
            full.setattr(background_save._HostCheckpointIO, "write", fail)
        elif where == ".metadata":
            full.setattr(background_save._HostCheckpointIO, "finish", fail)
        elif where == "links":
            full.setattr(Path, "hardlink_to", fail)
            full.setattr(background_save.shutil, "copyfile", fail)
        else:
            full.setattr(background_save, "save_config", fail)
        run.save(val_global_rewards=1.0)
        advance_save(run.callback, wait=True)
    assert names(tmp_path) == {"1", "1-last"} and not (tmp_path / PARTIAL).exists()
    assert {name: getattr(run.callback, name) for name in CALLBACK_STATE} == books
    (line,) = complaints
    assert "rank 0: [Errno 28] No space left on device; the run goes on, its last checkpoint is" in line
    assert "step=1-" in line
    run.save(val_global_rewards=1.0)
    assert names(tmp_path) == {"3", "3-last"}


@pytest.mark.parametrize("where", ["weights", "archive", "temporary folder"])
def test_a_disk_too_full_for_the_final_archive_ends_the_run_in_one_line(run, tmp_path, monkeypatch, where):
    def fail(*args, **kwargs):
        raise FULL if where != "temporary folder" else shutil.Error([("here", "there", str(FULL))])

    run.save(val_global_rewards=0.0)
    before, last = sorted(tmp_path.iterdir()), run.callback.last_model_path
    with monkeypatch.context() as full:
        if where == "weights":
            full.setattr(filesystem_async, "_write_item", fail)
        elif where == "archive":
            full.setattr(SaveRestoreConnector, "_make_nemo_file_from_folder", fail)
        else:
            full.setattr(shutil, "move", fail)
        with pytest.raises(ConfigError) as refused:
            run.callback.write_missing_archive()
    message, archive = str(refused.value), run.callback._format_nemo_checkpoint_name()
    assert message.startswith(f"{archive} could not be written (") and "\n" not in message
    assert "No space left on device" in message and message.endswith(f"from its last checkpoint, {last}")
    assert sorted(tmp_path.iterdir()) == before
    run.callback.write_missing_archive()
    assert sorted(tmp_path.iterdir()) == sorted([*before, Path(archive)])


def test_a_disk_that_fills_up_at_the_end_keeps_the_last_checkpoint(run, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise FULL

    monkeypatch.setattr(SaveRestoreConnector, "_make_nemo_file_from_folder", fail)
    with pytest.raises(ConfigError, match=r"could not be written \(No space left on device\); .*step=1-.*-last"):
        run.save(is_train_end=True, val_global_rewards=0.0)
    assert names(tmp_path) == {"1", "1-last"} and not list(tmp_path.glob(".*"))


def test_another_failure_ends_the_run_at_the_next_meeting(run, disk, tmp_path):
    disk.error = OSError(errno.EIO, "Input/output error")
    with (
        pytest.raises(OSError, match=r"could not be written: rank 0: .*Input/output error"),
        saving_in_background(run.callback),
    ):
        run.save(val_global_rewards=0.0)
        disk.may_write.set()
        advance_save(run.callback, wait=True)
        raise AssertionError("went on")
    assert names(tmp_path) == set()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", range(7))
def test_a_kill_between_any_two_renames_loses_nothing(run, tmp_path, monkeypatch, after):
    """Renames: the tables of contents and the list of deletions, two old checkpoints, two new ones; then deletion."""
    run.save(val_global_rewards=0.0)
    renames, rename = [], Path.rename

    def rename_or_die(self, target):
        if len(renames) == after:
            raise Killed
        renames.append(target)
        return rename(self, target)

    def die(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(Path, "rename", rename_or_die)
        dying.setattr(background_save.shutil, "rmtree", die)
        dying.setattr(background_save.BackgroundSave, "_in_thread", lambda self, function: function())
        with contextlib.suppress(Killed):
            run.save(val_global_rewards=1.0)
    assert len(renames) == after
    newest = newest_complete_checkpoint(tmp_path)
    assert is_complete(newest)
    assert names(tmp_path) == ({"2", "2-last"} if after > 1 else {"1", "1-last"})
    assert all(is_complete(path) for path in tmp_path.glob("[!.]*"))


def test_a_checkpoint_that_another_rank_moves_meanwhile_is_found(tmp_path, monkeypatch):
    name = "megatron_gpt-step=2-consumed_samples=8-epoch=0-rs_optimization_step=2-last"
    partial = tmp_path / ".partial"
    (partial / name).mkdir(parents=True)
    (partial / name / "metadata.json").write_text("{}")
    (partial / ".obsolete").write_text("")
    read_counters = checkpoints.read_counters

    def read_after_rank_0(path):
        if partial.exists():
            background_save.settle(partial)
        return read_counters(path)

    monkeypatch.setattr(checkpoints, "read_counters", read_after_rank_0)
    assert newest_complete_checkpoint(tmp_path) == tmp_path / name


def test_without_a_last_checkpoint_the_newest_of_the_best_counts(tmp_path):
    assert newest_complete_checkpoint(tmp_path) is None
    paths = [
        tmp_path / f"gpt-step={step}-consumed_samples=8-epoch=0-rs_optimization_step={step}{end}"
        for step, end in ((3, ""), (12, ""), (13, ""), (2, "-last"))
    ]
    for path in paths:
        path.mkdir()
    for path in paths[:2]:
        (path / "metadata.json").write_text("{}")
    assert newest_complete_checkpoint(tmp_path) == paths[1]
    foreign = tmp_path / "gpt_sft--val_loss=1.1-step=99-consumed_samples=80"
    foreign.mkdir()
    (foreign / "metadata.json").write_text("{}")
    (paths[0] / "common.pt").write_bytes(b"damaged, but older")
    assert newest_complete_checkpoint(tmp_path) == paths[1]
    (paths[3] / "metadata.json").write_text("{}")
    assert newest_complete_checkpoint(tmp_path) == paths[3]


def test_a_new_run_in_the_folder_of_another_one_is_refused(tmp_path):
    path = tmp_path / "checkpoints/gpt-step=3-consumed_samples=8-epoch=0-rs_optimization_step=3-last"
    path.mkdir(parents=True)
    (path / "metadata.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=rf"^exp_manager.resume_if_exists=False, but {path} is of a run in this folder"
    ):
        exp_manager.check_resume(None, str(tmp_path), resume_if_exists=False)


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "gpt-step=3-consumed_samples=8-epoch=0-rs_optimization_step=3-last"
    path.mkdir()
    for content in (b"", b"PK\x03\x04 and so on", b"hello"):
        (path / "common.pt").write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            read_counters(path)
        message = str(caught.value)
        assert message.startswith(f"the checkpoint {path} could not be restored (") and "\n" not in message


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("full"), MemoryError()])
def test_what_is_not_a_checkpoint_s_fault_passes_through(error):
    for raised in (error, CheckpointException("read", {0: (error, None)})):
        with pytest.raises(type(error)) as caught, checkpoints.damage_named("a checkpoint"):
            raise raised
        assert caught.value is error


class Save:
    """A save that stays pending until it is waited for."""

    is_pending = True
    trainer = type("Trainer", (), {"loggers": []})

    def advance(self, wait):
        self.is_pending = not wait


class KnownToAll(Exception):
    pass


@pytest.mark.parametrize(
    "error, num_ranks, is_waited_for",
    [(None, 2, True), (KnownToAll, 2, True), (KeyboardInterrupt, 1, True), (KeyboardInterrupt, 2, False)],
)
def test_the_end_of_training_waits_for_the_save(run, monkeypatch, error, num_ranks, is_waited_for):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: num_ranks)
    callback = type("Callback", (), {})()
    with contextlib.suppress(KnownToAll, KeyboardInterrupt), saving_in_background(callback, (KnownToAll,)):
        callback.background_save = Save()
        if error is not None:
            raise error
    assert callback.background_save.is_pending != is_waited_for
