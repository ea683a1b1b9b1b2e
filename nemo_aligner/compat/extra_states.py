"""Transformer Engine's modules restored from weights that another version of it wrote, or megatron-core's own modules.

A module of Transformer Engine keeps the scales of FP8 in an extra state, which is empty without FP8. Its attention has
one since 1.8 (NeMo 2.0.0 makes an exception for the name that 1.6 and 1.7 gave it), and by 2.9 its norms have. Weights
that were written without these do not hold them, and megatron-core 0.9 fails at the first that is missing. Removal:
with a megatron-core that leaves an extra state as it is where a checkpoint has none.
"""

import re
from collections.abc import Collection

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject

# Those of linear layers are always there: megatron-core's own layers write them, too.
_NOT_ALWAYS_WRITTEN = re.compile(r".*\.(core_attention|\w*layernorm)\._extra_state")


def keep_where_missing(model, stored: Collection[str]) -> None:
    """From now on `model.sharded_state_dict()` does not ask for empty extra states that a checkpoint does not hold.

    Args:
        model: a NeMo GPT model; `del model.sharded_state_dict` lets it ask for everything again.
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
