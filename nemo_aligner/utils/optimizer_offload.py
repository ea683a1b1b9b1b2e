"""Offload of a distributed optimizer's state to host memory while rollouts, or training itself, need the GPU memory.

Tensors keep their identity; only their storage is freed and reallocated. So one mechanism serves every optimizer,
whatever references it keeps. Copies run on dedicated streams; torch's allocator reuses freed memory once the copies out
of it complete.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch

Key = TypeVar("Key")

_SHARDS = ("params_shard", "param_remainders_shard", "exp_avg_shard", "exp_avg_sq_shard")
# torch's pinned-memory allocator rounds up to powers of two, so pieces of such sizes waste nothing. A piece is also the
# unit of copying, which takes about a millisecond.
_PIECE_BYTES, _SMALLEST_PIECE_BYTES = 1 << 26, 1 << 20
# In `passing_through`, the number of groups prefetched to the GPU, and of groups in flight back to the host.
_NUM_ARRIVING, _NUM_LEAVING = 2, 2


class _Away(NamedTuple):
    """A storage whose GPU memory was freed."""

    storage: torch.UntypedStorage
    num_bytes: int
    host_copy: list[torch.Tensor]


class OptimizerOffload:
    """Moves the tensors of an optimizer's state to pinned host memory and back.

    As a context manager, keeps them on the host within the context.

    Methods may be called in any state, and again after an exception: a tensor's GPU memory is freed only once its copy
    to the host is enqueued, and its host copy is dropped only once the copy back is enqueued. However, no other method
    may be called while an iterator of `passing_through` is active.

    Args:
        find_tensors: returns the current tensors of the state. Tensors on a CPU are left in place.
    """

    def __init__(self, find_tensors: Callable[[], Iterable[torch.Tensor]]):
        self._find_tensors = find_tensors
        self._host = _PinnedBuffer()
        self._away: list[_Away] = []
        self._arrival: torch.cuda.Event | None = None
        self._is_passing = False

    @cached_property
    def _way_out(self) -> "_CopyStream":
        return _CopyStream()

    @cached_property
    def _way_back(self) -> "_CopyStream":
        return _CopyStream()

    def pin_in_background(self) -> None:
        """Start allocating pinned memory for the current state, so that the first `offload` need not."""
        self._host.begin_to_grow(sum(storage.nbytes() for storage in self._storages()))

    def __enter__(self) -> "OptimizerOffload":
        self.offload()
        return self

    def __exit__(self, *_) -> None:
        self.start_onload()
        self.finish_onload()

    def offload(self) -> int:
        """Enqueue copies of the state to the host and free its GPU memory; returns the number of bytes freed."""
        assert not self._is_passing
        self.finish_onload()
        storages = self._storages()
        if not storages:
            return 0
        if self._away:  # an earlier call was interrupted by an exception
            self.start_onload()
            self.finish_onload()
            storages = self._storages()
        host_copies = self._host.parts([storage.nbytes() for storage in storages])
        self._way_out.wait_for(torch.cuda.current_stream())
        for storage, host_copy in zip(storages, host_copies, strict=True):
            entry = _Away(storage, storage.nbytes(), host_copy)
            self._copy_out(entry)
            self._away.append(entry)
            storage.resize_(0)
        return self.num_bytes_away

    @property
    def num_bytes_away(self) -> int:
        """GPU memory that the offloaded state needs when it is onloaded."""
        return sum(num_bytes for _, num_bytes, _ in self._away)

    def start_onload(self) -> None:
        """Start copying the state back, concurrently with other GPU work; `finish_onload` makes it usable."""
        assert not self._is_passing
        if not self._away:
            return
        self._way_back.wait_for(self._way_out.stream)
        self._arrival = self._fetch(self._away)
        self._away = []

    def finish_onload(self) -> None:
        """Make the current stream wait for an onload in flight, if any. Does not block the host."""
        if self._arrival is not None:
            torch.cuda.current_stream().wait_event(self._arrival)
            self._arrival = None

    def passing_through(self, groups: dict[Key, Iterable[torch.Tensor]]) -> Iterator[Key]:
        """Stream offloaded tensors through the GPU group by group; a group is resident while its key is yielded.

        The next groups are prefetched meanwhile, and previous ones are copied back to the host with their new values.
        Close the iterator if it is not exhausted. The host blocks on the copies back, to bound the number of groups on
        the GPU.
        """
        away = {entry.storage._cdata: entry for entry in self._away}
        coming = [(key, list({t.untyped_storage()._cdata: None for t in group})) for key, group in groups.items()]
        self._way_back.wait_for(self._way_out.stream)
        here, departures = deque(), deque()
        self._is_passing = True
        try:
            while coming or here:
                while coming and len(here) <= _NUM_ARRIVING:
                    key, storages = coming.pop(0)
                    entries = [away[storage] for storage in storages if storage in away]
                    here.append((key, entries, self._fetch(entries)))
                key, entries, arrival = here[0]
                torch.cuda.current_stream().wait_event(arrival)
                yield key
                departures.append(self._send(entries))
                here.popleft()
                if len(departures) > _NUM_LEAVING:
                    departures.popleft().synchronize()
        finally:
            for _, entries, arrival in here:
                torch.cuda.current_stream().wait_event(arrival)
                self._send(entries)
            self._is_passing = False

    def _copy_out(self, entry: _Away) -> None:
        on_gpu = _as_bytes(entry.storage)
        self._way_out.copy(entry.host_copy, _split_like(entry.host_copy, entry.storage))
        on_gpu.record_stream(self._way_out.stream)  # keeps the memory allocated until the copy completes

    def _send(self, entries: Sequence[_Away]) -> torch.cuda.Event:
        """Copy to the host and free the GPU memory; returns an event that is recorded after the copies."""
        self._way_out.wait_for(torch.cuda.current_stream())
        for entry in entries:
            if entry.storage.nbytes() > 0:  # zero if an exception interrupted the fetch
                self._copy_out(entry)
                entry.storage.resize_(0)
        return self._way_out.stream.record_event()

    def _fetch(self, entries: Sequence[_Away]) -> torch.cuda.Event:
        """Copy to the GPU, into newly allocated memory; returns an event that is recorded after the copies."""
        _allocate(entries)
        self._way_back.wait_for(torch.cuda.current_stream())  # which may still use the memory's previous contents
        for storage, _, host_copy in entries:
            self._way_back.copy(_split_like(host_copy, storage), host_copy)
        return self._way_back.stream.record_event()

    def _storages(self) -> list[torch.UntypedStorage]:
        """The state's storages on the GPU, without duplicates for tensors that share one."""
        found = {}
        for tensor in self._find_tensors():
            storage = tensor.untyped_storage()
            if tensor.is_cuda and storage.nbytes() > 0:
                found[storage.data_ptr()] = storage
        return list(found.values())


