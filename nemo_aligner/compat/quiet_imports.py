"""Imported before NeMo, megatron-core and torch, hides the warnings that they raise about each other and themselves.

They concern names that some later release will drop and packages whose place `compat` takes, which nobody who starts a
run can act on. Warnings about a run's own settings are left alone.
"""

import os
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # checkpoints are written by forks

for category in (DeprecationWarning, FutureWarning):
    warnings.filterwarnings("ignore", category=category, module=r"(torch|megatron|nemo|pytorch_lightning|hydra)\.")
warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|hydra)\.")
with warnings.catch_warnings(record=True):  # torch shows the one about this name, which megatron-core uses, regardless
    import torch.distributed._sharded_tensor  # noqa: F401
