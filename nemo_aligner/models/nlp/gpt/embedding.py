"""Word embeddings whose gradient goes where it belongs.

Autograd makes a matrix of the whole weight's size for it, in the weight's dtype, which then is added to the optimizer's
float32 buffer, micro-batch by micro-batch: for 128,256 entries of 2048 channels three gigabytes are read and written,
for rows of some megabytes. Here the rows are added to the buffer. (megatron-core's data-parallel wrapper still gets a
matrix for a tied weight, of zeros: see `stand_in_gradient`.)

Legend: M tokens, V vocabulary, H hidden size.
"""

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch.nn import functional as F

from nemo_aligner.utils.weight_gradients import stand_in_gradient


def can_add_in_place(embedding: VocabParallelEmbedding, fuse: bool) -> bool:
    """Whether `embed` may take the module's place; `fuse` means what it does for `weight_gradient`."""
    return fuse and embedding.tensor_model_parallel_size == 1 and hasattr(embedding.weight, "main_grad")


def embed(ids: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """Each token's row [..., H]; the weight's gradient is added to `weight_VH.main_grad`."""
    return _Embedding.apply(ids, weight_VH)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight_VH):
        ctx.save_for_backward(ids, weight_VH)
        return F.embedding(ids, weight_VH)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        ids, weight_VH = ctx.saved_tensors
        add_rows_(weight_VH.main_grad, ids.flatten(), grad.flatten(0, -2))
        return None, stand_in_gradient(weight_VH)


def add_rows_(sum_VH: torch.Tensor, ids_M: torch.Tensor, rows_MH: torch.Tensor) -> None:
    """`sum_VH[ids_M[m]] += rows_MH[m]` for every m, in an order that depends on the ids only; computed in float32.

    torch has it on a GPU in an order that depends on chance (`index_add_`), and in a fixed one that makes the host wait
    (`index_put_`).
    """
    if sum_VH.is_cuda:
        from nemo_aligner.models.nlp.gpt import embedding_kernels

        embedding_kernels.add_rows_(sum_VH, ids_M, rows_MH.contiguous())
    else:
        sum_VH.index_add_(0, ids_M, rows_MH.to(sum_VH.dtype))
