"""Holds, which keep back follow-ups that are paused or outside their workspace's sending hours.

Claims do not find a held follow-up until its hold ends. A held follow-up uses up no attempt and is not leased
repeatedly. A chat's order is preserved, because later follow-ups wait for a held one.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.sending_hours import EVERY_DAY, SendingHours
from followups.store.fragments import LEASED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy import Connection

    from followups.store.leases import Lease

NEVER = datetime(9998, 12, 31, tzinfo=UTC)
"""The next attempt of a paused follow-up: a date too far in the future for any claim."""


@dataclass(frozen=True, slots=True)
class WorkspaceHours:
    """A workspace's sending hours, with the start and end of the current sending period."""

    workspace_id: UUID
    hours: SendingHours
    open_from: datetime
    open_until: datetime


def hours_of(row: object) -> WorkspaceHours:
    """Return the sending hours stored in a row of their table."""
    days = frozenset(day for day in EVERY_DAY if row.days >> day & 1)  # type: ignore[attr-defined]
    hours = SendingHours(row.time_zone, row.opening, row.closing, days)  # type: ignore[attr-defined]
    return WorkspaceHours(row.workspace_id, hours, row.open_from, row.open_until)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Hold:
    """The end of a leased follow-up's hold, and the pause that causes the hold, if any."""

    lease: Lease
    until: datetime
    next_attempt_at: datetime
    sendable_from: datetime | None = None
    """The time from which lateness is counted, or None to keep the time recorded earlier."""
    pause_id: UUID | None = None
    hours: SendingHours | None = None


# Until this transaction commits, locks keep the pause and the sending hours unchanged. A concurrent resume, or a change
# of the sending hours, commits only after this transaction. A later resume or change of sending hours releases the
# follow-ups held here. Rows that were locked or changed meanwhile are soon checked again.
_HOLD = text(f"""
    WITH standing AS MATERIALIZED (
        SELECT id FROM pauses WHERE id = ANY(CAST(:pauses AS uuid[])) AND ended_at IS NULL
         ORDER BY id FOR SHARE SKIP LOCKED
    ), hours AS MATERIALIZED (
        SELECT workspace_id, time_zone, opening, closing, days FROM sending_hours
         WHERE workspace_id IN (
               SELECT f.workspace_id
                 FROM unnest(CAST(:ids AS uuid[]), CAST(:pauses AS uuid[])) AS b(id, pause)
                 JOIN follow_ups f ON f.id = b.id
                WHERE b.pause IS NULL)
         ORDER BY workspace_id FOR SHARE SKIP LOCKED
    ), held AS MATERIALIZED (
        SELECT f.id, b.until, b.again, b.sendable, b.pause
          FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[]), CAST(:untils AS timestamptz[]),
                      CAST(:agains AS timestamptz[]), CAST(:sendables AS timestamptz[]), CAST(:pauses AS uuid[]),
                      CAST(:zones AS text[]), CAST(:openings AS time[]), CAST(:closings AS time[]),
                      CAST(:days AS int[]))
               AS b(id, token, until, again, sendable, pause, zone, opening, closing, days)
         {LEASED}
         WHERE CASE WHEN b.pause IS NOT NULL THEN EXISTS (SELECT FROM standing s WHERE s.id = b.pause)
                    ELSE EXISTS (SELECT FROM hours h
                                  WHERE h.workspace_id = f.workspace_id AND h.time_zone = b.zone
                                    AND h.opening = b.opening AND h.closing = b.closing AND h.days = b.days) END
    )
    UPDATE follow_ups f
       SET next_attempt_at = held.again, pause_id = held.pause, lease_until = NULL,
           held_until = CASE WHEN held.pause IS NULL THEN held.until ELSE f.held_until END,
           sendable_from = COALESCE(held.sendable, f.sendable_from)
      FROM held
     WHERE f.id = held.id
    RETURNING f.id
""")  # noqa: S608 - no input, only the constants above


def hold_if_leased(connection: Connection, holds: Sequence[Hold]) -> set[UUID]:
    """Hold leased follow-ups; return those that were held."""
    parameters: dict[str, object] = {
        "ids": [one.lease.id for one in holds],
        "tokens": [one.lease.token for one in holds],
        "untils": [one.until for one in holds],
        "agains": [one.next_attempt_at for one in holds],
        "sendables": [one.sendable_from for one in holds],
        "pauses": [one.pause_id for one in holds],
    }
    hours = [columns_of(one.hours) if one.hours else {} for one in holds]
    names = {"zones": "time_zone", "openings": "opening", "closings": "closing", "days": "days"}
    parameters |= {name: [each.get(column) for each in hours] for name, column in names.items()}
    return set(connection.scalars(_HOLD, parameters))


# The next sending period is stored only if the sending hours have not changed meanwhile. The statement does not wait
# for locks. Many workers may compute the next sending period at the same time.
_OPEN_NEXT = text("""
    UPDATE sending_hours h SET open_from = :new_from, open_until = :new_until
      FROM (SELECT workspace_id FROM sending_hours
             WHERE workspace_id = :workspace_id AND time_zone = :time_zone AND opening = :opening
               AND closing = :closing AND days = :days AND open_until = :open_until
               FOR NO KEY UPDATE SKIP LOCKED) mine
     WHERE h.workspace_id = mine.workspace_id
""")


def open_next(connection: Connection, hours: WorkspaceHours, span: tuple[datetime, datetime]) -> None:
    """Store this sending period, against which the database then checks the current time."""
    parameters = columns_of(hours.hours) | {"workspace_id": hours.workspace_id, "open_until": hours.open_until}
    connection.execute(_OPEN_NEXT, parameters | {"new_from": span[0], "new_until": span[1]})


def columns_of(hours: SendingHours) -> dict[str, object]:
    """Return the sending hours as the columns of their table."""
    days = sum(1 << day for day in hours.days)
    return {"time_zone": hours.time_zone, "opening": hours.opening, "closing": hours.closing, "days": days}


# A recorded `sendable_from` that has already passed is left unchanged. A future or NULL `sendable_from` is replaced by
# the next time at which the workspace may send. During sending hours, or if the workspace has none, that is the current
# time.
_RELEASE_HELD = text("""
    WITH held AS MATERIALIZED (
        SELECT id FROM follow_ups
         WHERE workspace_id = :workspace_id AND held_until > now() AND held_until IS NOT NULL AND status = 'pending'
           AND pause_id IS NULL
         LIMIT :most
           FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE follow_ups f
       SET next_attempt_at = NULL, held_until = NULL,
           sendable_from = CASE WHEN f.sendable_from <= now() THEN f.sendable_from
                                ELSE GREATEST(now(), (SELECT h.open_from FROM sending_hours h
                                                       WHERE h.workspace_id = f.workspace_id)) END
      FROM held
     WHERE f.id = held.id
""")
BATCH = 1000


def release_held(connection: Connection, workspace_id: UUID) -> int:
    """Release up to a thousand follow-ups whose sending hours have changed; return their number."""
    return connection.execute(_RELEASE_HELD, {"workspace_id": workspace_id, "most": BATCH}).rowcount


SPREAD = timedelta(seconds=1)
"""Time over which held follow-ups are spread when sending hours begin, earliest due first."""
_LONGEST = timedelta(days=1)


def back_at(opening: datetime, due_date: datetime) -> datetime:
    """Return when to retry a follow-up that is held until ``opening``.

    Of two held follow-ups, the one with the earlier due date is retried first. The retry times are spread, so that held
    follow-ups do not all fall due together.
    """
    return opening + SPREAD * max(0.0, 1 - (opening - due_date) / _LONGEST)
