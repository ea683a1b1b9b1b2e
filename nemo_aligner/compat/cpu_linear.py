"""Float32 matrix products on a CPU through oneDNN.

torch gives them to MKL, which computes half as fast on processors that are not Intel's (AVX-512 EPYC, 32 rows, torch
2.13: 60-100 against 125-180 GFLOP/s). The operator is the one that torch.compile takes, and reads the weight where it
is. Removal: when `torch.nn.functional.linear` is as fast; `python -m nemo_aligner.compat.cpu_linear` shows both.
"""

import time

import torch
from torch.nn import functional as F


def linear(x_MI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` without gradients, [M, O]."""
    if x_MI.device.type == "cpu" and x_MI.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x_MI, weight_OI, bias_O, "none", [], "")
    return F.linear(x_MI, weight_OI, bias_O)


def _gflops(function) -> float:
    x_MI, weight_OI = torch.randn(32, 576), torch.randn(3072, 576)
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        function(x_MI, weight_OI)
        seconds.append(time.perf_counter() - start)
    return 2e-9 * x_MI.size(0) * weight_OI.numel() / min(seconds)


if __name__ == "__main__":
    print(f"oneDNN {_gflops(linear):.0f}, torch.nn.functional.linear {_gflops(F.linear):.0f} GFLOP/s")
