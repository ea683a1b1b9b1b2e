"""Start gloo processes on this machine and run a function in each of them."""

import datetime
import os
import traceback

import torch

from tests.ports import free_port


def run_ranks(function, world_size: int, *args, timeout_s: float = 300.0) -> list:
    """Run `function(rank, *args)` in `world_size` fresh processes joined by gloo; return their results in rank order.

    The function must be importable (defined at the top of a module) and its result picklable. A failure in any rank
    raises here with that rank's traceback.
    """
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(function, rank, world_size, port, timeout_s, results, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    outcomes = {}
    try:
        while len(outcomes) < world_size:
            if results.empty() and not any(process.is_alive() for process in processes):
                codes = [process.exitcode for process in processes]
                raise RuntimeError(f"a rank died without a word; exit codes {codes}")
            if results.empty():
                processes[len(outcomes) % world_size].join(0.05)
                continue
            rank, value, error = results.get()
            if error is not None:
                raise RuntimeError(f"rank {rank} of {world_size} failed:\n{error}")
            outcomes[rank] = value
    finally:
        for process in processes:
            process.join(5 if len(outcomes) == world_size else 0)
            process.kill()
    return [outcomes[rank] for rank in range(world_size)]


def _rank_main(function, rank, world_size, port, timeout_s, results, args):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    try:
        from nemo_aligner.compat import cpu

        cpu.enable()
        torch.distributed.init_process_group(
            "gloo", rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=timeout_s)
        )
        value = function(rank, *args)
        results.put((rank, value, None))
        torch.distributed.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
