"""Restoring Transformer Engine's modules from weights written by another version of it, or by megatron-core's modules.

A module of Transformer Engine keeps FP8 scales in an extra state, which is empty without FP8. Its attention has one
since 1.8 (NeMo 2.0.0 makes an exception for the name used in 1.6 and 1.7), and by 2.9 its norms have one. Weights
written without them lack these keys, and megatron-core 0.9 fails at the first missing one. Removal: with a
megatron-core that leaves an extra state unchanged if a checkpoint has none.
"""

import re
from collections.abc import Collection

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject

# Linear layers always have them: megatron-core's own layers write them, too.
_NOT_ALWAYS_WRITTEN = re.compile(r".*\.(core_attention|\w*layernorm)\._extra_state")


def keep_where_missing(model, stored: Collection[str]) -> None:
    """Patch `model.sharded_state_dict()` to omit empty extra states that are missing in a checkpoint.

    Args:
        model: a NeMo GPT model; `del model.sharded_state_dict` removes the patch.
        stored: names of the objects in the checkpoint, each with its shard (`unique_key`).
    """
    everything = model.sharded_state_dict

    def own_where_missing(part):
        is_missing = isinstance(part, ShardedObject) and part.unique_key not in stored
        if not (is_missing and _NOT_ALWAYS_WRITTEN.fullmatch(part.key)):
            return part
        is_empty = part.data is None or part.data.numel() == 0
        return LocalNonpersistentObject(part.data) if is_empty else part

    def sharded_state_dict(*args, **kwargs):
        state = everything(*args, **kwargs)
        dict_list_map_inplace(own_where_missing, state)
        return state

    model.sharded_state_dict = sharded_state_dict
