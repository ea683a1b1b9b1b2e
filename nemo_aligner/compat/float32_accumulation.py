"""Products of half-precision matrices added to a float32 matrix where it is.

torch takes a float32 summand beside bf16 factors since 2.10 (pytorch/pytorch#167931), on a GPU only. Removal: when
`torch.addmm` does it everywhere.
"""

import torch

from nemo_aligner.compat.cpu_linear import matmul

_IN_ONE_KERNEL = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def add_product_(sum_MN: torch.Tensor, left_MK: torch.Tensor, right_KN: torch.Tensor) -> None:
    """`sum_MN += left_MK @ right_KN`; the factors have one dtype, the sum the same or float32."""
    if sum_MN.is_cuda and left_MK.dtype == sum_MN.dtype:
        sum_MN.addmm_(left_MK, right_KN)
    elif sum_MN.is_cuda and _IN_ONE_KERNEL:
        torch.addmm(sum_MN, left_MK, right_KN, out_dtype=sum_MN.dtype, out=sum_MN)
    else:
        sum_MN.add_(matmul(left_MK, right_KN))
