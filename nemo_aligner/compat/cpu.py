"""Run megatron-core 0.9 and NeMo 2.0 on a CPU.

Both libraries hard-code CUDA: `torch.cuda.current_device()`, `.cuda()`, `device="cuda"`, `torch.cuda.LongTensor`,
CUDA streams and CUDA RNG states. `enable()` redirects those names to the CPU. It is called only when a configuration
asks for `trainer.accelerator: cpu`; it is not a fallback for a missing GPU.

`torch.cuda.is_available()` and `device_count()` are unchanged, so that code which checks them behaves correctly.
Removal: when megatron-core takes its device from the process group instead of from `torch.cuda`.
"""

import contextlib
import sys

import torch

from nemo_aligner import compat
from nemo_aligner.compat import cpu_linear, device


def enable() -> None:
    """Make megatron-core and NeMo compute on the CPU in this process. Idempotent."""
    if device.on_cpu():
        return
    # First, because megatron-core compiles functions at import, and torch.compile then inspects torch.
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random

    device.set_on_cpu()
    _redirect_torch()
    _redirect_optimizers()
    schedules.torch = _TorchWithoutCudaDevice()
    cpu_linear.use_in_megatron()
    # The RNG tracker uses the CPU's generator.
    random._set_cuda_rng_state = lambda state, device=-1: torch.set_rng_state(state)
    if "nemo.core.classes.modelPT" in sys.modules:
        compat.apply()  # possibly again: GPU-only packages may count as missing now


def redirect_nemo() -> None:
    """NeMo's models move themselves with `.cuda()`, and seed the RNG tracker only if a GPU is visible."""
    from megatron.core import tensor_parallel
    from nemo.collections.nlp.modules.common.megatron import megatron_init
    from nemo.core.classes import modelPT

    if megatron_init._set_random_seed.__module__ == __name__:
        return
    modelPT.ModelPT.cuda = lambda self, *args, **kwargs: self
    set_random_seed = megatron_init._set_random_seed

    def set_random_seed_and_tracker(seed):
        set_random_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)

    megatron_init._set_random_seed = set_random_seed_and_tracker


def _redirect_optimizers() -> None:
    """megatron-core's optimizers identify dtypes by the names of CUDA tensor types."""
    from megatron.core.optimizer import optimizer

    optimizer.torch = _TorchWithoutCudaDevice()
    tensor_type = torch.Tensor.type

    def type_as_on_a_gpu(self, *args, **kwargs):
        result = tensor_type(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.nn.Parameter.type = type_as_on_a_gpu


def _redirect_torch() -> None:
    for moving in (torch.Tensor, torch.nn.Module):
        moving.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.Stream = torch.cuda.current_stream = torch.cuda.Event = _NoStream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.LongTensor, torch.cuda.IntTensor = torch.LongTensor, torch.IntTensor
    torch.cuda.ByteTensor, torch.cuda.FloatTensor = torch.ByteTensor, torch.FloatTensor
    torch.cuda.manual_seed = torch.default_generator.manual_seed
    torch.cuda.get_rng_state = lambda *args: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)


class _TorchWithoutCudaDevice:
    """torch, for modules that write `device="cuda"` into calls of `torch.zeros` and `torch.tensor`."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def zeros(*args, device=None, **kwargs):
        return torch.zeros(*args, device="cpu" if device == "cuda" else device, **kwargs)

    @staticmethod
    def tensor(*args, device=None, **kwargs):
        return torch.tensor(*args, device="cpu" if device == "cuda" else device, **kwargs)


class _NoStream:
    """Replaces CUDA streams and events; work on a CPU is ordered already."""

    def __init__(self, *args, **kwargs):
        pass

    def synchronize(self, *args) -> None:
        pass

    record = wait = wait_stream = wait_event = record_event = synchronize
