"""When a step is run, captured and replayed; tests/gpu/test_engine.py tests this on a GPU."""

import logging
from typing import ClassVar

import pytest
import torch

from nemo_aligner.generation.cuda_graph import StepGraphs, graph_size, pools_in_use


class Graph:
    """A stand-in for `torch.cuda.CUDAGraph` that records what happens to it in `events`."""

    events: ClassVar[list[str]] = []

    def __init__(self):
        self.name = f"graph {len({event for event in self.events if event.endswith('begins')}) + 1}"

    def capture_begin(self, *pool, capture_error_mode):
        self.events.append(f"{self.name}, pool {pool}, begins")

    def capture_end(self):
        self.events.append(f"{self.name} ends")

    def pool(self):
        return 7

    def replay(self):
        self.events.append(f"{self.name} replayed")


@pytest.fixture
def events(monkeypatch):
    Graph.events = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    return Graph.events


def test_a_size_is_run_once_then_captured_then_replayed(events):
    graphs = StepGraphs(lambda num_rows: events.append(f"step of {num_rows}"), reads=(1, 2), warm=set())
    for num_rows in (4, 4, 8, 4, 8):
        graphs.run(num_rows)
    assert events == [
        "step of 4",
        "graph 1, pool (), begins", "step of 4", "graph 1 ends", "graph 1 replayed",
        "step of 8",
        "graph 1 replayed",
        "graph 2, pool (7,), begins", "step of 8", "graph 2 ends", "graph 2 replayed",
    ]  # fmt: skip
    assert graphs.are_valid_for((1, 2)) and not graphs.are_valid_for((1, 3))


def test_what_cannot_be_captured_is_run_one_kernel_at_a_time_and_said_once(events, caplog):
    def step(num_rows):
        events.append("step")
        if "begins" in events[-2:][0]:
            raise RuntimeError("operation not permitted when stream is capturing")

    graphs = StepGraphs(step, reads=(), warm=set())
    with caplog.at_level(logging.WARNING, "nemo_logger"):
        for num_rows in (4, 4, 4, 8, 8):
            graphs.run(num_rows)
    assert events == [
        "step", "graph 1, pool (), begins", "step", "graph 1 ends", "step", "step", "step", "step"
    ]  # fmt: skip
    assert sum("no CUDA graphs" in message for message in caplog.messages) == 1
    assert not graphs.are_valid_for(())  # the next phase tries again


def test_what_ran_before_memory_moved_is_captured_at_once(events):
    warm = set()
    for reads in ((1,), (2,)):
        graphs = StepGraphs(lambda num_rows: events.append(f"step of {num_rows}"), reads, warm)
        graphs.run(4)
    assert events == ["step of 4", "graph 1, pool (), begins", "step of 4", "graph 1 ends", "graph 1 replayed"]


def test_the_pool_of_graphs_is_in_use_as_long_as_they_are_there(events):
    graphs = StepGraphs(lambda num_rows: None, reads=(), warm=set())
    graphs.run(4)
    assert pools_in_use() == set()
    graphs.run(4)
    assert pools_in_use() == {7}
    del graphs
    assert pools_in_use() == set()


def test_few_sizes_cover_all_numbers_of_rows():
    assert [graph_size(n) for n in (1, 2, 3, 4, 9, 64, 65, 256, 257)] == [1, 2, 4, 4, 16, 64, 128, 256, 320]
    assert len({graph_size(n) for n in range(1, 257)}) <= 10
    assert all(n <= graph_size(n) < 2 * n for n in range(1, 257))
