"""How fast the optimizer's state leaves the GPU and comes back, compared with a plain copy of the same tensors.

    python -m benchmarks.offload --optimizer distributed_fused_adam

The model is that of `gpt_1b.py`, in bf16 with fp32 moments and master weights. The plain copy is the obvious
implementation: `tensor.to("cpu", non_blocking=True)` and back. Rates count the state's bytes once per direction.
"""

import argparse
import datetime
import os
import tempfile
import time
from pathlib import Path

import nemo_aligner.compat.quiet_imports  # noqa: F401

# isort: split
import psutil
import torch

from benchmarks.gpt_1b import build_actor
from nemo_aligner.utils.optimizer_offload import state_tensors
from tests.tiny import save_tokenizer

REPEATS = 5
GB = 1e9


def seconds(function) -> float:
    """Wall-clock time of `function` and all GPU work that it starts."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def pinned_rates(num_bytes: int = 2 * 1024**3) -> tuple[float, float]:
    """Bytes per second of one large copy to page-locked memory and back; the best of several."""
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    gpu = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    out = min(seconds(lambda: host.copy_(gpu, non_blocking=True)) for _ in range(REPEATS))
    back = min(seconds(lambda: gpu.copy_(host, non_blocking=True)) for _ in range(REPEATS))
    return num_bytes / out, num_bytes / back


def plain_copy(tensors: list[torch.Tensor]) -> tuple[list[float], list[float]]:
    outs, backs = [], []
    for _ in range(REPEATS):
        copies = []
        outs.append(seconds(lambda copies=copies: copies.extend(t.to("cpu", non_blocking=True) for t in tensors)))
        pairs = list(zip(tensors, copies, strict=True))
        backs.append(seconds(lambda pairs=pairs: [t.copy_(c, non_blocking=True) for t, c in pairs]))
    return outs, backs


def training_step_wait(actor) -> float:
    """Seconds that the GPU's main stream waits for state whose copy back began while it was generating."""
    actor.offload_adam_states()
    torch.cuda.synchronize()
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    actor.prefetch_adam_states()
    for _ in range(600):  # about 0.9 s on an H100, less than generating the last rollouts
        matrix @ matrix
    before.record()
    actor.onload_adam_states()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1000


def another_copy_takes(move, copy) -> float:
    """Seconds that `copy`, of a few bytes, takes on the main stream right after `move` has started moving the state."""
    torch.cuda.synchronize()
    move()
    start = time.perf_counter()
    copy()
    torch.cuda.current_stream().synchronize()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="distributed_fused_adam")
    optimizer = parser.parse_args().optimizer

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        actor, _ = build_actor(save_tokenizer(Path(folder)), optimizer=optimizer)
        build_s = time.perf_counter() - start
    start = time.perf_counter()
    actor._optimizer_offload._host.wait()
    pinning_rest_s = time.perf_counter() - start
    tensors = list(state_tensors(actor))
    num_bytes = sum(t.numel() * t.element_size() for t in tensors)
    for t in tensors:  # any values but zeros
        t.view(torch.uint8).random_(1, 120)
    checksums = [t.view(torch.uint8).sum(dtype=torch.int64) for t in tensors]
    host_bytes = sum(piece.numel() for piece in actor._optimizer_offload._host.pieces)

    out_rate, back_rate = pinned_rates()
    allocated = torch.cuda.memory_allocated()
    outs, backs = [seconds(actor.offload_adam_states)], []
    freed = allocated - torch.cuda.memory_allocated()
    backs.append(seconds(actor.onload_adam_states))
    for _ in range(REPEATS):
        outs.append(seconds(actor.offload_adam_states))
        backs.append(seconds(actor.onload_adam_states))
    wait = training_step_wait(actor)
    on_gpu, on_host = torch.zeros(1, device="cuda"), torch.zeros(1, pin_memory=True)
    fetching = another_copy_takes(actor.offload_adam_states, lambda: on_host.copy_(on_gpu))
    sending = another_copy_takes(actor.prefetch_adam_states, lambda: on_gpu.copy_(on_host, non_blocking=True))
    actor.onload_adam_states()
    is_equal = all(
        torch.equal(t.view(torch.uint8).sum(dtype=torch.int64), checksum)
        for t, checksum in zip(state_tensors(actor), checksums, strict=True)
    )
    plain_outs, plain_backs = plain_copy(tensors)

    later_out, later_back = sorted(outs[1:])[REPEATS // 2], sorted(backs[1:])[REPEATS // 2]
    print(f"\n{datetime.date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}, {optimizer}, "
          f"{os.cpu_count()} CPU cores, {psutil.virtual_memory().total / GB:.0f} GB")  # fmt: skip
    print(f"state {num_bytes / GB:.3f} GB in {len(tensors)} tensors; values after all moves equal: {is_equal}")
    print(f"model built in {build_s:.1f} s, page-locking beside it; then waited {pinning_rest_s:.1f} s for the rest\n")
    print(f"{'':34}{'out':>12}{'back':>12}")
    print(f"{'pinned copy, GB/s':34}{out_rate / GB:12.1f}{back_rate / GB:12.1f}")
    print(f"{'ours, s (median of later ones)':34}{later_out:12.3f}{later_back:12.3f}")
    print(f"{'a number beside it, ms':34}{fetching * 1e3:12.3f}{sending * 1e3:12.3f}")
    print(f"{'ours, GB/s':34}{num_bytes / later_out / GB:12.1f}{num_bytes / later_back / GB:12.1f}")
    print(f"{'plain copy, s (first)':34}{plain_outs[0]:12.3f}{plain_backs[0]:12.3f}")
    print(f"{'plain copy, s (best)':34}{min(plain_outs):12.3f}{min(plain_backs):12.3f}\n")
    share = min(num_bytes / later_out / out_rate, num_bytes / later_back / back_rate)
    first = max(outs[0] / later_out, backs[0] / later_back)
    for name, value, limit, is_met in (
        ("share of the pinned rate", f"{share:.3f}", ">= 0.90", share >= 0.90),
        ("first move / later ones", f"{first:.2f}", "<= 1.5", first <= 1.5),
        ("a training step waits, s", f"{wait:.4f}", "<= 0.02", wait <= 0.02),
        ("a number goes the same way, s", f"{max(fetching, sending):.4f}", "<= 0.005", max(fetching, sending) <= 0.005),
        ("GPU memory freed / state", f"{freed / num_bytes:.4f}", "0.99..1.01", abs(freed / num_bytes - 1) <= 0.01),
        ("host memory / state", f"{host_bytes / num_bytes:.4f}", "<= 1.05", host_bytes <= 1.05 * num_bytes),
    ):
        print(f"{name:34}{value:>12}{limit:>14}   {'PASS' if is_met and is_equal else 'FAIL'}")


if __name__ == "__main__":
    main()
