"""Move the state of a distributed optimizer to the host while rollouts need the GPU's memory."""

from contextlib import contextmanager, nullcontext

import torch

_SHARDS = ("params_shard", "param_remainders_shard", "exp_avg_shard", "exp_avg_sq_shard")


def offload_optimizer_states(ptl_model):
    """A context manager: within it, the optimizer's moments and master weights are on the host.

    A null context if `ptl_model.to_offload_adam_states` is off or the optimizer is not a distributed one.
    """
    if not (ptl_model.to_offload_adam_states and ptl_model.with_distributed_adam):
        return nullcontext()
    state = ptl_model._optimizer.state_dict(state_dict_format=1, gather_on_root=False)
    return offload_distributed_adam(state, force_clear_memory=True)


@contextmanager
def offload_distributed_adam(state_dict: dict, force_clear_memory: bool = False):
    """Within the context every bucket's shards of Apex's DistributedFusedAdam lie on the host.

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
