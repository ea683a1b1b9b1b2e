"""torch's attention over sequences of different lengths (`torch.nn.attention.varlen`, flash attention underneath).

torch 2.10 brought it with `is_causal` and equal numbers of query and key heads; 2.11 says the same by `window_size`,
and 2.12 knows grouped queries by `enable_gqa`. Removal of the distinctions: with torch>=2.12 in pyproject.toml.
"""

import inspect

import torch

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None


def can_compute(query_TND: torch.Tensor) -> bool:
    """Whether the kernel is there and takes such queries."""
    return (
        varlen_attn is not None
        and query_TND.is_cuda
        and query_TND.dtype in (torch.bfloat16, torch.float16)
        and query_TND.size(-1) % 8 == 0
        and query_TND.size(-1) <= 256
        and torch.cuda.get_device_capability(query_TND.device) >= (8, 0)
    )


def causal(
    query_TND: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, bounds: torch.Tensor, max_length: int
) -> torch.Tensor:
    """Causal attention within sequences, [T, N, D].

    Args:
        bounds: int32 [sequences + 1] on the device; sequence i is at bounds[i] .. bounds[i + 1].
        max_length: of a sequence.
    """
    accepted = inspect.signature(varlen_attn).parameters
    options = {"window_size": (-1, 0)} if "window_size" in accepted else {"is_causal": True}
    repeats = query_TND.size(1) // key_TGD.size(1)
    if repeats > 1 and "enable_gqa" in accepted:
        options["enable_gqa"] = True
    elif repeats > 1:
        key_TGD, value_TGD = (x.repeat_interleave(repeats, dim=1) for x in (key_TGD, value_TGD))
    return varlen_attn(query_TND, key_TGD, value_TGD, bounds, bounds, max_length, max_length, **options)
