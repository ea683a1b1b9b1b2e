"""Pipeline stages decode groups of rows in turn, over gloo, and draw the same tokens as one process.

Each launch of processes runs several layouts in turn, because importing NeMo takes longer than running a tiny model.
"""

import contextlib
import datetime
import os
import signal
import string
from collections import Counter, deque
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state

from nemo_aligner.generation import decode
from nemo_aligner.generation import rollouts as rollouts_module
from nemo_aligner.generation.invalid_logits import INVALID_TOKEN
from nemo_aligner.generation.rollouts import GenerationSettings
from nemo_aligner.generation.stages import Pipeline
from nemo_aligner.utils.termination import StopRequested, TerminationWatch
from tests.distributed.launch import run_ranks
from tests.tiny import load_actor, prompt_batch

MAX_LENGTH = 20
# single tokens that end a row: enough of the 320 for responses of all lengths
END_STRINGS = ["<|endoftext|>", *string.ascii_lowercase]
LENGTHS = [9, 3, 17, 1, 4, 12, 6, 2, 5, 3, 8]
NUM_CHECKS_BEFORE_SIGNAL = 7


@dataclass
class Layout:
    tp: int = 1
    pp: int = 1
    virtual: int | None = None
    overrides: dict = field(default_factory=dict)

    @property
    def ticks_per_position(self) -> int:
        return self.pp * (self.virtual or 1)


RESETS = {"data.reset_attention_mask": True, "data.reset_position_ids": True}
OF_TWO = {
    "PP=2": Layout(pp=2),
    "PP=2 VPP=2": Layout(pp=2, virtual=2),
}
OF_FOUR = {
    "PP=4": Layout(pp=4),
    "PP=4 resets": Layout(pp=4, overrides=RESETS),
    "TP=2 PP=2": Layout(tp=2, pp=2),
    "TP=2 PP=2 VPP=2": Layout(tp=2, pp=2, virtual=2),
}


def prompts_of(num_rows: int, eod_id: int) -> list[list[int]]:
    """Prompts of different lengths, with an end-of-text id inside the longer ones."""
    generator = torch.Generator().manual_seed(3)
    prompts = []
    for length in LENGTHS[:num_rows]:
        prompts.append(torch.randint(1, 300, (length,), generator=generator).tolist())
        prompts[-1][4:5] = [eod_id] * (length > 5) or prompts[-1][4:5]
    return prompts


def load(archive: str, layout: Layout, world_size: int):
    actor = load_actor(
        archive, world_size, rs={"length_params.max_length": MAX_LENGTH, "sampling_params.temperature": 3.0},
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.virtual, micro_batch_size=1, global_batch_size=4,
        **layout.overrides,
    )  # fmt: skip
    actor._rollout_generator._settings = GenerationSettings("nemo")
    actor.prepare_for_inference()
    return actor


