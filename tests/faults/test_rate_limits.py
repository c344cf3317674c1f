"""Tests of rate limits with real workers: the limit and all guarantees hold even if Redis is wiped."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.store import rate_limits
from followups.store.rate_limits import LimitScope
from stack import wait_until

if TYPE_CHECKING:
    from datetime import datetime

    from faults.rig import Rig

COUNT, RATE, BURST, WIPED = 150, 30, 5, 3

LET_THROUGH = "SELECT COALESCE(sum(value), 0) FROM metric_totals WHERE sample = 'followups_limiter_unavailable_total'"
"""SQL that counts follow-ups begun without a Redis query, as may happen on a stalled machine."""


def test_wiped_while_they_wait(rig: Rig) -> None:
    """Each wipe of Redis allows one extra burst, but no message is lost or sent twice."""
    with rig.world.engine.begin() as connection:
        rate_limits.put(connection, LimitScope(rig.world.workspace_id, None, "all"), RATE, BURST)
    rig.start(workers=2)
    started: datetime = rig.world.scalar("SELECT clock_timestamp()")
    ids = rig.bulk(COUNT)
    for _ in range(WIPED):
        time.sleep(0.3 + rig.rng.random())
        with rig.broker() as broker:
            broker.flushdb()
    rig.settle_down(within=120)
    verdict = rig.verdict()
    assert verdict.ended == {"sent": len(ids)}
    assert rig.world.scalar("SELECT max(attempts) FROM follow_ups") == 1
    with rig.world.engine.connect() as connection:
        accepted = list(connection.scalars(text("SELECT accepted_at FROM follow_ups ORDER BY accepted_at")))
    free = (1 + WIPED) * BURST + float(rig.world.scalar(LET_THROUGH))
    for number, moment in enumerate(accepted, start=1):
        assert number <= free + RATE * (moment - started).total_seconds()
    wait_until(lambda: any(line["count"] for line in rig.events("limited")))  # the event is logged every five seconds
