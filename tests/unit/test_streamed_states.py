"""Optimizer state that stays on the host in training: who requests what, and when. tests/gpu tests the copies."""

from types import SimpleNamespace

import pytest
import torch

from nemo_aligner.compat.apex_step import step_bucket_by_bucket
from tests.tiny import load_actor


class FakeOffload:
    def __init__(self, calls: list):
        self.calls, self.num_bytes_away = calls, 0

    def __enter__(self):
        self.calls.append("leave")

    def __exit__(self, *_):
        self.calls.append("come back")

    def start_onload(self):
        self.calls.append("come back")

    def passing_through(self, groups):
        for key, tensors in groups.items():
            self.calls.append(("in", key, [int(tensor) for tensor in tensors]))
            yield key
            self.calls.append(("out", key))


@pytest.fixture
def calls():
    return []


def bucket(number: int) -> SimpleNamespace:
    moments = torch.tensor(10 * number), torch.tensor(10 * number + 1)
    return SimpleNamespace(
        params_shard=None, param_remainders_shard=None, exp_avg_shard=moments[0], exp_avg_sq_shard=moments[1]
    )


def test_buckets_are_stepped_one_at_a_time_where_they_are_away(calls):
    offload = FakeOffload(calls)
    optimizer = SimpleNamespace(
        state={"buckets": [bucket(number) for number in range(4)]}, _local_step=lambda ids: calls.append(("step", ids))
    )
    step_bucket_by_bucket(optimizer, offload)
    optimizer._local_step([1, 3])
    assert calls == [("step", [1, 3])]
    offload.num_bytes_away = 1
    calls.clear()
    optimizer._local_step([3, 1])
    assert calls == [
        ("in", 3, [30, 31]), ("step", [3]), ("out", 3),
        ("in", 1, [10, 11]), ("step", [1]), ("out", 1),
    ]  # fmt: skip


def test_another_optimizer_is_refused(calls):
    with pytest.raises(ValueError, match="distributed_fused_adam, not AdamW"):
        step_bucket_by_bucket(torch.optim.AdamW([torch.zeros(1)]), FakeOffload(calls))


@pytest.mark.parametrize("streams", [False, True])
def test_a_streamed_state_comes_back_for_a_checkpoint_alone(tiny_nemo, monkeypatch, calls, streams):
    actor = load_actor(tiny_nemo, rs={"training.stream_adam_states": streams}, micro_batch_size=1, global_batch_size=1)
    monkeypatch.setattr(actor, "_optimizer_offload", FakeOffload(calls))
    monkeypatch.setattr(actor, "_offloads", lambda: True)
    monkeypatch.setattr("nemo_aligner.models.nlp.gpt.megatron_gpt_rs_actor.grad_reductions", lambda model: None)
    actor.prepare_for_inference()
    actor.prefetch_adam_states()
    actor.finish_inference()
    actor.prepare_for_training()
    actor.finish_training_step()
    assert calls[0] == "leave" and set(calls[1:]) == {"leave" if streams else "come back"}
    calls.clear()
    actor.onload_adam_states()  # as a save does
    assert calls == (["come back"] if streams else [])
