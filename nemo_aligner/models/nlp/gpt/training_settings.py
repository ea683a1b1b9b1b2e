"""How the actor trains on rollouts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingSettings:
    """The section `model.rs.training`, which existing configurations may lack.

    Attributes:
        packing: train on rows without their padding.
        max_tokens_per_pack: None for twice as many as a padded micro-batch has, or as many where layers keep as much of
            a token as they did padded.
        stream_adam_states: while training, too, the optimizer state is on the host; it passes through the GPU in the
            optimizer's step.
    """

    packing: bool = True
    max_tokens_per_pack: int | None = None
    stream_adam_states: bool = False
