"""Process groups for tests: NCCL on GPUs, gloo on the CPU where there is no GPU."""

import os

import torch

from nemo_aligner.compat import cpu
from nemo_aligner.utils import parallel_state


class Utils:
    """Starts and tears down process groups of one host. All ranks of a test call the same methods.

    Attributes:
        world_size: ranks that take part: WORLD_SIZE, or 1 without a launcher.
        rank: this rank: LOCAL_RANK, or 0 without a launcher; -1 if it takes no part.
    """

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    _store: torch.distributed.Store | None = None
    _num_world_sizes = 0

    @classmethod
    def initialize_distributed(cls) -> None:
        """Join the default process group, or adopt it if there is one. Does nothing on a rank that takes no part."""
        if not torch.cuda.is_available():
            cpu.enable()
        if torch.distributed.is_initialized():
            cls.world_size, cls.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
            return
        if cls.rank == -1:
            return
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "nccl"
            torch.cuda.set_device(cls.rank)
        store = None
        if cls._store is not None:
            store = torch.distributed.PrefixStore(f"world size {cls._num_world_sizes}", cls._store)
        elif cls.world_size == 1:
            store = torch.distributed.HashStore()  # a process alone needs no address at which others would find it
        torch.distributed.init_process_group(backend, world_size=cls.world_size, rank=cls.rank, store=store)

    @classmethod
    def initialize_model_parallel(
        cls,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        virtual_pipeline_model_parallel_size: int | None = None,
        **kwargs,
    ) -> None:
        """Replace the model-parallel groups; the arguments are those of `megatron.core.parallel_state`."""
        cls.destroy_model_parallel()
        cls.initialize_distributed()
        if cls.rank == -1:
            return
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size, pipeline_model_parallel_size, virtual_pipeline_model_parallel_size, **kwargs
        )

    @classmethod
    def destroy_model_parallel(cls) -> None:
        """Forget the model-parallel groups; the default group stays."""
        parallel_state.destroy_model_parallel()

    @classmethod
    def set_world_size(cls, world_size: int | None = None, rank: int | None = None) -> None:
        """Let the next groups have `world_size` ranks; None goes back to what the launcher said.

        A default group of another size is torn down. Without `rank`, ranks at or above `world_size` take no part.
        """
        cls.world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
        cls._num_world_sizes += 1
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() != cls.world_size:
            # Kept for the next groups: a new store at the same address would race with the end of this one.
            cls._store = cls._store or torch.distributed.distributed_c10d._get_default_store()
            cls.destroy_model_parallel()
            torch.distributed.destroy_process_group()
        if rank is None:
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            rank = local_rank if local_rank < cls.world_size else -1
        cls.rank = rank
