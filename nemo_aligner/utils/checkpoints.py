"""Training checkpoints that are there whole or not at all, and which of them a run continues from.

A checkpoint is a folder that megatron-core writes from all ranks. It is written under another name, synced to disk and
then renamed; only after that does an older one go.
"""

import contextlib
import copy
import errno
import os
import re
import shutil
import types
from pathlib import Path

import torch
from nemo.utils import logging
from nemo.utils.callbacks import NeMoModelCheckpoint
from nemo.utils.get_rank import is_global_rank_zero
from nemo.utils.model_utils import ckpt_to_dir

COUNTERS = ("step", "consumed_samples", "epoch", "rs_optimization_step")
# Of a checkpoint's files, megatron-core writes this one last.
LAST_FILE = "metadata.json"
PARTIAL = ".partial"
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
# What Lightning's callback keeps of the checkpoints that it has written.
BOOKS = (
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


def read_counters(ckpt_path: str | Path) -> dict[str, int]:
    """The RS counters of a checkpoint: from inside it, or, as the original wrote none there, from its name.

    Raises:
        ValueError: if they are in neither.
    """
    common = Path(ckpt_path, "common.pt")
    if common.is_file():
        stored = torch.load(common, map_location="cpu", weights_only=True).get("rs_trainer")
        if stored is not None:
            return {name: int(stored[name]) for name in COUNTERS}
    return {name: extract_value_from_ckpt(name, str(ckpt_path)) for name in COUNTERS}


def newest_complete_checkpoint(folder: str | Path) -> Path | None:
    """The `-last` checkpoint of the highest step that was written to its end; None if there is none.

    One that a killed run had no time to rename counts, too; rank 0 renames it.
    """
    folder = Path(folder)
    found = {path: path for path in folder.glob("*-last") if is_complete(path)}
    found.update({folder / path.name: path for path in (folder / PARTIAL).glob("*-last") if is_complete(path)})
    if not found:
        return None
    newest = max(found, key=lambda path: (read_counters(found[path])["step"], found[path].stat().st_mtime))
    if found[newest] != newest and is_global_rank_zero():
        _replace(newest, found[newest])
    return newest


def is_complete(path: Path) -> bool:
    """Whether the checkpoint folder was written to its end."""
    return (path / LAST_FILE).is_file() and not NeMoModelCheckpoint.is_checkpoint_unfinished(path)


def custom_save_ckpt_func(
    self, trainer, pl_module, monitor_candidates: dict, is_train_end: bool = False, save_top_only: bool = False
) -> None:
    """Save through NeMo's checkpoint callback: the top-k checkpoint, then the last one. Collective over the job.

    A checkpoint for which there is no room on the disk is reported, and the run goes on with the older ones in place.

    Args:
        self: the `NeMoModelCheckpoint` callback.
        monitor_candidates: metric name -> tensor; names of checkpoints and the choice of the best come from these. The
            RS counters among them are stored in the checkpoint, too.
        is_train_end: also run the callback's end hook, which writes the final `.nemo`.
        save_top_only: leave out the last checkpoint.
    """
    counters = {name: int(monitor_candidates[name]) for name in COUNTERS if name in monitor_candidates}
    pl_module.rs_trainer_state = counters
    saves = [] if save_top_only else [self._save_last_checkpoint]
    if self.monitor is None or self.monitor in monitor_candidates:
        saves.insert(0, self._save_topk_checkpoint)
    with _whole_or_not_at_all(self):
        for save in saves:
            before = {name: copy.copy(getattr(self, name)) for name in BOOKS}
            try:
                save(trainer, monitor_candidates)
            except OSError as error:
                if error.errno not in DISK_IS_FULL:
                    raise
                vars(self).update(before)
                last = self.last_model_path or "none"
                logging.error(f"{error.strerror}; the run goes on, its last checkpoint is {last}")
    if is_train_end:
        # The hook would save once more, with metrics of Lightning's loop, which does not run here.
        self._last_checkpoint_saved = self._last_checkpoint_saved or self.last_model_path or "none"
        val_check_interval, trainer.val_check_interval = trainer.val_check_interval, 0
        self.on_train_end(trainer, pl_module)
        trainer.val_check_interval = val_check_interval


def write_missing_archive(self, pl_module) -> None:
    """Write the final `.nemo` of a run that was killed between its last checkpoint and that. Collective over the job.

    Args:
        self: the `NeMoModelCheckpoint` callback.
    """
    path = Path(self._format_nemo_checkpoint_name())
    is_missing = [self.save_nemo_on_train_end and not path.exists()]
    torch.distributed.broadcast_object_list(is_missing, src=0)
    if is_missing[0]:
        pl_module.save_to(str(path))


@contextlib.contextmanager
def _whole_or_not_at_all(callback: NeMoModelCheckpoint):
    """Within, the callback's checkpoints replace one of the same name, and only when they are complete."""
    callback._save_checkpoint = types.MethodType(_save_and_rename, callback)
    version_counter, callback._enable_version_counter = callback._enable_version_counter, False
    try:
        yield
    finally:
        del callback._save_checkpoint
        callback._enable_version_counter = version_counter


def _save_and_rename(callback: NeMoModelCheckpoint, trainer, filepath: str) -> None:
    final = Path(ckpt_to_dir(filepath))
    partial = final.parent / PARTIAL / final.name
    if is_global_rank_zero():
        shutil.rmtree(partial.parent, ignore_errors=True)  # of a save that was interrupted
    trainer.strategy.barrier()
    _check_free_space(final.parent)
    NeMoModelCheckpoint._save_checkpoint(callback, trainer, f"{partial}{callback.FILE_EXTENSION}")
    callback._last_checkpoint_saved = filepath
    if is_global_rank_zero():
        _sync(partial)
        _replace(final, partial)
    trainer.strategy.barrier()


def _check_free_space(folder: Path) -> None:
    """Refuse to begin what would fill the disk, as far as the checkpoints that are there can tell. Collective.

    Raises:
        OSError: on every rank.
    """
    verdict = [None]
    if is_global_rank_zero():
        folder.mkdir(parents=True, exist_ok=True)
        sizes = [sum(file.stat().st_size for file in path.rglob("*")) for path in folder.iterdir() if is_complete(path)]
        free = shutil.disk_usage(folder).free
        if free < max(sizes, default=0):
            verdict = [f"the checkpoint could not be written: {folder} has room for {free} of {max(sizes)} bytes"]
    torch.distributed.broadcast_object_list(verdict, src=0)
    if verdict[0] is not None:
        raise OSError(errno.ENOSPC, verdict[0])


def _replace(final: Path, partial: Path) -> None:
    """Rename the complete folder `partial`; what had the name before goes. A kill in between loses neither."""
    if final.exists():
        final.rename(partial.parent / "replaced")
    partial.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(partial.parent)


def _sync(folder: Path) -> None:
    """Have the disk take everything below `folder` before going on."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(Path(parent, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
