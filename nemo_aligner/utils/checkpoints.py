"""Training checkpoints that are there whole or not at all, and which of them a run continues from.

A checkpoint is a folder that megatron-core writes from all ranks. It is written under another name, synced to disk and
then renamed; only after that does an older one go. How is in `background_save`, which and when is here.
"""

import contextlib
import copy
import errno
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from weakref import proxy

import torch
from nemo.utils import logging
from nemo.utils.callbacks import NeMoModelCheckpoint
from nemo.utils.get_rank import is_global_rank_zero
from nemo.utils.model_utils import ckpt_to_dir
from torch.distributed.checkpoint.api import CheckpointException

from nemo_aligner.utils.background_save import PARTIAL, BackgroundSave, complete_in, is_complete, settle
from nemo_aligner.utils.errors import ConfigError
from nemo_aligner.utils.server_utils import one_line

COUNTERS = ("step", "consumed_samples", "epoch", "rs_optimization_step")
# What goes wrong while a checkpoint is read, but is not its fault.
NOT_DAMAGE = (ConfigError, MemoryError, torch.OutOfMemoryError, torch.distributed.DistError)
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
# What Lightning's callback keeps of the checkpoints that it has written.
CALLBACK_STATE = (
    "best_k_models", "kth_best_model_path", "kth_value", "best_model_path", "best_model_score", "last_model_path",
)  # fmt: skip


def extract_value_from_ckpt(key: str, ckpt_path: str) -> int:
    """The integer behind `key=` in the last component of a checkpoint's path.

    Raises:
        ValueError: if the name has no such field.
    """
    name = Path(str(ckpt_path).rstrip("/")).name
    found = re.search(rf"(?:^|[^A-Za-z0-9_]){re.escape(key)}=(\d+)(?:\.0+)?(?![\d.]*\d)", name)
    if found is None:
        raise ValueError(f"the checkpoint name {name!r} has no field {key}=<integer>")
    return int(found.group(1))


