"""Checks of a model's parallel configuration that Megatron makes late or not at all."""

import torch
from nemo.collections.nlp.parts.utils_funcs import torch_dtype_from_precision
from omegaconf import DictConfig

from nemo_aligner.compat import virtual_stages
from nemo_aligner.utils.errors import ConfigError

TP, PP = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"
VPP = "model.virtual_pipeline_model_parallel_size"
# Model sizes that are sharded over the tensor-parallel ranks.
SPLIT_OVER_TP = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "override_vocab_size")


def check_parallel(cfg: DictConfig) -> None:
    """Refuse a resolved run configuration whose model cannot be parallelized as configured.

    Raises:
        ConfigError: one line with the keys, their values and the fix.
    """
    model = cfg.model
    _check_tensor_parallel(model)
    _check_stages(model)
    if virtual_stages.count(model) > 1:
        _check_virtual_stages(cfg)
    _check_messages(cfg)
    _check_recomputation(model)


def _check_tensor_parallel(model: DictConfig) -> None:
    size = model.get("tensor_model_parallel_size", 1)
    for key in SPLIT_OVER_TP:
        if (model.get(key) or 0) % size:
            raise ConfigError(f"{TP}={size} must divide the model's {key}={model[key]}")
    if size == 1 and model.get("sequence_parallel"):
        raise ConfigError(f"model.sequence_parallel=True needs {TP} of 2 or more; set it to False")
    if size > 1 and model.get("perform_initialization") is False:
        raise ConfigError(
            f"model.perform_initialization=False would have Megatron take the gradient norm of one part of the model, "
            f"with {TP}={size}; set it to True"
        )


def _check_stages(model: DictConfig) -> None:
    stages, chunks = model.get("pipeline_model_parallel_size", 1), virtual_stages.count(model)
    if chunks > 1 and stages == 1:
        raise ConfigError(f"{VPP}={chunks} needs {PP} of 2 or more; set it to null")
    if model.get("num_layers") is not None and model.num_layers % (stages * chunks):
        split = f"{PP}={stages}" + (f" * {VPP}={chunks}" if chunks > 1 else "")
        raise ConfigError(f"the model's num_layers={model.num_layers} must be a multiple of {split}")


def _check_virtual_stages(cfg: DictConfig) -> None:
    model = cfg.model
    stages = model.pipeline_model_parallel_size
    if torch_dtype_from_precision(cfg.trainer.precision) != torch.float32 and not model.megatron_amp_O2:
        raise ConfigError(f"{VPP} needs model.megatron_amp_O2=True with trainer.precision={cfg.trainer.precision}")
    replicas = cfg.trainer.devices * cfg.trainer.num_nodes // (stages * model.get("tensor_model_parallel_size", 1))
    num_microbatches = model.global_batch_size // (model.micro_batch_size * replicas)
    if num_microbatches % stages:
        raise ConfigError(
            f"{VPP} needs a multiple of {PP}={stages} micro-batches, but model.global_batch_size="
            f"{model.global_batch_size} / (model.micro_batch_size={model.micro_batch_size} * {replicas} data-parallel "
            f"replicas) = {num_microbatches}"
        )
    if stages == 2 and model.get("batch_p2p_comm"):
        raise ConfigError(
            f"model.batch_p2p_comm=True would confuse activations and gradients with {PP}=2 and {VPP}; set it to False"
        )


def _check_messages(cfg: DictConfig) -> None:
    if not cfg.model.get("overlap_p2p_comm"):
        return
    if cfg.trainer.accelerator == "cpu":
        raise ConfigError("model.overlap_p2p_comm=True is not supported on a CPU; set it to False")
    if cfg.model.get("batch_p2p_comm"):
        raise ConfigError("model.overlap_p2p_comm=True needs model.batch_p2p_comm=False")


def _check_recomputation(model: DictConfig) -> None:
    granularity, method, num_layers = (
        model.get(f"activations_checkpoint_{name}") for name in ("granularity", "method", "num_layers")
    )
    if granularity not in (None, "full", "selective"):
        raise ConfigError(f"model.activations_checkpoint_granularity={granularity!r} must be null, selective or full")
    if granularity == "selective" and num_layers is not None:
        raise ConfigError("model.activations_checkpoint_num_layers must be null with granularity selective")
    if granularity != "full":
        return
    if method not in ("uniform", "block"):
        raise ConfigError(
            f"model.activations_checkpoint_method={method!r} must be uniform or block with granularity full"
        )
    if not isinstance(num_layers, int) or num_layers < 1:
        raise ConfigError(
            f"model.activations_checkpoint_num_layers={num_layers!r} must be a positive whole number with granularity "
            "full"
        )
    if method == "uniform" and model.get("num_layers") is not None:
        in_chunk = model.num_layers // model.get("pipeline_model_parallel_size", 1) // virtual_stages.count(model)
        if in_chunk % num_layers:
            raise ConfigError(
                f"model.activations_checkpoint_num_layers={num_layers} must divide the {in_chunk} layers that each "
                "pipeline stage has, with method uniform"
            )
