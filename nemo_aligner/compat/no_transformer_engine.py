"""NeMo 2.0.0 without Transformer Engine: where it is not installed, and on a CPU, where its modules cannot be built.

Removal: with a NeMo whose GPT model can be built from megatron-core's local modules alone.
"""

import os

from nemo.utils import logging

from nemo_aligner.compat import device


def apply() -> None:
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model

    # MegatronBaseModel matches a pattern against this variable, which only NVIDIA's containers set (TypeError on None).
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "")
    if megatron_gpt_model.HAVE_TE and not device.on_cpu():
        return
    _skip_bert_models()
    _use_own_layer_spec(megatron_gpt_model)
    _keep_weight_decay_off_own_norm()


def _skip_bert_models() -> None:
    """`NLPModel.__init__` lists BERT checkpoints, which imports a layer spec that needs Transformer Engine."""
    from nemo.collections.nlp.models import nlp_model

    nlp_model.get_megatron_pretrained_bert_models = lambda: []


def _keep_weight_decay_off_own_norm() -> None:
    """NeMo identifies norms by an `isinstance` test, which also accepts a tuple of classes."""
    from nemo.collections.nlp.modules.common.megatron import utils

    from nemo_aligner.models.nlp.gpt.layer_spec import Norm

    if not isinstance(utils.MixedFusedRMSNorm, tuple):
        utils.MixedFusedRMSNorm = (utils.MixedFusedRMSNorm, Norm)


def _use_own_layer_spec(megatron_gpt_model) -> None:
    """NeMo's `get_specs` builds all specs, whichever is requested, and some need Transformer Engine."""
    from nemo_aligner.models.nlp.gpt.layer_spec import get_block_spec

    def get_specs(spec_name, transformer_config=None, use_te=True, hyena_cfg=None):
        if spec_name not in ("", "te_gpt"):
            raise ValueError(
                f"model.name: the layer spec {spec_name!r} needs Transformer Engine, and a GPU for it; install it, or "
                "use a model with the default spec (model.name: '')"
            )
        if use_te:
            logging.warning("no Transformer Engine, or no GPU: model.transformer_engine is ignored, torch is used")
        return get_block_spec(transformer_config)

    megatron_gpt_model.get_specs = get_specs
