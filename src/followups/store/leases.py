"""The statements that move leased follow-ups on: begin, end, release. Claims are in `followups.store.claims`.

Each is one guarded, batched statement. The guard is in the SQL: a row that is not returned had been taken, ended or
claimed again, which is a normal result. Statements here never wait for another transaction's locks: locked rows are
skipped, reported, and tried again.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import text

from followups.channels import WINDOW
from followups.store import marks
from followups.store.fragments import CHAT, DUE, DUE_READ, LATENESS_FROM, LEASED, LOOKED_UP, WINDOWED, honest
from followups.store.holds import HELD_BACK

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    from sqlalchemy import Connection

    from followups.states import Final


def uuid_array(ids: Iterable[UUID]) -> str:
    """Return an array literal for PostgreSQL; a driver that adapts element by element takes ten times as long."""
    return f"{{{','.join([one.hex for one in ids])}}}"


def int_array(numbers: Iterable[int]) -> str:
    """Return an array literal of integers."""
    return f"{{{','.join(map(str, numbers))}}}"


class Lease(NamedTuple):
    """The right to begin one follow-up. ``token`` is the fencing token, ``due`` the moment to send.

    It is created several times for each follow-up, and creating a tuple takes half the time of a dataclass.
    """

    id: UUID
    token: int
    due: datetime
    losses: int = 0
    """Its lost leases: it may be a poison pill."""
    key: int = 0
    """The key of its workspace's queue (`key_of`); 0 if unknown."""
    task_id: str = ""
    """The task whose hint brought it to its worker."""
    expires: float = inf
    """When its worker drops it, an `uptime`: by then another may have it."""
    refusals: int = 0
    """How many times in a row the follow-up could not begin at its moment."""


KEYS = 2**20
"""How many keys there are. Two workspaces with the same key share a queue, which is harmless and rare."""


def key_of(workspace_id: UUID) -> int:
    """Return the key of a workspace's queue: the last bits of its id, which are random."""
    return workspace_id.int % KEYS


@dataclass(frozen=True, slots=True)
class World:
    """The settings that begin needs for its checks."""

    lease: timedelta
    max_lateness: timedelta
    early: timedelta
    """How long before the due moment begin may come; the sender waits for the rest."""


_SILENCE_BROKEN = "COALESCE(c.last_message_role = 'user', false)"
# A follow-up may be scheduled after an operator's message, which is then its trigger. If a change gave the follow-up
# another trigger, or moved it into the chat, it was still scheduled later than the message.
_TAKEN_OVER = (
    "COALESCE(c.last_message_role = 'operator' AND f.trigger_chat_message_id <> c.last_message_id"
    " AND f.scheduled_at < c.last_message_at, false)"
)
_TOO_LATE = (
    f"(CAST(:max_lateness AS interval) > interval '0' AND now() >= {LATENESS_FROM} + CAST(:max_lateness AS interval))"
)
_WINDOW_CLOSED = (
    f"(c.channel IN ({WINDOWED})"
    " AND now() >= COALESCE(c.last_user_message_at, '-infinity') + CAST(:window AS interval))"
)
_EARLY = f"{DUE} > now() + CAST(:early AS interval)"
_EARLIER = (
    "e.workspace_id = f.workspace_id AND e.chat_id = f.chat_id AND e.status = 'pending'"
    " AND (e.due_date, e.id) < (f.due_date, f.id)"
)
_BATCH = "unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[])) AS b(id, token)"

# A row locked by a caller's open transaction is skipped and tried again: one slow transaction must not hold up other
# messages.
_BEGIN = text(f"""
    WITH ready AS MATERIALIZED (
        SELECT f.id, c.channel, c.external_id
          FROM {_BATCH} {LEASED}
         {CHAT}
         WHERE c.removed_at IS NULL AND NOT {_SILENCE_BROKEN} AND NOT {_TAKEN_OVER} AND NOT {_WINDOW_CLOSED}
           AND NOT {_TOO_LATE}
           AND NOT {_EARLY} AND NOT EXISTS (SELECT FROM follow_ups e WHERE {_EARLIER} OFFSET 0) AND NOT {HELD_BACK}
    )
    UPDATE follow_ups f
       SET begun_at = now(), attempts = f.attempts + 1, lease_until = now() + CAST(:lease AS interval)
      FROM ready
     WHERE f.id = ready.id
    RETURNING f.begun_at, f.lease_token, {DUE_READ} AS due, f.snoozes, f.traceparent,
              -- in the order of Delivery
              f.id, f.workspace_id, f.chat_id, ready.channel, ready.external_id, f.trigger_chat_message_id, f.message,
              f.due_date, f.attempts
""")  # noqa: S608 - no input, only the constants above


