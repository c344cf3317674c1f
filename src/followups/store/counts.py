"""Counts, lag and throughput. No statement in this module runs for long, however many rows there are.

Counts of pending, waiting, overdue and in-flight follow-ups are exact and use small partial indexes. Follow-ups in a
final state are counted up to `EXACT_UP_TO` for each state. Above `EXACT_UP_TO`, the planner's estimate is used instead,
which takes equally little time for any number of rows. Lag and throughput are computed from an index of the follow-ups
that ended in the last few minutes. A query that exceeds `LIMIT` is cancelled.

The backlog is measured for metrics, which are read every few seconds. Counting ten million pending rows takes seconds.
A trigger that keeps counters would update one shared row whenever a follow-up is inserted or ends. Rows are counted one
by one only up to `BACKLOG_EXACT_UP_TO`. A healthy system has fewer overdue follow-ups than `BACKLOG_EXACT_UP_TO`. Above
`BACKLOG_EXACT_UP_TO`, the planner's estimates are used. The estimates are as accurate as the last ANALYZE. Autovacuum
runs ANALYZE after 2 % of the rows have changed. An estimate is never lower than the number of rows that were counted.
On two busy cores, with 500,000 rows pending and 36,000 of them overdue, measuring the backlog took 16 ms. Counting all
500,000 pending rows took 83 ms. With 60,000 rows sent since the last vacuum, the first measurement took 287 ms. Later
measurements of the backlog took 13 to 16 ms. The time needed to measure the backlog does not depend on the number of
rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from followups.states import Status
from followups.store import counter_totals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Connection, Row, TextClause

EXACT_UP_TO = 100_000
"""Up to this number, rows of a final state are counted exactly, which takes about 20 ms."""

LIMIT = timedelta(seconds=2)
"""Time limit of the queries for lag and throughput."""


BACKLOG_EXACT_UP_TO = 10_000
"""Size up to which a backlog is counted; the planner estimates larger backlogs."""

_DUE = "COALESCE(next_attempt_at, due_date)"


@dataclass(frozen=True, slots=True)
class Backlog:
    """Counts of the backlog: exact up to 10,000, and estimated above that.

    ``oldest_overdue`` is the age of the oldest overdue follow-up in seconds, or 0 if there is none.
    """

    pending: int
    overdue: int
    oldest_overdue: float
    in_flight: int


_PENDING_ROWS = "FROM follow_ups WHERE status = 'pending'"

# The query scans the claims' index only as far as the rows that are due slightly after the current time. This range
# includes all follow-ups in flight, because no attempt begins long before its due time. A follow-up that waits for its
# chat's earlier follow-up does not count as overdue. Only the earlier follow-up can count as overdue. Because of the
# ORDER BY, PostgreSQL reads only the needed part of the index. Without an ORDER BY, the planner would read the whole
# table, because it assumes that a third of all pending rows are overdue. Reading the index is slow where it begins with
# dead rows of sent follow-ups, so the query reads the index only once.
_COUNT = text(f"""
    WITH head AS MATERIALIZED (
        SELECT {_DUE} AS due, begun_at {_PENDING_ROWS} AND waits_for IS NULL AND {_DUE} <= now() + interval '1 second'
         ORDER BY {_DUE}, id LIMIT :head)
    SELECT (SELECT count(*) FROM (SELECT {_PENDING_ROWS} LIMIT :most) AS p) AS pending,
           count(*) FILTER (WHERE due <= now()) AS overdue,
           COALESCE(EXTRACT(EPOCH FROM now() - min(due) FILTER (WHERE due <= now())), 0) AS oldest_overdue,
           count(begun_at) AS in_flight
      FROM head
""")  # noqa: S608 - no input, only the constants above

_ESTIMATE_PENDING = text(f"EXPLAIN (FORMAT JSON) SELECT {_PENDING_ROWS}")
# The planner does not use the histogram of a partial index. Without a histogram, the planner assumes that a third of
# the rows are overdue.
_SHARE_OVERDUE = text("""
    SELECT avg((bound <= now())::int)
      FROM pg_stats, unnest(CAST(CAST(histogram_bounds AS text) AS timestamptz[])) AS bound
     WHERE schemaname = current_schema() AND tablename = 'ix_follow_ups_due' AND attname = 'coalesce'
