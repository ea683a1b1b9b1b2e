"""megatron-core 0.9.0's writer of `torch_dist` checkpoints.

It writes from forked processes and collects their results through a manager, another process that imports everything
again: this adds seconds to the first save, and forking a process with threads can deadlock. Writing releases the GIL,
so threads are as fast. Moreover, if one rank cannot write, on a full disk for example, all others wait for it forever.
Removal: with a megatron-core whose saves neither fork nor hang.
"""

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch


def apply() -> None:
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_in_threads)
    filesystem_async._get_write_results_queue = queue.SimpleQueue
    async_utils.DistributedAsyncCaller.schedule_async_call = _call_in_thread
    TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks = _make_request


def _make_request(self, writer, planned: tuple):
    """Replaces the request that rank 0 finalizes while the other ranks wait."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

    _, metadata, _ = planned
    return AsyncRequest(*writer.get_save_function_and_args(), [Finalization(writer, metadata)])


class Finalization:
    """Final step after every rank has written its files: rank 0 writes the metadata with the tensors' locations."""

    def __init__(self, writer, metadata):
        self._writer, self._metadata, self._results = writer, metadata, None

    def __call__(self) -> None:
        """Gather and finish. Collective over all ranks.

        Raises:
            OSError: on every rank, if any rank could not write.
        """
        self.gather()
        failure = None
        if self._results is not None:
            try:
                self.finish()
            except Exception as error:
                failure = error
        raise_on_all_ranks(failure)

    def gather(self) -> None:
        """Gather the ranks' write results on rank 0. Collective over all ranks; raises like `__call__`."""
        results = failure = None
        try:
            results = self._writer.retrieve_write_results()
        except Exception as error:
            failure = error
        raise_on_all_ranks(failure)
        if torch.distributed.get_rank() == 0:
            self._results = [None] * torch.distributed.get_world_size()
        torch.distributed.gather_object(results, self._results)

    def finish(self) -> None:
        """Write the checkpoint metadata. On rank 0 only."""
        self._writer.finish(self._metadata, self._results)


def raise_on_all_ranks(failure: Exception | None) -> None:
    """Raise on every rank if any rank could not write. Collective over all ranks.

    Raises:
        OSError: on every rank: the first rank's failure, with its error number.
    """
    own = None
    if failure is not None:
        cause = _root(failure)
        message = f"the checkpoint could not be written: rank {torch.distributed.get_rank()}: {cause}"
        own = (getattr(cause, "errno", None), message)
    of_ranks = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, own)
    first = next((of_rank for of_rank in of_ranks if of_rank is not None), None)
    if first is not None:
        raise OSError(*first) from failure


def _call_in_thread(self, async_fn, save_args: tuple) -> None:
    """Replaces the forked process; callers use only those methods of `process` that a thread has as well."""
    if async_fn is not None:
        torch.cuda.synchronize()
        self.start_time = time.time()
        self.process = threading.Thread(target=async_fn, args=save_args)
        self.process.start()


def _write_in_threads(write_buckets: list, all_results: queue.SimpleQueue) -> None:
    """Write one file per bucket; put {bucket number: results}, or the first exception, into `all_results`."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    results, tokens = queue.Queue(), queue.Queue()
    with ThreadPoolExecutor(len(write_buckets)) as pool:
        for number, bucket in enumerate(write_buckets):
            tokens.put(number)
            pool.submit(FileSystemWriterAsync.write_preloaded_data, number, bucket, results, tokens, True)
    by_bucket = dict(results.get() for _ in write_buckets)
    failures = [result for result in by_bucket.values() if isinstance(result, Exception)]
    all_results.put(failures[0] if failures else by_bucket)


def _root(error: BaseException) -> BaseException:
    """The first exception of a chain: torch's writer may fail again on closing the file, hiding the disk's error."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error
