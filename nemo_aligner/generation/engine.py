"""Generation engine with continuous batching, on the weights of a live GPT model.

A lane does the following in its turns:

1. Prefill the next prompts in one pass into a prompt store, each prompt once, however many rollouts it has.
2. Admit rows by copying their prompt's keys and values from the store into a KV cache slot.
3. Decode all rows in flight, one token each per step.
4. Retire finished rows. Waiting rows take their slots, or the last rows in flight are moved to close the gaps, so that
   the cost of a step follows the number of rows in flight.

With pipeline parallelism the rows are split over as many lanes as there are stages. In each tick a stage runs one
lane's turn, one tick after the previous stage:

    tick      0   1   2   3   4   5
    stage 0   0   1   2   0   1   2         lanes
    stage 1       0   1   2   0   1
    stage 2           0   1   2   0

All stages plan the same turns in the same order. At the start of a tick each sends the outputs of its previous tick, in
one batch of sends and receives; at the end the last stage broadcasts the tokens it sampled. The order is the same on
all ranks, as in `stages`. Every stage then yields the rows that finished in the turn the last stage has just run: the
same rows in the same tick on all ranks, with no rank waiting for another, so the consumer may run a collective over all
of them.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import count, groupby

import torch

from nemo_aligner.generation.ends import EndStrings
from nemo_aligner.generation.invalid_logits import InvalidLogitsError
from nemo_aligner.generation.kv_cache import USABLE_SHARE
from nemo_aligner.generation.lane import Lane, Prompt, Turn
from nemo_aligner.generation.rows import Decoding, Row
from nemo_aligner.generation.stages import Pipeline

# 64 tokens of each row on one GPU, otherwise 32: well below the half minute that schedulers wait after SIGTERM.
TURNS_BETWEEN_CHECKS = 32


class Engine:
    """Decodes rows with the parameters of `model`, a stage's `GPTModel` that passes `unsupported_by_engine`.

    Args:
        max_rows: maximum number of rows in flight; lowered if memory is short.
    """

    def __init__(self, model: torch.nn.Module, max_rows: int):
        self._pipeline = Pipeline([model])
        num_stages = self._pipeline.num_stages
        self._hidden_size = model.config.hidden_size
        self._dtype = next(model.parameters()).dtype
        self.lanes = [Lane(model, -(-max_rows // num_stages), num_stages) for _ in range(num_stages)]

    @torch.no_grad()
    def generate(
        self,
        rows: list[Row],
        decoding: Decoding,
        end_strings: EndStrings,
        check: Callable[[], object] | None = None,
        on_last_rows: Callable[[], object] | None = None,
    ) -> Iterator[Row]:
        """Decode all `rows`, admitted in order; yields each row as it finishes.

        All ranks of a replica call it together with the same rows, and run the same steps.

        Args:
            check: called every TURNS_BETWEEN_CHECKS turns, between the same steps on all ranks, so it may run a
                collective. An exception it raises ends generation.
            on_last_rows: called at most once, when no row is waiting and at most half of the slots are occupied.

        Raises:
            InvalidLogitsError: on all ranks, when the logits of a row in flight are NaN or infinite.
            torch.OutOfMemoryError: on all ranks, when there is no memory for the keys and values of a single row.
        """
        waiting = deque(Prompt(deque(same)) for _, same in groupby(rows, key=lambda row: row.prompt))
        lanes, num_stages, stage = self.lanes, len(self.lanes), self._pipeline.stage
        for number, lane in enumerate(lanes):
            share = 1 / (num_stages - USABLE_SHARE * number)  # of what earlier lanes left free: equal for all lanes
            lane.begin(-(-len(rows) // num_stages), waiting, decoding, share)
        turns: deque[tuple[Lane, Turn]] = deque(maxlen=num_stages)  # the last stage may still be at the oldest
        messages, num_idle, error = [], 0, None
        for tick in count():
            turn = None
            if tick >= stage:
                lane = lanes[(tick - stage) % num_stages]
                try:
                    turn = lane.plan(waiting, end_strings)
                except InvalidLogitsError as first:  # the other stages must reach the same turn
                    error, turn = error or first, Turn()
                    waiting.clear()
                    for each in lanes:
                        each.give_up()
                turns.append((lane, turn))
                are_last = not waiting and all(each.is_at_most_half_full for each in lanes)
                if on_last_rows is not None and are_last:
                    on_last_rows()
                    on_last_rows = None
                num_idle = num_idle + 1 if turn.is_idle and not lane.in_flight else 0
            if check is not None and tick > 0 and tick % (TURNS_BETWEEN_CHECKS * num_stages) == 0:
                check()
            if num_stages > 1:
                messages = self._exchange(messages, turn)
            if turn is not None:
                messages = lane.run(turn, messages)
            if tick >= num_stages - 1:
                yield from self._end_tick(*turns[-(num_stages - stage)])
            if num_idle >= num_stages + (num_stages - 1 - stage):
                break
        if error is not None:
            raise error

    def release(self) -> None:
        """Free the memory of the KV caches."""
        for lane in self.lanes:
            lane.release()

    def _exchange(self, outputs: list[torch.Tensor], turn: Turn | None) -> list[torch.Tensor]:
        """Send the outputs of the previous tick, and receive the inputs of this tick's turn."""
        sizes = [] if turn is None or self._pipeline.stage == 0 else turn.sizes_of_messages()
        return self._pipeline.exchange(outputs, [(size, self._hidden_size) for size in sizes], self._dtype)

    def _end_tick(self, lane: Lane, turn: Turn) -> list[Row]:
        """Broadcast the tokens that the last stage sampled in its turn; returns the rows that finished in that turn."""
        if len(self.lanes) > 1 and turn.num_rows:
            under_way = self._pipeline.broadcast(lane.sampled(turn))
            under_way.wait()
            lane.advance(turn)
        return turn.finished
