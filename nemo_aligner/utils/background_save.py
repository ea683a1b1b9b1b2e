"""Asynchronous checkpoint writes.

Training blocks only while the state is copied to host memory. A thread on each rank writes and syncs its shard; once
all ranks are done, a thread on rank 0 completes the checkpoint and renames it to its final path. Threads call no
collectives.
"""

import contextlib
import errno
import gc
import io
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_transformation import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, DistributedAsyncCaller
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.parallel_state import get_data_parallel_world_size
from nemo.utils.callbacks import NeMoModelCheckpoint
from nemo.utils.get_rank import is_global_rank_zero
from pytorch_lightning.plugins.io.wrapper import _WrappingCheckpointIO

from nemo_aligner.compat.checkpoint_writer import raise_on_all_ranks
from nemo_aligner.utils.optimizer_offload import state_tensors

# The file of a checkpoint that is written last.
LAST_FILE = "metadata.json"
# Folder of incomplete checkpoints, next to the final ones. Once they are complete, it also holds the list of obsolete
# checkpoints, and then those checkpoints themselves.
PARTIAL = ".partial"
_OBSOLETE = ".obsolete"


class BackgroundSave:
    """Saves one checkpoint at a time. Methods are collective over all ranks and must be called on the main thread."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.is_pending = False
        self._memory = HostMemory()
        self._caller = DistributedAsyncCaller()
        self._failure: Exception | None = None
        self._steps: Iterator[bool] = iter(())

    def get_memory_ready(self) -> None:
        """Start allocating host memory for the current state, so that the first save need not."""
        self._memory.begin_to_grow(_num_bytes_of_state(self.trainer.lightning_module))

    def start(self, folders: list[Path], obsolete: list[Path], weights_only: bool = False) -> None:
        """Copy the state to host memory and start writing it. The previous save must have ended.

        Args:
            folders: final paths of the checkpoint, all with the same parent; they share their files.
            obsolete: checkpoints to remove once it is complete.

        Raises:
            OSError: on every rank, if the disk is too full for it.
        """
        partial = folders[0].parent / PARTIAL
        parts = [partial / folder.name for folder in folders]
        failure = None
        if is_global_rank_zero():
            try:
                _make_room(parts[0])
            except OSError as error:
                failure = error
        raise_on_all_ranks(failure)
        strategy = self.trainer.strategy
        usual, host = strategy.checkpoint_io, _HostCheckpointIO(strategy.unwrapped_checkpoint_io, self._memory)
        strategy.checkpoint_io = host
        gc.disable()  # a collection over all the objects that NeMo imports can take longer than the copy
        try:
            self.trainer.save_checkpoint(f"{parts[0]}{NeMoModelCheckpoint.FILE_EXTENSION}", weights_only)
        finally:
            gc.enable()
            strategy.checkpoint_io = usual
        self._steps = self._write_and_complete(host, parts, obsolete)
        self.is_pending = next(self._steps)

    def advance(self, wait: bool = False) -> None:
        """Advance the save as far as possible without blocking, or to completion if `wait`.

        Raises:
            OSError: on every rank, if any rank could not write; this ends the save.
        """
        while self.is_pending and self._caller.is_current_async_call_done(blocking=wait):
            self.is_pending = False  # in case the next step raises
            self.is_pending = next(self._steps, False)

    def _write_and_complete(self, host: "_HostCheckpointIO", parts: list[Path], obsolete: list[Path]) -> Iterator[bool]:
        """Resumed after each `yield` once the threads of all ranks have finished their tasks."""
        try:
            self._in_thread(host.write)
            yield True
            raise_on_all_ranks(self._failure)
            host.gather()
            if is_global_rank_zero():
                self._in_thread(lambda: _complete(host, parts, obsolete))
            yield True
            raise_on_all_ranks(self._failure)
        except OSError:
            if is_global_rank_zero():
                with contextlib.suppress(OSError):  # the next save retries, and raises on failure
                    settle(parts[0].parent)
            raise

    def _in_thread(self, function: Callable[[], None]) -> None:
        self._failure = None
        self._caller.schedule_async_call(self._call, (function,))

    def _call(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:
            self._failure = error


class _HostCheckpointIO(_WrappingCheckpointIO):
    """Replaces NeMo's checkpoint IO for one save: copies the state, and defers the write to `write`.

    Attributes:
        config: contents of the checkpoint's last file.
    """

    def __init__(self, checkpoint_io, memory: "HostMemory"):
        super().__init__(checkpoint_io)
        memory.rewind()
        self._memory = memory
        self._common: memoryview | None = None
        self._request = AsyncRequest(None, (), [])

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        self._folder = Path(path)
        strategy = self.checkpoint_io.save_sharded_strategy
        self.config = CheckpointingConfig(strategy.backend, strategy.version)
        if self.checkpoint_io.save_ckpt_format != "torch_dist":  # zarr supports synchronous writes only
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
            return
        sharded, common = save_preprocess(checkpoint)
        if isinstance(strategy, FullyParallelSaveStrategyWrapper):
            strategy.apply_saving_parallelization(sharded)
            strategy = strategy.base_strategy
        self._request = strategy.async_save(dict_list_map_inplace(self._to_host, sharded), self._folder)
        if is_global_rank_zero():
            serialized = io.BytesIO()
            torch.save(common, serialized)
            self._common = serialized.getbuffer()

    def _to_host(self, value):
        if not isinstance(value, ShardedTensor) or value.data is None or not is_main_replica(value.replica_id):
            return value
        state = value.data.detach()
        value.data = self._memory.take(state.shape, state.dtype).copy_(state, non_blocking=True)
        return value

    def write(self) -> None:
        """Write and sync this rank's shard. Local; `gather` reports failures to write tensors."""
        if self._common is not None:
            with open(self._folder / COMMON_STATE_FNAME, "wb") as file:
                file.write(self._common)
                os.fsync(file.fileno())
        if self._request.async_fn is not None:
            self._request.async_fn(*self._request.async_fn_args)

    def gather(self) -> None:
        """Gather on rank 0 what each rank has written. Collective over all ranks.

        Raises:
            OSError: on every rank, if any rank could not write.
        """
        for finalization in self._request.finalize_fns:
            finalization.gather()

    def finish(self) -> None:
        """Write the checkpoint metadata. On rank 0 only."""
        for finalization in self._request.finalize_fns:
            finalization.finish()


