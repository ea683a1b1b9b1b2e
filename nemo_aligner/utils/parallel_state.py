"""Process-group queries: everything in `megatron.core.parallel_state`, and the source rank of a replica.

A replica is the model-parallel group: the TP x PP ranks that hold one copy of the model.
"""

import torch
from megatron.core import parallel_state as megatron_parallel_state


def get_model_parallel_src_rank() -> int:
    """Global rank of this replica's source rank, the lowest one in it."""
    return min(torch.distributed.get_process_group_ranks(megatron_parallel_state.get_model_parallel_group()))


def __getattr__(name: str):
    return getattr(megatron_parallel_state, name)
