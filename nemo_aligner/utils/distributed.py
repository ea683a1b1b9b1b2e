"""Collectives over the process groups of a job, and padding that the ranks agree on.

Every function documents which ranks must call it. A group of None means all ranks; a source is a global rank; results
of collectives are on this process's GPU. A tensor that cannot be sent raises on every rank, so that none hangs.
Log-probabilities and timers live in separate modules and are re-exported here.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.distributed import ProcessGroup

from nemo_aligner.compat.device import current_device
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.logprobs import (
    DistributedLogprob,
    calculate_distributed_entropy,
    from_parallel_logits_to_logprobs,
)
from nemo_aligner.utils.tensors import batch_pad_to_fixed_len, deprecated_in_version
from nemo_aligner.utils.timers import ScopedTimer, SyncTimer, Timer, max_over_ranks

__all__ = [
    "DistributedLogprob",
    "ScopedTimer",
    "SyncTimer",
    "Timer",
    "broadcast_2d_tensor",
    "broadcast_2d_tensor_within_mp",
    "broadcast_2d_tensor_within_pp",
    "broadcast_tensor",
    "broadcast_tensor_within_pp",
    "calculate_distributed_entropy",
    "from_parallel_logits_to_logprobs",
    "masked_global_mean_var",
    "max_over_ranks",
    "normalize_tensor",
    "pad_list",
    "pad_tensors_to_max_global_seq_len",
    "rebalance_nd_tensor",
    "run_distributed_inference",
    "run_if_model_parallel_src",
]


def broadcast_tensor(
    tensor: torch.Tensor | None, src: int, group: ProcessGroup | None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Send a tensor whose shape and dtype only the source knows; all ranks of the group must call it.

    Args:
        tensor: any shape, dtype and device on rank `src`; what other ranks pass is ignored.
        dtype: dtype that the source casts to before sending; None keeps the tensor's dtype.

    Returns:
        The tensor, on every rank of the group.

    Raises:
        ValueError: rank `src` passed None. Raised on every rank.
    """
    is_source = torch.distributed.get_rank() == src
    if is_source and tensor is not None:
        tensor = tensor.detach().to(device=current_device(), dtype=dtype).contiguous()
    header = [(tensor.shape, tensor.dtype) if is_source and tensor is not None else None]
    torch.distributed.broadcast_object_list(header, src=src, group=group, device=current_device())
    if header[0] is None:
        raise ValueError(f"rank {src} is the source of a broadcast but passed no tensor")

    shape, dtype = header[0]
    received = tensor if is_source else torch.empty(shape, dtype=dtype, device=current_device())
    torch.distributed.broadcast(_as_bytes(received), src=src, group=group)
    return received


def broadcast_tensor_within_pp(
    tensor: torch.Tensor | None, dtype: torch.dtype | None = None, from_last: bool = True
) -> torch.Tensor:
    """Send the last (or first) pipeline stage's tensor to all stages, each of which must call it.

    With a single stage, returns the tensor, cast if `dtype` is given. Otherwise like `broadcast_tensor`.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return tensor if dtype is None else tensor.to(dtype)
    if from_last:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
    else:
        source = parallel_state.get_pipeline_model_parallel_first_rank()
    return broadcast_tensor(tensor, source, parallel_state.get_pipeline_model_parallel_group(), dtype)


@deprecated_in_version("0.1.0", "use broadcast_tensor, which takes any shape and keeps the dtype")
def broadcast_2d_tensor(
    tensor: torch.Tensor | None, src: int, group: ProcessGroup | None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`broadcast_tensor` for matrices, cast to `dtype`.

    Raises:
        AssertionError: the tensor is not two-dimensional. Raised on every rank.
    """
    return _require_2d(broadcast_tensor(tensor, src, group, dtype))


def broadcast_2d_tensor_within_pp(
    tensor: torch.Tensor | None, dtype: torch.dtype = torch.float32, from_last: bool = True
) -> torch.Tensor:
    """`broadcast_tensor_within_pp` for matrices, cast to `dtype` for any number of stages."""
    return _require_2d(broadcast_tensor_within_pp(tensor, dtype, from_last))


