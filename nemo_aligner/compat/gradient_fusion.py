"""megatron-core 0.9's `gradient_accumulation_fusion` without Apex.

A linear layer then accumulates its weight gradient in the optimizer's float32 buffer within the matmul: no gradient in
half precision is written, cast and added. megatron-core calls Apex's extension for that; torch can do the same (see
`float32_accumulation`). Nothing is patched where the extension is installed. Removal: with a megatron-core whose linear
layers do not need it.
"""

import types

import torch

from nemo_aligner.compat.float32_accumulation import add_product_


def apply() -> None:
    from megatron.core.tensor_parallel import layers

    if layers._grad_accum_fusion_available:
        return
    # The first is called for buffers in float32, the second for buffers in half precision.
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(
        wgrad_gemm_accum_fp32=_accumulate_, wgrad_gemm_accum_fp16=_accumulate_
    )
    layers._grad_accum_fusion_available = True


def _accumulate_(input_MI: torch.Tensor, grad_output_MO: torch.Tensor, main_grad_OI: torch.Tensor) -> None:
    add_product_(main_grad_OI, grad_output_MO.t(), input_MI)
