"""megatron-core 0.9.0's writer of `torch_dist` checkpoints.

It writes from forked processes and collects their results through a manager, a further process that imports everything
anew: seconds for each first save, and a fork of a process with threads can hang for good. Writing releases the
interpreter's lock, so threads do as well. And where one rank could not write, on a full disk, say, all others wait for
it forever. Removal: with a megatron-core whose synchronous saves neither fork nor hang.
"""

import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch


def apply() -> None:
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    if writer.write_preloaded_data_multiproc is _write_in_threads:
        return
    retrieve_own_results = writer.retrieve_write_results

    def retrieve_write_results(self):
        try:
            results, failure = retrieve_own_results(self), None
        except Exception as error:
            cause = _root(error)
            message = f"the checkpoint could not be written: rank {torch.distributed.get_rank()}: {cause}"
            results, failure = None, (getattr(cause, "errno", None), message)
        failures = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(failures, failure)
        failure = next((failure for failure in failures if failure is not None), None)
        if failure is not None:
            raise OSError(*failure)
        return results

    writer.retrieve_write_results = retrieve_write_results
    writer.write_preloaded_data_multiproc = staticmethod(_write_in_threads)
    filesystem_async._get_write_results_queue = queue.SimpleQueue
    async_utils.DistributedAsyncCaller.schedule_async_call = _call_in_thread


def _call_in_thread(self, async_fn, save_args: tuple) -> None:
    """In the place of a forked process; `process` is asked no more than what a thread can answer."""
    if async_fn is not None:
        torch.cuda.synchronize()
        self.start_time = time.time()
        self.process = threading.Thread(target=async_fn, args=save_args)
        self.process.start()


def _write_in_threads(write_buckets: list, all_results: queue.SimpleQueue) -> None:
    """Write one file per bucket; puts {bucket number: results} into `all_results`, or the first exception."""
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
    while error.__cause__ is not None:
        error = error.__cause__
    return error
