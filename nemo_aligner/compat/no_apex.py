"""NeMo 2.0.0 without Apex.

NeMo imports a handful of names from Apex at the top of its modules and refuses, or fails with a NameError, without
them. megatron-core 0.9 has an equivalent of each that this library needs. Every function below fills in one module;
none does anything if NeMo found Apex. Removal: with a NeMo whose Megatron models no longer import Apex.
"""

import torch


def apply() -> None:
    from nemo.collections.nlp.parts import nlp_overrides

    if nlp_overrides.HAVE_APEX:
        return
    _allow_strategies(nlp_overrides)
    _allow_main_params()
    _fill_build_model()
    _fill_weight_decay_groups()


def _allow_strategies(nlp_overrides) -> None:
    """`NLPDDPStrategy` and the gradient scaler only ask whether Apex is there; its optimizers are imported with it."""
    from nemo.core.optim.mcore_optim import McoreDistributedOptimizer

    class MegatronDistributedFusedAdam(torch.optim.Optimizer):
        """Stands for Apex's optimizer in `isinstance` tests: without Apex, no optimizer is one."""

    nlp_overrides.HAVE_APEX = True
    nlp_overrides.McoreDistributedOptimizer = McoreDistributedOptimizer
    nlp_overrides.MegatronDistributedFusedAdam = MegatronDistributedFusedAdam


def _allow_main_params() -> None:
    """The optimizer with fp32 master weights asks for Apex and uses it for fp16 alone, which is refused anyway."""
    from nemo.core.optim import optimizer_with_main_params

    optimizer_with_main_params.HAVE_APEX = True


def _fill_build_model() -> None:
    from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
    from nemo.collections.nlp.modules.common.megatron import build_model

    build_model.set_defaults_if_not_set_tensor_model_parallel_attributes = (
        set_defaults_if_not_set_tensor_model_parallel_attributes
    )


def _fill_weight_decay_groups() -> None:
    """NeMo keeps weight decay off Apex's norms; without Apex megatron-core falls back to torch's."""
    from megatron.core.transformer.torch_layer_norm import WrappedTorchLayerNorm
    from nemo.collections.nlp.modules.common.megatron import utils

    utils.listify_model = lambda model: model if isinstance(model, list) else [model]
    utils.FusedLayerNorm = utils.FastLayerNorm = utils.MixedFusedRMSNorm = WrappedTorchLayerNorm
