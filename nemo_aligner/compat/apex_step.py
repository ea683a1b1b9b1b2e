"""Bucket-by-bucket step of Apex's DistributedFusedAdam, with the state of the other buckets on the host.

For Apex 25.04, which steps all buckets in one or two calls of a private method, without a hook in between. Removal:
once it has one. tests/gpu/test_training_script.py detects a change of that method: it compares the losses with a
streamed state to those with a resident one.
"""

from contextlib import closing

from nemo_aligner.utils.optimizer_offload import OptimizerOffload, bucket_tensors


def step_bucket_by_bucket(optimizer, offload: OptimizerOffload) -> None:
    """Stream offloaded buckets through the GPU in the optimizer's step.

    Parameters must have storage separate from the state, as in bf16 with `megatron_amp_O2`.

    Raises:
        ValueError: it is another optimizer.
    """
    step_of_buckets = getattr(optimizer, "_local_step", None)
    if step_of_buckets is None:
        raise ValueError(
            "model.rs.training.stream_adam_states=True needs model.optim.name=distributed_fused_adam, not "
            f"{type(optimizer).__name__}"
        )

    def local_step(bucket_ids: list[int]) -> None:
        if offload.num_bytes_away == 0:
            step_of_buckets(bucket_ids)
            return
        buckets = optimizer.state["buckets"]
        with closing(offload.passing_through({i: bucket_tensors(buckets[i]) for i in bucket_ids})) as turns:
            for bucket_id in turns:
                step_of_buckets([bucket_id])

    optimizer._local_step = local_step
