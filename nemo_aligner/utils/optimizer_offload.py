"""A distributed optimizer's state on the host while rollouts need the GPU's memory.

Tensors keep their identity: what goes and comes is the memory behind them. So one mechanism serves every optimizer,
whatever references it keeps. Copies run on a stream of their own; freed memory can be taken by others as the copies out
of it end, which torch's allocator sees to.
"""

import ctypes
import math
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

_SHARDS = ("params_shard", "param_remainders_shard", "exp_avg_shard", "exp_avg_sq_shard")
# Page-locking is a call that cannot be interrupted: in pieces, it lets other threads get at the driver in between.
_PIECE_BYTES = 1 << 28
# Of a tensor's first byte on the host: copies are fastest from whole pages.
_ALIGNMENT = mmap.PAGESIZE


class OptimizerOffload:
    """Moves the tensors of an optimizer's state to page-locked host memory and back.

    As a context manager: within, they are on the host.

    Every method may be called in any state, and again after an exception: a tensor's memory is let go only once its
    values are on their way to the host, and its host copy is needed only until then.

    Args:
        find_tensors: gives the tensors of the state as they are now. Those on a CPU are left where they are.
    """

    def __init__(self, find_tensors: Callable[[], Iterable[torch.Tensor]]):
        self._find_tensors = find_tensors
        self._host = _PinnedBuffer()
        self._away: list[tuple[torch.UntypedStorage, int, torch.Tensor]] = []  # storage, its bytes, their host copy
        self._arrival: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None

    def pin_in_background(self) -> None:
        """Begin to page-lock host memory for the state as it is now, so that the first `offload` need not."""
        if num_bytes := _end_offset(storage.nbytes() for storage in self._storages()):
            self._host.begin_to_grow(num_bytes)

    def __enter__(self) -> "OptimizerOffload":
        self.offload()
        return self

    def __exit__(self, *_) -> None:
        self.start_onload()
        self.finish_onload()

    def offload(self) -> int:
        """Send the state to the host and let go of its GPU memory, without waiting; returns the bytes that it frees."""
        self.finish_onload()
        storages = self._storages()
        if not storages:
            return 0
        if self._away:  # an exception came in between
            self.start_onload()
            self.finish_onload()
            storages = self._storages()
        host_copies = self._host.parts([storage.nbytes() for storage in storages])
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        for storage, host_copy in zip(storages, host_copies, strict=True):
            on_gpu = _as_bytes(storage)
            with torch.cuda.stream(self._stream):
                host_copy.copy_(on_gpu, non_blocking=True)
            on_gpu.record_stream(self._stream)  # the allocator keeps the memory until the copy has been made
            self._away.append((storage, storage.nbytes(), host_copy))
            storage.resize_(0)
        return sum(num_bytes for _, num_bytes, _ in self._away)

    def start_onload(self) -> None:
        """Begin to bring the state back, beside whatever the GPU does; `finish_onload` makes it usable."""
        if not self._away:
            return
        self._allocate()
        self._stream.wait_stream(torch.cuda.current_stream())  # which may still use what the memory held before
        with torch.cuda.stream(self._stream):
            for storage, _, host_copy in self._away:
                _as_bytes(storage).copy_(host_copy, non_blocking=True)
            self._arrival = self._stream.record_event()
        self._away = []

    def finish_onload(self) -> None:
        """Have the current stream wait for the state, if it is on its way back. The host does not wait."""
        if self._arrival is not None:
            torch.cuda.current_stream().wait_event(self._arrival)
            self._arrival = None

    def _allocate(self) -> None:
        """GPU memory for all that is away, or, if there is not enough, for nothing."""
        try:
            for storage, num_bytes, _ in self._away:
                storage.resize_(num_bytes)
        except torch.OutOfMemoryError:
            for storage, _, _ in self._away:
                storage.resize_(0)
            raise

    def _storages(self) -> list[torch.UntypedStorage]:
        """The state's memory on the GPU, each piece once though several tensors may look at it."""
        found = {}
        for tensor in self._find_tensors():
            storage = tensor.untyped_storage()
            if tensor.is_cuda and storage.nbytes() > 0:
                found[storage.data_ptr()] = storage
        return list(found.values())


