"""Float32 matrix products on a CPU through oneDNN.

torch gives them to MKL, which computes half as fast on processors that are not Intel's (AVX-512 EPYC, 32 rows, torch
2.13: 60-100 against 125-180 GFLOP/s). The operator is the one that torch.compile takes, and reads the weight where it
is. Removal: when `torch.nn.functional.linear` is as fast; `python -m nemo_aligner.compat.cpu_linear` shows both.
"""

import time

import torch
from torch.nn import functional as F

# oneDNN brings its second operand into another order first, which costs as much as the product if the first has few
# rows: then the two change places.
_FEW_ROWS = range(16, 65)


def linear(x_MI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` without gradients, [M, O]."""
    if not (x_MI.device.type == "cpu" and x_MI.dtype == torch.float32 and torch.backends.mkldnn.is_available()):
        return F.linear(x_MI, weight_OI, bias_O)
    if x_MI.size(0) in _FEW_ROWS:
        y_MO = _onednn_linear(weight_OI, x_MI).t().contiguous()
        return y_MO if bias_O is None else y_MO.add_(bias_O)
    return _onednn_linear(x_MI, weight_OI, bias_O)


def _onednn_linear(x_MI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_MI, weight_OI, bias_O, "none", [], "")


def _gflops(function) -> float:
    x_MI, weight_OI = torch.randn(32, 576), torch.randn(3072, 576)
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        function(x_MI, weight_OI)
        seconds.append(time.perf_counter() - start)
    return 2e-9 * x_MI.size(0) * weight_OI.numel() / min(seconds)


if __name__ == "__main__":
    for function in (F.linear, _onednn_linear, linear):
        print(f"{function.__name__}: {_gflops(function):.0f} GFLOP/s")
