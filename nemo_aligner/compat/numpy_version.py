"""megatron-core 0.9.0 with numpy 2, which a GPU host may have although this library's pins exclude it.

Removal: with a megatron-core that does not call `numpy.product`.
"""

import numpy as np


def apply() -> None:
    """The sharded state of its distributed optimizer uses `numpy.product`, which numpy 2 has removed."""
    if not hasattr(np, "product"):
        np.product = np.prod
