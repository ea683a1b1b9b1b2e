"""KV cache of the rows in flight, allocated once, and the memory available for it.

Legend: L layers, R rows, G key/value groups of this rank, T positions per row, D channels per head.
"""

from collections.abc import Collection

import psutil
import torch
from megatron.core import parallel_state

from nemo_aligner.compat.device import current_device
from nemo_aligner.generation.cuda_graph import pools_in_use

# The rest is for activations, logits and fragmentation.
USABLE_SHARE = 0.85


class KVCache:
    """Keys and values [L, R, G, T, D]; the owner keeps track of which positions are filled."""

    def __init__(self, num_layers: int, num_rows: int, num_groups: int, capacity: int, head_dim: int, dtype, device):
        # One allocation: torch's allocator might swap two of equal size when they are allocated again, which would
        # invalidate captured graphs. Zeros: attention multiplies masked positions by 0, which must not meet a NaN.
        both = torch.zeros(2, num_layers, num_rows, num_groups, capacity, head_dim, dtype=dtype, device=device)
        self.keys_LRGTD, self.values_LRGTD = both.unbind()

    @property
    def num_rows(self) -> int:
        return self.keys_LRGTD.size(1)

    @property
    def capacity(self) -> int:
        return self.keys_LRGTD.size(3)

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys_LRGTD.numel() * self.keys_LRGTD.element_size()

    @property
    def pointer(self) -> int:
        """Its address in memory."""
        return self.keys_LRGTD.data_ptr()

    def copy_row_(self, row: int, source: "KVCache", source_row: int, length: int) -> None:
        """Copy the first `length` positions of a row of `source`, which may be this cache, to `row`."""
        for ours, theirs in ((self.keys_LRGTD, source.keys_LRGTD), (self.values_LRGTD, source.values_LRGTD)):
            ours[:, row, :, :length] = theirs[:, source_row, :, :length]


def bytes_per_position(num_layers: int, num_groups: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token."""
    return 2 * num_layers * num_groups * head_dim * dtype.itemsize


def usable_memory(device: torch.device) -> int:
    """Bytes that KV caches may use now: most of what neither this process nor another one uses."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available * USABLE_SHARE)
    free, _ = torch.cuda.mem_get_info(device)
    cached = cached_memory(torch.cuda.memory_snapshot(), device.index, pools_in_use())
    return int((free + cached) * USABLE_SHARE)


def cached_memory(segments: list[dict], device_index: int, pools_of_graphs: Collection[tuple[int, int]]) -> int:
    """Bytes that torch's caching allocator holds free on a device.

    Args:
        segments: from `torch.cuda.memory_snapshot()`, in which a graph's private memory looks free between replays.
        pools_of_graphs: pools whose memory only captured graphs can use. Pools without graphs do not belong here: torch
            empties them before it runs out of memory.
    """
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in segments
        if segment["device"] == device_index and segment["segment_pool_id"] not in pools_of_graphs
    )


def min_over_ranks(number: int) -> int:
    """The minimum of `number` over the ranks of a replica, which must generate the same rows. Collective over them.

    Without initialized model parallelism this process is the only rank.
    """
    is_alone = not parallel_state.model_parallel_is_initialized()
    if is_alone or parallel_state.get_model_parallel_group().size() == 1:
        return number
    least = torch.tensor(number, device=current_device())
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=parallel_state.get_model_parallel_group())
    return int(least)