class _PinnedBuffer:
    """Page-locked host memory that only grows, and is kept.

    torch's own allocator of such memory rounds up to a power of two, which for a state of many gigabytes is too much.
    """

    def __init__(self):
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._growth: threading.Thread | None = None
        self._failure: BaseException | None = None

    def begin_to_grow(self, num_bytes: int) -> None:
        """Make it at least that large, in a thread."""
        self._wait()
        if num_bytes > self._bytes.numel():
            device = torch.cuda.current_device()
            self._growth = threading.Thread(target=self._grow, args=(num_bytes, device), daemon=True)
            self._growth.start()

    def parts(self, sizes: list[int]) -> list[torch.Tensor]:
        """Disjoint parts of it of those sizes, uint8 [size] each."""
        self.begin_to_grow(_end_offset(sizes))
        self._wait()
        parts, offset = [], 0
        for size in sizes:
            parts.append(self._bytes[offset : offset + size])
            offset += _aligned(size)
        return parts

    def _wait(self) -> None:
        if self._growth is not None:
            self._growth.join()
            self._growth = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _grow(self, num_bytes: int, device: int) -> None:
        try:
            torch.cuda.set_device(device)
            self._release()
            self._bytes = _pinned(num_bytes)
        except BaseException as error:
            self._failure = error

    def _release(self) -> None:
        torch.cuda.synchronize()  # no copy may be under way
        for piece in self._bytes.split(_PIECE_BYTES):
            _check(torch.cuda.cudart().cudaHostUnregister(piece.data_ptr()))
        self._bytes = torch.empty(0, dtype=torch.uint8)


def _pinned(num_bytes: int) -> torch.Tensor:
    """Zeros, uint8 [num_bytes], page-locked."""
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to lock
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    for piece in buffer.split(_PIECE_BYTES):
        ctypes.memset(piece.data_ptr(), 0, piece.numel())  # touches the pages without holding the interpreter's lock
        _check(torch.cuda.cudart().cudaHostRegister(piece.data_ptr(), piece.numel(), 0))
    return buffer


def _check(status) -> None:
    if int(status) != 0:
        raise RuntimeError(f"page-locking host memory for the optimizer's state failed: {status}")


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _aligned(num_bytes: int) -> int:
    return math.ceil(num_bytes / _ALIGNMENT) * _ALIGNMENT


def _end_offset(sizes: Iterable[int]) -> int:
    return sum(map(_aligned, sizes))


def state_tensors(ptl_model) -> Iterator[torch.Tensor]:
    """The moments and master weights of the model's distributed optimizer, as far as they have memory of their own."""
    if not ptl_model.use_mcore_dist_optim:
        for bucket in ptl_model._optimizer.state["buckets"]:
            shards = (getattr(bucket, name) for name in _SHARDS)
            yield from (shard for shard in shards if shard is not None)
        return
    optimizer = ptl_model._optimizer.mcore_optimizer
    for state in optimizer.optimizer.state.values():
        yield from (state[key] for key in ("exp_avg", "exp_avg_sq") if key in state)
    for group in optimizer.shard_fp32_from_float16_groups:
        yield from group


# For scripts that move the buckets of Apex's optimizer themselves


@contextmanager
def offload_distributed_adam(state_dict: dict, force_clear_memory: bool = False):
    """Within the context every bucket's shards of Apex's DistributedFusedAdam are tensors on the host.

    Args:
        state_dict: `optimizer.state_dict(state_dict_format=1)`, whose buckets are those of the optimizer itself.
        force_clear_memory: also return the freed memory from torch's cache to the device.
    """
    buckets = state_dict["state"]["buckets"]
    for bucket in buckets:
        dist_adam_load_state_bucket_into_device(bucket, "cpu")
    torch.cuda.synchronize()
    if force_clear_memory:
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for bucket in buckets:
            dist_adam_load_state_bucket_into_device(bucket, torch.cuda.current_device())
        torch.cuda.synchronize()


def dist_adam_load_state_bucket_into_device(state_bucket, device) -> None:
    """Move one bucket of Apex's DistributedFusedAdam to `device`, in place."""
    for name in _SHARDS:
        shard = getattr(state_bucket, name)
        if shard is not None:
            setattr(state_bucket, name, shard.to(device, non_blocking=True))
