"""What a trainer may call on a model, and when.

Training and inference alternate; each phase opens with its `prepare_*` call and closes with its `finish_*` call.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator


class SupervisedInterface(ABC):
    """A model that can be trained on a batch."""

    @abstractmethod
    def get_loss_and_metrics(self, batch: dict, forward_only: bool) -> tuple[float, dict]:
        """Run forward, and backward unless `forward_only`, over this replica's rows of a global batch.

        Gradients are left accumulated. Loss and metrics are host numbers, equal on every rank.
        """

    @abstractmethod
    def prepare_for_training_step(self) -> None:
        """Called before the `get_loss_and_metrics` of each optimizer step."""

    @abstractmethod
    def finish_training_step(self) -> None:
        """Called after `get_loss_and_metrics`, before gradients are clipped: reduces them over the ranks."""

    def prepare_for_validation_step(self) -> None:
        raise NotImplementedError

    def finish_validation_step(self) -> None:
        raise NotImplementedError


class Inferrable(ABC):
    """A model that can be run for inference."""

    @abstractmethod
    def prepare_for_inference(self) -> None:
        """Called before a phase of `infer` calls."""

    @abstractmethod
    def infer(self, *args, **kwargs):
        """Run inference. All ranks of a replica call it together with the same input."""

    def infer_each(
        self,
        batches: Iterable,
        check: Callable[[], object] | None = None,
        on_last_rows: Callable[[], object] | None = None,
    ) -> Iterator:
        """`infer` for each batch, in order. A model may work on several of them at a time.

        Args:
            check: called periodically while several batches are in flight, by all ranks of a replica at the same
                token; an exception it raises ends inference.
            on_last_rows: may be called once, when few rows are left.
        """
        return map(self.infer, batches)

    @abstractmethod
    def finish_inference(self) -> None:
        """Called after a phase of `infer` calls."""


class AlignableGenerativeInterface(SupervisedInterface, Inferrable):
    """A policy: it generates responses and is trained on them.

    In addition to this interface, a trainer reads its `cfg`, `tokenizer` and parameters, and `_sampling_params` and
    `_length_params`, plain dicts of the sections `sampling_params` and `length_params` of `cfg.rs`.
    """

    restored_from: str | None = None  # archive or folder of its initial weights

    trains_with_sequence_parallel = False  # if so, training rows are padded to a multiple of the TP size

    @abstractmethod
    def prepare_for_training(self) -> None:
        """Called before a phase of training steps."""

    @abstractmethod
    def finish_training(self) -> None:
        """Called after a phase of training steps."""

    def seed_step(self, step: int) -> None:
        """Called before each RS step: reseed the random generators of this process as a function of the step."""

    def seed_sampling(self, *key: int) -> None:
        """Called before a phase of `infer` calls, whose samples are to be a function of the key."""

    def prefetch_adam_states(self, beside_rollouts: bool = False) -> None:
        """Called when rollouts end, or are about to: the optimizer state will soon be needed on the device."""

    def onload_adam_states(self) -> None:
        """Called before a checkpoint is written: the optimizer state must be on the device."""

    def get_init_policy_logprobs(self, rollout_batches: list[dict]):
        """Log-probabilities under the policy that training started from. Rejection sampling does not need them."""
        raise NotImplementedError