class HostMemory:
    """Host buffer for the copy of a state, reused between saves: allocating it takes longer than filling it."""

    def __init__(self):
        self.pieces: list[torch.Tensor] = []
        self._worker = ThreadPoolExecutor(1)
        self._growth: Future | None = None
        self._place = (0, 0)  # start of the free part: index of a piece, byte offset in it

    @property
    def num_bytes(self) -> int:
        return sum(piece.numel() for piece in self.pieces)

    def begin_to_grow(self, num_bytes: int) -> None:
        """Start growing the buffer to at least `num_bytes` in a thread."""
        if self._growth is None or self._growth.done():
            self._growth = self._worker.submit(self._grow, num_bytes)

    def rewind(self) -> None:
        """Mark the whole buffer as free."""
        if self._growth is not None:
            self._growth.result()
        self._place = (0, 0)

    def take(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor. The same sequence of requests after each `rewind` gets the same memory.

        The tensor has its own storage, because torch writes a tensor's whole storage to disk.
        """
        num_bytes = shape.numel() * dtype.itemsize
        number, start = self._place
        while number < len(self.pieces) and start + num_bytes > self.pieces[number].numel():
            number, start = number + 1, 0
        if number == len(self.pieces):
            self.pieces.append(torch.empty(num_bytes, dtype=torch.uint8))
        self._place = (number, _aligned(start + num_bytes))
        if num_bytes == 0:
            return torch.empty(shape, dtype=dtype)
        part = memoryview(self.pieces[number].numpy())[start : start + num_bytes]
        return torch.frombuffer(part, dtype=dtype).view(shape)

    def _grow(self, num_bytes: int) -> None:
        if num_bytes > self.num_bytes:  # filled, as the OS commits pages only on first write
            self.pieces.append(torch.empty(num_bytes - self.num_bytes, dtype=torch.uint8).fill_(0))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64


def _num_bytes_of_state(ptl_model) -> int:
    """Estimate of the bytes that this rank writes, including its share of the state replicated over DP ranks."""
    chunks = ptl_model.get_model_module_list()
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    if ptl_model.use_peft:
        weights = [parameter for parameter in weights if parameter.requires_grad]
    if ptl_model.with_distributed_adam:
        shared, own = weights, list(state_tensors(ptl_model))
    else:
        shared, own = [*weights, *nested_values(dict(ptl_model._optimizer.state))], []
    return sum(map(_num_bytes, own)) + sum(map(_num_bytes, shared)) // get_data_parallel_world_size()


def _num_bytes(value) -> int:
    return _aligned(value.nbytes) if isinstance(value, torch.Tensor) and value.ndim > 0 else 0


def is_complete(path: Path) -> bool:
    """Whether the checkpoint folder was written completely."""
    return (path / LAST_FILE).is_file() and not NeMoModelCheckpoint.is_checkpoint_unfinished(path)


def complete_in(partial: Path) -> list[Path]:
    """Checkpoints that a save had completed but not yet renamed to their final paths."""
    return list(partial.glob("[!.]*")) if (partial / _OBSOLETE).exists() else []


def settle(partial: Path) -> None:
    """Rename complete checkpoints to their final paths, remove those they replace, and delete all else in `partial`.

    Safe to interrupt: nothing is lost, and the next call continues.
    """
    complete = complete_in(partial)
    places = [partial.parent / path.name for path in complete]
    obsolete = [partial.parent / name for name in (partial / _OBSOLETE).read_text().splitlines()] if complete else []
    for path in (*places, *obsolete):
        if path.exists():
            path.rename(partial / f"{_OBSOLETE}-{path.name}")
    for path, place in zip(complete, places, strict=True):
        path.rename(place)
    _sync_folder(partial.parent)
    shutil.rmtree(partial, ignore_errors=True)  # files still held by a network file system go next time


def _make_room(folder: Path) -> None:
    """Create the folder if there is room for a checkpoint, judging by the size of the existing ones.

    Raises:
        OSError: if there is not enough free space.
    """
    partial = folder.parent
    if partial.exists():
        settle(partial)  # left over from an interrupted save
    folder.mkdir(parents=True)
    there = [path for path in partial.parent.glob("[!.]*") if is_complete(path)]
    sizes = [sum(file.stat().st_size for file in path.rglob("*")) for path in there]
    free = shutil.disk_usage(partial).free
    if free < max(sizes, default=0):
        raise OSError(errno.ENOSPC, f"{partial.parent} has room for {free} of {max(sizes)} bytes")


def _complete(host: _HostCheckpointIO, parts: list[Path], obsolete: list[Path]) -> None:
    """Complete the checkpoint in `parts[0]`, link it into the other parts, and rename all to their final paths."""
    host.finish()
    written, *others = parts
    partial = written.parent
    for other in others:
        _share_files(written, other)
    for part in parts:
        save_config(host.config, part)
    names = [os.path.relpath(path, partial.parent) for path in obsolete]
    (partial / ".list").write_text("\n".join(names))
    _sync(partial)
    (partial / ".list").rename(partial / _OBSOLETE)
    _sync_folder(partial)
    settle(partial)


def _share_files(folder: Path, other: Path) -> None:
    """Hard-link the files of a folder into another one; copy them if the file system has no hard links."""
    other.mkdir()
    for path in sorted(folder.rglob("*")):
        target = other / path.relative_to(folder)
        if path.is_dir():
            target.mkdir()
            continue
        try:
            target.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, target)


def _sync(folder: Path) -> None:
    """fsync everything below `folder`."""
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
