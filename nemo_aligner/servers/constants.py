"""Commands that rank 0 of a server job sends to its other ranks."""

from enum import IntEnum

import torch

from nemo_aligner.compat.device import current_device


class ServerSignal(IntEnum):
    """The next action of the other ranks."""

    FORWARD = 1
    TRAIN = 2
    INVALID = 3
    SAVE = 4

    def cuda(self) -> torch.Tensor:
        """The signal as an int64 tensor [1] on this process's device."""
        return torch.tensor([self.value], dtype=torch.int64, device=current_device())
