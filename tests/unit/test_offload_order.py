"""The order of copies between GPU and host, checked without a GPU: no two may access the same memory unordered.

Streams are simulated by vector clocks (Mattern 1989): every launch gets a time on its stream, and a stream knows only
those launches of another that it has waited for. Two accesses are a race if neither knows of the other and one is a
write, whatever order they happen to run in.
"""

import contextlib
import random
from types import SimpleNamespace

import pytest
import torch

from nemo_aligner.utils import optimizer_offload
from nemo_aligner.utils.optimizer_offload import OptimizerOffload

NUM_GROUPS, TENSORS_PER_GROUP = 9, 2


class Clock:
    """A stream, or an event: what its stream knew when the event was recorded."""

    def __init__(self, known=()):
        self.known = dict(known)

    def wait_stream(self, other):
        for stream, time in other.known.items():
            self.known[stream] = max(time, self.known.get(stream, 0))

    wait_event = wait_stream

    def record_event(self):
        return Clock(self.known)


class Machine:
    """Records which memory each launch accessed, and which accesses race."""

    def __init__(self, choose: random.Random):
        self.main, self.host, self.choose = Clock(), Clock(), choose
        self.accesses, self.races = {}, []
        self.let_go = []  # (block, the events after which the allocator may reuse it)
        self.num_blocks = 0

    def launch(self, stream: Clock, memory, is_write: bool) -> None:
        stream.wait_stream(self.host)  # a launch comes after everything that the host has waited for
        stream.known[stream] = stream.known.get(stream, 0) + 1
        for other, time, was_write in self.accesses.setdefault(memory, []):
            if (is_write or was_write) and stream.known.get(other, 0) < time:
                self.races.append(memory)
        self.accesses[memory].append((stream, stream.known[stream], is_write))

    def new_block(self):
        """New memory, or a released block, whose events the allocator checks before it reuses the block."""
        if self.let_go and self.choose.random() < 0.7:
            block, events = self.let_go.pop(self.choose.randrange(len(self.let_go)))
            for event in events:
                self.host.wait_stream(event)
            return block
        self.num_blocks += 1
        return ("block", self.num_blocks)

    def others_use_the_gpu(self) -> None:
        block = self.new_block()
        self.launch(self.main, block, is_write=True)
        self.let_go.append((block, []))


class Storage:
    """A tensor's memory; its value is a number."""

    def __init__(self, machine: Machine, number: int):
        self.machine, self._cdata, self.value = machine, number, 0
        self.block, self.readers = machine.new_block(), []
        self.host_copy = SimpleNamespace(value=None, name=("host", number))

    def nbytes(self):
        return 0 if self.block is None else 1

    def data_ptr(self):
        return self._cdata

    def resize_(self, size):
        if size == 0 and self.block is not None:
            self.machine.let_go.append((self.block, [reader.record_event() for reader in self.readers]))
            self.block, self.value, self.readers = None, None, []
        elif size > 0 and self.block is None:
            self.block = self.machine.new_block()

    def record_stream(self, stream):
        self.readers.append(stream)


class CopyStream:
    def __init__(self, machine: Machine):
        self.machine, self.stream = machine, Clock()

    def wait_for(self, stream):
        self.stream.wait_stream(stream)

    def copy(self, target, source):
        def memory(side):
            return side.block if isinstance(side, Storage) else side.name

        self.machine.launch(self.stream, memory(source), is_write=False)
        self.machine.launch(self.stream, memory(target), is_write=True)
        target.value = source.value


class Run:
    """An offload of fake tensors, with the values that they must have."""

    def __init__(self, machine: Machine):
        self.machine = machine
        numbers = iter(range(NUM_GROUPS * TENSORS_PER_GROUP))
        self.groups = {
            key: [Storage(machine, next(numbers)) for _ in range(TENSORS_PER_GROUP)] for key in range(NUM_GROUPS)
        }
        self.expected = dict.fromkeys(self.groups, 0)
        self.offload = OptimizerOffload(lambda: [tensor for key in self.groups for tensor in self.tensors(key)])
        self.most_here = 0

    def tensors(self, key):
        return [SimpleNamespace(is_cuda=True, untyped_storage=lambda s=s: s) for s in self.groups[key]]

    def step(self, key) -> None:
        """A kernel that reads and writes the group, like an optimizer's."""
        self.expected[key] += 1
        for storage in self.groups[key]:
            self.machine.launch(self.machine.main, storage.block, is_write=True)
            storage.value += 1
            assert storage.value == self.expected[key]

    def come_back(self) -> None:
        self.offload.start_onload()
        self.offload.finish_onload()
        for key in self.groups:
            self.step(key)

    def pass_through(self, fails: bool) -> None:
        choose = self.machine.choose
        keys = choose.sample(list(self.groups), choose.choice([1, 4, NUM_GROUPS]))
        last = choose.choice(keys) if fails else None
        turns = self.offload.passing_through({key: self.tensors(key) for key in keys})
        with contextlib.suppress(KeyboardInterrupt), contextlib.closing(turns):
            for key in turns:
                self.step(key)
                self.most_here = max(self.most_here, sum(group[0].nbytes() for group in self.groups.values()))
                if key == last:
                    raise KeyboardInterrupt
        assert not any(storage.nbytes() for group in self.groups.values() for storage in group)


@pytest.fixture
def a_run(monkeypatch):
    """a_run(seed) -> a run on its own machine."""

    def make(seed: int) -> Run:
        machine = Machine(random.Random(seed))
        fakes = {
            "_CopyStream": lambda: CopyStream(machine),
            "_as_bytes": lambda storage: storage,
            "_split_like": lambda host_copy, storage: storage,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(optimizer_offload, name, fake)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: machine.main)
        monkeypatch.setattr(Clock, "synchronize", lambda event: machine.host.wait_stream(event), raising=False)
        run = Run(machine)
        storages = [storage for group in run.groups.values() for storage in group]
        monkeypatch.setattr(run.offload._host, "parts", lambda sizes: [storage.host_copy for storage in storages])
        return run

    return make


@pytest.mark.parametrize("seed", range(60))
def test_nothing_races_and_nothing_is_lost_in_any_order_of_calls(a_run, seed):
    run = a_run(seed)
    for _ in range(12):
        call = run.machine.choose.choice(["offload", "start_onload", "come back", "pass", "pass", "fail"])
        if call == "come back":
            run.come_back()
        elif call in ("offload", "start_onload"):
            getattr(run.offload, call)()
        elif run.offload.num_bytes_away > 0:
            run.pass_through(fails=call == "fail")
        run.machine.others_use_the_gpu()
    run.come_back()
    assert run.machine.races == []
    assert run.most_here <= 3


def test_a_state_that_passes_through_cannot_be_sent_elsewhere(a_run):
    run = a_run(0)
    run.offload.offload()
    turns = run.offload.passing_through({key: run.tensors(key) for key in run.groups})
    next(turns)
    for call in (run.offload.offload, run.offload.start_onload):
        with pytest.raises(AssertionError):
            call()
    turns.close()
    run.come_back()
