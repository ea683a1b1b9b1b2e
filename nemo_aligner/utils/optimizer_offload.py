"""A distributed optimizer's state on the host while rollouts, or training itself, need the GPU's memory.

Tensors keep their identity: what goes and comes is the memory behind them. So one mechanism serves every optimizer,
whatever references it keeps. Copies run on a stream of their own; freed memory can be taken by others as the copies out
of it end, which torch's allocator sees to.
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
# torch's allocator of page-locked memory rounds up to powers of two: with pieces of such sizes nothing is lost. A piece
# is also what is copied at a time, in about a millisecond.
_PIECE_BYTES, _SMALLEST_PIECE_BYTES = 1 << 26, 1 << 20
# How many groups of a state that passes through the GPU may be on their way there, and on their way back.
_NUM_ARRIVING, _NUM_LEAVING = 2, 2


class _Away(NamedTuple):
    """Memory that was let go of."""

    storage: torch.UntypedStorage
    num_bytes: int
    host_copy: list[torch.Tensor]


class OptimizerOffload:
    """Moves the tensors of an optimizer's state to page-locked host memory and back.

    As a context manager: within, they are on the host.

    Every method may be called in any state, and again after an exception: a tensor's memory is let go only once its
    values are on their way to the host, and its host copy is needed only until then. But while tensors pass through the
    GPU, none of the others.

    Args:
        find_tensors: gives the tensors of the state as they are now. Those on a CPU are left where they are.
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
        """Begin to page-lock host memory for the state as it is now, so that the first `offload` need not."""
        self._host.begin_to_grow(sum(storage.nbytes() for storage in self._storages()))

    def __enter__(self) -> "OptimizerOffload":
        self.offload()
        return self

    def __exit__(self, *_) -> None:
        self.start_onload()
        self.finish_onload()

    def offload(self) -> int:
        """Send the state to the host and let go of its GPU memory, without waiting; returns the bytes that it frees."""
        assert not self._is_passing
        self.finish_onload()
        storages = self._storages()
        if not storages:
            return 0
        if self._away:  # an exception came in between
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
        """What the state will take on the GPU when it comes back."""
        return sum(num_bytes for _, num_bytes, _ in self._away)

    def start_onload(self) -> None:
        """Begin to bring the state back, beside whatever the GPU does; `finish_onload` makes it usable."""
        assert not self._is_passing
        if not self._away:
            return
        self._way_back.wait_for(self._way_out.stream)
        self._arrival = self._fetch(self._away)
        self._away = []

    def finish_onload(self) -> None:
        """Have the current stream wait for the state, if it is on its way back. The host does not wait."""
        if self._arrival is not None:
            torch.cuda.current_stream().wait_event(self._arrival)
            self._arrival = None

    def passing_through(self, groups: dict[Key, Iterable[torch.Tensor]]) -> Iterator[Key]:
        """Bring tensors that are away to the GPU, one group after the other, each while the iterator stands at its key.

        The next groups arrive meanwhile, and the last ones leave with the values that they were given. To be closed
        where it is not iterated to its end. The host waits for groups to leave, so that few are on the GPU at a time.
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
        on_gpu.record_stream(self._way_out.stream)  # the allocator keeps the memory until the copy has been made

    def _send(self, entries: Sequence[_Away]) -> torch.cuda.Event:
        """Copy what is on the GPU back to the host and let go of the memory; returns when that will have been done."""
        self._way_out.wait_for(torch.cuda.current_stream())
        for entry in entries:
            if entry.storage.nbytes() > 0:  # else an exception came in between
                self._copy_out(entry)
                entry.storage.resize_(0)
        return self._way_out.stream.record_event()

    def _fetch(self, entries: Sequence[_Away]) -> torch.cuda.Event:
        """Copy to the GPU, into new memory; returns when the copies will have been made."""
        _allocate(entries)
        self._way_back.wait_for(torch.cuda.current_stream())  # which may still use what the memory held before
        for storage, _, host_copy in entries:
            self._way_back.copy(_split_like(host_copy, storage), host_copy)
        return self._way_back.stream.record_event()

    def _storages(self) -> list[torch.UntypedStorage]:
        """The state's memory on the GPU, each piece once though several tensors may look at it."""
        found = {}
        for tensor in self._find_tensors():
            storage = tensor.untyped_storage()
            if tensor.is_cuda and storage.nbytes() > 0:
                found[storage.data_ptr()] = storage
        return list(found.values())


class _CopyStream:
    """A stream for copies between host and GPU, with room between them for the copies of others."""

    def __init__(self):
        # Streams share a few hardware queues, in which what waits holds up what is behind it; but not those of another
        # priority.
        self.stream = torch.cuda.Stream(priority=-1)
        self._gap = torch.zeros(1, device="cuda")

    def wait_for(self, stream: torch.cuda.Stream) -> None:
        self.stream.wait_stream(stream)

    def copy(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Copy piece by piece.

        A copy engine goes through the copies of one stream and does not look at those of another before it has to wait,
        be it for a kernel. Without one, a single number that the main stream fetches or sends, or an event that it
        records behind that, stays in line until the whole state has gone by: a quarter of a second for 13.6 GB.
        """
        with torch.cuda.stream(self.stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
                self._gap.zero_()


def _allocate(entries: Sequence[_Away]) -> None:
    """GPU memory for all of them, or, if there is not enough, for none."""
    try:
        for storage, num_bytes, _ in entries:
            storage.resize_(num_bytes)
    except torch.OutOfMemoryError:
        for storage, _, _ in entries:
            storage.resize_(0)
        raise


class _PinnedBuffer:
    """Page-locked host memory that only grows, and is kept."""

    def __init__(self):
        self.pieces: list[torch.Tensor] = []
        self._worker = ThreadPoolExecutor(1)
        self._growth: Future | None = None

    def begin_to_grow(self, num_bytes: int) -> None:
        """Make it at least that large, in a thread."""
        self.wait()
        missing = num_bytes - sum(piece.numel() for piece in self.pieces)
        if missing > 0:
            self._growth = self._worker.submit(self._grow, missing, torch.cuda.current_device())

    def wait(self) -> None:
        """Return when it has its size, or raise what kept it from that."""
        if self._growth is not None:
            growth, self._growth = self._growth, None
            growth.result()

    def parts(self, sizes: list[int]) -> list[list[torch.Tensor]]:
        """For each size, disjoint parts of it that are so large together; uint8, one-dimensional."""
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
    """Powers of two that are together `num_bytes` or a little more."""
    num_full, rest = divmod(num_bytes, _PIECE_BYTES)
    rest = -(-rest // _SMALLEST_PIECE_BYTES) * _SMALLEST_PIECE_BYTES
    return [_PIECE_BYTES] * num_full + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _split_like(parts: list[torch.Tensor], storage: torch.UntypedStorage) -> tuple[torch.Tensor, ...]:
    return _as_bytes(storage).split([part.numel() for part in parts])


def state_tensors(ptl_model) -> Iterator[torch.Tensor]:
    """The moments and master weights of the model's distributed optimizer, as far as they have memory of their own."""
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
