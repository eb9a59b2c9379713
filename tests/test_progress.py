"""The meter counts what was done, and speaks of speed only from what was done now."""

import pytest

from chipviz import progress
from chipviz.progress import Cancelled, Meter, Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = {"s": 100.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: now["s"])
    return now


def test_rate_and_time_left_follow_from_work_and_time(clock):
    seen = []
    meter = Meter("extracting", 100, seen.append)
    clock["s"] += 5.0
    meter.advance(20, "reading", weight=1000)
    clock["s"] += 5.0
    meter.advance(20, "reading", weight=3000)
    assert seen[0] == Progress("extracting", "reading", 20, 100, rate=200.0, eta_s=20.0)
    assert seen[1] == Progress("extracting", "reading", 40, 100, rate=400.0, eta_s=15.0)


def test_work_done_in_an_earlier_run_counts_as_done_but_not_as_speed(clock):
    seen = []
    meter = Meter("extracting", 100, seen.append)
    meter.skip(60)
    clock["s"] += 10.0
    meter.advance(20, "reading", weight=500)
    assert seen == [Progress("extracting", "reading", 80, 100, rate=50.0, eta_s=10.0)]


@pytest.mark.usefixtures("clock")
def test_before_any_time_has_passed_nothing_is_said_of_speed():
    seen = []
    Meter("fitting", 3, seen.append).advance(1, "fitting", weight=9)
    assert seen == [Progress("fitting", "fitting", 1, 3, rate=None, eta_s=None)]


def test_work_without_weight_has_no_rate(clock):
    seen = []
    meter = Meter("fitting", 4, seen.append)
    clock["s"] += 1.0
    meter.advance(1, "fitting")
    assert (seen[0].rate, seen[0].eta_s) == (None, 3.0)


def test_a_listener_that_cancels_stops_the_work():
    def stop(_):
        raise Cancelled

    with pytest.raises(Cancelled):
        Meter("fitting", 2, stop).advance(1, "fitting")
