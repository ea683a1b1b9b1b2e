"""Generate responses token by token with megatron-core's key/value cache, through all pipeline stages.

Legend: B rows, P longest prompt, W = P + max_length columns, t the position that is being decided, V vocabulary.
Rows are right-padded. The loop starts behind the shortest prompt: at position t a row whose prompt is longer copies
its prompt token, the others draw one (as NeMo's `generate` does, whose tokens these are, in greedy decoding exactly).
"""

import torch
from megatron.core import InferenceParams, parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from nemo_aligner.generation.sampling import NO_TOKEN, NoTokenError, SamplingParams, sample
from nemo_aligner.generation.stages import forward_through_stages
from nemo_aligner.utils.masks import attention_mask_and_position_ids


@torch.no_grad()
def generate(
    model,
    prompts_BP: torch.Tensor,
    prompt_lengths_B: torch.Tensor,
    strategy,
    *,
    max_length: int,
    min_length: int,
    end_strings: list[str],
    sampling_params: SamplingParams,
    uniform_BL: torch.Tensor,
) -> torch.Tensor:
    """Prompts with their responses, int64 [B, W] on every rank of the replica; a row's tail holds the end-of-text id.

    All ranks of a replica call it together with the same arguments. The strategy is told of every position and knows
    afterwards where each row ended.

    Args:
        model: a `MegatronGPTModel`, prepared for inference.
        prompts_BP: int64 [B, at least P] on the device; not modified.
        prompt_lengths_B: int64 [B] on the device.
        min_length: tokens that a row generates before it may end; the strategy has to know it too.
        uniform_BL: float64 [B, max_length] on the device, from which each row's tokens are drawn; `random_streams`.

    Raises:
        NoTokenError: on all ranks of the replica, when the logits of a row are NaN or infinite.
    """
    eod_id = model.tokenizer.eos_id
    width = int(prompt_lengths_B.max()) + max_length
    tokens_BW = _widened(prompts_BP, width, eod_id)
    stepper = _CachedForward(model, tokens_BW, eod_id)
    is_last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    end_ids = strategy.end_token_ids(eod_id, end_strings)
    is_done_B = torch.zeros_like(prompt_lengths_B, dtype=torch.bool)
    for t in range(int(prompt_lengths_B.min()), width):
        logits_BV = stepper.next_logits(tokens_BW, t)
        generated_B = t - prompt_lengths_B
        if is_last_stage:
            logits_BV[:, model.tokenizer.vocab_size :] = -torch.inf
            too_short_B = generated_B < min_length
            logits_BV[:, end_ids] = logits_BV[:, end_ids].masked_fill(too_short_B[:, None], -torch.inf)
            uniform_B = uniform_BL.gather(1, generated_B.clamp(min=0, max=max_length - 1)[:, None]).squeeze(1)
            drawn_B = sample(logits_BV, tokens_BW[:, :t], sampling_params, uniform_B)
            drawn_B = torch.where(is_done_B, eod_id, drawn_B)
            tokens_BW[:, t] = torch.where(generated_B >= 0, drawn_B, tokens_BW[:, t])
        tokens_BW[:, t] = _from_last_stage(tokens_BW[:, t])
        for row in (tokens_BW[:, t] == NO_TOKEN).nonzero().flatten().tolist():
            length = int(prompt_lengths_B[row])
            raise NoTokenError(tokens_BW[row, :length].tolist(), t - length)
        if is_last_stage:
            is_end_B = strategy.end_of_generation_condition(tokens_BW[:, : t + 1], tokens_BW[:, t], eod_id, end_strings)
            is_done_B |= (generated_B >= 0) & (is_end_B | (generated_B + 1 >= max_length))
        if _from_last_stage(is_done_B.all()):
            break
    return tokens_BW


def _widened(prompts_BP: torch.Tensor, width: int, eod_id: int) -> torch.Tensor:
    tokens_BW = prompts_BP.new_full((prompts_BP.size(0), width), eod_id)
    shared = min(width, prompts_BP.size(1))
    tokens_BW[:, :shared] = prompts_BP[:, :shared]
    return tokens_BW


class _CachedForward:
    """Runs the model over the positions it has not seen yet and keeps their keys and values."""

    def __init__(self, model, tokens_BW: torch.Tensor, eod_id: int):
        self.model = model
        self.eod_id = eod_id
        self.chunks = model.model if isinstance(model.model, list) else [model.model]
        rows, width = tokens_BW.shape
        # one for each chunk, as attention layers count from their chunk's first
        self.caches = [InferenceParams(max_batch_size=rows, max_sequence_length=width) for _ in self.chunks]

    def next_logits(self, tokens_BW: torch.Tensor, t: int) -> torch.Tensor | None:
        """Logits of the token at position t, float32 [B, V] on the last pipeline stage, None on the others."""
        seen = self.caches[0].sequence_len_offset
        mask, position_ids = attention_mask_and_position_ids(tokens_BW[:, :t], self.eod_id, **self.model.resets)
        mask = None if mask is None else mask[:, :, seen:]

        def forward(number, chunk):
            cache = self.caches[number]
            output = chunk(tokens_BW[:, seen:t], position_ids[:, seen:], mask, inference_params=cache)
            cache.sequence_len_offset = t
            return output

        logits_BSV = forward_through_stages(self.chunks, forward, num_rows=tokens_BW.size(0), num_positions=t - seen)
        if logits_BSV is None:
            return None
        return gather_from_tensor_model_parallel_region(logits_BSV[:, -1]).float()


def _from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """The last pipeline stage's values, whose shape and dtype all stages know: no header precedes them."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return tensor
    tensor = tensor.contiguous()
    torch.distributed.broadcast(
        tensor,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return tensor