class _CopyStream:
    """A stream for host-device copies that leaves gaps for the copies of other streams."""

    def __init__(self):
        # Streams of the same priority share a few hardware queues, where a waiting operation blocks those after it.
        self.stream = torch.cuda.Stream(priority=-1)
        self._gap = torch.zeros(1, device="cuda")

    def wait_for(self, stream: torch.cuda.Stream) -> None:
        self.stream.wait_stream(stream)

    def copy(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Copy piece by piece, with a small kernel after each piece.

        A copy engine processes the copies of one stream until it has to wait, for instance for a kernel, before it
        serves another stream. Without the kernel, even a single scalar copied by the main stream, or an event recorded
        after that copy, waits until the whole state is copied: a quarter of a second for 13.6 GB.
        """
        with torch.cuda.stream(self.stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
                self._gap.zero_()


def _allocate(entries: Sequence[_Away]) -> None:
    """Allocate GPU memory for all entries, or, if there is not enough, for none."""
    try:
        for storage, num_bytes, _ in entries:
            storage.resize_(num_bytes)
    except torch.OutOfMemoryError:
        for storage, _, _ in entries:
            storage.resize_(0)
        raise


class _PinnedBuffer:
    """Pinned host memory that only grows and is never freed."""

    def __init__(self):
        self.pieces: list[torch.Tensor] = []
        self._worker = ThreadPoolExecutor(1)
        self._growth: Future | None = None

    def begin_to_grow(self, num_bytes: int) -> None:
        """Start growing it to at least `num_bytes` in a thread."""
        self.wait()
        missing = num_bytes - sum(piece.numel() for piece in self.pieces)
        if missing > 0:
            self._growth = self._worker.submit(self._grow, missing, torch.cuda.current_device())

    def wait(self) -> None:
        """Wait until growing is done; re-raises its exception."""
        if self._growth is not None:
            growth, self._growth = self._growth, None
            growth.result()

    def parts(self, sizes: list[int]) -> list[list[torch.Tensor]]:
        """For each size, disjoint parts of the buffer that add up to it; uint8, one-dimensional."""
        self.begin_to_grow(sum(sizes))
        self.wait()
        pieces, rest, found = iter(self.pieces), torch.empty(0, dtype=torch.uint8), []
        for size in sizes:
            parts = []
            while size > 0:
                rest = rest if rest.numel() else next(pieces)
                parts.append(rest[:size])
                rest = rest[size:]
                size -= parts[-1].numel()
            found.append(parts)
        return found

    def _grow(self, num_bytes: int, device: int) -> None:
        torch.cuda.set_device(device)
        for size in _piece_sizes(num_bytes):
            self.pieces.append(torch.empty(size, dtype=torch.uint8, pin_memory=True))


def _piece_sizes(num_bytes: int) -> list[int]:
    """Powers of two that add up to `num_bytes` or slightly more."""
    num_full, rest = divmod(num_bytes, _PIECE_BYTES)
    rest = -(-rest // _SMALLEST_PIECE_BYTES) * _SMALLEST_PIECE_BYTES
    return [_PIECE_BYTES] * num_full + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _split_like(parts: list[torch.Tensor], storage: torch.UntypedStorage) -> tuple[torch.Tensor, ...]:
    return _as_bytes(storage).split([part.numel() for part in parts])


def state_tensors(ptl_model) -> Iterator[torch.Tensor]:
    """The moments and master weights of the model's distributed optimizer that have their own storage."""
    if not ptl_model.use_mcore_dist_optim:
        for bucket in ptl_model._optimizer.state["buckets"]:
            yield from bucket_tensors(bucket)
        return
    optimizer = ptl_model._optimizer.mcore_optimizer
    for state in optimizer.optimizer.state.values():
        yield from (state[key] for key in ("exp_avg", "exp_avg_sq") if key in state)
    for group in optimizer.shard_fp32_from_float16_groups:
        yield from group


def bucket_tensors(bucket) -> Iterator[torch.Tensor]:
    """This rank's part of one bucket of Apex's DistributedFusedAdam."""
    shards = (getattr(bucket, name) for name in _SHARDS)
    return (shard for shard in shards if shard is not None)


# For scripts that move the buckets of Apex's optimizer themselves.


@contextmanager
def offload_distributed_adam(state_dict: dict, force_clear_memory: bool = False):
    """Keep every bucket's shards of Apex's DistributedFusedAdam on the host within the context.

    Args:
        state_dict: `optimizer.state_dict(state_dict_format=1)`, whose buckets are those of the optimizer itself.
        force_clear_memory: also empty torch's CUDA cache.
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
