"""megatron-core 0.9.0 with a newer torch."""

import dataclasses
import functools
import inspect


def apply() -> None:
    _adapt_checkpoint_writer()
    _keep_what_megatron_core_adds_to_metadata()


def _adapt_checkpoint_writer() -> None:
    """megatron-core writes `torch_dist` checkpoints through torch's private `_write_item`, which gained two arguments.

    torch 2.7 prepended `transforms` and 2.9 appended `serialization_format`. Removal: with megatron-core 0.12.
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


def _keep_what_megatron_core_adds_to_metadata() -> None:
    """megatron-core stores the shapes of flattened optimizer states in an attribute unknown to torch.

    torch 2.11 writes a copy of the metadata, which lacks it; torch 2.13 writes the object itself. Removal: when torch
    2.13 is the oldest supported, or with a megatron-core that stores the shapes elsewhere.
    """
    from torch.distributed.checkpoint import filesystem

    if "dataclasses.replace(" in inspect.getsource(filesystem._FileSystemWriter.finish):
        filesystem.dataclasses = _ReplaceKeepsAttributes()


class _ReplaceKeepsAttributes:
    """The module `dataclasses`, but with a `replace` that also copies attributes that are not fields."""

    def __getattr__(self, name):
        return getattr(dataclasses, name)

    @staticmethod
    def replace(instance, **changes):
        copy = dataclasses.replace(instance, **changes)
        for name, value in vars(instance).items():
            vars(copy).setdefault(name, value)
        return copy
