"""The forward pass of a model chunk over a pack, returning log-probabilities instead of logits.

megatron-core's `GPTModel` is called as usual, through all its wrappers. Three of its parts are patched for the duration
of the call: word embeddings accumulate their gradient in place where linear layers do, rotary positions are those
within the pack's rows, and the output layer returns the log-probabilities of the loss tokens.

Legend: as in packing.py, and H hidden size.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.utils import get_attr_wrapped_model

from nemo_aligner.models.nlp.gpt.embedding import can_add_in_place, embed
from nemo_aligner.models.nlp.gpt.layer_spec import ScaledDotProductAttention
from nemo_aligner.models.nlp.gpt.packing import Pack
from nemo_aligner.utils.target_logprobs import TargetLogprobs


def unsupported_by_packing(gpt_model: torch.nn.Module) -> str | None:
    """What in a model does not support packs, for the log; None if all does. The same on all pipeline stages."""
    if not isinstance(gpt_model, GPTModel):
        return type(gpt_model).__name__
    config = gpt_model.config
    for layer in gpt_model.decoder.layers:
        attention = layer.self_attention.core_attention
        if not isinstance(attention, ScaledDotProductAttention):
            return type(attention).__name__
    if config.rotary_interleaved or config.apply_rope_fusion:
        return "model.rotary_interleaved or apply_rope_fusion"
    if config.defer_embedding_wgrad_compute:
        return "model.defer_embedding_wgrad_compute"
    return None


def packed_forward(model: torch.nn.Module, pack: Pack) -> torch.Tensor:
    """Run a model chunk over a pack that is on its device.

    Returns:
        On the last stage the log-probabilities of `pack.targets_R`, float32 [R]; on others hidden states for the next,
        [T, 1, H], or [T/TP, 1, H] with sequence parallelism.
    """
    gpt_model = get_attr_wrapped_model(model, "decoder", return_model_obj=True)
    rotary_positions = _rotary_positions(gpt_model, pack.position_ids_1T[0])
    with _embedding_gradient_in_place(gpt_model), rotary_positions, _logprobs_for_logits(gpt_model, pack):
        output = model(pack.tokens_1T, pack.position_ids_1T, None, labels=None, packed_seq_params=pack.sequences)
    return output.squeeze(0) if gpt_model.post_process else output


@contextlib.contextmanager
def _embedding_gradient_in_place(gpt_model: GPTModel) -> Iterator[None]:
    if not gpt_model.pre_process:
        yield
        return
    module = gpt_model.embedding.word_embeddings
    if not can_add_in_place(module, gpt_model.config.gradient_accumulation_fusion):
        yield
        return
    with _other_forward(module, lambda ids: embed(ids, module.weight)):
        yield


@contextlib.contextmanager
def _rotary_positions(gpt_model: GPTModel, position_ids_T: torch.Tensor) -> Iterator[None]:
    """Replace the model's table of angles [T, 1, 1, D] by [T, 1, D], indexed by each token's position."""
    if gpt_model.position_embedding_type != "rope":
        yield
        return
    hook = gpt_model.rotary_pos_emb.register_forward_hook(
        lambda module, args, table_T11D: table_T11D.squeeze(1)[position_ids_T]
    )
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _logprobs_for_logits(gpt_model: GPTModel, pack: Pack) -> Iterator[None]:
    if not gpt_model.post_process:
        yield
        return
    layer = gpt_model.output_layer

    def forward(hidden_T1H, weight=None):
        logprobs_R = _target_logprobs(layer, hidden_T1H, layer.weight if weight is None else weight, pack)
        return logprobs_R.unsqueeze(1), None  # [positions, rows], transposed by GPTModel

    with _other_forward(layer, forward):
        yield


@contextlib.contextmanager
def _other_forward(module: torch.nn.Module, forward: Callable) -> Iterator[None]:
    """Replace `forward` only: the module's hooks, in which wrappers and optimizers wait for parameters, still run."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _target_logprobs(
    layer: ColumnParallelLinear, hidden_T1H: torch.Tensor, weight_VH: torch.Tensor, pack: Pack
) -> torch.Tensor:
    if layer.sequence_parallel:
        hidden_T1H = gather_from_sequence_parallel_region(hidden_T1H, tensor_parallel_output_grad=True)
    hidden_RH = hidden_T1H.squeeze(1).index_select(0, pack.loss_positions_R)
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight_VH.dtype
    with torch.autocast("cuda", enabled=False):
        return TargetLogprobs.apply(
            hidden_RH.to(dtype),
            weight_VH.to(dtype),
            pack.targets_R,
            layer.allreduce_dgrad,
            layer.gradient_accumulation_fusion,
        )