@contextlib.contextmanager
def damage_named(ckpt_path: str | Path) -> Iterator[None]:
    """Within, what goes wrong is a `ConfigError` in one line that names the checkpoint.

    But not a lack of memory, a lost connection between ranks, and whatever ends a process.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:  # the latter, a BaseException, has any of all ranks
        first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if isinstance(first, NOT_DAMAGE) or not isinstance(first, Exception):
            raise first from error
        raise ConfigError(
            f"the checkpoint {ckpt_path} could not be restored ({one_line(f'{type(first).__name__}: {first}')}): it is "
            "damaged, or of another model, precision or optimizer; move it away to go on from an older one, if there "
            "is one, or give another exp_manager.explicit_log_dir"
        ) from error


def read_counters(ckpt_path: str | Path) -> dict[str, int]:
    """The RS counters of a checkpoint: from inside it, or, as the original wrote none there, from its name.

    Raises:
        ValueError: if they are in neither.
    """
    state = read_run_state(ckpt_path)
    return {name: state[name] for name in COUNTERS}


def read_run_state(ckpt_path: str | Path) -> dict:
    """The RS counters of a checkpoint and, under `settings`, those of the run that wrote it.

    There are no settings in a checkpoint of the original, or of our first versions.

    Raises:
        ConfigError: if the checkpoint is damaged.
        ValueError: if the counters are neither in the checkpoint nor in its name.
    """
    common = Path(ckpt_path, "common.pt")
    with damage_named(ckpt_path):
        try:
            stored = torch.load(common, map_location="cpu", weights_only=True)
        except FileNotFoundError:  # of the original's, or renamed by rank 0 in between
            stored = {}
    counters, settings = stored.get("rs_trainer"), stored.get("rs_settings")
    if counters is None:
        counters = {name: extract_value_from_ckpt(name, str(ckpt_path)) for name in COUNTERS}
    state = {name: int(counters[name]) for name in COUNTERS}
    return state if settings is None else {**state, "settings": settings}


def newest_complete_checkpoint(folder: str | Path) -> Path | None:
    """The `-last` checkpoint of the highest step that was written to its end, without such the newest of the best.

    One that a killed run had no time to rename counts, too; rank 0 renames it. None if there is none.
    """
    try:
        return _newest_complete(Path(folder))
    except FileNotFoundError:  # renamed by rank 0 in between
        return _newest_complete(Path(folder))


def _newest_complete(folder: Path) -> Path | None:
    # Those in the making first, so that none is overlooked that rank 0 renames in between.
    partial = [path for path in complete_in(folder / PARTIAL) if path.match("*-last")]
    found = {folder / path.name: path for path in partial}
    found.update({path: path for path in folder.glob("*-last") if is_complete(path)})
    if not found:
        found = {path: path for path in folder.glob("*=*") if is_complete(path) and _has_counters(path)}
    if not found:
        return None
    newest = max(found, key=lambda path: (_step(found[path]), found[path].stat().st_mtime))
    if partial and is_global_rank_zero():
        settle(folder / PARTIAL)
    return newest


def _step(path: Path) -> int:
    """By its name, so that damage to an older checkpoint does not matter; else by what it holds."""
    try:
        return extract_value_from_ckpt("step", str(path))
    except ValueError:
        return read_counters(path)["step"]


def _has_counters(path: Path) -> bool:
    """Whether it is one of ours, be it damaged."""
    try:
        read_counters(path)
    except ConfigError:
        return True
    except ValueError:
        return False
    return True


def custom_save_ckpt_func(
    self, trainer, pl_module, monitor_candidates: dict, is_train_end: bool = False, save_top_only: bool = False
) -> None:
    """Save through NeMo's checkpoint callback: the top-k checkpoint, and the last one. Collective over the job.

    On return both are on the disk; within `saving_in_background` they are on their way there. A checkpoint for which
    there is no room on the disk is reported, and the run goes on with the older ones in place.

    Args:
        self: the `NeMoModelCheckpoint` callback.
        monitor_candidates: metric name -> tensor; names of checkpoints and the choice of the best come from these. The
            RS counters among them are stored in the checkpoint, too.
        is_train_end: also run the callback's end hook, which writes the final `.nemo`.
        save_top_only: leave out the last checkpoint.

    Raises:
        OSError: on every rank, if one of them could not write this checkpoint or the one before.
        ConfigError: there is no room on the disk for the final `.nemo`; on rank 0 or on all.
    """
    advance_save(self, wait=True)
    pl_module.rs_trainer_state = {
        name: int(monitor_candidates[name]) for name in COUNTERS if name in monitor_candidates
    }
    self.has_last_save_failed = False
    self.books_before_save = {name: copy.copy(getattr(self, name)) for name in CALLBACK_STATE}
    with _recording(self) as (folders, obsolete):
        why_not_ranked = _why_not_ranked(self.monitor, monitor_candidates)
        if why_not_ranked is None:
            self._save_topk_checkpoint(trainer, monitor_candidates)
        elif self.save_top_k != 0:
            logging.warning(
                f"exp_manager.checkpoint_callback_params.monitor={self.monitor} {why_not_ranked} in this step, so this "
                f"checkpoint is not ranked by it; measured were {', '.join(sorted(monitor_candidates))}"
            )
        if not save_top_only:
            # Lightning would put a zero in the name for a metric that is not there.
            self._save_last_checkpoint(trainer, {self.monitor: torch.tensor(float("nan")), **monitor_candidates})
    if folders:
        if not hasattr(self, "background_save"):  # a script that has bound this function itself
            self.background_save = BackgroundSave(trainer)
        with _surviving_a_full_disk(self):
            self.background_save.start(folders, obsolete, self.save_weights_only)
    if is_train_end or not getattr(self, "saves_in_background", False):
        advance_save(self, wait=True)
    if is_train_end:
        # The hook would save once more, with metrics of Lightning's loop, which does not run here.
        self._last_checkpoint_saved = self._last_checkpoint_saved or self.last_model_path or "none"
        val_check_interval, trainer.val_check_interval = trainer.val_check_interval, 0
        with _explaining_a_full_disk(self):
            self.on_train_end(trainer, pl_module)
        trainer.val_check_interval = val_check_interval


def _why_not_ranked(monitor: str | None, candidates: dict) -> str | None:
    if monitor is None:
        return None
    if monitor not in candidates:
        return "was not measured"
    value = float(candidates[monitor])
    # NeMo would read the value back from the checkpoint's name, and die of one without digits at every later start.
    return None if math.isfinite(value) else f"is {value}"


@contextlib.contextmanager
def saving_in_background(callback, known_to_all_ranks: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Within, saves of the callback block only until the state is copied; who trains calls `advance_save` often.

    At the end, a save that is under way is waited for: also after exceptions of the kinds in `known_to_all_ranks`,
    which every rank raises. After others a rank that has company must not wait for it.
    """
    callback.saves_in_background = True
    advance_save(callback)
    try:
        yield
    except BaseException as error:
        if isinstance(error, known_to_all_ranks) or torch.distributed.get_world_size() == 1:
            advance_save(callback, wait=True)
        raise
    else:
        advance_save(callback, wait=True)
    finally:
        callback.saves_in_background = False


