"""Batch samplers: the rows of a dataset that each data-parallel rank takes, and their order.

All ranks together take a *run* of rows at a time: micro_batch_size * data_parallel_size rows, or global_batch_size rows
if the loader yields whole steps. A run is split into blocks of micro_batch_size rows, assigned to ranks round-robin.
"""

from collections.abc import Iterator, Sequence

import torch


class PaddingRow(int):
    """A row number that only fills a batch: a dataset flags its item, so that it can be ignored."""


class _BatchSampler:
    """Base of both samplers; the trainer reads the attributes.

    total_samples: rows of the dataset. consumed_samples: rows consumed by all ranks, over all epochs.
    """

    def __init__(
        self,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        drop_last: bool,
        load_gbs: bool,
    ):
        """load_gbs: yield this rank's global_batch_size / data_parallel_size rows of a step at once instead of
        micro_batch_size rows. `build_dataloader` refuses sizes that do not divide evenly."""
        if total_samples < 1:
            raise ValueError("the dataset has no rows; check the files in model.data.data_prefix")
        if consumed_samples < 0:
            raise ValueError(f"consumed_samples={consumed_samples} is negative; start from 0")
        self.total_samples = total_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.drop_last = drop_last
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self._run_size = global_batch_size if load_gbs else micro_batch_size * data_parallel_size

    def _share_of_rank(self, run: Sequence[int]) -> list[int]:
        """This rank's rows of a run; if the last run of a dataset is incomplete, the share may be short or empty."""
        first = self.data_parallel_rank * self.micro_batch_size
        stride = self.micro_batch_size * self.data_parallel_size
        return [row for start in range(first, len(run), stride) for row in run[start : start + self.micro_batch_size]]


class RandomBatchSampler(_BatchSampler):
    """Training: every epoch has total_samples // global_batch_size full steps under its own permutation of all rows.

    Epoch and position depend only on `consumed_samples`, and the permutation only on seed and epoch, so the rows of a
    step, also after resuming, are the same for every data-parallel size and micro-batch size. An iterator ends with the
    epoch; the next one starts the next epoch. `consumed_samples` counts the rows that the sampler has yielded (loader
    workers prefetch ahead of the trainer) and may be set before an iterator is created.
    """

    def __init__(self, *args, seed: int, **kwargs):
        """Raises ValueError if the dataset is smaller than a step, RuntimeError if `drop_last` is off with runs of
        more than one row (the incomplete last step could not be distributed evenly)."""
        super().__init__(*args, **kwargs)
        self.seed = seed
        if not self.drop_last and self.micro_batch_size * self.data_parallel_size > 1:
            raise RuntimeError(
                f"drop_last=False needs micro-batch size * data-parallel size = 1, not {self.micro_batch_size} * "
                f"{self.data_parallel_size}; leave drop_last at True"
            )
        incomplete_step = self.total_samples % self.global_batch_size if self.drop_last else 0
        self._rows_per_epoch = self.total_samples - incomplete_step
        if self._rows_per_epoch == 0:
            raise ValueError(
                f"the training set has {self.total_samples} prompts, fewer than one step of {self.global_batch_size}; "
                f"add prompts or lower model.rs.num_rollout_samples"
            )

    def __len__(self) -> int:
        """Batches left in the current epoch."""
        left = self._rows_per_epoch - self.consumed_samples % self._rows_per_epoch
        return -(-left // self._run_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, offset = divmod(self.consumed_samples, self._rows_per_epoch)
        if offset % self._run_size:
            raise ValueError(
                f"consumed_samples={self.consumed_samples} lies inside a batch of {self._run_size} prompts; resume "
                f"with a count of whole steps of {self.global_batch_size}"
            )
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(self.total_samples, generator=generator)[: self._rows_per_epoch]
        for start in range(offset, self._rows_per_epoch, self._run_size):
            run = order[start : start + self._run_size].tolist()
            # Counted before yielding: the iterator may not be advanced again after the last batch of an epoch.
            self.consumed_samples += len(run)
            yield self._share_of_rank(run)


class SequentialBatchSampler(_BatchSampler):
    """Validation: the rows from `consumed_samples` on, in order, the same in every pass.

    Every rank yields the same number of batches, `len()`, none of them empty, because generation uses collectives. One
    validation pass takes global_batch_size rows, that is min(len(), global_batch_size / (mbs * dp)) micro-batches.
    The last run may be incomplete: its rows still appear once, in shorter batches, and a rank that has none of them
    yields a single `PaddingRow`. With `drop_last` such a run is dropped, unless there are fewer than
    global_batch_size rows, as a pass would then miss it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.consumed_samples >= self.total_samples:
            raise ValueError(
                f"consumed_samples={self.consumed_samples} leaves none of the {self.total_samples} rows; start from 0"
            )

    def __len__(self) -> int:
        rows = self.total_samples - self.consumed_samples
        if self.drop_last and rows >= self.global_batch_size:
            return rows // self._run_size
        return -(-rows // self._run_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            start = self.consumed_samples + batch * self._run_size
            run = range(start, min(start + self._run_size, self.total_samples))
            yield self._share_of_rank(run) or [PaddingRow(0)]
