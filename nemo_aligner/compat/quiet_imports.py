"""Suppresses warnings of NeMo, megatron-core and torch about each other and themselves; import it before them.

They concern deprecated names and packages that `compat` replaces, which a user cannot act on. Warnings about a run's
own settings are kept.
"""

import os
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # checkpoints are written by forks

for category in (DeprecationWarning, FutureWarning):
    warnings.filterwarnings("ignore", category=category, module=r"(torch|megatron|nemo|pytorch_lightning|hydra)\.")
warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|hydra)\.")
with warnings.catch_warnings(record=True):  # torch warns of this name, used by megatron-core, despite filters
    import torch.distributed._sharded_tensor  # noqa: F401
