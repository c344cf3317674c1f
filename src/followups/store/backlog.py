"""What is pending, overdue and in flight: gauges, cheap however many rows there are.

A count of ten million pending rows takes seconds, and counters kept by a trigger would cost every insert and every
end a write to one shared row. So rows are counted one by one up to `EXACT_UP_TO`, which is what a healthy system
has overdue; beyond, the numbers are the planner's estimates, as exact as the last ANALYZE (which runs after 2 % of
the rows have changed), and never below what was counted. Measured on two busy cores with half a million rows pending
and 36,000 of them overdue: 16 ms (an exact count of pending takes 83 ms, and grows with it); right after 60,000 were
sent and not vacuumed yet, 287 ms once and 13 to 16 ms from then on. The numbers of rows make no difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import text

if TYPE_CHECKING:
    from sqlalchemy import Connection

EXACT_UP_TO = 10_000
"""Rows that are counted one by one; beyond, the planner's estimate has to do."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """Counts of follow-ups, exact up to 10,000 and estimated beyond; the oldest's age in seconds, 0 for none."""

    pending: int
    overdue: int
    oldest_overdue: float
    in_flight: int


_PENDING = "FROM follow_ups WHERE status = 'pending'"
_DUE = "COALESCE(next_attempt_at, due_date)"

# The head of the claim's own index, up to now and a little: nothing begins earlier than that, so what is in flight
# is in it as well. One that waits for an earlier one of its chat is not overdue: that one is. Ordered, so that the
# index is walked and no further than needed: the planner takes a third of all that is pending for overdue, and
# would rather read the whole table. Looked at once, since what was sent and not vacuumed yet lies before it.
_COUNT = text(f"""
    WITH head AS MATERIALIZED (
        SELECT {_DUE} AS due, begun_at {_PENDING} AND waits_for IS NULL AND {_DUE} <= now() + interval '1 second'
         ORDER BY {_DUE}, id LIMIT :head)
    SELECT (SELECT count(*) FROM (SELECT {_PENDING} LIMIT :most) AS p) AS pending,
           count(*) FILTER (WHERE due <= now()) AS overdue,
           COALESCE(EXTRACT(EPOCH FROM now() - min(due) FILTER (WHERE due <= now())), 0) AS oldest_overdue,
           count(begun_at) AS in_flight
      FROM head
""")  # noqa: S608 - no input, only the constants above

_ESTIMATE_PENDING = text(f"EXPLAIN (FORMAT JSON) SELECT {_PENDING}")
# The planner itself does not look at this histogram, since its index is partial, and guesses a third.
_SHARE_OVERDUE = text("""
    SELECT avg((bound <= now())::int)
      FROM pg_stats, unnest(CAST(CAST(histogram_bounds AS text) AS timestamptz[])) AS bound
     WHERE schemaname = current_schema() AND tablename = 'ix_follow_ups_due' AND attname = 'coalesce'
""")


def measure(connection: Connection, *, window: int) -> Backlog:
    """Count what waits. ``window`` is the most that can be in flight."""
    row = connection.execute(_COUNT, {"most": EXACT_UP_TO + 1, "head": max(EXACT_UP_TO + 1, window)}).one()
    pending, overdue = row.pending, row.overdue
    if pending > EXACT_UP_TO:
        plan = connection.execute(_ESTIMATE_PENDING).scalar_one()
        pending = max(pending, int(plan[0]["Plan"]["Plan Rows"]))
    if overdue > EXACT_UP_TO:
        share = connection.execute(_SHARE_OVERDUE).scalar_one() or 0  # none: the table was never analysed
        overdue = max(overdue, int(share * pending))
    return Backlog(pending, overdue, float(row.oldest_overdue), row.in_flight)
