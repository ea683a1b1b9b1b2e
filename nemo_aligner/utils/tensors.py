"""Small helpers: masked statistics, padding, device moves, garbage collection, warnings.

Shapes: B rows, S token positions, V vocabulary entries.
"""

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable, Sequence

import torch

from nemo_aligner.compat.device import current_device


def masked_mean(values: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Mean of the entries of `values` whose `mask` is not zero.

    Args:
        values: any shape; entries that are not selected may be NaN.
        mask: the shape of `values`, any dtype.
        dim: the dimension to average over; None averages over all selected entries.

    Returns:
        The mean, accumulated in float64 and returned in the dtype of `values` (integers: torch's default float dtype).
        NaN where nothing is selected.

    Raises:
        ValueError: the shapes differ.
    """
    selected = _selection(values, mask)
    mean = torch.where(selected, values, 0).sum(dim, dtype=torch.float64) / selected.sum(dim)
    return mean.to(torch.result_type(values, 1.0))


def masked_std(values: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Standard deviation of the selected entries, with divisor n - 1 as in `torch.std`; otherwise like `masked_mean`.

    NaN where fewer than two entries are selected.
    """
    selected = _selection(values, mask)
    num_selected = selected.sum(dim, keepdim=True)
    mean = torch.where(selected, values, 0).sum(dim, dtype=torch.float64, keepdim=True) / num_selected
    squared_deviations = torch.where(selected, values - mean, 0).square().sum(dim, keepdim=True)
    std = (squared_deviations / (num_selected - 1).clamp(min=0)).sqrt()
    return (std.squeeze() if dim is None else std.squeeze(dim)).to(torch.result_type(values, 1.0))


def _selection(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if values.shape != mask.shape:
        raise ValueError(f"values {list(values.shape)} and mask {list(mask.shape)} must have the same shape")
    return mask != 0


def select_log_probs(full_log_probs: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick each next token's log-probability.

    Args:
        full_log_probs: [B, S, V]; entry t is the distribution of token t + 1.
        indices: [B, S] int64 token ids, not shifted.

    Returns:
        The log-probabilities of `indices[:, 1:]`, [B, S-1], and their distributions, [B, S-1, V].
    """
    full_log_probs = full_log_probs[:, :-1]
    return full_log_probs.gather(-1, indices[:, 1:].unsqueeze(-1)).squeeze(-1), full_log_probs


def calculate_response_lengths(tokens: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Number of ids other than `eos_id` in each row of `tokens` [B, S], as int64 [B]."""
    return (tokens != eos_id).sum(-1)


def batch_pad_to_fixed_len(batch: Sequence[torch.Tensor], max_batch_len: int, pad_token: int | float) -> torch.Tensor:
    """Stack 1-D tensors into [len(batch), max_batch_len], padded on the right with `pad_token`, dtype kept.

    An empty batch gives [0, max_batch_len] in the dtype that torch infers from `pad_token`.

    Raises:
        ValueError: a tensor is longer than `max_batch_len`.
    """
    longest = max((len(row) for row in batch), default=0)
    if longest > max_batch_len:
        raise ValueError(f"a row of length {longest} does not fit max_batch_len={max_batch_len}")
    if not batch:
        return torch.full((0, max_batch_len), pad_token)
    return torch.stack([torch.nn.functional.pad(row, (0, max_batch_len - len(row)), value=pad_token) for row in batch])


def apply_func_to_dict(func: Callable, dictionary: dict) -> dict:
    """A new dict with `func` applied to every value."""
    return {key: func(value) for key, value in dictionary.items()}


def move_to_device_if_tensor(device: torch.device | str, item):
    """`item` on `device` if it is a tensor, else `item` itself."""
    return item.to(device) if torch.is_tensor(item) else item


def to_device_async(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to `device` without blocking the host."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def cpu_dict(dictionary: dict) -> dict:
    """A new dict with tensors moved to the CPU; other values are unchanged."""
    return apply_func_to_dict(functools.partial(move_to_device_if_tensor, "cpu"), dictionary)


def cuda_dict(dictionary: dict) -> dict:
    """A new dict with tensors moved to this process's GPU; other values are unchanged."""
    return apply_func_to_dict(functools.partial(move_to_device_if_tensor, current_device()), dictionary)


def clear_memory() -> None:
    """Collect garbage and empty the CUDA cache."""
    gc.collect()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def gc_frozen():
    """Restrict garbage collection within the context to objects created in it, which takes milliseconds.

    Traversing the objects of all libraries takes 0.4 s, and they live as long as the process.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def surpress_user_warnings(function: Callable) -> Callable:
    """Decorator: suppress `UserWarning` in calls of `function`; other warnings pass."""

    @functools.wraps(function)
    def quiet(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UserWarning)
            return function(*args, **kwargs)

    return quiet


def deprecated_in_version(version: str, message: str | None = None) -> Callable:
    """Decorator: each call warns (`DeprecationWarning`) that the function is deprecated since `version`.

    `message` says what to use instead.
    """

    def decorate(function: Callable) -> Callable:
        notice = f"{function.__qualname__} is deprecated since version {version}"
        if message:
            notice += f": {message}"

        @functools.wraps(function)
        def warning(*args, **kwargs):
            warnings.warn(notice, DeprecationWarning, stacklevel=2)
            return function(*args, **kwargs)

        return warning

    return decorate