def begin_if_leased(connection: Connection, leases: Sequence[Lease], world: World) -> list[Any]:
    """Begin the valid leases that have no obstacle; return what to send."""
    rows = list(connection.execute(_BEGIN, batch_of(leases) | _world(world)))
    if rows:
        marks.written(connection, ((row.id, row.begun_at) for row in rows))
    return rows


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a valid lease was not begun. ``earlier`` is the follow-up of its chat before it."""

    lease: Lease
    chat_removed: bool
    silence_broken: bool
    window_closed: bool
    too_late: bool
    earlier: UUID | None
    taken_over: bool = False


_OBSTACLES = text(f"""
    SELECT f.id, f.lease_token, c.removed_at IS NOT NULL AS chat_removed,
           {_SILENCE_BROKEN} AS silence_broken, {_TAKEN_OVER} AS taken_over, {_WINDOW_CLOSED} AS window_closed,
           {_TOO_LATE} AS too_late, earlier.id AS earlier
      FROM {_BATCH} CROSS JOIN LATERAL ({LOOKED_UP} OFFSET 0) f
     {CHAT}
      LEFT JOIN LATERAL (
          SELECT e.id FROM follow_ups e WHERE {_EARLIER} ORDER BY e.due_date DESC, e.id DESC LIMIT 1
      ) earlier ON true
""")  # noqa: S608 - no input, only the constants above


def obstacles(connection: Connection, leases: Sequence[Lease], world: World) -> list[Obstacle]:
    """For each valid lease, return what blocks it."""
    by_id = {lease.id: lease for lease in leases}
    rows = connection.execute(_OBSTACLES, batch_of(leases) | _world(world))
    return [
        Obstacle(
            by_id[row.id]._replace(token=row.lease_token),
            row.chat_removed,
            row.silence_broken,
            row.window_closed,
            row.too_late,
            row.earlier,
            row.taken_over,
        )
        for row in rows
    ]


_END = text(f"""
    WITH held AS MATERIALIZED (
        SELECT f.id, b.status, b.reason, b.by_code
          FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[]), CAST(:statuses AS text[]),
                      CAST(:reasons AS text[]), CAST(:by_code AS boolean[])) AS b(id, token, status, reason, by_code)
          {LEASED}
    )
    UPDATE follow_ups f
       SET status = held.status, finished_at = now(), updated_at = now(), lease_until = NULL,
           reason = CASE WHEN held.by_code THEN {honest("held.reason", "f")} ELSE held.reason END
      FROM held
     WHERE f.id = held.id
    RETURNING f.id, f.finished_at
""")  # noqa: S608 - no input, only the constants above


def end_if_not_begun(connection: Connection, ends: Sequence[tuple[Lease, Final]]) -> set[UUID]:
    """End leased follow-ups without an attempt; return those that this call ended."""
    parameters = batch_of([lease for lease, _ in ends]) | {
        "statuses": [final.status.value for _, final in ends],
        "reasons": [final.reason for _, final in ends],
        "by_code": [final.code is not None for _, final in ends],
    }
    rows = connection.execute(_END, parameters).all()
    if rows:
        marks.written(connection, rows)
    return {row.id for row in rows}


_RELEASE = text(f"""
    WITH held AS MATERIALIZED (
        SELECT f.id FROM {_BATCH} {LEASED}
    )
    UPDATE follow_ups f SET lease_until = NULL FROM held WHERE f.id = held.id
""")  # noqa: S608 - no input, only the constants above


def release_if_not_begun(connection: Connection, leases: Sequence[Lease]) -> int:
    """Release leases, so that the next tick may claim them; return how many were still valid."""
    return connection.execute(_RELEASE, batch_of(leases)).rowcount


_DEFER = text(f"""
    WITH held AS MATERIALIZED (
        SELECT f.id FROM {_BATCH} {LEASED}
    )
    UPDATE follow_ups f SET next_attempt_at = now() + CAST(:delay AS interval), lease_until = NULL
      FROM held
     WHERE f.id = held.id
""")  # noqa: S608 - no input, only the constants above


def defer_if_not_begun(connection: Connection, leases: Sequence[Lease], delay: timedelta) -> int:
    """Defer leased follow-ups without using up an attempt; return how many leases were still valid."""
    return connection.execute(_DEFER, batch_of(leases) | {"delay": delay}).rowcount


def batch_of(leases: Sequence[Lease]) -> dict[str, object]:
    """Return the parameters of a batch: ids and tokens."""
    return {"ids": uuid_array(lease.id for lease in leases), "tokens": int_array(lease.token for lease in leases)}


def _world(world: World) -> dict[str, object]:
    return {"lease": world.lease, "max_lateness": world.max_lateness, "early": world.early, "window": WINDOW}
