"""megatron-core 0.9.0 with numpy 2, which a GPU host may bring though our own pins keep it out.

Removal: with a megatron-core that does not call `numpy.product`.
"""

import numpy as np


def apply() -> None:
    """Sharded states of its distributed optimizer are measured with a name that numpy 2 has dropped."""
    if not hasattr(np, "product"):
        np.product = np.prod
