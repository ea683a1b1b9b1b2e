"""How the actor trains on rollouts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingSettings:
    """The section `model.rs.training`, which existing configurations may lack.

    Attributes:
        packing: train on rows without their padding.
        stream_adam_states: while training, too, the optimizer state is on the host; it passes through the GPU in the
            optimizer's step.
    """

    packing: bool = True
    stream_adam_states: bool = False