def broadcast_2d_tensor_within_mp(tensor: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Broadcast the source rank's matrix, cast to `dtype`, over the replica; all its ranks must call it.

    With a single rank, returns the tensor, cast to `dtype`.
    """
    group = parallel_state.get_model_parallel_group()
    if group.size() == 1:
        return _require_2d(tensor.to(dtype))
    return _require_2d(broadcast_tensor(tensor, parallel_state.get_model_parallel_src_rank(), group, dtype))


def _require_2d(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.dim() == 2, f"a 2-D tensor is required, not one of shape {list(tensor.shape)}"
    return tensor


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """View of a contiguous tensor as a flat byte tensor: backends support bytes, but not every dtype."""
    return tensor.view(-1).view(torch.uint8)


def rebalance_nd_tensor(tensor: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Concatenate the rows of all ranks of the group, in group order; all of them must call it.

    Args:
        tensor: [rows, ...]; the number of rows, which may be 0, can differ between ranks, the rest must not.

    Returns:
        [sum of rows, ...] in the dtype of `tensor`, on every rank.

    Raises:
        ValueError: dtypes or row shapes differ, or a tensor has no dimension. Raised on every rank.
    """
    group_size = torch.distributed.get_world_size(group)
    headers = [None] * group_size
    torch.distributed.all_gather_object(headers, (tensor.shape, tensor.dtype), group=group)
    if len({(len(shape), shape[1:], dtype) for shape, dtype in headers}) > 1 or tensor.dim() == 0:
        raise ValueError(f"the ranks' tensors must agree in dtype and all dimensions but the first; they are {headers}")

    # The collective needs equal sizes: every rank pads to the largest number of rows.
    num_rows = [shape[0] for shape, _ in headers]
    share = torch.zeros(max(num_rows), *tensor.shape[1:], dtype=tensor.dtype, device=current_device())
    share[: len(tensor)] = tensor.detach()
    shares = [torch.empty_like(share) for _ in range(group_size)]
    torch.distributed.all_gather([_as_bytes(received) for received in shares], _as_bytes(share), group=group)
    return torch.cat([received[:count] for received, count in zip(shares, num_rows, strict=True)])


def run_if_model_parallel_src(fn: Callable, *fn_args, **fn_kwargs):
    """Call `fn` on the replica's source rank and return its value; None on the other ranks."""
    if torch.distributed.get_rank() == parallel_state.get_model_parallel_src_rank():
        return fn(*fn_args, **fn_kwargs)
    return None


def run_distributed_inference(
    inputs: dict[str, torch.Tensor] | None = None, infer_fn: Callable[..., torch.Tensor] | None = None
) -> np.ndarray:
    """Scatter a batch of rank 0 over the replicas, infer, and gather the outputs; all ranks must call it.

    Args:
        inputs: on rank 0 only: "inputs" [B, S] token ids and "sequence_length" [B, 1].
        infer_fn: called as `infer_fn(inputs=(tokens, lengths))` with this replica's rows, int64 [B/DP, S] and [B/DP],
            on the GPU; returns a tensor of B/DP rows.

    Returns:
        B rows on every rank, in the order of `inputs`; bfloat16 outputs as float32.

    Raises:
        ValueError: B is not a multiple of DP, the two inputs differ in B, or the outputs are not B rows. Raised on
            every rank.
    """
    inputs = inputs or {}
    tokens = broadcast_tensor(inputs.get("inputs"), src=0, group=None, dtype=torch.int64)
    lengths = broadcast_tensor(inputs.get("sequence_length"), src=0, group=None, dtype=torch.int64).flatten()
    num_replicas = parallel_state.get_data_parallel_world_size()
    if len(tokens) != len(lengths):
        raise ValueError(f"'inputs' has {len(tokens)} rows, but 'sequence_length' has {len(lengths)}")
    if len(tokens) % num_replicas:
        raise ValueError(f"a batch of {len(tokens)} rows cannot be divided by {num_replicas} replicas: pad it first")

    replica = parallel_state.get_data_parallel_rank()
    rows_per_replica = len(tokens) // num_replicas
    own_rows = slice(replica * rows_per_replica, (replica + 1) * rows_per_replica)
    outputs = infer_fn(inputs=(tokens[own_rows], lengths[own_rows]))
    outputs = rebalance_nd_tensor(torch.as_tensor(outputs), parallel_state.get_data_parallel_group())
    if len(outputs) != len(tokens):
        raise ValueError(f"infer_fn made {len(outputs)} rows of a batch of {len(tokens)}")
    if outputs.dtype == torch.bfloat16:  # not supported by NumPy
        outputs = outputs.float()
    return outputs.cpu().numpy()


def masked_global_mean_var(
    values: torch.Tensor, mask: torch.Tensor, group: ProcessGroup | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the selected entries over all ranks of the group; all of them must call it.

    Args:
        values: any shape, which may differ between ranks.
        mask: the shape of `values`; entries other than 0 select.

    Returns:
        Two float32 scalars. The variance divides by the number of entries; both are NaN where none is selected.

    Raises:
        ValueError: the shapes differ on this rank.
    """
    if values.shape != mask.shape:
        raise ValueError(f"values {list(values.shape)} and mask {list(mask.shape)} must have the same shape")
    selected = values.to(device=current_device(), dtype=torch.float64)[mask.to(current_device()) != 0]
    total_and_count = torch.stack((selected.sum(), torch.tensor(selected.numel(), device=selected.device).double()))
    torch.distributed.all_reduce(total_and_count, group=group)
    total, count = total_and_count
    mean = total / count
    squared_deviations = (selected - mean).square().sum()
    torch.distributed.all_reduce(squared_deviations, group=group)
    return mean.float(), (squared_deviations / count).float()


def normalize_tensor(tensor: torch.Tensor, mask: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """Subtract the group's masked mean and divide by the square root of its masked variance + 1e-8.

    All entries are normalised, selected or not; shape, dtype and device are kept. All ranks of the group must call it.
    """
    mean, variance = masked_global_mean_var(tensor, mask, group)
    return (tensor - mean.to(tensor.device)) / (variance.to(tensor.device) + 1e-8).sqrt()


def pad_list(tensor_list: Sequence[torch.Tensor], pad_value: int | float) -> list[torch.Tensor]:
    """Right-pad matrices with `pad_value` to the widest of them. Local."""
    width = max((tensor.size(1) for tensor in tensor_list), default=0)
    return [torch.nn.functional.pad(tensor, (0, width - tensor.size(1)), value=pad_value) for tensor in tensor_list]


def pad_tensors_to_max_global_seq_len(
    list_of_tensors: Sequence[torch.Tensor],
    pad_value: int | float,
    group: ProcessGroup | None,
    sequence_length_to_pad_to: int | None = None,
) -> torch.Tensor:
    """Stack this rank's 1-D tensors at the width of the longest one of the group; all its ranks must call it.

    Args:
        list_of_tensors: this rank's rows; may be empty.
        pad_value: fills each row on the right.
        sequence_length_to_pad_to: a larger width to use instead. Longer data keeps its own width, with a warning.

    Returns:
        [rows, width] on the device and in the dtype of the rows; the width is equal on all ranks.
    """
    longest = torch.tensor(max(map(len, list_of_tensors), default=0), dtype=torch.int64, device=current_device())
    torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX, group=group)
    width = longest.item()
    if sequence_length_to_pad_to is not None:
        if width > sequence_length_to_pad_to:
            warnings.warn(
                f"a sequence of {width} tokens is longer than the {sequence_length_to_pad_to} to pad to: "
                f"padding to {width}",
                stacklevel=2,
            )
        width = max(width, sequence_length_to_pad_to)
    return batch_pad_to_fixed_len(list_of_tensors, width, pad_value)
