"""NeMo 2.0.0 without Apex.

NeMo imports a few names from Apex at module level and refuses to run, or fails with a NameError, without them.
megatron-core 0.9 has an equivalent of each that this library needs. Every function below patches one module; all are
no-ops if NeMo found Apex. Removal: with a NeMo whose Megatron models no longer import Apex.
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
    """`NLPDDPStrategy` and the gradient scaler only check for Apex; its optimizers are imported along with it."""
    from nemo.core.optim.mcore_optim import McoreDistributedOptimizer

    class MegatronDistributedFusedAdam(torch.optim.Optimizer):
        """Placeholder for Apex's optimizer in `isinstance` tests, which are always false without Apex."""

    nlp_overrides.HAVE_APEX = True
    nlp_overrides.McoreDistributedOptimizer = McoreDistributedOptimizer
    nlp_overrides.MegatronDistributedFusedAdam = MegatronDistributedFusedAdam


def _allow_main_params() -> None:
    """The optimizer with fp32 master weights requires Apex, but uses it only for fp16, which is refused anyway."""
    from nemo.core.optim import optimizer_with_main_params

    optimizer_with_main_params.HAVE_APEX = True


def _fill_build_model() -> None:
    from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
    from nemo.collections.nlp.modules.common.megatron import build_model

    build_model.set_defaults_if_not_set_tensor_model_parallel_attributes = (
        set_defaults_if_not_set_tensor_model_parallel_attributes
    )


def _fill_weight_decay_groups() -> None:
    """NeMo exempts Apex's norms from weight decay; without Apex megatron-core falls back to torch's norms."""
    from megatron.core.transformer.torch_layer_norm import WrappedTorchLayerNorm
    from nemo.collections.nlp.modules.common.megatron import utils

    utils.listify_model = lambda model: model if isinstance(model, list) else [model]
    utils.FusedLayerNorm = utils.FastLayerNorm = utils.MixedFusedRMSNorm = WrappedTorchLayerNorm
