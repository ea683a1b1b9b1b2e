"""The engine with pipeline stages, over gloo, draws the same tokens as one process."""

from unittest import mock

import pytest
from megatron.core import parallel_state

from nemo_aligner.generation import engine, kv_cache, lane
from nemo_aligner.generation.invalid_logits import INVALID_TOKEN
from nemo_aligner.generation.rollouts import GenerationSettings
from nemo_aligner.generation.rows import DeviceRows
from tests.distributed.launch import run_ranks
from tests.distributed.test_pipelined_decoding import (
    MAX_LENGTH,
    Layout,
    batch_of,
    load,
    num_stuck,
    prompts_of,
    recorded_exchanges,
    rollouts_of,
)

OF_TWO = {"PP=2": Layout(pp=2)}
OF_FOUR = {"PP=4": Layout(pp=4), "TP=2 PP=2": Layout(tp=2, pp=2)}


class WatchedLane(lane.Lane):
    most_in_flight = 0

    def plan(self, *args):
        turn = super().plan(*args)
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        return turn


class LaneAhead(WatchedLane):
    """A lane whose host lags one turn behind, as it does with a GPU."""

    def __init__(self, *args):
        super().__init__(*args)
        self._snapshots_behind = 1

    def _max_context(self):
        return self._cache.capacity


def with_engine(actor, max_rows: int = 256):
    actor._rollout_generator.release()
    actor._rollout_generator._engine = None
    actor._rollout_generator._settings = GenerationSettings("engine", max_rows)
    return actor


def rollouts_with_slots_for(actor, max_rows: int) -> dict:
    """Rollouts where rows wait for slots, few prompts are prefilled at once, and the host lags behind."""
    with mock.patch.object(lane, "MAX_PROMPTS_PER_PREFILL", 2), mock.patch.object(engine, "Lane", LaneAhead):
        return rollouts_of(with_engine(actor, max_rows))


def rows_in_lanes(actor, num_prompts: int, num_rollouts: int) -> list[int]:
    """Most rows in flight in each lane for a batch of this size that follows a larger one."""
    prompts = prompts_of(num_prompts, actor.tokenizer.eos_id)
    with mock.patch.object(engine, "Lane", WatchedLane):
        with_engine(actor).infer(batch_of(actor, [[7, 8]] * 20))
        lanes = actor._rollout_generator._engine.lanes
        for each in lanes:
            each.most_in_flight = 0
        actor.infer(batch_of(actor, [prompt for prompt in prompts for _ in range(num_rollouts)]))
    return [each.most_in_flight for each in lanes]


def slots_in_lanes(actor) -> tuple[list[int], float]:
    """Slots in each lane when memory limits them, and the share of the memory that they use."""
    memory, lanes = 2**20, []

    def usable_memory(device) -> float:
        caches = [cache for each in lanes for cache in (each._cache, each._prompts) if cache is not None]
        return kv_cache.USABLE_SHARE * (memory - sum(cache.num_bytes for cache in caches))

    def noted_lane(*args):
        lanes.append(lane.Lane(*args))
        return lanes[-1]

    with mock.patch.object(lane, "usable_memory", usable_memory), mock.patch.object(engine, "Lane", noted_lane):
        with_engine(actor).infer(batch_of(actor, [[7, 8]] * 200))
    return [each._cache.num_rows for each in lanes], 1 - usable_memory(None) / kv_cache.USABLE_SHARE / memory


def error_of(actor) -> str:
    draw = DeviceRows.sample

    def spoiling(self, logits_BV, max_context):
        sampled_B = draw(self, logits_BV, max_context)
        is_invalid_B = self.position_R[: len(sampled_B)] == 13  # token 9 of the rows with prompts of five tokens
        return sampled_B.masked_fill(is_invalid_B, INVALID_TOKEN)

    prompts = [[5 + row] * (12 if row % 2 else 5) for row in range(8)]
    with (
        mock.patch.object(DeviceRows, "sample", spoiling),
        mock.patch.dict(actor._length_params, min_length=MAX_LENGTH),
        pytest.raises(FloatingPointError) as error,
    ):
        with_engine(actor).infer(batch_of(actor, prompts))
    return str(error.value)


def run_layouts(rank: int, archive: str, world_size: int, layouts: dict[str, Layout]) -> dict[str, dict]:
    outcomes = {}
    for name, layout in layouts.items():
        parallel_state.initialize_model_parallel(layout.tp, layout.pp, layout.virtual)
        actor = load(archive, layout, world_size)
        with recorded_exchanges() as exchanges:
            rollouts = rollouts_of(with_engine(actor))
            few = rollouts_with_slots_for(actor, 4)
        outcomes[name] = {
            "rollouts": rollouts, "few": few, "exchanges": exchanges, "error": error_of(actor),
            "rows in lanes": [rows_in_lanes(actor, *shape) for shape in ((8, 1), (2, 4), (1, 8))],
            "slots in lanes": slots_in_lanes(actor),
            "is engine": actor._rollout_generator._engine is not None,
        }  # fmt: skip
        parallel_state.destroy_model_parallel()
    return outcomes


@pytest.fixture(scope="module")
def of_one(tiny_nemo):
    actor = load(str(tiny_nemo), Layout(), 1)
    return rollouts_of(with_engine(actor)), error_of(actor)


@pytest.fixture(scope="module")
def of_two(tiny_nemo):
    return run_ranks(run_layouts, 2, str(tiny_nemo), 2, OF_TWO)


@pytest.fixture(scope="module")
def of_four(tiny_nemo):
    return run_ranks(run_layouts, 4, str(tiny_nemo), 4, OF_FOUR)


@pytest.mark.parametrize("name", OF_TWO)
def test_two_processes_decode_as_one(of_one, of_two, name):
    check(OF_TWO[name], [outcomes[name] for outcomes in of_two], of_one)


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_decode_as_one(of_one, of_four, name):
    check(OF_FOUR[name], [outcomes[name] for outcomes in of_four], of_one)


def check(layout: Layout, outcomes: list[dict], of_one: tuple[dict, str]) -> None:
    rollouts, error = of_one
    exchanges = [outcome["exchanges"] for outcome in outcomes]
    assert sum(map(len, exchanges)) > 4 * MAX_LENGTH and num_stuck(exchanges) == 0
    for outcome in outcomes:
        assert outcome["is engine"]
        assert outcome["rollouts"] == rollouts == outcome["few"]
        assert outcome["error"] == error
        slots, share = outcome["slots in lanes"]
        assert 1 < max(slots) <= min(slots) + 1 < 200 // layout.pp and 0.75 < share <= 0.85
        assert outcome["rows in lanes"] == [[8 // layout.pp] * layout.pp] * 3
