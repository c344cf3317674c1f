"""Settlement records the outcome of each attempt. For a failed attempt, settlement also inserts a row."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import text

from followups import binary_arrays
from followups.channels import WINDOW
from followups.event_loop import driver_rows
from followups.halving import halve_within
from followups.statements import Statement
from followups.states import CANCEL_CODES, Status
from followups.store import commit_checks
from followups.store.fragments import ENDS_AT, OPEN, honest
from followups.store.leases import batch_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Connection

    from followups.store.leases import Lease


ENDED_MARGIN = timedelta(milliseconds=200)
"""How long after the end of its allowed lateness a follow-up is claimed again, so that begin finds it too late.

Begin looks at a follow-up shortly before its due time.
"""


class Settlement(NamedTuple):
    """The outcome to record for an attempt.

    If the status is pending, the attempt is retried after ``delay``, by the database's clock.
    """

    lease: Lease
    status: Status
    reason: str | None = None
    delay: timedelta | None = None
    chat_message_id: UUID | None = None
    accepted_ago: float = 0.0
    """For a sent follow-up, the seconds since the transport accepted it."""
    seconds: float = 0.0
    """Duration, in seconds, of the attempt that sent the follow-up."""
    refunded: bool = False
    """Whether the attempt does not count because the receiver asked for a later one."""
    cancel_takes_precedence: bool = True
    """Whether a cancel during the attempt overrides the attempt's outcome."""
    cancel_detail: str = ""
    """Text that is appended to a cancel's reason if the reason is only a code; may be empty."""


class SettledFollowUp(NamedTuple):
    """A settled follow-up. For a sent follow-up, ``lag`` is the time in seconds from due date to acceptance."""

    id: UUID
    status: Status
    reason: str | None
    lag: float | None
    next_attempt_at: datetime | None


_IS_CANCELLED = "(r.cancel_takes_precedence AND f.cancel_requested IS NOT NULL)"

_BY_CODE = ", ".join(f"'{code.value}'" for code in sorted(CANCEL_CODES))
_CANCEL_REASON = f"""
    CASE WHEN f.cancel_requested IN ({_BY_CODE}) THEN {honest("f.cancel_requested || r.cancel_detail", "f")}
         ELSE f.cancel_requested END
"""
"""SQL for the reason that is stored if a follow-up is cancelled during an attempt. An operator's own words stay
unchanged.
"""

# A follow-up that cannot be sent any more must end on time, and must not keep later ones of its chat waiting.
_NEXT_ATTEMPT = f"""
    LEAST(now() + r.delay,
          (SELECT GREATEST(last.ends + CAST(:margin AS interval), now())
             FROM (SELECT {ENDS_AT} AS ends FROM chats c
                    WHERE c.workspace_id = f.workspace_id AND c.id = f.chat_id) last
            WHERE last.ends IS NOT NULL))
"""  # noqa: S608 - no input, only the constant above
"""SQL for the time of the next attempt: after the delay, or as soon as the follow-up can no longer be sent."""

_IN_FLIGHT_ROWS = f"""
         CROSS JOIN LATERAL (
             SELECT f.ctid AS place FROM follow_ups f
              WHERE f.id = b.id AND f.lease_token = b.token AND {OPEN} AND f.begun_at IS NOT NULL
                FOR NO KEY UPDATE SKIP LOCKED
         ) f
"""  # noqa: S608 - no input, only the constant above
"""SQL that locks the rows of the attempts in flight. The update then needs no second look-up, because it uses the rows'
locations (ctid). A row that was updated since the statement's snapshot is not found there, and is tried again like a
locked row.
"""

_SETTLE = text(f"""
    WITH r AS MATERIALIZED (
        SELECT b.*, f.place
          FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[]), CAST(:statuses AS text[]),
                      CAST(:reasons AS text[]), CAST(:delays AS interval[]), CAST(:refunded AS boolean[]),
                      CAST(:cancel_takes_precedence AS boolean[]), CAST(:cancel_details AS text[]))
               AS b(id, token, status, reason, delay, refunded, cancel_takes_precedence, cancel_detail)
          {_IN_FLIGHT_ROWS}
    )
    UPDATE follow_ups f
       SET status = CASE WHEN {_IS_CANCELLED} THEN 'cancelled' ELSE r.status END,
           reason = CASE WHEN {_IS_CANCELLED} THEN {_CANCEL_REASON} ELSE {honest("r.reason", "f")} END,
           finished_at = CASE WHEN {_IS_CANCELLED} OR r.status <> 'pending' THEN now() END,
           updated_at = CASE WHEN {_IS_CANCELLED} OR r.status <> 'pending' THEN now() ELSE f.updated_at END,
           next_attempt_at = CASE WHEN {_IS_CANCELLED} OR r.status <> 'pending' THEN f.next_attempt_at
                                  ELSE {_NEXT_ATTEMPT} END,
           attempts = f.attempts - r.refunded::int,
           snoozes = f.snoozes + r.refunded::int,
           begun_at = NULL,
           lease_until = NULL
      FROM r
     WHERE f.ctid = r.place
    RETURNING f.id, f.status, f.reason, f.next_attempt_at, f.finished_at
""")  # noqa: S608 - no input, only the constant above


