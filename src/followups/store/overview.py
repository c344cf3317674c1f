"""Figures of one workspace, or of all workspaces, for the console's overview page.

Each figure is computed from a limited number of rows. Every query reads its rows in the order of an index. A query that
exceeds the time limit `LIMIT` is cancelled, and its figure is None.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.states import Status
from followups.store.counts import within

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Connection, TextClause

MOST = 10_000
"""The largest number that is counted exactly; a larger count is shown as "more than"."""

LIMIT = timedelta(milliseconds=100)
"""Time limit of each query for the overview."""

MINUTES = 60
"""Number of minutes that the throughput chart covers."""

RECENT = 1_000
"""Number of the most recently finished follow-ups among which failures are counted."""


@dataclass(frozen=True, slots=True)
class OverviewFigures:
    """The figures of the console's overview.

    A figure that exceeds `MOST` is not exact: it means "more than `MOST`". A figure is None if its query took too long.
    """

    at: datetime
    states: Mapping[str, int | None] = field(default_factory=dict)
    overdue: int | None = None
    oldest_due: datetime | None = None
    paused: int | None = None
    outside_hours: int | None = None
    lags: tuple[timedelta, ...] | None = None
    """p50, p95 and p99 of the lag in the last five minutes, or None.

    The result is None if no message was accepted in the last five minutes, or if the query took too long.
    """
    sent: list[int] | None = None
    """Number of follow-ups sent in each of the last few minutes, oldest first."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Number of failures per reason code, among the newest follow-ups finished in the last hour."""


_DUE = "COALESCE(next_attempt_at, due_date)"
_MINE = " AND f.workspace_id = CAST(:workspace_id AS uuid)"


def _count(condition: str, mine: str) -> TextClause:
    return text(f"SELECT count(*) FROM (SELECT FROM follow_ups f WHERE {condition}{mine} LIMIT :most) AS found")  # noqa: S608 - no input


_STATE = _count("f.status = :status", _MINE)
_STATE_OF_ALL = text("""
    SELECT count(*) FROM (
           SELECT FROM workspaces w
            CROSS JOIN LATERAL (
                  SELECT FROM follow_ups f WHERE f.workspace_id = w.id AND f.status = :status LIMIT :most) AS own
            LIMIT :most) AS found
""")
_OVERDUE = f"""
    SELECT count(*) AS number, min(due) AS oldest FROM (
           SELECT {_DUE} AS due FROM follow_ups f
            WHERE f.status = 'pending' AND f.waits_for IS NULL AND {_DUE} <= now(){{mine}}
            ORDER BY {_DUE}, f.id LIMIT :most) AS found
"""  # noqa: S608 - no input
_LAGS = """
    SELECT percentile_disc(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY f.accepted_at - f.due_date) AS lags
      FROM follow_ups f
     WHERE f.finished_at > now() - interval '5 minutes' AND f.status = 'sent'
       AND f.accepted_at > now() - interval '5 minutes'{mine}
"""
_SENT = """
    SELECT CAST(floor(EXTRACT(EPOCH FROM now() - f.finished_at) / 60) AS int) AS ago, count(*) AS number
      FROM follow_ups f
     WHERE f.finished_at > now() - :minutes * interval '1 minute' AND f.finished_at <= now()
       AND f.status = 'sent'{mine}
     GROUP BY 1
"""
_FAILURES = """
    SELECT split_part(f.reason, ':', 1) AS code, count(*) AS number
      FROM (SELECT status, reason, workspace_id FROM follow_ups
             WHERE finished_at > now() - interval '1 hour' AND finished_at <= now()
             ORDER BY finished_at DESC LIMIT :recent) f
     WHERE f.status = 'failed'{mine}
     GROUP BY 1 ORDER BY 2 DESC LIMIT 5
"""
_NOW = text("SELECT now()")


def read(connection: Connection, workspace_id: UUID | None) -> OverviewFigures:
    """Return the figures of a workspace, or of all workspaces if ``workspace_id`` is None."""
    mine = _MINE if workspace_id else ""
    given = {"workspace_id": workspace_id, "most": MOST + 1, "minutes": MINUTES, "recent": RECENT}

    def rows(query: str | TextClause, **more: object) -> list[object] | None:
        statement = text(query.replace("{mine}", mine)) if isinstance(query, str) else query
        found = within(connection, LIMIT, statement, given | more)
        return None if found is None else list(found)

    def number(query: TextClause, **more: object) -> int | None:
        found = rows(query, **more)
        return None if found is None else int(found[0][0])  # type: ignore[index] # a row

    due = rows(_OVERDUE)
    lags = rows(_LAGS)
    sent = rows(_SENT)
    state = _STATE if workspace_id else _STATE_OF_ALL
    failures = rows(_FAILURES)
    ago = None if sent is None else {row.ago: row.number for row in sent}  # type: ignore[attr-defined] # rows
    return OverviewFigures(
        at=connection.execute(_NOW).scalar_one(),
        states={each.value: number(state, status=each.value) for each in Status},
        overdue=due[0].number if due else None,  # type: ignore[attr-defined] # likewise
        oldest_due=due[0].oldest if due else None,  # type: ignore[attr-defined] # likewise
        paused=number(_count("f.status = 'pending' AND f.pause_id IS NOT NULL", mine)),
        outside_hours=number(
            _count("f.status = 'pending' AND f.held_until IS NOT NULL AND f.held_until > now()", mine)
        ),
        lags=tuple(lags[0].lags) if lags and lags[0].lags else None,  # type: ignore[attr-defined] # likewise
        sent=None if ago is None else [ago.get(minute, 0) for minute in reversed(range(MINUTES))],
        failures={row.code: row.number for row in failures or ()},  # type: ignore[attr-defined] # likewise
    )
