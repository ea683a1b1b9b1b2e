"""Pipeline schedule for generation, virtual stages included, and communication between stages.

Rows are split into as many groups as there are stages. In every tick each stage has one turn: one of its model chunks
applied to one group. It iterates over the groups, then over its chunks, then over positions. Each stage is one tick
behind the previous one. With three stages (numbers are groups, a prime marks the next position):

    tick      0   1   2   3   4   5
    stage 0   0   1   2   0'  1'  2'
    stage 1       0   1   2   0'  1'
    stage 2           0   1   2   0'

So a stage's output in one tick is the input of the next stage in the next tick (after the last stage: of the first
stage's next chunk), and a group's tokens are sampled in the tick before the first stage needs them.

Stages communicate only at the end of a tick: first all exchange their outputs in one batch of sends and receives, then
the last stage broadcasts the tokens. The order is the same on all ranks, so there is no deadlock, even where a
communicator runs one operation after another, as NCCL's do.
"""

import contextlib
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import distributed

from nemo_aligner.compat.device import current_device


class ScheduleSlot(NamedTuple):
    """Index of the group, and of the chunk within this stage (0 without virtual stages)."""

    group: int
    chunk: int


class Pipeline:
    """This rank's pipeline stage, and its model `chunks` in order: one without virtual stages."""

    def __init__(self, chunks: list[torch.nn.Module]):
        self._chunks = chunks
        self._config = get_model_config(chunks[0])
        self.stage = parallel_state.get_pipeline_model_parallel_rank()
        self.num_stages = parallel_state.get_pipeline_model_parallel_world_size()
        self._sends: list[distributed.Work] = []
        if self.num_stages > 1:
            # NCCL connects a group in its first communication, which all ranks must join; not all join the first tick's
            distributed.barrier(group=parallel_state.get_pipeline_model_parallel_group())

    @property
    def num_chunks(self) -> int:
        return len(self._chunks)

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def ticks_per_position(self) -> int:
        return self.num_stages * self.num_chunks

    def turn(self, tick: int) -> ScheduleSlot | None:
        """This stage's turn; None until the first group can have reached it."""
        return self._turn(tick - self.stage)

    def sampling_group(self, tick: int) -> int | None:
        """The group whose tokens the last stage samples in this tick; the same on all stages."""
        turn = self._turn(tick - (self.num_stages - 1))
        return turn.group if turn is not None and turn.chunk == self.num_chunks - 1 else None

    def begins_with_hidden_states(self, turn: ScheduleSlot) -> bool:
        """Whether the input of `turn` is the previous stage's output, and not tokens."""
        return self.stage > 0 or turn.chunk > 0

    def run(self, chunk: int, hidden: torch.Tensor | None, inputs: tuple, **options) -> torch.Tensor:
        """The output of a chunk called with `inputs` and `options`; all but the model's first chunk take `hidden`."""
        if self.num_chunks > 1:
            parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
        get_attr_wrapped_model(self._chunks[chunk], "set_input_tensor")(hidden)
        autocast = contextlib.nullcontext()
        if self._config.enable_autocast:
            autocast = torch.autocast("cuda", dtype=self._config.autocast_dtype)
        with autocast:
            return self._chunks[chunk](*inputs, **options)

    def send_recv(self, output: torch.Tensor | None, received_shape: tuple[int, int] | None) -> torch.Tensor | None:
        """Send this tick's output to the next stage, and return this stage's input for the next tick.

        Args:
            output: None if there is nothing for another stage.
            received_shape: positions and rows of the hidden states to be received; None if none are sent.
        """
        dtype = self._config.pipeline_dtype  # in which outputs are received
        outputs = [] if output is None else [output.to(dtype)]
        shapes = [] if received_shape is None else [(*received_shape, self._config.hidden_size)]
        received = self.exchange(outputs, shapes, dtype)
        return received[0] if received else None

    def exchange(
        self, outputs: list[torch.Tensor], received_shapes: list[tuple[int, ...]], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """Send `outputs` to the next stage and return what is received from the previous one, in one batch."""
        group = parallel_state.get_pipeline_model_parallel_group()
        previous_rank = parallel_state.get_pipeline_model_parallel_prev_rank()
        next_rank = parallel_state.get_pipeline_model_parallel_next_rank()
        received = [torch.empty(shape, dtype=dtype, device=current_device()) for shape in received_shapes]
        messages = [distributed.P2POp(distributed.isend, output, next_rank, group) for output in outputs]
        messages += [distributed.P2POp(distributed.irecv, tensor, previous_rank, group) for tensor in received]
        under_way = distributed.batch_isend_irecv(messages) if messages else []
        for _ in received[: len(under_way)]:
            under_way.pop().wait()  # receives come last; NCCL returns a single handle for the batch
        # Sends are waited for only in the next tick: the receiving stage may still be computing.
        for send in self._sends:
            send.wait()
        self._sends = under_way
        return received

    def broadcast(self, tensor: torch.Tensor) -> distributed.Work | None:
        """Start broadcasting the last stage's contiguous tensor into `tensor`; None if there is only one stage."""
        if self.num_stages == 1:
            return None
        return distributed.broadcast(
            tensor,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
            async_op=True,
        )

    def _turn(self, number: int) -> ScheduleSlot | None:
        if number < 0:
            return None
        return ScheduleSlot(number % self.num_stages, number // self.num_stages % self.num_chunks)
