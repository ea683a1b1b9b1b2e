"""Weight decay on matrices alone, as NeMo says of its own grouping of parameters.

NeMo 2.0.0 tells norms from other modules by their classes, which are Apex's. It so decays the weights of our own norms
and of Transformer Engine's, which may be part of the linear layer behind them. megatron-core's optimizer (0.9), which
goes by the number of dimensions, does not. Removal: with a NeMo that goes by it, too.
"""

import functools


def apply() -> None:
    from nemo.collections.nlp.models.language_modeling import megatron_gpt_model
    from nemo.collections.nlp.modules.common.megatron import utils

    grouped = utils.get_params_for_weight_decay_optimization
    if grouped.__module__ == __name__:
        return

    @functools.wraps(grouped, assigned=())
    def without_vectors(model) -> tuple[dict, ...]:
        groups = grouped(model)
        decayed = [group for group in groups if group.get("weight_decay") != 0]
        spared = next((group for group in groups if group.get("weight_decay") == 0), None)
        if spared is None:
            spared = {"params": [], "weight_decay": 0.0, "is_expert": False}
        for group in decayed:
            spared["params"] += [parameter for parameter in group["params"] if parameter.dim() == 1]
            group["params"] = [parameter for parameter in group["params"] if parameter.dim() != 1]
        return tuple(group for group in (*decayed, spared) if group["params"])

    for module in (utils, megatron_gpt_model):
        module.get_params_for_weight_decay_optimization = without_vectors
