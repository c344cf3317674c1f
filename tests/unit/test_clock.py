"""A worker's estimate of the database's clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from followups.delivery.clock import DatabaseClock

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Monotonic:
    """A monotonic clock whose time a test sets."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def moment(seconds: float) -> datetime:
    """Return the time ``seconds`` after the start of 1970."""
    return EPOCH + timedelta(seconds=seconds)


def test_no_samples() -> None:
    """If a clock has no samples yet, it raises an error instead of guessing the time."""
    with pytest.raises(RuntimeError, match="not been asked"):
        DatabaseClock().now()


@given(
    st.lists(st.tuples(st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 10)), min_size=1, max_size=30),
    st.floats(-1e6, 1e9),
)
def test_never_ahead(samples: list[tuple[float, float, float]], offset: float) -> None:
    """The estimate never runs ahead of the database's clock, even after a long round trip.

    Therefore no follow-up is sent early.
    """
    monotonic = Monotonic()
    clock = DatabaseClock(monotonic)
    for there, back, pause in samples:
        monotonic.seconds += pause
        asked = monotonic.seconds
        told = moment(offset + asked + there)
        monotonic.seconds += there + back
        clock.observe(told, asked, monotonic.seconds)
        behind = (moment(offset + monotonic.seconds) - clock.now()).total_seconds()
        assert -1e-4 < behind <= back + 1e-4


def test_quickest_sample_counts() -> None:
    """The clock estimate uses the database's quickest answer, even if slower answers follow."""
    monotonic = Monotonic()
    clock = DatabaseClock(monotonic)
    clock.observe(moment(5000.0), 1000.0, 1000.001)
    clock.observe(moment(5000.0), 1000.0, 1000.4)
    assert abs((clock.now() - moment(4999.999)).total_seconds()) < 0.0001
    assert clock.until(moment(5000.499)) == pytest.approx(0.5)


def test_set_back() -> None:
    """If the database's clock is set back, the next sample corrects the estimate."""
    monotonic = Monotonic()
    clock = DatabaseClock(monotonic)
    clock.observe(moment(5000.0), 1000.0, 1000.001)
    clock.observe(moment(4000.0), 1000.0, 1000.001)
    assert clock.now() < moment(4000.0)