# Most outcomes are `sent`, so this statement omits the columns that only other outcomes need.
_SETTLE_SENT = Statement(f"""
    WITH r AS MATERIALIZED (
        SELECT b.*, f.place
          FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[]), CAST(:chat_message_ids AS uuid[]),
                      CAST(:accepted_ago AS double precision[]), CAST(:took AS double precision[]))
               AS b(id, token, chat_message_id, accepted_ago, took)
          {_IN_FLIGHT_ROWS}
    )
    UPDATE follow_ups f
       SET status = 'sent', finished_at = now(), updated_at = now(), begun_at = NULL, lease_until = NULL,
           chat_message_id = COALESCE(r.chat_message_id, f.chat_message_id),
           accepted_at = clock_timestamp() - make_interval(secs => r.accepted_ago),
           accepted_duration = make_interval(secs => r.took)
      FROM r
     WHERE f.ctid = r.place
    RETURNING f.id, date_part('epoch', f.accepted_at - f.due_date) AS lag, f.finished_at
""")  # noqa: S608 - no input, only the constant above


def settle_if_in_flight(
    connection: Connection, settlements: Sequence[Settlement], max_lateness: timedelta
) -> list[SettledFollowUp]:
    """Record the outcomes of attempts in flight, and return the settled follow-ups.

    No retry is later than the end of the allowed lateness, so that the follow-up then ends. A follow-up that is not
    returned is locked, was just updated, or is now leased by another worker.
    """
    sent = [one for one in settlements if one.status is Status.SENT]
    others = [one for one in settlements if one.status is not Status.SENT]
    return [
        *(_settle_sent(connection, sent) if sent else ()),
        *(_settle(connection, others, max_lateness) if others else ()),
    ]


def _settle_sent(connection: Connection, settlements: Sequence[Settlement]) -> list[SettledFollowUp]:
    parameters = {
        "chat_message_ids": binary_arrays.uuids([s.chat_message_id for s in settlements]),
        "accepted_ago": binary_arrays.doubles([s.accepted_ago for s in settlements]),
        "took": binary_arrays.doubles([s.seconds for s in settlements]),
    }
    rows = driver_rows(connection, _SETTLE_SENT, batch_of([one.lease for one in settlements]) | parameters)
    if rows:
        commit_checks.by_time(connection, ((row_id, finished_at) for row_id, _, finished_at in rows))
    return [SettledFollowUp(row_id, Status.SENT, None, lag, None) for row_id, lag, _ in rows]


def _settle(
    connection: Connection, settlements: Sequence[Settlement], max_lateness: timedelta
) -> list[SettledFollowUp]:
    parameters = {
        "max_lateness": max_lateness,
        "window": WINDOW,
        "margin": ENDED_MARGIN,
        "statuses": [s.status.value for s in settlements],
        "reasons": [s.reason for s in settlements],
        "delays": [s.delay for s in settlements],
        "refunded": [s.refunded for s in settlements],
        "cancel_takes_precedence": [s.cancel_takes_precedence for s in settlements],
        "cancel_details": [s.cancel_detail for s in settlements],
    }
    rows = connection.execute(_SETTLE, batch_of([one.lease for one in settlements]) | parameters).all()
    if rows:
        commit_checks.by_time(connection, ((row.id, row.finished_at or row.next_attempt_at) for row in rows))
    return [SettledFollowUp(row.id, Status(row.status), row.reason, None, row.next_attempt_at) for row in rows]


_IN_FLIGHT = text(f"""
    SELECT b.id
      FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[])) AS b(id, token)
     CROSS JOIN LATERAL (
         SELECT FROM follow_ups f
          WHERE f.id = b.id AND f.lease_token = b.token AND {OPEN} AND f.begun_at IS NOT NULL
         OFFSET 0
     ) f
""")  # noqa: S608 - no input, only the constant above


def still_in_flight(connection: Connection, leases: Sequence[Lease]) -> set[UUID]:
    """Return the ids of attempts in flight: those whose rows were locked or just updated when settle skipped them."""
    return set(connection.scalars(_IN_FLIGHT, batch_of(leases)))


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed attempt. ``duration`` is None if it was not measured."""

    follow_up_id: UUID
    number: int
    outcome: str
    detail: str
    status_code: int | None = None
    duration: timedelta | None = None


_RECORD = text("""
    INSERT INTO failed_attempts (follow_up_id, number, outcome, detail, status_code, duration)
    SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:numbers AS int[]), CAST(:outcomes AS text[]),
                         CAST(:details AS text[]), CAST(:status_codes AS int[]), CAST(:durations AS interval[]))
""")


def record_failures(connection: Connection, failures: Sequence[Failure]) -> list[tuple[Failure, Exception]]:
    """Record failed attempts, each batch under a savepoint; return the attempts that were not recorded."""
    return halve_within(connection, failures, partial(_record, connection)).refused


def _record(connection: Connection, failures: Sequence[Failure]) -> None:
    parameters = {
        "ids": [f.follow_up_id for f in failures],
        "numbers": [f.number for f in failures],
        "outcomes": [f.outcome for f in failures],
        "details": [f.detail for f in failures],
        "status_codes": [f.status_code for f in failures],
        "durations": [f.duration for f in failures],
    }
    connection.execute(_RECORD, parameters)
