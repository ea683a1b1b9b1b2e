"""NeMo 2.0.0's LoRA adapters without Transformer Engine and Apex.

Both are required at import but not used: adapters are added to layers derived from megatron-core's, and LoRA has no
norm. Removal: with a NeMo whose adapters import without them.
"""

import sys
import types


def apply() -> None:
    from nemo.collections.nlp.modules.common.megatron.adapters import parallel_adapters
    from nemo.collections.nlp.parts import peft_config
    from nemo.collections.nlp.parts.mixins import nlp_adapter_mixins

    parallel_adapters.HAVE_APEX = True
    if hasattr(nlp_adapter_mixins, "swap_mcore_mixin"):
        return
    mixins = _import_mixins()
    nlp_adapter_mixins.swap_mcore_mixin = mixins.swap_mcore_mixin
    peft_config.MCoreSelfAttentionMixin = mixins.MCoreSelfAttentionMixin
    peft_config.MCoreMLPMixin = mixins.MCoreMLPMixin


def _import_mixins():
    """The module imports one name of Transformer Engine, but handles that name being None."""
    name = "megatron.core.extensions.transformer_engine"
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].SplitAlongDim = None
    try:
        from nemo.collections.nlp.modules.common.megatron.adapters import mcore_mixins
    finally:
        del sys.modules[name]
    return mcore_mixins
