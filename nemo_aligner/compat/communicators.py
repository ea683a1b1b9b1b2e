"""No NCCL communicators for process groups of a single rank.

Lightning 2.5.6 binds the process group to a device, which makes torch initialize the communicator of every group at
creation. Megatron creates some two dozen groups; in a given layout most have one rank and never communicate, but each
communicator takes a few hundred megabytes of GPU memory. Here they are initialized lazily, at their first collective.
Groups of several ranks stay eager: lazy initialization could deadlock where ranks reach their first collectives in
different orders.

Removal: with a Lightning that binds to no device, or a Megatron that creates only the groups its layout uses.
"""

import functools

import torch


def apply() -> None:
    new_group = torch.distributed.new_group
    if new_group.__module__ == __name__:
        return

    @functools.wraps(new_group)
    def new_group_of_one_unconnected(ranks=None, *args, **kwargs):
        world = torch.distributed.group.WORLD
        device = None if world is None else world.bound_device_id
        if device is None or ranks is None or len(ranks) > 1:
            return new_group(ranks, *args, **kwargs)
        world.bound_device_id = None
        try:
            return new_group(ranks, *args, **kwargs)
        finally:
            world.bound_device_id = device

    new_group_of_one_unconnected.__module__ = __name__
    torch.distributed.new_group = new_group_of_one_unconnected
