"""Float32 matrix products on a CPU through oneDNN.

torch uses MKL, which is half as fast on processors other than Intel's (AVX-512 EPYC, 32 rows, torch 2.13: 60-100
against 125-180 GFLOP/s; 240 rows, as in training: 55-110 against 190-240). The operator is the one that torch.compile
uses, and reads the weight without a copy. Removal: when `torch.nn.functional.linear` is as fast;
`python -m nemo_aligner.compat.cpu_linear` measures both.

Legend: M rows, I inputs, O outputs.
"""

import functools
import time

import torch
from torch.nn import functional as F

# oneDNN first reorders its second operand, which costs as much as the product if the first has few rows: then the two
# are swapped.
_FEW_ROWS = range(16, 65)


def linear(x_MI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` without gradients, [M, O]."""
    is_float32_on_cpu = x_MI.device.type == "cpu" and x_MI.dtype == torch.float32
    if not (is_float32_on_cpu and x_MI.numel() > 0 and torch.backends.mkldnn.is_available()):
        return F.linear(x_MI, weight_OI, bias_O)
    if x_MI.size(0) in _FEW_ROWS:
        y_MO = _onednn_linear(weight_OI, x_MI).t().contiguous()
        return y_MO if bias_O is None else y_MO.add_(bias_O)
    return _onednn_linear(x_MI, weight_OI, bias_O)


def _onednn_linear(x_MI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_MI, weight_OI, bias_O, "none", [], "")


def matmul(left_MI: torch.Tensor, right_IO: torch.Tensor) -> torch.Tensor:
    """`left_MI @ right_IO` without gradients, [M, O]."""
    return linear(left_MI, right_IO.t())


class _LinearWithGradients(torch.autograd.Function):
    """Differentiable `linear`, whose gradients use the same operator."""

    @staticmethod
    def forward(ctx, x, weight_OI, bias_O):
        ctx.save_for_backward(x, weight_OI)
        ctx.has_bias = bias_O is not None
        return linear(x.flatten(0, -2), weight_OI, bias_O).unflatten(0, x.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight_OI = ctx.saved_tensors
        x_MI, grad_MO = x.flatten(0, -2), grad.flatten(0, -2)
        grad_x = matmul(grad_MO, weight_OI).view_as(x)
        return grad_x, matmul(grad_MO.t(), x_MI), grad_MO.sum(0) if ctx.has_bias else None


def use_in_megatron() -> None:
    """Use oneDNN in megatron-core's linear layers where they compute in float32 without communication."""
    from megatron.core.tensor_parallel import layers

    megatron_linear = layers.linear_with_grad_accumulation_and_async_allreduce
    if megatron_linear.__module__ == __name__:
        return

    @functools.wraps(megatron_linear)
    def linear_with_gradients(input, weight, bias, gradient_accumulation_fusion, sequence_parallel, *args, **kwargs):
        is_more = gradient_accumulation_fusion or sequence_parallel or kwargs.get("allreduce_dgrad") or args
        if is_more or kwargs.get("grad_output_buffer") is not None or weight.dtype != torch.float32:
            return megatron_linear(
                input, weight, bias, gradient_accumulation_fusion, sequence_parallel, *args, **kwargs
            )
        return _LinearWithGradients.apply(input, weight, bias)

    linear_with_gradients.__module__ = __name__
    layers.linear_with_grad_accumulation_and_async_allreduce = linear_with_gradients


def _gflops(function) -> float:
    x_MI, weight_OI = torch.randn(240, 576), torch.randn(3072, 576)
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        function(x_MI, weight_OI)
        seconds.append(time.perf_counter() - start)
    return 2e-9 * x_MI.size(0) * weight_OI.numel() / min(seconds)


if __name__ == "__main__":
    for function in (F.linear, _onednn_linear, linear):
        print(f"{function.__name__}: {_gflops(function):.0f} GFLOP/s")
