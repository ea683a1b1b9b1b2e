"""No NCCL communicators for process groups of a single rank.

Lightning 2.5.6 binds the process group to a device, whereupon torch connects every group as it is created. Megatron
creates some two dozen of them; most have one rank in a given layout and never send anything, but each connected one
takes a few hundred megabytes of the GPU. They connect with their first collective instead. Groups of several ranks stay
as they are: where ranks come to their first collectives in different orders, connecting them there could deadlock.

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
