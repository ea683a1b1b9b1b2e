"""Flash attention over variable-length sequences, calling torch's private operator directly.

The public API, `torch.nn.attention.varlen.varlen_attn` (torch 2.10 and later), is an operator in Python with a gradient
in Python, which takes about 350 us of host time per call on an H100, hundreds of times per training step (torch 2.11).
The underlying operator has its gradient in C++, supports grouped queries in all versions and has had the same first ten
arguments, and the same five results, since torch 2.3 (checked up to 2.13). The gradient is deterministic if
`torch.use_deterministic_algorithms` asks for it. Removal: when the public API costs the host as little.
"""

import functools
from collections.abc import Callable

import torch


def can_compute(query_TND: torch.Tensor) -> bool:
    """Whether the kernel is available and supports such queries."""
    return (
        query_TND.is_cuda
        and query_TND.dtype in (torch.bfloat16, torch.float16)
        and query_TND.size(-1) % 8 == 0
        and query_TND.size(-1) <= 256
        and _has_kernel(query_TND.device)
    )


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    is_built = torch.backends.cuda.is_flash_attention_available()
    return is_built and torch.cuda.get_device_capability(device) >= (8, 0)


def causal(
    query_TND: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, cu_seqlens: torch.Tensor, max_length: int
) -> torch.Tensor:
    """Causal attention within sequences, [T, N, D].

    Args:
        cu_seqlens: int32 [sequences + 1] on the device; sequence i is at cu_seqlens[i] .. cu_seqlens[i + 1].
        max_length: maximum sequence length.
    """
    return _kernel(query_TND, key_TGD, value_TGD, cu_seqlens, max_length)[0]


def causal_and_gradient(
    query_TND: torch.Tensor, key_TGD: torch.Tensor, value_TGD: torch.Tensor, cu_seqlens: torch.Tensor, max_length: int
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]]:
    """`causal` without autograd, and its VJP, from the output's gradient to those of query, key and value."""
    with torch.no_grad():
        context_TND, *state, _ = _kernel(query_TND, key_TGD, value_TGD, cu_seqlens, max_length)
    logsumexp, *random_state = state
    dropout, is_causal = 0.0, True

    def gradient(grad_TND: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.ops.aten._flash_attention_backward(
            grad_TND, query_TND, key_TGD, value_TGD, context_TND, logsumexp, cu_seqlens, cu_seqlens, max_length,
            max_length, dropout, is_causal, *random_state,
        )  # fmt: skip

    return context_TND, gradient


def _kernel(query_TND, key_TGD, value_TGD, cu_seqlens, max_length) -> tuple[torch.Tensor, ...]:
    dropout, is_causal, return_debug_mask = 0.0, True, False
    return torch.ops.aten._flash_attention_forward(
        query_TND,
        key_TGD,
        value_TGD,
        cu_seqlens,
        cu_seqlens,
        max_length,
        max_length,
        dropout,
        is_causal,
        return_debug_mask,
    )
