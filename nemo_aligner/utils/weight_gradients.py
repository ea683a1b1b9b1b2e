"""Weight gradients of linear layers, for custom autograd functions.

Follows the conventions of megatron-core's linear layers: with `gradient_accumulation_fusion` the gradient is
accumulated in `weight.main_grad`, the optimizer's float32 buffer, and autograd gets a dummy gradient.

Legend: M rows, I inputs, O outputs.
"""

import torch
from megatron.core.tensor_parallel import layers

from nemo_aligner.compat.cpu_linear import matmul


def weight_gradient(
    weight_OI: torch.Tensor, grad_MO: torch.Tensor, x_MI: torch.Tensor, fuse: bool
) -> torch.Tensor | None:
    """The weight gradient to return from the backward of `x_MI @ weight_OI.T`, whose output gradient is `grad_MO`."""
    if not fuse:
        return matmul(grad_MO.t(), x_MI)
    add_to_main_grad(weight_OI.main_grad, grad_MO, x_MI)
    return stand_in_gradient(weight_OI)


def add_to_main_grad(main_grad_OI: torch.Tensor, grad_MO: torch.Tensor, x_MI: torch.Tensor) -> None:
    kernels = layers.fused_weight_gradient_mlp_cuda
    add = kernels.wgrad_gemm_accum_fp32 if main_grad_OI.dtype == torch.float32 else kernels.wgrad_gemm_accum_fp16
    add(x_MI, grad_MO, main_grad_OI)


def stand_in_gradient(weight_OI: torch.Tensor) -> torch.Tensor | None:
    """The dummy gradient that autograd gets when the real one is already in `main_grad`.

    megatron-core's data-parallel wrapper relies on its hooks being called, which takes a gradient that it then drops.
    For a tied weight it adds the gradients of all uses, so the dummy must be zero.
    """
    if not hasattr(weight_OI, "grad_added_to_main_grad"):
        return None
    weight_OI.grad_added_to_main_grad = True
    if getattr(weight_OI, "zero_out_wgrad", False):
        return torch.zeros_like(weight_OI)
    return torch.empty_like(weight_OI)
