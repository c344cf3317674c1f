"""The line in front of the slots asks nobody, and holds whatever a hint may say."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from followups.dispatch.clock import DatabaseClock
from followups.dispatch.line import Line
from followups.store.leases import Lease
from followups.uptime import uptime


@pytest.mark.parametrize(
    ("due", "taken"), [(datetime.min.replace(tzinfo=UTC), 1), (datetime.max.replace(tzinfo=UTC), 0)]
)
def test_moments_at_the_edge_of_the_calendar(due: datetime, taken: int) -> None:
    """A lease that is due at the first moment there is goes at once; one that is due at the last waits."""
    clock = DatabaseClock()
    clock.observe(datetime.now(UTC), uptime(), uptime())
    line = Line(clock, timedelta(seconds=60), slots=10)
    line.add([Lease(uuid4(), 1, due)])
    delay = line.seconds_to_next()
    assert delay is not None
    assert (delay < 0) == line.is_anybodys_moment() == bool(taken)
    assert len(line.take(10)) == taken
