"""The device of this process: its GPU, or the CPU if the configuration asks for it."""

import torch

_on_cpu = False


def set_on_cpu() -> None:
    """Record that this process runs on the CPU. Called by `nemo_aligner.compat.cpu.enable` only."""
    global _on_cpu
    _on_cpu = True


def on_cpu() -> bool:
    return _on_cpu


def current_device() -> torch.device:
    """The device on which this process keeps its tensors."""
    return torch.device("cpu") if _on_cpu else torch.device("cuda", torch.cuda.current_device())
