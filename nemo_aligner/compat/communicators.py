"""NCCL communicators of those groups alone that communicate, as NeMo 2.0.0 was written for.

Lightning 2.5.6 binds the process group to a device, whereupon torch connects every group when it is created. Megatron
creates some two dozen groups, most of which, in a given layout, never send anything; each connected one takes some
hundred megabytes of the GPU. Unbound, a group connects with its first collective.

Removal: with a Megatron or NeMo that creates only the groups its layout uses.
"""

import functools


def apply() -> None:
    from pytorch_lightning.strategies import ddp

    connect = ddp._init_dist_connection
    if connect.__module__ == __name__:
        return

    @functools.wraps(connect, assigned=())
    def connect_unbound(*args, device_id=None, **kwargs):
        return connect(*args, **kwargs)

    ddp._init_dist_connection = connect_unbound
