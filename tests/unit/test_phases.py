"""Phases of a step: every moment belongs to exactly one phase."""

import pytest

from nemo_aligner.compat import cpu
from nemo_aligner.utils import phases
from nemo_aligner.utils.phases import OTHER, PHASES, TOTAL, PhaseClock, phase_table


@pytest.fixture
def clock(monkeypatch):
    """A clock whose time the test sets."""
    cpu.enable()
    time = [0.0]
    monkeypatch.setattr(phases, "_now", lambda: time[0])
    clock = PhaseClock()
    clock.passes = lambda seconds: time.__setitem__(0, time[0] + seconds)
    return clock


def consumed(clock) -> dict[str, float]:
    return {phase: seconds for phase, seconds in clock.consume().items() if seconds}


def test_phases_interrupt_each_other_and_add_up(clock):
    clock.passes(1)
    with clock("rollout"):
        clock.passes(2)
        with clock("score"):
            clock.passes(4)
        clock.passes(8)
    clock.passes(16)
    with clock("score"):
        clock.passes(32)
    assert consumed(clock) == {OTHER: 17, "rollout": 10, "score": 36, TOTAL: 63}


def test_every_phase_is_there_and_the_clock_starts_anew(clock):
    with clock("select"):
        clock.passes(1)
    assert set(clock.consume()) == {*PHASES, OTHER, TOTAL}
    clock.passes(2)
    assert consumed(clock) == {OTHER: 2, TOTAL: 2}
    clock.passes(4)
    clock.start()
    assert consumed(clock) == {}


def test_validation_keeps_its_phases_to_itself(clock):
    with clock("validation"):
        clock.passes(1)
        with clock("rollout"):
            clock.passes(2)
        clock.passes(4)
    assert consumed(clock) == {"validation": 7, TOTAL: 7}


def test_a_phase_that_raises_is_over(clock):
    with pytest.raises(KeyError), clock("optimizer"):
        clock.passes(1)
        raise KeyError
    clock.passes(2)
    assert consumed(clock) == {"optimizer": 1, OTHER: 2, TOTAL: 3}


def test_an_unknown_phase_is_a_mistake(clock):
    with pytest.raises(AssertionError, match="rolout"), clock("rolout"):
        pass


def test_the_table_has_a_line_for_what_occurred(clock):
    nothing = dict.fromkeys((*PHASES, OTHER), 0.0)
    table = phase_table(
        {
            "step 1": {**nothing, "rollout": 3.0, OTHER: 1.0, TOTAL: 4.0},
            "step 2": {**nothing, "select": 1.5, OTHER: 0.5, TOTAL: 2.0},
        }
    )
    assert [line.split() for line in table.splitlines()] == [
        ["phase", "step", "1", "step", "2"],
        ["rollout", "3.000", "s", "75.0%", "0.000", "s", "0.0%"],
        ["select", "0.000", "s", "0.0%", "1.500", "s", "75.0%"],
        ["other", "1.000", "s", "25.0%", "0.500", "s", "25.0%"],
        ["total", "4.000", "s", "100.0%", "2.000", "s", "100.0%"],
    ]
