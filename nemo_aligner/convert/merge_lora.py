"""Merges LoRA adapters into the weights they adapt."""

import torch
from megatron.core import parallel_state
from omegaconf import OmegaConf

from nemo_aligner.models.nlp.gpt.lora import adapters_of


@torch.no_grad()
def merge_lora_(model) -> None:
    """Add every adapter to its layer's weight, W + (alpha / dim) * linear_out @ linear_in, and remove it.

    The result is an ordinary model, which `save_to` saves completely. Collective over all ranks. An optimizer built
    before does not know the weights that are trainable afterwards.
    """
    for adapter in list(adapters_of(model)):
        weight = adapter.linear.weight
        weight.copy_(weight.float() + _delta(adapter.module).to(weight.device))
    for parent in {adapter.parent for adapter in adapters_of(model)}:
        del parent.adapter_layer, parent.adapter_cfg
    model.use_peft = False
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    OmegaConf.update(model.cfg, "peft.peft_scheme", "none", force_add=True)


def _delta(adapter: torch.nn.Module) -> torch.Tensor:
    """The adapter's update of this rank's shard of the weight, float32 and of its shape."""
    linear_in, linear_out = adapter.linear_in.weight, adapter.linear_out.weight
    # The layer's weight is sharded along one dimension, the adapter's two weights along both.
    if adapter.input_is_parallel:
        linear_out = _gather_rows(linear_out)
    else:
        linear_in = _gather_rows(linear_in)
    return adapter.alpha / adapter.dim * linear_out.float() @ linear_in.float()


def _gather_rows(weight: torch.Tensor) -> torch.Tensor:
    """The rows of all tensor-parallel ranks, in rank order."""
    shards = [torch.empty_like(weight) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    torch.distributed.all_gather(shards, weight.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(shards)
