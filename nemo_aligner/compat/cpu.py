"""Run megatron-core 0.9 and NeMo 2.0 on a CPU.

Both libraries name CUDA outright: `torch.cuda.current_device()`, `.cuda()`, `device="cuda"`, `torch.cuda.LongTensor`,
CUDA streams and CUDA random states. `enable()` points those names at the CPU. It is called when, and only when, a
configuration asks for `trainer.accelerator: cpu`; nothing here is a fallback for a missing GPU.

`torch.cuda.is_available()` and `device_count()` keep telling the truth, so that code which asks before it acts is not
misled. Removal: when megatron-core takes its device from the process group instead of from `torch.cuda`.
"""

import contextlib
import functools

import torch

from nemo_aligner.compat import device

# Every factory of torch that megatron-core 0.9 or NeMo 2.0 calls with a literal device="cuda".
_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "ones_like", "tensor", "zeros", "zeros_like")


def enable() -> None:
    """Let megatron-core and NeMo compute on the CPU in this process. Calling it again changes nothing."""
    if device.on_cpu():
        return
    device.set_on_cpu()
    for name in _FACTORIES:
        setattr(torch, name, _ignoring_cuda_device(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.set_device = torch.cuda.synchronize = torch.cuda.empty_cache = _do_nothing
    torch.cuda.Stream = torch.cuda.current_stream = torch.cuda.Event = _NoStream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.LongTensor, torch.cuda.IntTensor = torch.LongTensor, torch.IntTensor
    torch.cuda.ByteTensor, torch.cuda.FloatTensor = torch.ByteTensor, torch.FloatTensor
    torch.cuda.manual_seed = torch.default_generator.manual_seed
    torch.cuda.get_rng_state = lambda *args: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    _redirect_megatron_rng()
    _redirect_nemo()


def _ignoring_cuda_device(factory):
    @functools.wraps(factory)
    def on_cpu(*args, **kwargs):
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


def _do_nothing(*args, **kwargs) -> None:
    pass


class _NoStream:
    """Stands in for CUDA streams and events, which order work that on a CPU is in order already."""

    def __init__(self, *args, **kwargs):
        pass

    record = wait = wait_stream = wait_event = synchronize = record_event = _do_nothing


def _redirect_megatron_rng() -> None:
    """Let megatron-core's random-state tracker keep states of the CPU's generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._set_cuda_rng_state = lambda state, device=-1: torch.set_rng_state(state)


def _redirect_nemo() -> None:
    """Two places of NeMo: models move themselves with `.cuda()`, and the tracker is seeded only where a GPU is seen."""
    from megatron.core import tensor_parallel
    from nemo.collections.nlp.modules.common.megatron import megatron_init
    from nemo.core.classes import modelPT

    modelPT.ModelPT.cuda = lambda self, *args, **kwargs: self
    set_random_seed = megatron_init._set_random_seed

    def set_random_seed_and_tracker(seed):
        set_random_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)

    megatron_init._set_random_seed = set_random_seed_and_tracker