def advance_save(callback, wait: bool = False) -> None:
    """Take the save that is under way, if there is one, as far as it gets at once, or, if asked to wait, to its end.

    If there has been none, host memory for the first is got meanwhile. Collective over the job; does nothing with a
    callback that does not save in the background.

    Raises:
        OSError: on every rank, if one of them could not write, unless for want of room on the disk.
    """
    save = getattr(callback, "background_save", None)
    if save is None:
        return
    if not save.is_pending:
        if callback.save_last or callback.save_top_k:
            save.get_memory_ready()
        return
    with _surviving_a_full_disk(callback):
        save.advance(wait)
        if not save.is_pending and is_global_rank_zero():
            for logger in save.trainer.loggers:
                logger.after_save_checkpoint(proxy(callback))


def write_missing_archive(self, pl_module) -> None:
    """Write the final `.nemo` of a run that was killed between its last checkpoint and that. Collective over the job.

    Args:
        self: the `NeMoModelCheckpoint` callback.

    Raises:
        ConfigError: there is no room on the disk for it; on rank 0 or on all.
    """
    path = Path(self._format_nemo_checkpoint_name())
    is_missing = [self.save_nemo_on_train_end and not path.exists()]
    torch.distributed.broadcast_object_list(is_missing, src=0)
    if is_missing[0]:
        with _explaining_a_full_disk(self):
            pl_module.save_to(str(path))


@contextlib.contextmanager
def _recording(callback: NeMoModelCheckpoint) -> Iterator[tuple[list[Path], list[Path]]]:
    """Within, the callback keeps its books, and what it would save and remove is put into two lists instead.

    A checkpoint may have the name of one that is there, which it then replaces.
    """
    folders, obsolete = [], []

    def save(trainer, filepath: str) -> None:
        folders.insert(0, ckpt_to_dir(filepath))
        callback._last_checkpoint_saved = filepath

    def remove(trainer, filepath: str) -> None:
        obsolete.append(ckpt_to_dir(filepath))

    callback._save_checkpoint, callback._remove_checkpoint = save, remove
    version_counter, callback._enable_version_counter = callback._enable_version_counter, False
    try:
        yield folders, obsolete
    finally:
        del callback._save_checkpoint, callback._remove_checkpoint
        callback._enable_version_counter = version_counter


@contextlib.contextmanager
def _surviving_a_full_disk(callback: NeMoModelCheckpoint) -> Iterator[None]:
    """Within, a save that fails has not happened in the callback's books; for want of room, that is reported only."""
    try:
        yield
    except OSError as error:
        vars(callback).update(callback.books_before_save)
        callback.has_last_save_failed = True
        if error.errno not in DISK_IS_FULL:
            raise
        if is_global_rank_zero():
            last = callback.last_model_path or "none"
            logging.error(f"{error.strerror}; the run goes on, its last checkpoint is {last}")


@contextlib.contextmanager
def _explaining_a_full_disk(callback: NeMoModelCheckpoint) -> Iterator[None]:
    """Within, want of room for the final `.nemo` ends the run in one line: there is no later save to make up for it."""
    try:
        yield
    except OSError as error:
        # shutil tells of what it could not copy to the folder for temporary files, but not why
        if error.errno not in DISK_IS_FULL and not isinstance(error, shutil.Error):
            raise
        raise ConfigError(
            f"{callback._format_nemo_checkpoint_name()} could not be written ({error.strerror or error}); make room "
            f"there and in {tempfile.gettempdir()}, and start the same command again, which goes on from its last "
            f"checkpoint, {callback.last_model_path or 'none'}"
        ) from error
