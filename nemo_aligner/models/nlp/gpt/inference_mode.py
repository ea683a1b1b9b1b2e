"""Switch a NeMo GPT model to inference and back."""

from nemo.utils import logging
from omegaconf import DictConfig, open_dict

from nemo_aligner.utils.train_utils import set_eval, set_train

# Keys of the model config that MegatronGPTModel reads without a default, and that an archive may lack.
_READ_WITHOUT_DEFAULT = {
    "optim": {"name": "adamw"},
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "activations_checkpoint_layers_per_pipeline": None,
    "sequence_parallel": False,
}


def fill_missing_keys(cfg: DictConfig) -> None:
    """Give `cfg`, in place, the keys that NeMo expects to find when it builds the model and when it switches it."""
    with open_dict(cfg):
        for key, value in _READ_WITHOUT_DEFAULT.items():
            cfg.setdefault(key, value)


def switch_off_O2_in_float32(cfg: DictConfig) -> None:
    """Weights in float32 are their own master weights; NeMo would fail for want of half-precision ones."""
    if cfg.get("megatron_amp_O2", False) and str(cfg.precision) in ("32", "32-true"):
        logging.info(f"model.megatron_amp_O2=True has nothing to do with precision {cfg.precision}; it is switched off")
        with open_dict(cfg):
            cfg.megatron_amp_O2 = False


class InferenceMode:
    """Activation checkpointing and sequence parallelism of a model, off for inference and restored behind it.

    NeMo remembers one set of values: switching off twice in a row would make it remember "off".
    """

    def __init__(self, model):
        self._model = model
        self._is_on = False

    def enter(self) -> None:
        """Prepare for inference. A second call before `leave` changes nothing."""
        if not self._is_on:
            self._model._reset_activation_checkpointing_args()
            self._model._reset_sequence_parallelism_args()
            self._is_on = True
        set_eval(self._model)

    def leave(self) -> None:
        """Restore what `enter` switched off."""
        if self._is_on:
            self._model._restore_activation_checkpointing_args()
            self._model._restore_sequence_parallelism_args()
            self._is_on = False
        set_train(self._model)