def batch_of(actor, prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    actor.seed_sampling(1)
    return prompt_batch(prompts, actor.tokenizer.eos_id, MAX_LENGTH)


@contextlib.contextmanager
def recorded_exchanges():
    """This rank's exchanges, in order: sets of those started together, each as (kind, ranks, running number)."""
    exchanges, counts = [], Counter()
    batch, broadcast, barrier = (
        getattr(torch.distributed, name) for name in ("batch_isend_irecv", "broadcast", "barrier")
    )
    rank = torch.distributed.get_rank()

    def begin(what: str, *ranks: int) -> tuple:
        counts[what, ranks] += 1
        return what, ranks, counts[what, ranks]

    def recording_batch(messages):
        is_send = [message.op is torch.distributed.isend for message in messages]
        ends = [(rank, m.peer) if sends else (m.peer, rank) for m, sends in zip(messages, is_send, strict=True)]
        exchanges.append({begin("message", *pair) for pair in ends})
        return batch(messages)

    def recording_broadcast(*args, **options):
        exchanges.append({begin("broadcast", *torch.distributed.get_process_group_ranks(options["group"]))})
        return broadcast(*args, **options)

    def recording_barrier(group=None):
        exchanges.append({begin("barrier", *torch.distributed.get_process_group_ranks(group))})
        return barrier(group)

    with (
        mock.patch.object(torch.distributed, "barrier", recording_barrier),
        mock.patch.object(torch.distributed, "batch_isend_irecv", recording_batch),
        mock.patch.object(torch.distributed, "broadcast", recording_broadcast),
    ):
        yield exchanges


def num_stuck(exchanges_of_ranks: list[list[set]]) -> int:
    """Number of exchanges that never complete if each rank handles its own in order and each needs all its ranks.

    NCCL's communicators work like this: a send completes together with its receive.
    """
    queues, met = [deque(exchanges) for exchanges in exchanges_of_ranks], set()
    while True:
        heads = [queue[0] if queue else set() for queue in queues]
        met |= {one for head in heads for one in head if all(one in heads[rank] for rank in one[1])}
        ended = [queue.popleft() for queue in queues if queue and queue[0] <= met]
        if not ended:
            return sum(map(len, queues))


def rollouts_of(actor) -> dict[str, dict[str, list]]:
    """Rollouts of ragged rows ending at different times, of fewer rows than stages, and with a repetition penalty."""
    settings = {
        "eleven rows": (11, {"use_greedy": False, "end_strings": END_STRINGS}),
        "three rows": (3, {"use_greedy": False, "end_strings": END_STRINGS}),
        "one row": (1, {"use_greedy": False, "end_strings": END_STRINGS}),
        "greedy": (5, {"use_greedy": True, "end_strings": [], "repetition_penalty": 1.5}),
    }
    found = {}
    for name, (num_rows, sampling) in settings.items():
        with mock.patch.dict(actor._sampling_params, sampling):
            rollouts = actor.infer(batch_of(actor, prompts_of(num_rows, actor.tokenizer.eos_id)))
        found[name] = {key: value.tolist() for key, value in rollouts.items()}
    with mock.patch.dict(actor._sampling_params, sampling):
        batches = [batch_of(actor, prompts_of(num_rows, actor.tokenizer.eos_id)) for num_rows in (2, 7, 4, 1, 6)]
        for number, rollouts in enumerate(actor.infer_each(batches)):
            torch.distributed.barrier()  # the trainer also synchronizes with the other ranks between batches
            found[f"batch {number}"] = {key: value.tolist() for key, value in rollouts.items()}
    return found


def error_of(actor) -> str:
    """The error when rows of several groups fail: by ticks an even row fails first, by position an odd one."""
    prompts = [[5 + row] * (1 if row % 2 else 12) for row in range(8)]
    uniform_BL = actor._random_streams(batch_of(actor, prompts), MAX_LENGTH)
    is_invalid = uniform_BL[[0, 4, 3, 7, 5], [0, 0, 9, 8, 8]]

    def spoiling(logits_BV, previous_BT, params, uniform_B):
        sampled_B = sample(logits_BV, previous_BT, params, uniform_B)
        return sampled_B.masked_fill(torch.isin(uniform_B, is_invalid), INVALID_TOKEN)

    sample = decode.sample
    with (
        mock.patch.object(decode, "sample", spoiling),
        mock.patch.dict(actor._length_params, min_length=MAX_LENGTH),
        pytest.raises(FloatingPointError) as error,
    ):
        actor.infer(batch_of(actor, prompts))
    return str(error.value)


def ticks_and_turns(actor, layout: Layout) -> tuple[int, int]:
    """Number of ticks and of turns until one batch per stage has all its tokens.

    At regular intervals a barrier keeps every stage from finishing its turn until all of them have begun theirs.
    """
    ticks, turns, pass_on, forward = [], [], Pipeline.send_recv, decode._Group.forward

    def counting(self, *args):
        ticks.append(None)
        return pass_on(self, *args)

    def meeting(self, *args):
        if len(ticks) % layout.ticks_per_position == layout.pp - 1:
            torch.distributed.monitored_barrier(timeout=datetime.timedelta(seconds=60))
        turns.append(None)
        return forward(self, *args)

    with (
        mock.patch.object(Pipeline, "send_recv", counting),
        mock.patch.object(decode._Group, "forward", meeting),
        mock.patch.dict(actor._length_params, min_length=MAX_LENGTH),
    ):
        list(actor.infer_each([batch_of(actor, [[5, 6, 7]] * 8)] * layout.pp))
    return len(ticks), len(turns)


def sizes_of_groups(actor, layout: Layout, memory: int) -> set[int]:
    """Numbers of rows in the groups of one batch of `pp` rows per stage, with room for `memory` tokens."""
    sizes, init = set(), decode._Group.__init__

    def noting(self, model, strategy, prompts_RP, *args):
        sizes.add(prompts_RP.size(0))
        init(self, model, strategy, prompts_RP, *args)

    config, layers = actor.cfg, actor.cfg.num_layers // layout.pp
    bytes_per_token = 2 * layers * (config.num_query_groups // layout.tp) * config.kv_channels * 4
    vocabulary = config.get("override_vocab_size", actor.padded_vocab_size) // layout.tp
    logits = layout.pp * 3 * vocabulary * 4  # of a group's prompts, [5, 6, 7]
    batch = batch_of(actor, [[5, 6, 7]] * layout.pp)
    with (
        mock.patch.object(decode._Group, "__init__", noting),
        mock.patch.object(rollouts_module, "usable_memory", lambda device: memory * bytes_per_token + logits),
    ):
        list(actor.infer_each([batch] * layout.pp))
    return sizes


def checks_of(actor, is_asked: bool) -> tuple[int, int, int]:
    """Number of checks until two batches are complete, and until SIGTERM stops them; batches complete by then."""
    batch = batch_of(actor, prompts_of(7, actor.tokenizer.eos_id))
    num_checks, num_complete, watch = [], 0, TerminationWatch()

    def check():
        num_checks.append(None)
        watch.sync(is_done=False)

    def check_when_asked():
        if is_asked and len(num_checks) == NUM_CHECKS_BEFORE_SIGNAL:
            os.kill(os.getpid(), signal.SIGTERM)
        check()

    with mock.patch.object(decode, "TURNS_BETWEEN_CHECKS", 2), watch.watching():
        list(actor.infer_each([batch, batch], check))
        num_undisturbed = len(num_checks)
        num_checks.clear()
        with pytest.raises(StopRequested):
            for _ in actor.infer_each([batch, batch], check_when_asked):
                num_complete += 1
    return num_undisturbed, len(num_checks), num_complete


def run_layouts(rank: int, archive: str, world_size: int, layouts: dict[str, Layout]) -> dict[str, dict]:
    outcomes = {}
    for name, layout in layouts.items():
        parallel_state.initialize_model_parallel(layout.tp, layout.pp, layout.virtual)
        actor = load(archive, layout, world_size)
        with recorded_exchanges() as exchanges:
            rollouts = rollouts_of(actor)
        outcomes[name] = {
            "rollouts": rollouts,
            "exchanges": exchanges,
            "error": error_of(actor),
            "ticks and turns": ticks_and_turns(actor, layout),
            "sizes": [
                sizes_of_groups(actor, layout, memory if rank == 1 else 10**6)
                for memory in (0, layout.pp * layout.pp * (3 + MAX_LENGTH) - 1, 10**6)
            ],
            "checks": checks_of(actor, is_asked=rank == 1),
        }
        parallel_state.destroy_model_parallel()
    return outcomes


@pytest.fixture(scope="module")
def of_one(tiny_nemo):
    """One process's rollouts and error, without and with resets; rollouts come from the engine where it can."""
    plain, resetting = (load(str(tiny_nemo), Layout(overrides=overrides), 1) for overrides in ({}, RESETS))
    errors = error_of(plain), error_of(resetting)
    plain._rollout_generator._settings = GenerationSettings("engine")
    return {False: (rollouts_of(plain), errors[0]), True: (rollouts_of(resetting), errors[1])}


@pytest.fixture(scope="module")
def of_two(tiny_nemo):
    return run_ranks(run_layouts, 2, str(tiny_nemo), 2, OF_TWO)


@pytest.fixture(scope="module")
def of_four(tiny_nemo):
    return run_ranks(run_layouts, 4, str(tiny_nemo), 4, OF_FOUR)


def test_the_rows_of_these_tests_end_at_very_different_times(of_one):
    for rollouts, error in of_one.values():
        eleven = rollouts["eleven rows"]
        lengths = torch.tensor(eleven["response_lengths"]) - torch.tensor(eleven["prompt_lengths"])
        assert lengths.min() <= 3 and lengths.max() == MAX_LENGTH and lengths.unique().numel() >= 5
        assert "token 9 of a response to" in error
    assert of_one[False][0] != of_one[True][0]


@pytest.mark.parametrize("name", OF_TWO)
def test_two_processes_decode_as_one(of_one, of_two, name):
    check(OF_TWO[name], [outcomes[name] for outcomes in of_two], of_one)


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_decode_as_one(of_one, of_four, name):
    check(OF_FOUR[name], [outcomes[name] for outcomes in of_four], of_one)


def check(layout: Layout, outcomes: list[dict], of_one: dict) -> None:
    rollouts, error = of_one[bool(layout.overrides)]
    exchanges = [outcome["exchanges"] for outcome in outcomes]
    assert sum(map(len, exchanges)) > 4 * MAX_LENGTH and num_stuck(exchanges) == 0
    for outcome in outcomes:
        assert outcome["rollouts"] == rollouts
        assert outcome["error"] == error
        num_ticks, num_turns = outcome["ticks and turns"]
        assert num_turns == MAX_LENGTH * layout.ticks_per_position
        assert num_ticks - num_turns == 2 * (layout.pp - 1)  # while the pipeline fills and drains
        # groups of one row with no room to spare, then of all rows of a batch but one, then of all
        assert outcome["sizes"][0] == {1} and max(outcome["sizes"][1]) == layout.pp - 1
        assert outcome["sizes"][2] == {layout.pp}
        assert outcome["checks"] == outcomes[0]["checks"]
    num_undisturbed, num_checks, num_complete = outcomes[0]["checks"]
    assert num_checks == NUM_CHECKS_BEFORE_SIGNAL + 1 < num_undisturbed and num_complete == 0
