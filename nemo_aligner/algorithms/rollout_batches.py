"""Rollout micro-batches: prompts, each repeated for its rollouts, and the columns that scoring and selection need.

Legend: B prompts of a micro-batch, N rollouts per prompt.
"""

from collections.abc import Callable, Iterator
from itertools import islice

import torch

from nemo_aligner.algorithms.scoring import records_of
from nemo_aligner.utils.errors import ConfigError, PromptError
from nemo_aligner.utils.server_utils import fail_on_all_ranks
from nemo_aligner.utils.text_generation_utils import has_content


def read_prompts(
    dataloader_iter: Iterator[dict], num_microbatches: int, dataset, num_rollouts: int
) -> tuple[list[dict], list[list[dict]]]:
    """Read the collated prompts of `num_microbatches`, or of as many as are left, and the `records_of` their rollouts.

    Raises:
        PromptError: on every rank of the job, if one of them could not read its prompts.
    """

    def read():
        try:
            batches = list(islice(dataloader_iter, num_microbatches))
            return batches, [records_of(dataset, batch, len(batch["length"]) * num_rollouts) for batch in batches]
        except (ConfigError, OSError) as error:
            raise PromptError(str(error)) from error

    return fail_on_all_ranks(read, PromptError)


def stored_or_generated(
    model,
    batches: list[dict],
    stored: list[dict | None],
    num_rollouts: int,
    sync: Callable[[bool], bool],
    on_last_rows: Callable[[], object] | None,
    step: int,
) -> Iterator[dict]:
    """Yield each micro-batch's rollouts as soon as they are there: stored ones, or else newly generated ones.

    The ranks synchronize before each micro-batch, and also while it is generated, some replicas more often than others.

    Args:
        model: the policy; see `infer_each`.
        batches: collated prompts, as the dataloader gives them.
        stored: for each batch its rollouts from `UnscoredRollouts`, or None.
        num_rollouts: N.
        sync: called with False, as this rank is not done; collective over the job. What it raises ends the generation.
        on_last_rows: see `infer_each`.
        step: named in error messages.

    Yields:
        Tensors with B * N rows, N neighbouring ones for each prompt, on the model's device: what `infer`
        returns, `prompt_tokens`, `prompt_index`, `is_padding` (bool, the row only fills up the batch) and `is_fit`
        (bool, the row may be trained on).

    Raises:
        FloatingPointError: if the model's weights give no finite logits.
    """
    unanswered = [batch for batch, rollouts in zip(batches, stored, strict=True) if rollouts is None]
    new = _generate(model, unanswered, num_rollouts, check=lambda: sync(False), on_last_rows=on_last_rows)
    try:
        for rollouts in stored:
            sync(False)
            yield next(new) if rollouts is None else rollouts
    except FloatingPointError as error:
        raise FloatingPointError(f"RS step {step}: {error}") from error


def without_stand_ins(batch: dict) -> dict:
    """Mark stand-in rows as padding: the prompt that they repeat has a row of its own.

    Args:
        batch: collated prompts; where known `loss_multiplier` bool [B], False for stand-ins, and `is_padding` bool [B].
    """
    if "loss_multiplier" not in batch:
        return batch
    is_stand_in = ~batch["loss_multiplier"]
    return {**batch, "is_padding": batch.get("is_padding", torch.zeros_like(is_stand_in)) | is_stand_in}


def _generate(model, batches: list[dict], num_rollouts: int, **hooks: Callable[[], object] | None) -> Iterator[dict]:
    """Generate for all batches in one call, so that rows of one can take the cache slots of an earlier one's."""
    repeated = [_repeated(batch, num_rollouts) for batch in batches]
    for batch, output in zip(repeated, model.infer_each(repeated, **hooks), strict=True):
        yield _with_inputs(output, batch, num_rollouts, model.tokenizer, model._sampling_params["end_strings"])


def _repeated(batch: dict, num_rollouts: int) -> dict:
    """The batch with `num_rollouts` neighbouring rows for each of its own, and a `rollout_id` that identifies each row
    whatever batch it is in.
    """
    repeated = {
        key: value.repeat_interleave(num_rollouts, dim=0)
        for key, value in batch.items()
        if isinstance(value, torch.Tensor) and value.size(0) == batch["length"].size(0)
    }
    if "prompt_index" in batch:
        repeated["rollout_id"] = _rollout_ids(batch["prompt_index"], num_rollouts)
    return repeated


def _rollout_ids(prompt_index: torch.Tensor, num_rollouts: int) -> torch.Tensor:
    """int64 [B * N, 2]: each rollout's prompt in the dataset, and its number among those of the prompt."""
    number = torch.arange(num_rollouts).repeat(len(prompt_index))
    return torch.stack([prompt_index.repeat_interleave(num_rollouts), number], dim=1)


def _with_inputs(output: dict, repeated: dict, num_rollouts: int, tokenizer, end_strings) -> dict:
    """The generated rollouts with the columns of their prompts that scoring and selection need."""
    device = output["response_tokens"].device
    num_rows = repeated["length"].size(0)
    rows = {
        **output,
        "prompt_tokens": repeated["text"].to(device),
        "prompt_index": repeated.get("prompt_index", torch.arange(num_rows) // num_rollouts).to(device),
        "is_padding": repeated.get("is_padding", torch.zeros(num_rows, dtype=torch.bool)).to(device),
    }
    may_train = repeated.get("loss_multiplier", torch.ones(num_rows, dtype=torch.bool)).to(device)
    ended_with_content = output["is_end"] & has_content(
        output["response_tokens"], output["prompt_lengths"], output["response_lengths"], tokenizer, end_strings
    )
    rows["is_fit"] = ended_with_content & may_train
    return rows
