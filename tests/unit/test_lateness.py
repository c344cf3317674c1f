"""Lateness is measured from the first time at which sending hours allow the message."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from followups.delivery.hold import UNREADABLE, closed_until, hold_or_end, sendable_from
from followups.sending_hours import SendingHours, opens_at, span_of
from followups.store.holds import SPREAD, Hold, WorkspaceHours
from followups.store.leases import Lease
from followups.store.obstacles import Obstacle
from followups.store.settlement import ENDED_MARGIN

MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
CLOCKS = st.times().map(lambda each: each.replace(second=0, microsecond=0))
HOURS = st.builds(
    SendingHours,
    st.sampled_from(["UTC", "Europe/Berlin", "Australia/Lord_Howe"]),
    CLOCKS,
    CLOCKS,
    st.frozensets(st.integers(0, 6), min_size=1),
)
MOMENTS = st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - the strategy adds UTC
GAPS = st.lists(st.timedeltas(MINUTE, timedelta(days=3)), min_size=1, max_size=8)
NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)
MORNING = SendingHours("UTC", time(8), time(11))


def found(hours: SendingHours | None, wanted: datetime, now: datetime, known: datetime | None = None) -> Obstacle:
    """Return what blocks a follow-up now, given the time from which it could be sent."""
    span = span_of(hours, now) if hours else None
    standing = WorkspaceHours(uuid4(), hours, *span) if hours and span else None
    return Obstacle(Lease(uuid4(), 1, now), now, now, wanted, wanted, sendable_from=known, hours=standing)


def blocked(obstacle: Obstacle, max_lateness: timedelta) -> Obstacle:
    """Return the obstacle that `begin` would find if lateness is counted from the recorded time."""
    late = obstacle.now >= (obstacle.sendable_from or obstacle.wanted_from) + max_lateness
    return replace(obstacle, too_late=late)


@given(HOURS, MOMENTS, GAPS)
def test_repeated_holds(hours: SendingHours, wanted: datetime, gaps: list[timedelta]) -> None:
    """Even after several holds, lateness counts from the first sending hours at or after the due date."""
    now, known = wanted, None
    for gap in gaps:
        known = sendable_from(found(hours, wanted, now, known))
        assert known == opens_at(hours, wanted)
        now += gap


@given(st.lists(st.tuples(HOURS, st.timedeltas(MINUTE, timedelta(days=3))), min_size=1, max_size=8), MOMENTS)
def test_hours_that_change(changes: list[tuple[SendingHours, timedelta]], wanted: datetime) -> None:
    """If sending hours change, lateness never counts from before the due date; a past start is kept."""
    now, known = wanted, None
    for hours, gap in changes:
        obstacle = found(hours, wanted, now, known)
        after = sendable_from(obstacle)
        assert after is not None
        assert after >= wanted
        if known is not None and known <= now:
            assert after == known
        elif known is not None:
            assert after == (closed_until(obstacle) or now)
        now, known = now + gap, after


@given(HOURS, MOMENTS, st.timedeltas(HOUR, timedelta(days=4)), GAPS)
def test_too_late_is_final(hours: SendingHours, wanted: datetime, most: timedelta, gaps: list[timedelta]) -> None:
    """A follow-up is too late only after the maximum lateness has passed. It is then never held again."""
    now, known = wanted, None
    for gap in gaps:
        obstacle = found(hours, wanted, now, known)
        decided = hold_or_end(blocked(obstacle, most), most)
        if now >= opens_at(hours, wanted) + most:
            assert decided is None
            assert blocked(obstacle, most).too_late
        elif isinstance(decided, Hold):
            known = decided.sendable_from
        else:
            assert not blocked(obstacle, most).too_late
        now += gap


@given(MOMENTS, st.timedeltas(-HOUR, 3 * HOUR))
def test_the_stored_opening_time_decides(now: datetime, off: timedelta) -> None:
    """A machine with different time zone data waits until the stored opening time.

    Until then, it does not check the follow-up again.
    """
    hours = SendingHours("UTC", time(0), time(0))
    opening = now + off
    standing = WorkspaceHours(uuid4(), hours, opening, opening + 5 * HOUR)
    obstacle = replace(found(None, now, now), hours=standing)
    assert closed_until(obstacle) == (opening if off > timedelta(0) else None)


@pytest.mark.parametrize("known", [None, NOON - HOUR])
def test_a_time_zone_unknown_to_this_machine(known: datetime | None) -> None:
    """If the machine does not know a time zone, it keeps the recorded time and rechecks in a minute."""
    hours = WorkspaceHours(uuid4(), replace(MORNING, time_zone="Mars/Olympus"), NOON - 9 * HOUR, NOON - HOUR)
    obstacle = replace(found(None, NOON, NOON, known), hours=hours)
    assert sendable_from(obstacle) == known
    assert closed_until(obstacle) == NOON + UNREADABLE


@pytest.mark.parametrize(("lateness", "until"), [(HOUR, HOUR), (20 * HOUR, 20 * HOUR), (21 * HOUR, 20 * HOUR)])
def test_a_hold_ends_with_the_allowed_lateness(lateness: timedelta, until: timedelta) -> None:
    """A follow-up that fell due within sending hours fails at the lateness limit, even if they begin again later."""
    obstacle = found(MORNING, NOON - HOUR, NOON, NOON)
    held = hold_or_end(blocked(obstacle, lateness), lateness)
    assert isinstance(held, Hold)
    assert held.until == NOON + until
    assert NOON + until <= held.next_attempt_at <= NOON + until + SPREAD
    ended = found(MORNING, NOON - HOUR, NOON + HOUR + ENDED_MARGIN, NOON)
    assert hold_or_end(blocked(ended, HOUR), HOUR) is None


def test_sending_hours_take_precedence_over_a_pause() -> None:
    """Outside sending hours, a paused follow-up is held by the sending hours first, then by the pause."""
    pause = uuid4()
    outside = replace(found(MORNING, NOON, NOON), pause_id=pause)
    held = hold_or_end(blocked(outside, HOUR), HOUR)
    assert isinstance(held, Hold)
    assert (held.pause_id, held.until) == (None, NOON + 20 * HOUR)
    opened = replace(found(MORNING, NOON, held.until, held.sendable_from), pause_id=pause)
    held = hold_or_end(blocked(opened, HOUR), HOUR)
    assert isinstance(held, Hold)
    assert (held.pause_id, held.sendable_from) == (pause, opened.now)
