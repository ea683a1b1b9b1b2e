"""How Triton kernels are launched: set up while the one in front of them ends, and within what the device has.

A kernel launched so begins as soon as each program of the kernel in front has said `let_next_begin`, or ended
("programmatic dependent launch" in NVIDIA's CUDA programming guide). As that one need not be past its own wait, several
may run at once, back to the last kernel that was launched in the ordinary way; what is in front of that has ended. At
once a kernel may read what none of them writes, as weights and positions, and have memory fetched that it will need.
For all else it waits in `wait_for_previous` until the kernel in front has ended. Each must, on every path: so all
further ones have ended, too, and what they read may be written to.
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
    """Options of a launch, of which EARLY is the kernel's own; Hopper GPUs and later ones can."""
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
    """Have NUM_BYTES behind each pointer, which is a multiple of 16, on their way into the L2 cache.

    Nothing is done for other numbers than multiples of 16.
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
    """Bytes of its own that a program may have at most."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
