"""Launch options for Triton kernels: overlap with the end of the previous kernel, and device limits.

A kernel launched with `early_launch` starts as soon as each program of the previous kernel has called `let_next_begin`
or ended ("programmatic dependent launch" in NVIDIA's CUDA programming guide). As the previous kernel need not be past
its own wait, several may run at once, back to the last kernel launched normally; everything before that one has ended.
Before its wait a kernel may only read what none of these kernels writes, such as weights and positions, and prefetch
memory. For everything else it calls `wait_for_previous`, which returns when the previous kernel has ended. Every kernel
must call it on every path: then all earlier kernels have ended, too, and what they read may be overwritten.
"""

import functools

import torch
import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton before 3.4
    gdc_launch_dependents = gdc_wait = None


@functools.cache
def early_launch(device: torch.device) -> dict[str, bool]:
    """Launch options, of which EARLY is a kernel argument; supported from Hopper on."""
    can = gdc_wait is not None and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if can else {"EARLY": False}


@triton.jit
def let_next_begin(EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    if EARLY:
        gdc_wait()


@triton.jit
def fetch_into_cache(pointers, NUM_BYTES: tl.constexpr, EARLY: tl.constexpr):
    """Start prefetching NUM_BYTES from each pointer, which is a multiple of 16, into the L2 cache.

    Does nothing if NUM_BYTES is not a multiple of 16.
    """
    if EARLY and NUM_BYTES % 16 == 0:
        size: tl.constexpr = f"{NUM_BYTES}"
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], " + size + "; mov.u32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Maximum bytes of shared memory per program."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
