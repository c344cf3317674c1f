"""Tests of the due queue, which does no I/O and accepts hints with any content."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from followups.delivery.clock import DatabaseClock
from followups.delivery.due_queue import LEAD, LONGEST_RETRY_DELAY, RETRY_DELAY, DueQueue
from followups.delivery.slots import Slots
from followups.store.leases import Lease
from followups.uptime import uptime

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("due", "taken"), [(datetime.min.replace(tzinfo=UTC), 1), (datetime.max.replace(tzinfo=UTC), 0)]
)
def test_times_at_the_edge_of_the_calendar(due: datetime, taken: int) -> None:
    """A lease may be due at the first or the last moment of the calendar."""
    clock = DatabaseClock()
    clock.observe(datetime.now(UTC), uptime(), uptime())
    queue = DueQueue(clock, timedelta(seconds=60), Slots(10))
    queue.add([Lease(uuid4(), 1, due)])
    delay = queue.seconds_to_next()
    assert delay is not None
    assert (delay < 0) == queue.is_due() == bool(taken)
    assert len(queue.take(10)) == taken


def test_repeated_deferrals_grow() -> None:
    """If a follow-up repeatedly cannot begin, its deferrals become longer, up to a limit."""
    seconds = 0.0
    clock = DatabaseClock(lambda: seconds)
    clock.observe(NOON, 0.0, 0.0)
    queue = DueQueue(clock, timedelta(days=1), Slots(10))
    queue.add([Lease(uuid4(), 1, NOON)])
    waits = []
    for _ in range(8):
        (lease,) = queue.take(1)
        queue.slots.release(lease)
        queue.defer_refused(lease)
        wait = (queue.seconds_to_next() or 0.0) + LEAD.total_seconds()
        waits.append(timedelta(seconds=round(wait, 6)))
        seconds += wait
    assert waits == [min(RETRY_DELAY * 2**number, LONGEST_RETRY_DELAY) for number in range(8)]
    assert waits[-1] == LONGEST_RETRY_DELAY
