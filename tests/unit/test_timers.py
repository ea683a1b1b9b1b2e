import math

import pytest
import torch

from nemo_aligner.utils import timers
from nemo_aligner.utils.timers import ScopedTimer, SyncTimer, Timer


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the test advances it."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(timers.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr("nemo.utils.timers.time.time", lambda: Clock.now)
    return Clock


def test_limit_is_days_hours_minutes_seconds(clock):
    timer = Timer("01:02:03:04")
    timer.start_time()
    assert timer.get_time_remaining() == 86400 + 2 * 3600 + 3 * 60 + 4
    clock.now += 100
    assert timer.get_time_elapsed() == 100
    assert timer.get_time_remaining() == 93784 - 100


def test_finished_when_the_limit_is_reached(clock):
    timer = Timer("00:00:01:00")
    timer.start_time()
    clock.now += 59.9
    assert timer.is_finished() is False
    clock.now += 0.2
    assert timer.is_finished() is True
    timer.start_time()
    assert timer.is_finished() is False


def test_without_a_limit_never_finished(clock):
    timer = Timer(None)
    timer.start_time()
    clock.now += 1e9
    assert timer.get_time_remaining() == math.inf
    assert timer.is_finished() is False


@pytest.mark.parametrize("duration", ["12:00:00", "1 day", "", "00:00:00:-1", 216000])
def test_malformed_durations_name_the_form(duration):
    with pytest.raises(ValueError, match="DD:HH:MM:SS"):
        Timer(duration)


def test_asking_before_starting_is_an_error():
    with pytest.raises(RuntimeError, match="start_time"):
        Timer("00:00:00:01").get_time_elapsed()


def test_scoped_timer_hands_durations_out_once(clock):
    timer = ScopedTimer()
    with timer("outer"):
        clock.now += 2
        with timer("inner"):
            clock.now += 3
        assert timer.consume_durations() == {"inner": 3.0}
        clock.now += 1
    assert timer.consume_durations() == {"outer": 6.0}
    assert timer.consume_durations() == {}


def test_scoped_timer_measures_a_consumed_section_anew(clock):
    timer = ScopedTimer()
    for seconds in (4, 10):
        with timer("section"):
            clock.now += seconds
        assert timer.consume_durations() == {"section": seconds}


def test_scoped_timer_refuses_an_unconsumed_section(clock):
    timer = ScopedTimer()
    with timer("section"):
        clock.now += 1
    with pytest.raises(ValueError, match="'section' was timed already"), timer("section"):
        clock.now += 5
    assert timer.consume_durations() == {"section": 1.0}


def test_scoped_timer_stops_when_the_body_raises(clock):
    timer = ScopedTimer()
    with pytest.raises(KeyError), timer("section"):
        clock.now += 1
        raise KeyError
    assert timer.consume_durations() == {"section": 1.0}


def test_scoped_timer_waits_for_the_current_stream_and_for_no_other(clock, monkeypatch):
    class Stream:
        def synchronize(self):
            clock.now += 2

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(clock, "now", clock.now + 100))
    timer = ScopedTimer(sync_cuda=True)
    with timer("section"):
        clock.now += 1
    assert timer.consume_durations() == {"section": 3.0}


def test_sync_timer_is_deprecated_and_averages(clock):
    with pytest.warns(DeprecationWarning, match="SyncTimer"):
        timer = SyncTimer()
    for seconds in (1, 3):
        timer.start("section")
        clock.now += seconds
        elapsed = timer.stop_and_get_time("section")
    assert elapsed == timer.get("section") == 2.0
    with pytest.raises(ValueError, match="no time is stored for section 'section'"):
        timer.sync_and_consume_over_stored_time("section")
