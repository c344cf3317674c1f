"""What is pending, overdue and in flight: gauges, cheap however many rows there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import text

if TYPE_CHECKING:
    from sqlalchemy import Connection

EXACT_UP_TO = 20_000
"""Rows that are counted one by one; beyond, the planner's estimate has to do (a count of ten million
pending rows takes seconds, and tells an operator nothing more)."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """Counts of follow-ups, exact up to 20,000 and estimated beyond; the oldest's age in seconds, 0 for none."""

    pending: int
    overdue: int
    oldest_overdue: float
    in_flight: int


_PENDING = "FROM follow_ups WHERE status = 'pending'"
_DUE = "COALESCE(next_attempt_at, due_date)"
# Through the claim's own index. One that waits for an earlier one of its chat is not overdue: that one is.
_OVERDUE = f"{_PENDING} AND waits_for IS NULL AND {_DUE} <= now()"

# In flight are the first rows of the claim's index: the ticks claim from its head, and no further than the
# window; what lies behind cannot be.
_COUNT = text(f"""
    SELECT (SELECT count(*) FROM (SELECT {_PENDING} LIMIT :most) AS p) AS pending,
           (SELECT count(*) FROM (SELECT {_OVERDUE} LIMIT :most) AS o) AS overdue,
           (SELECT COALESCE(EXTRACT(EPOCH FROM now() - min(due)), 0) FROM (
               SELECT {_DUE} AS due {_OVERDUE} ORDER BY {_DUE}, id LIMIT 1) AS first) AS oldest_overdue,
           (SELECT count(begun_at) FROM (
               SELECT begun_at {_PENDING} AND waits_for IS NULL ORDER BY {_DUE}, id LIMIT :window) AS head) AS in_flight
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
    row = connection.execute(_COUNT, {"most": EXACT_UP_TO + 1, "window": window}).one()
    pending, overdue = row.pending, row.overdue
    if pending > EXACT_UP_TO:
        plan = connection.execute(_ESTIMATE_PENDING).scalar_one()
        pending = max(pending, int(plan[0]["Plan"]["Plan Rows"]))
    if overdue > EXACT_UP_TO:
        share = connection.execute(_SHARE_OVERDUE).scalar_one() or 0  # none: the table was never analysed
        overdue = max(overdue, int(share * pending))
    return Backlog(pending, overdue, float(row.oldest_overdue), row.in_flight)
