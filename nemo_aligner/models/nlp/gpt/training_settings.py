"""How the actor trains on rollouts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingSettings:
    """The section `model.rs.training`, which existing configurations may lack.

    Attributes:
        packing: train on packed rows, without padding.
        max_tokens_per_pack: None for twice the tokens of a padded micro-batch, or the same number where layers save as
            much per token as without packing.
        stream_adam_states: keep the optimizer state on the host during training, too, and stream it through the GPU in
            the optimizer step.
    """

    packing: bool = True
    max_tokens_per_pack: int | None = None
    stream_adam_states: bool = False
