"""Generate responses with the weights of a live GPT model: rows join, are decoded side by side, and leave.

What happens, in order: the next prompts are prefilled in one pass into a store, each once, however many rollouts it is
to have; rows join by copying their prompt's keys and values from there into a slot of the cache; all rows in flight
are decoded, one token each per step; rows that have ended leave, and waiting ones take their slots, or the last rows
in flight close the gaps, so that a step costs what its rows cost. That is what a lane does in its turns.

With pipeline stages rows are in as many lanes as there are stages, which take turns; in each tick a stage has one, a
tick behind the stage before:

    tick      0   1   2   3   4   5
    stage 0   0   1   2   0   1   2         lanes
    stage 1       0   1   2   0   1
    stage 2           0   1   2   0

All stages plan the same turns in the same order. At the beginning of a tick they send on what they have put out in the
one before, in one batch of sends and receives; at its end the last one spreads the tokens that it has drawn: one order
for all ranks, as in `stages`. Behind that they let out the rows that left in the turn in which the last stage is: the
same ones in the same tick, when nobody waits for anybody, as whoever gets them may hold a collective over all ranks.
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

# 64 tokens of each row on one GPU, otherwise 32: well below the half minute that schedulers wait behind SIGTERM.
TURNS_BETWEEN_CHECKS = 32


class Engine:
    """Decodes rows with the parameters of `model`, a stage's `GPTModel` without an `unsupported_by_engine` part.

    Args:
        max_rows: rows in flight at most; memory may lower it.
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
        """Continue all `rows`, of which the first join first; yields each as it finishes.

        All ranks of a replica call it together with the same rows, and take the same steps.

        Args:
            check: called every TURNS_BETWEEN_CHECKS turns, between the same steps on all of them: it may hold a
                collective. What it raises ends the generation.
            on_last_rows: called at most once, when no row waits any more and at most half of the slots are taken.

        Raises:
            InvalidLogitsError: on all of them, when the logits of a row in flight are NaN or infinite.
            torch.OutOfMemoryError: on all of them, when there is no memory for the keys and values of a single row.
        """
        waiting = deque(Prompt(deque(same)) for _, same in groupby(rows, key=lambda row: row.prompt))
        lanes, num_stages, stage = self.lanes, len(self.lanes), self._pipeline.stage
        for number, lane in enumerate(lanes):
            share = 1 / (num_stages - USABLE_SHARE * number)  # of what the lanes before have left: the same for all
            lane.begin(-(-len(rows) // num_stages), waiting, decoding, share)
        turns: deque[tuple[Lane, Turn]] = deque(maxlen=num_stages)  # of which the last stage may be at the first
        messages, num_idle, error = [], 0, None
        for tick in count():
            turn = None
            if tick >= stage:
                lane = lanes[(tick - stage) % num_stages]
                try:
                    turn = lane.plan(waiting, end_strings)
                except InvalidLogitsError as first:  # the others have to come to the same turn
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
        """Give the memory of keys and values back."""
        for lane in self.lanes:
            lane.release()

    def _exchange(self, outputs: list[torch.Tensor], turn: Turn | None) -> list[torch.Tensor]:
        """Send what the last tick has put out, and receive what this one's turn works on."""
        sizes = [] if turn is None or self._pipeline.stage == 0 else turn.sizes_of_messages()
        return self._pipeline.exchange(outputs, [(size, self._hidden_size) for size in sizes], self._dtype)

    def _end_tick(self, lane: Lane, turn: Turn) -> list[Row]:
        """Let what the last stage has drawn in its turn come to all stages; returns the rows that left in it."""
        if len(self.lanes) > 1 and turn.num_rows:
            under_way = self._pipeline.broadcast(lane.sampled(turn))
            under_way.wait()
            lane.advance(turn)
        return turn.finished
