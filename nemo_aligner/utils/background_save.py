"""A checkpoint on its way to the disk while training goes on.

Training waits only while the state is copied to host memory. A thread of each rank writes and syncs its part; once all
have, a thread of rank 0 completes the checkpoint and moves it to its place. Threads call no collectives.
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

# Of a checkpoint's files, this one is written last.
LAST_FILE = "metadata.json"
# Beside the checkpoints, the folder of those in the making. In it, once these are complete, the list of those that go,
# and then those themselves.
PARTIAL = ".partial"
_OBSOLETE = ".obsolete"


class BackgroundSave:
    """Saves one checkpoint at a time. Its methods are collective over the job, and for the main thread."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.is_pending = False
        self._memory = HostMemory()
        self._caller = DistributedAsyncCaller()
        self._failure: Exception | None = None
        self._steps: Iterator[bool] = iter(())

    def get_memory_ready(self) -> None:
        """Begin to get host memory for the state as it is now, so that the first save need not."""
        self._memory.begin_to_grow(_num_bytes_of_state(self.trainer.lightning_module))

    def start(self, folders: list[Path], obsolete: list[Path], weights_only: bool = False) -> None:
        """Copy the state to host memory and begin to write it. The save before must have ended.

        Args:
            folders: where the checkpoint is going to be, all in one folder; they share their files.
            obsolete: checkpoints that are removed once it is there.

        Raises:
            OSError: on every rank, if there is no room for it.
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
        gc.disable()  # looking for garbage in all that NeMo has imported can take longer than the copy
        try:
            self.trainer.save_checkpoint(f"{parts[0]}{NeMoModelCheckpoint.FILE_EXTENSION}", weights_only)
        finally:
            gc.enable()
            strategy.checkpoint_io = usual
        self._steps = self._write_and_complete(host, parts, obsolete)
        self.is_pending = next(self._steps)

    def advance(self, wait: bool = False) -> None:
        """Take the save as far as it gets at once, or, if asked to wait, to its end.

        Raises:
            OSError: on every rank, if one of them could not write; that is then the end of the save.
        """
        while self.is_pending and self._caller.is_current_async_call_done(blocking=wait):
            self.is_pending = False  # also if the next step fails
            self.is_pending = next(self._steps, False)

    def _write_and_complete(self, host: "_HostCheckpointIO", parts: list[Path], obsolete: list[Path]) -> Iterator[bool]:
        """Goes on after each `yield` when the threads of all ranks have done what they were given."""
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
                with contextlib.suppress(OSError):  # the next save tries again, and says so
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
    """In the place of NeMo's for one save: copies the state, and writes it when asked to.

    Attributes:
        config: what stands in a checkpoint's last file.
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
        if self.checkpoint_io.save_ckpt_format != "torch_dist":  # zarr can be written in the foreground only
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
        """Write and sync what this rank holds. Local; a failure of tensors is told by `gather`."""
        if self._common is not None:
            with open(self._folder / COMMON_STATE_FNAME, "wb") as file:
                file.write(self._common)
                os.fsync(file.fileno())
        if self._request.async_fn is not None:
            self._request.async_fn(*self._request.async_fn_args)

    def gather(self) -> None:
        """Let rank 0 know what the ranks have written. Collective over the job.

        Raises:
            OSError: on every rank, if one of them could not write.
        """
        for finalization in self._request.finalize_fns:
            finalization.gather()

    def finish(self) -> None:
        """Write the table of contents. On rank 0."""
        for finalization in self._request.finalize_fns:
            finalization.finish()


class HostMemory:
    """Memory for the copy of a state, kept from save to save: getting it takes longer than filling it."""

    def __init__(self):
        self.pieces: list[torch.Tensor] = []
        self._worker = ThreadPoolExecutor(1)
        self._growth: Future | None = None
        self._place = (0, 0)  # where what is not taken yet begins: a piece, and a byte in it

    @property
    def num_bytes(self) -> int:
        return sum(piece.numel() for piece in self.pieces)

    def begin_to_grow(self, num_bytes: int) -> None:
        """Have at least so much, before long: a thread gets it."""
        if self._growth is None or self._growth.done():
            self._growth = self._worker.submit(self._grow, num_bytes)

    def rewind(self) -> None:
        """What was taken may be taken anew."""
        if self._growth is not None:
            self._growth.result()
        self._place = (0, 0)

    def take(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized tensor. The same requests after each `rewind` get the same memory.

        It has a storage of its own, as torch writes a tensor's whole storage to the disk.
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
        if num_bytes > self.num_bytes:  # written to, as the system gives memory only then
            self.pieces.append(torch.empty(num_bytes - self.num_bytes, dtype=torch.uint8).fill_(0))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64


def _num_bytes_of_state(ptl_model) -> int:
    """About what this rank is going to write: of what all replicas hold, its share."""
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
    """Whether the checkpoint folder was written to its end."""
    return (path / LAST_FILE).is_file() and not NeMoModelCheckpoint.is_checkpoint_unfinished(path)


def complete_in(partial: Path) -> list[Path]:
    """The checkpoints that a save had completed, but not moved to their places."""
    return list(partial.glob("[!.]*")) if (partial / _OBSOLETE).exists() else []


def settle(partial: Path) -> None:
    """Move what is complete to its place, and remove what that stands for, and the rest.

    A kill in between loses nothing; the next call goes on.
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
    shutil.rmtree(partial, ignore_errors=True)  # what a network file system holds on to goes next time


def _make_room(folder: Path) -> None:
    """Create the folder, unless a checkpoint in it would fill the disk, as far as those that are there can tell.

    Raises:
        OSError: if it would.
    """
    partial = folder.parent
    if partial.exists():
        settle(partial)  # of a save that was interrupted
    folder.mkdir(parents=True)
    there = [path for path in partial.parent.glob("[!.]*") if is_complete(path)]
    sizes = [sum(file.stat().st_size for file in path.rglob("*")) for path in there]
    free = shutil.disk_usage(partial).free
    if free < max(sizes, default=0):
        raise OSError(errno.ENOSPC, f"{partial.parent} has room for {free} of {max(sizes)} bytes")


def _complete(host: _HostCheckpointIO, parts: list[Path], obsolete: list[Path]) -> None:
    """Complete the checkpoint in the first of `parts`, have it in the others, too, and move all to their places."""
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
    """Have the files of a folder in another one; as copies where a file system has no links."""
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
