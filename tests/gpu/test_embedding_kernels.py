"""Rows added to an embedding's gradient, against float64.

Also runs on a CPU, in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/gpu/test_embedding_kernels.py`.

Legend: M tokens, V vocabulary, H hidden size.
"""

import pytest
import torch

from nemo_aligner.models.nlp.gpt import embedding
from tests.gpu.conftest import INTERPRETED
from tests.gpu.test_layer_kernels import DTYPES, SUMMED, error, on_device

embedding_kernels = pytest.importorskip("nemo_aligner.models.nlp.gpt.embedding_kernels")

RUNS_INTERPRETED = True
IDS = {
    "one": [3],
    "all different": list(range(40, 0, -1)),
    "all the same": [5] * 37,
    "first and last": [49, 0, 49, 0, 0, 1, 48],
    "some often": [7, 2] * 20 + [7] * 9 + [1, 30, 2, 8, 8, 8, 8, 8, 8, 8, 8],
}


@DTYPES
@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("H", [64, 1100])
def test_rows_are_added(normal, dtype, kind, H):
    ids_M = torch.tensor(IDS[kind])
    rows_MH, sum_VH = normal(len(ids_M), H, dtype=dtype) + 0.5, normal(50, H, dtype=torch.float32)
    exact_VH = sum_VH.double().index_add(0, ids_M, rows_MH.double())
    ours_VH = on_device(sum_VH)
    embedding_kernels.add_rows_(ours_VH, on_device(ids_M), on_device(rows_MH))
    is_touched = torch.zeros(50, dtype=torch.bool)
    is_touched[ids_M] = True
    assert torch.equal(ours_VH.cpu()[~is_touched], sum_VH[~is_touched])
    assert error(ours_VH[on_device(is_touched)], exact_VH[is_touched]) <= SUMMED


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has one program after the other, on the CPU")
def test_the_sum_does_not_depend_on_chance(normal):
    ids_M = torch.randint(9, (4000,), generator=torch.Generator().manual_seed(1)).cuda()
    rows_MH = normal(4000, 512, dtype=torch.bfloat16).cuda()
    sums = []
    for _ in range(3):
        sums.append(torch.zeros(9, 512, device="cuda"))
        embedding.add_rows_(sums[-1], ids_M, rows_MH)
    assert sums[0].norm() > 0 and all(torch.equal(sum_VH, sums[0]) for sum_VH in sums)
