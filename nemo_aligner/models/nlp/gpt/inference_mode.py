"""Switch a NeMo GPT model to inference and back."""

from collections.abc import Iterator

import torch
from megatron.core import ModelParallelConfig
from nemo.collections.nlp.parts.utils_funcs import torch_dtype_from_precision
from nemo.utils import logging
from omegaconf import DictConfig, open_dict

from nemo_aligner.utils.train_utils import set_eval, set_train

# What training may switch on, with its "off" value: in the config, in Megatron's configs, in the modules.
_OFF_IN_CONFIG = {
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "activations_checkpoint_layers_per_pipeline": None,
    "sequence_parallel": False,
}
_OFF_IN_MEGATRON_CONFIGS = {
    "recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None, "sequence_parallel": False,
}  # fmt: skip
_OFF_IN_MODULES = {"checkpoint_core_attention": False, "sequence_parallel": False, "reduce_scatter_embeddings": False}
# Keys of the model config that MegatronGPTModel reads without a default, and that an archive may lack.
_READ_WITHOUT_DEFAULT = {
    "optim": {"name": "adamw"},
    **_OFF_IN_CONFIG,
}


def fill_missing_keys(cfg: DictConfig) -> None:
    """Add to `cfg`, in place, the keys that NeMo expects when it builds the model and when it switches modes."""
    with open_dict(cfg):
        for key, value in _READ_WITHOUT_DEFAULT.items():
            cfg.setdefault(key, value)


def switch_off_O2_in_float32(cfg: DictConfig) -> None:
    """Float32 weights are their own master weights; NeMo's O2 would fail as there are no half-precision weights."""
    if cfg.get("megatron_amp_O2", False) and torch_dtype_from_precision(cfg.precision) == torch.float32:
        logging.info(f"model.megatron_amp_O2=True has nothing to do with precision {cfg.precision}; it is switched off")
        with open_dict(cfg):
            cfg.megatron_amp_O2 = False


class InferenceMode:
    """Switches a model's activation checkpointing and sequence parallelism off for inference, and restores them after.

    NeMo's own methods for this miss that megatron-core's embeddings scatter their output, and save "off" as the state
    to restore when called twice in a row.
    """

    def __init__(self, model):
        self._model = model
        self._before: list[tuple[object, str, object]] | None = None  # owner, attribute, value; None in training

    def enter(self) -> None:
        """Prepare for inference. A second call before `leave` changes nothing."""
        if self._before is None:
            self._before = []
            for owner, off in self._switches():
                for name, value in off.items():
                    if hasattr(owner, name):
                        self._before.append((owner, name, getattr(owner, name)))
                        setattr(owner, name, value)
        set_eval(self._model)

    def leave(self) -> None:
        """Restore what `enter` switched off."""
        for owner, name, value in self._before or ():
            setattr(owner, name, value)
        self._before = None
        set_train(self._model)

    def _switches(self) -> Iterator[tuple[object, dict]]:
        modules = [module for chunk in self._model.get_model_module_list() for module in chunk.modules()]
        configs = [self._model.model_parallel_config, *(getattr(module, "config", None) for module in modules)]
        configs = {id(config): config for config in configs if isinstance(config, ModelParallelConfig)}
        yield self._model.cfg, _OFF_IN_CONFIG
        yield from ((config, _OFF_IN_MEGATRON_CONFIGS) for config in configs.values())
        yield from ((module, _OFF_IN_MODULES) for module in modules)
