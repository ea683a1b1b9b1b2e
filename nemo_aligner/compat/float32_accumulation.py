"""In-place accumulation of half-precision matrix products into a float32 matrix.

torch supports a float32 addend with bf16 factors since 2.10 (pytorch/pytorch#167931), on a GPU only. Removal: when
`torch.addmm` does it everywhere.
"""

import torch

from nemo_aligner.compat.cpu_linear import matmul

_IN_ONE_KERNEL = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


def add_product_(sum_MN: torch.Tensor, left_MK: torch.Tensor, right_KN: torch.Tensor) -> None:
    """`sum_MN += left_MK @ right_KN`; both factors have the same dtype, the sum has that dtype or float32."""
    if sum_MN.is_cuda and left_MK.dtype == sum_MN.dtype:
        sum_MN.addmm_(left_MK, right_KN)
    elif sum_MN.is_cuda and _IN_ONE_KERNEL:
        torch.addmm(sum_MN, left_MK, right_KN, out_dtype=sum_MN.dtype, out=sum_MN)
    else:
        sum_MN.add_(matmul(left_MK, right_KN))
