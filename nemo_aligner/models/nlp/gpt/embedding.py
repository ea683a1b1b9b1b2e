"""Word embeddings that accumulate their gradient directly in the optimizer's buffer.

Autograd materializes a dense gradient of the weight's size and dtype, which is then added to the optimizer's float32
buffer in every micro-batch: for 128,256 entries of 2048 channels three gigabytes are read and written, for rows of some
megabytes. Here only the rows are added to the buffer. (For a tied weight, megatron-core's data-parallel wrapper still
gets a dense gradient, of zeros: see `stand_in_gradient`.)

Legend: M tokens, V vocabulary, H hidden size.
"""

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from torch.nn import functional as F

from nemo_aligner.utils.weight_gradients import stand_in_gradient


def can_add_in_place(embedding: VocabParallelEmbedding, fuse: bool) -> bool:
    """Whether `embed` may replace the module; `fuse` as for `weight_gradient`."""
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

    On a GPU torch's `index_add_` is nondeterministic, and `index_put_`, which is deterministic, synchronizes the host.
    """
    if sum_VH.is_cuda:
        from nemo_aligner.models.nlp.gpt import embedding_kernels

        embedding_kernels.add_rows_(sum_VH, ids_M, rows_MH.contiguous())
    else:
        sum_VH.index_add_(0, ids_M, rows_MH.to(sum_VH.dtype))
