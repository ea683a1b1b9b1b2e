"""megatron-core 0.9.0 with a torch that is newer than itself."""

import functools
import inspect


def apply() -> None:
    _adapt_checkpoint_writer()


def _adapt_checkpoint_writer() -> None:
    """megatron-core writes `torch_dist` checkpoints through torch's private `_write_item`, which gained two arguments.

    torch 2.7 put `transforms` first and 2.9 appended `serialization_format`. Removal: with megatron-core 0.12.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint import filesystem

    parameters = inspect.signature(filesystem._write_item).parameters
    if "transforms" not in parameters or isinstance(filesystem_async._write_item, functools.partial):
        return
    arguments = [filesystem._StorageWriterTransforms()]
    keywords = {}
    if "serialization_format" in parameters:
        keywords["serialization_format"] = filesystem.SerializationFormat.TORCH_SAVE
    filesystem_async._write_item = functools.partial(filesystem._write_item, *arguments, **keywords)
