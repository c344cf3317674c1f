"""Holds: what is paused, and what falls outside its workspace's sending hours.

A held follow-up leaves the claim's range until the hold ends. It uses up no attempt, and is not claimed and refused
again and again. Order within its chat is kept: those behind it keep waiting.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.channels import WINDOW
from followups.sending_hours import EVERY_DAY, SendingHours
from followups.store.fragments import CHAT, DUE, LEASED, LOOKED_UP, WINDOWED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy import Connection

    from followups.store.leases import Lease

NEVER = datetime(9998, 12, 31, tzinfo=UTC)
"""The next attempt of a paused follow-up: beyond every claim and every realistic due date."""

# Begin comes a little before the due moment at which the message is sent.
_SENT_AT = f"GREATEST(now(), {DUE})"
_PAUSE = """
    FROM pauses p
   WHERE p.ended_at IS NULL AND (p.workspace_id = f.workspace_id OR p.workspace_id IS NULL)
     AND (p.channel = c.channel OR p.channel IS NULL)
"""
_CLOSED = f"""
    FROM sending_hours h
   WHERE h.workspace_id = f.workspace_id AND NOT ({_SENT_AT} >= h.open_from AND {_SENT_AT} < h.open_until)
"""

# Whether there are any pauses or sending hours is asked once a statement; while there are none, which is the usual
# case, a follow-up costs nothing more.
HELD_BACK = f"""
    ((SELECT EXISTS (SELECT FROM pauses WHERE ended_at IS NULL)) AND EXISTS (SELECT {_PAUSE})
     OR (SELECT EXISTS (SELECT FROM sending_hours)) AND EXISTS (SELECT {_CLOSED}))
"""  # noqa: S608 - no input, only the constants above
"""SQL: whether follow-up ``f`` in chat ``c`` must not begin now. Once the stored time of sending is over this is true
until a worker has computed the next one (`open_next`).
"""


@dataclass(frozen=True, slots=True)
class Hours:
    """A workspace's sending hours, and the time of sending that the database compares with."""

    workspace_id: UUID
    hours: SendingHours
    open_from: datetime
    open_until: datetime


@dataclass(frozen=True, slots=True)
class Finding:
    """What may hold a leased follow-up. ``window_ends`` is None if its channel has no window."""

    id: UUID
    now: datetime
    sent_at: datetime
    """When it would be sent: now, or at its due moment."""
    due_date: datetime
    wanted_from: datetime
    """The due date, or the time at which it was set if it was already past then."""
    sendable_from: datetime | None
    """First moment at which sending hours allowed (or were to allow) the send, or None if not recorded."""
    window_ends: datetime | None
    pause_id: UUID | None
    hours: Hours | None


_FIND = text(f"""
    SELECT f.id, now() AS now, {_SENT_AT} AS sent_at, f.due_date, p.id AS pause_id, h.*,
           GREATEST(f.due_date, f.scheduled_at) AS wanted_from, f.sendable_from,
           CASE WHEN c.channel IN ({WINDOWED}) THEN c.last_user_message_at + CAST(:window AS interval) END
               AS window_ends
      FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[])) AS b(id, token)
     CROSS JOIN LATERAL ({LOOKED_UP} OFFSET 0) f
     {CHAT}
      LEFT JOIN LATERAL (SELECT p.id {_PAUSE} ORDER BY p.created_at LIMIT 1) p ON true
      LEFT JOIN sending_hours h ON h.workspace_id = f.workspace_id
     WHERE (SELECT EXISTS (SELECT FROM pauses WHERE ended_at IS NULL) OR EXISTS (SELECT FROM sending_hours))
       AND (p.id IS NOT NULL OR h.workspace_id IS NOT NULL)
""")  # noqa: S608 - no input, only the constants above


def find(connection: Connection, leases: Sequence[Lease]) -> list[Finding]:
    """Return what may hold each of the valid leases; for most there is nothing."""
    parameters = {"ids": [one.id for one in leases], "tokens": [one.token for one in leases], "window": WINDOW}
    return [
        Finding(
            row.id,
            row.now,
            row.sent_at,
            row.due_date,
            row.wanted_from,
            row.sendable_from,
            row.window_ends,
            row.pause_id,
            hours_of(row) if row.workspace_id else None,
        )
        for row in connection.execute(_FIND, parameters)
    ]


def hours_of(row: object) -> Hours:
    """Return the sending hours from a row of their table."""
    days = frozenset(day for day in EVERY_DAY if row.days >> day & 1)  # type: ignore[attr-defined]
    hours = SendingHours(row.time_zone, row.opening, row.closing, days)  # type: ignore[attr-defined]
    return Hours(row.workspace_id, hours, row.open_from, row.open_until)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Hold:
    """Until when a leased follow-up is held, and by which pause (None means by sending hours)."""

    lease: Lease
    until: datetime
    next_attempt_at: datetime
    sendable_from: datetime | None = None
    """When lateness starts to count, or None to keep the recorded time."""
    pause_id: UUID | None = None
    hours: SendingHours | None = None


# The locks on the pause and on the hours keep them in force until this commits: a resume, or a change of the hours,
# comes after it and releases. Rows that are locked or have changed meanwhile are looked at again shortly.
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
    """Hold leased follow-ups; return those now held."""
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


# Only for the hours it was computed from, and without waiting: many workers find out at the same moment.
_OPEN_NEXT = text("""
    UPDATE sending_hours h SET open_from = :new_from, open_until = :new_until
      FROM (SELECT workspace_id FROM sending_hours
             WHERE workspace_id = :workspace_id AND time_zone = :time_zone AND opening = :opening
               AND closing = :closing AND days = :days AND open_until = :open_until
               FOR NO KEY UPDATE SKIP LOCKED) mine
     WHERE h.workspace_id = mine.workspace_id
""")


def open_next(connection: Connection, hours: Hours, span: tuple[datetime, datetime]) -> None:
    """Store this time of sending for the database to compare with."""
    parameters = columns_of(hours.hours) | {"workspace_id": hours.workspace_id, "open_until": hours.open_until}
    connection.execute(_OPEN_NEXT, parameters | {"new_from": span[0], "new_until": span[1]})


def columns_of(hours: SendingHours) -> dict[str, object]:
    """Return the hours as the columns of their table."""
    days = sum(1 << day for day in hours.days)
    return {"time_zone": hours.time_zone, "opening": hours.opening, "closing": hours.closing, "days": days}


# A `sendable_from` in the past is kept. Any other becomes the opening of the current sending hours, or now if they are
# open or there are none any more.
_FREE_QUIET = text("""
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


def free_quiet(connection: Connection, workspace_id: UUID) -> int:
    """Release up to a thousand that wait for sending hours, because these have changed; return how many."""
    return connection.execute(_FREE_QUIET, {"workspace_id": workspace_id, "most": BATCH}).rowcount


SPREAD = timedelta(seconds=1)
"""Follow-ups held until the same opening return spread over this time after it, in the order of their due dates."""
_LONGEST = timedelta(days=1)


def back_at(opening: datetime, due_date: datetime) -> datetime:
    """Return when one held until ``opening`` is tried again: the first due first, and not all at once."""
    return opening + SPREAD * max(0.0, 1 - (opening - due_date) / _LONGEST)
