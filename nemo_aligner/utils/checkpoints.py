"""Atomic training checkpoints, and the choice of the checkpoint to resume from.

A checkpoint is a folder that megatron-core writes from all ranks. It is written under a temporary name, synced to disk
and then renamed; only then is an older one removed. `background_save` implements the write; this module decides which
checkpoints are written and when.
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
# Errors raised while reading a checkpoint that do not mean the checkpoint is damaged.
NOT_DAMAGE = (ConfigError, MemoryError, torch.OutOfMemoryError, torch.distributed.DistError)
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
# Attributes in which Lightning's callback tracks the checkpoints that it has written.
CALLBACK_STATE = (
    "best_k_models", "kth_best_model_path", "kth_value", "best_model_path", "best_model_score", "last_model_path",
)  # fmt: skip


def extract_value_from_ckpt(key: str, ckpt_path: str) -> int:
    """The integer after `key=` in the last component of a checkpoint's path.

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
    """Context manager that converts errors into a one-line `ConfigError` naming the checkpoint.

    Out-of-memory errors, lost connections between ranks, and exceptions that end a process are re-raised unchanged.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:  # CheckpointException, a BaseException, holds all ranks' errors
        first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if isinstance(first, NOT_DAMAGE) or not isinstance(first, Exception):
            raise first from error
        raise ConfigError(
            f"the checkpoint {ckpt_path} could not be restored ({one_line(f'{type(first).__name__}: {first}')}): it is "
            "damaged, or of another model, precision or optimizer; move it away to go on from an older one, if there "
            "is one, or give another exp_manager.explicit_log_dir"
        ) from error


def read_counters(ckpt_path: str | Path) -> dict[str, int]:
    """The RS counters stored in a checkpoint, or those in its name, as the original NeMo-Aligner stored none.

    Raises:
        ValueError: if they are in neither.
    """
    state = read_run_state(ckpt_path)
    return {name: state[name] for name in COUNTERS}


def read_run_state(ckpt_path: str | Path) -> dict:
    """The RS counters of a checkpoint and, under `settings`, the settings of the run that wrote it.

    Checkpoints of the original NeMo-Aligner and of this library's first versions have no settings.

    Raises:
        ConfigError: if the checkpoint is damaged.
        ValueError: if the counters are neither in the checkpoint nor in its name.
    """
    common = Path(ckpt_path, "common.pt")
    with damage_named(ckpt_path):
        try:
            stored = torch.load(common, map_location="cpu", weights_only=True)
        except FileNotFoundError:  # a checkpoint of the original, or renamed by rank 0 in the meantime
            stored = {}
    counters, settings = stored.get("rs_trainer"), stored.get("rs_settings")
    if counters is None:
        counters = {name: extract_value_from_ckpt(name, str(ckpt_path)) for name in COUNTERS}
    state = {name: int(counters[name]) for name in COUNTERS}
    return state if settings is None else {**state, "settings": settings}


def newest_complete_checkpoint(folder: str | Path) -> Path | None:
    """The complete `-last` checkpoint of the highest step, else the newest complete top-k checkpoint, else None.

    Includes a complete checkpoint that a killed run did not get to rename; rank 0 renames it.
    """
    try:
        return _newest_complete(Path(folder))
    except FileNotFoundError:  # renamed by rank 0 in the meantime
        return _newest_complete(Path(folder))


def _newest_complete(folder: Path) -> Path | None:
    # List the partial folder first, so as not to miss a checkpoint that rank 0 renames in the meantime.
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
    """Prefer the step in the name, so that a damaged older checkpoint does no harm; fall back to the stored one."""
    try:
        return extract_value_from_ckpt("step", str(path))
    except ValueError:
        return read_counters(path)["step"]


def _has_counters(path: Path) -> bool:
    """Whether it is an RS checkpoint, possibly damaged."""
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
    """Save the top-k and the last checkpoint through NeMo's checkpoint callback. Collective over all ranks.

    On return both are on disk; within `saving_in_background` the writes are still in flight. If the disk is full, the
    save is reported as failed, the older checkpoints stay, and the run continues.

    Args:
        self: the `NeMoModelCheckpoint` callback.
        monitor_candidates: metric name -> tensor; determines checkpoint names and the top-k ranking. The RS counters
            among them are also stored in the checkpoint.
        is_train_end: also run the callback's end hook, which writes the final `.nemo`.
        save_top_only: skip the last checkpoint.

    Raises:
        OSError: on every rank, if any rank could not write this checkpoint or the previous one.
        ConfigError: the disk is too full for the final `.nemo`; on rank 0 or on all ranks.
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
            # Lightning would put a zero in the name for a missing metric.
            self._save_last_checkpoint(trainer, {self.monitor: torch.tensor(float("nan")), **monitor_candidates})
    if folders:
        if not hasattr(self, "background_save"):  # the script bound this function itself
            self.background_save = BackgroundSave(trainer)
        with _surviving_a_full_disk(self):
            self.background_save.start(folders, obsolete, self.save_weights_only)
    if is_train_end or not getattr(self, "saves_in_background", False):
        advance_save(self, wait=True)
    if is_train_end:
        # Keep the hook from saving once more, with metrics of Lightning's loop, which does not run here.
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
    # NeMo parses the value from the checkpoint's name, and a value without digits would crash every later start.
    return None if math.isfinite(value) else f"is {value}"


@contextlib.contextmanager
def saving_in_background(callback, known_to_all_ranks: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Context manager in which saves block only until the state is copied; the training loop polls `advance_save`.

    On exit, waits for a save in flight, also after exceptions of the types in `known_to_all_ranks`, which every rank
    raises. After any other exception, a rank of a multi-rank job must not wait, as the other ranks may not join.
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
    """Advance the save in flight, if any, as far as possible without blocking, or to completion if `wait`.

    With no save in flight, start allocating host memory for the next one. Collective over all ranks; a no-op for a
    callback that has no `background_save`.

    Raises:
        OSError: on every rank, if any rank could not write, unless because the disk is full.
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
    """Write the final `.nemo` if the run was killed after its last checkpoint but before the `.nemo`.

    Collective over all ranks.

    Args:
        self: the `NeMoModelCheckpoint` callback.

    Raises:
        ConfigError: the disk is too full for it; on rank 0 or on all ranks.
    """
    path = Path(self._format_nemo_checkpoint_name())
    is_missing = [self.save_nemo_on_train_end and not path.exists()]
    torch.distributed.broadcast_object_list(is_missing, src=0)
    if is_missing[0]:
        with _explaining_a_full_disk(self):
            pl_module.save_to(str(path))


@contextlib.contextmanager
def _recording(callback: NeMoModelCheckpoint) -> Iterator[tuple[list[Path], list[Path]]]:
    """Context manager in which the callback updates its state, but only lists what it would save and remove.

    Disables the version counter: a checkpoint replaces an existing one of the same name.
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
    """Roll the callback's state back if a save fails; if the disk is full, log the error instead of raising it."""
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
    """Turn a full disk while writing the final `.nemo` into a `ConfigError`: no later save can make up for it."""
    try:
        yield
    except OSError as error:
        # shutil.Error lists the files that could not be copied to the temporary folder, but has no errno
        if error.errno not in DISK_IS_FULL and not isinstance(error, shutil.Error):
            raise
        raise ConfigError(
            f"{callback._format_nemo_checkpoint_name()} could not be written ({error.strerror or error}); make room "
            f"there and in {tempfile.gettempdir()}, and start the same command again, which goes on from its last "
            f"checkpoint, {callback.last_model_path or 'none'}"
        ) from error