""")


def measure_backlog(connection: Connection, *, window: int) -> Backlog:
    """Measure the backlog. ``window`` is the in-flight limit."""
    row = connection.execute(
        _COUNT, {"most": BACKLOG_EXACT_UP_TO + 1, "head": max(BACKLOG_EXACT_UP_TO + 1, window)}
    ).one()
    pending, overdue = row.pending, row.overdue
    if pending > BACKLOG_EXACT_UP_TO:
        plan = connection.execute(_ESTIMATE_PENDING).scalar_one()
        pending = max(pending, int(plan[0]["Plan"]["Plan Rows"]))
    if overdue > BACKLOG_EXACT_UP_TO:
        # the share is None if the table was never analyzed
        share = connection.execute(_SHARE_OVERDUE).scalar_one() or 0
        overdue = max(overdue, int(share * pending))
    return Backlog(pending, overdue, float(row.oldest_overdue), row.in_flight)


@dataclass(frozen=True, slots=True)
class Counts:
    """The number of follow-ups in each state."""

    pending: int
    waiting: int
    """Number of pending follow-ups that wait for an earlier follow-up in their chat."""
    paused: int
    """Number of pending follow-ups that are due but paused."""
    quiet: int
    """Number of pending follow-ups that are due but outside sending hours."""
    overdue: int
    """Number of pending follow-ups that are overdue and not blocked by an earlier one in the chat."""
    oldest_overdue: timedelta | None
    in_flight: int
    final: Mapping[str, int]
    """The number of finished follow-ups by status."""
    estimated: frozenset[str]
    """Final states for which the number of follow-ups is only an estimate."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Throughput and lag of the follow-ups accepted in the last ``window``.

    Lag is the acceptance time minus the due date. The lag of a retried follow-up includes its retries. Follow-ups that
    were created after their due date are included.
    """

    window: timedelta
    sent: int
    p50: timedelta | None = None
    p95: timedelta | None = None
    p99: timedelta | None = None

    @property
    def per_minute(self) -> float:
        """Average number of follow-ups sent in a minute."""
        return self.sent / (self.window / timedelta(minutes=1))


_PENDING = text(f"""
    SELECT (SELECT count(*) FROM follow_ups WHERE status = 'pending') AS pending,
           (SELECT count(*) FROM follow_ups WHERE status = 'pending' AND waits_for IS NOT NULL) AS waiting,
           (SELECT count(*) FROM follow_ups WHERE status = 'pending' AND pause_id IS NOT NULL) AS paused,
           (SELECT count(*) FROM follow_ups
             WHERE status = 'pending' AND held_until IS NOT NULL AND held_until > now() AND pause_id IS NULL) AS quiet,
           (SELECT count(*) FROM follow_ups
             WHERE status = 'pending' AND waits_for IS NULL AND {_DUE} <= now()) AS overdue
""")  # noqa: S608 - no input, only the constant above
# This query uses an index that starts with the workspace, as the follow-up lists do.
_COUNT_FINAL = text("""
    SELECT s.status, (
           SELECT count(*) FROM (
               SELECT FROM workspaces w
                CROSS JOIN LATERAL (
                      SELECT FROM follow_ups f WHERE f.workspace_id = w.id AND f.status = s.status LIMIT :most) AS own
                LIMIT :most) AS counted) AS number
      FROM unnest(CAST(:statuses AS text[])) AS s(status)
""")
_ESTIMATE_FINAL = text("""
    SELECT common.status, CAST(greatest(c.reltuples, 0) * common.fraction AS bigint)
      FROM pg_class c
      JOIN pg_stats s ON s.tablename = c.relname AND s.schemaname = CAST(c.relnamespace::regnamespace AS text)
     CROSS JOIN LATERAL unnest(CAST(CAST(s.most_common_vals AS text) AS text[]), s.most_common_freqs)
                     AS common(status, fraction)
     WHERE c.oid = 'follow_ups'::regclass AND s.attname = 'status' AND common.status <> 'pending'
