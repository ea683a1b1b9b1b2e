"""`embedding` as a Triton kernel.

Legend: M tokens, V vocabulary, H hidden size.
"""

import torch
import triton
import triton.language as tl


def add_rows_(sum_VH: torch.Tensor, ids_M: torch.Tensor, rows_MH: torch.Tensor) -> None:
    num_rows, size = rows_MH.shape
    sorted_ids_M, order_M = ids_M.sort(stable=True)
    ends_M = torch.searchsorted(sorted_ids_M, sorted_ids_M, right=True)
    block = min(512, triton.next_power_of_2(size))
    _add_rows_kernel[(num_rows, triton.cdiv(size, block))](
        sum_VH, sorted_ids_M, order_M, ends_M, rows_MH, size, ROWS=8, BLOCK=block, num_warps=4
    )


@triton.jit
def _add_rows_kernel(sums, sorted_ids, order, ends, rows, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """All rows of an id are summed by the program at the first of them, ROWS at a time."""
    place = tl.program_id(0).to(tl.int64)
    own_id = tl.load(sorted_ids + place)
    if tl.load(sorted_ids + place - 1, mask=place > 0, other=-1) != own_id:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < size
        end = tl.load(ends + place)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(place, end, ROWS):
            of_id = start + tl.arange(0, ROWS)
            row = tl.load(order + of_id, mask=of_id < end, other=0)
            at = rows + row[:, None] * size + column[None, :]
            total += tl.load(at, mask=(of_id < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        at = sums + own_id * size + column
        found = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, (found + tl.sum(total, axis=0)).to(sums.dtype.element_ty), mask=inside)