""")


def count(connection: Connection, *, window: int, exact_up_to: int = EXACT_UP_TO) -> Counts:
    """Count follow-ups by state. ``window`` is the in-flight limit."""
    pending = connection.execute(_PENDING).one()
    head = measure_backlog(connection, window=window)
    final = _count_final(connection, exact_up_to + 1)
    estimated = frozenset(status for status, number in final.items() if number > exact_up_to)
    if estimated:
        estimates = {row[0]: row[1] for row in connection.execute(_ESTIMATE_FINAL)}
        # Before the first ANALYZE, the table has no row estimate. Without an estimate, the function returns the number
        # of rows counted so far.
        final |= {status: max(estimates.get(status, 0), final[status]) for status in estimated}
    return Counts(
        pending=pending.pending,
        waiting=pending.waiting,
        paused=pending.paused,
        quiet=pending.quiet,
        overdue=pending.overdue,
        oldest_overdue=timedelta(seconds=head.oldest_overdue) if pending.overdue else None,
        in_flight=head.in_flight,
        final=final,
        estimated=estimated,
    )


def _count_final(connection: Connection, most: int) -> dict[str, int]:
    statuses = [status.value for status in (Status.SENT, Status.FAILED, Status.CANCELLED)]
    return {row.status: row.number for row in connection.execute(_COUNT_FINAL, {"statuses": statuses, "most": most})}


# A follow-up's message is always accepted before the follow-up ends as sent. Therefore, a follow-up that ended before
# the measured period was also accepted before that period.
_PACE = text("""
    SELECT count(*) AS sent,
           percentile_disc(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY accepted_at - due_date) AS lags
      FROM follow_ups
     WHERE finished_at > now() - CAST(:window AS interval) AND status = 'sent'
       AND accepted_at > now() - CAST(:window AS interval)
""")
_PER_SECOND = text("""
    SELECT CAST(floor(EXTRACT(EPOCH FROM now() - finished_at)) AS int) AS ago, count(*) AS number
      FROM follow_ups
     WHERE finished_at > now() - :seconds * interval '1 s' AND finished_at <= now() AND status = 'sent'
     GROUP BY 1
""")
_PREVIOUS = text("SELECT current_setting('statement_timeout')")
_LIMIT = text("SELECT set_config('statement_timeout', :limit, true)")
_CANCELLED_BY_TIMEOUT = "57014"


def pace(connection: Connection, window: timedelta, limit: timedelta = LIMIT) -> Pace | None:
    """Measure the follow-ups sent in the last ``window``; return None if the query exceeds ``limit``.

    Percentiles are nearest-rank.
    """
    rows = within(connection, limit, _PACE, {"window": window})
    return Pace(window, rows[0].sent, *(rows[0].lags or ())) if rows else None


def per_second(connection: Connection, seconds: int, limit: timedelta = LIMIT) -> list[int] | None:
    """Return the number of follow-ups sent in each of the most recent seconds, oldest first.

    Returns None if the query does not finish in time.
    """
    rows = within(connection, limit, _PER_SECOND, {"seconds": seconds})
    if rows is None:
        return None
    numbers = {row.ago: row.number for row in rows}
    return [numbers.get(ago, 0) for ago in reversed(range(seconds))]


def within(
    connection: Connection, limit: timedelta, query: TextClause, parameters: Mapping[str, object]
) -> Sequence[Row[Any]] | None:
    """Return the rows, or None if the query takes longer than ``limit``.

    A query that takes too long does not abort the transaction.
    """
    milliseconds = str(max(round(limit / timedelta(milliseconds=1)), 1))
    try:
        with connection.begin_nested():
            previous = connection.scalar(_PREVIOUS)
            connection.execute(_LIMIT, {"limit": milliseconds})
            rows = connection.execute(query, parameters).all()
            # Releasing the savepoint does not reset `statement_timeout`. Only a rollback to the savepoint, or the end
            # of the transaction, resets `statement_timeout`.
            connection.execute(_LIMIT, {"limit": previous})
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != _CANCELLED_BY_TIMEOUT:
            raise
        return None
    return rows


def attempts(connection: Connection) -> dict[str, int]:
    """Return how many attempts all processes have made, by outcome; the result is at most a second old."""
    found: dict[str, int] = {}
    for (name, labels), value in counter_totals.read(connection).items():
        if name == "followups_attempts_total":
            outcome = str(json.loads(labels)["outcome"])
            found[outcome] = found.get(outcome, 0) + int(value)
    return found
