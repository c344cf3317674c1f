"""Rate limits set by operators, their scopes, and the deferral of follow-ups that exceed a limit.

This module also defers follow-ups when the circuit breaker is open.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.channels import WINDOW
from followups.halving import halve_within
from followups.store import commit_checks
from followups.store.fragments import CHAT, DUE, ENDS_AT, LEASED
from followups.store.leases import batch_of, uuid_array

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    from sqlalchemy import Connection

    from followups.halving import Halved
    from followups.store.leases import Lease


@dataclass(frozen=True, slots=True)
class LimitScope:
    """The workspace and the channel that a rate limit applies to; None means all.

    ``per`` decides which follow-ups share a bucket.
    """

    workspace_id: UUID | None
    channel: str | None
    per: str

    @property
    def parameters(self) -> dict[str, object]:
        """The parameters of the SQL statement."""
        return {"workspace_id": self.workspace_id, "channel": self.channel, "per": self.per}


@dataclass(frozen=True, slots=True)
class Limit:
    """A rate limit in force: ``rate`` tokens a second, ``burst`` tokens in a full bucket."""

    id: UUID
    workspace_id: UUID | None
    channel: str | None
    per: str
    rate: float
    burst: int
    workspace: str | None
    since: datetime


_SET = text("""
    INSERT INTO rate_limits (workspace_id, channel, per, rate, burst)
    VALUES (CAST(:workspace_id AS uuid), CAST(:channel AS text), :per, :rate, :burst)
    ON CONFLICT (COALESCE(workspace_id, '00000000-0000-0000-0000-000000000000'::uuid), COALESCE(channel, ''), per)
    DO UPDATE SET rate = excluded.rate, burst = excluded.burst
""")
_CLEAR = text("""
    DELETE FROM rate_limits
     WHERE workspace_id IS NOT DISTINCT FROM CAST(:workspace_id AS uuid)
       AND channel IS NOT DISTINCT FROM CAST(:channel AS text) AND per = :per
""")
_LIMIT = """
    SELECT l.id, l.workspace_id, l.channel, l.per, l.rate, l.burst, w.name AS workspace, l.created_at
      FROM rate_limits l LEFT JOIN workspaces w ON w.id = l.workspace_id
"""
_STANDING = text(f"{_LIMIT} ORDER BY w.name NULLS FIRST, l.channel NULLS FIRST, l.per")
_OF = text(f"""
    {_LIMIT}
     WHERE (l.workspace_id = :workspace_id OR l.workspace_id IS NULL) AND (l.channel = :channel OR l.channel IS NULL)
     ORDER BY l.rate
""")


def put(connection: Connection, scope: LimitScope, rate: float, burst: int) -> None:
    """Create or change a rate limit."""
    connection.execute(_SET, scope.parameters | {"rate": rate, "burst": burst})


def clear(connection: Connection, scope: LimitScope) -> bool:
    """Remove a rate limit; return whether there was one."""
    return connection.execute(_CLEAR, scope.parameters).rowcount == 1


def standing(connection: Connection) -> list[Limit]:
    """Return every rate limit, the widest scope first."""
    return [Limit(*row) for row in connection.execute(_STANDING)]


_CONCERNING = text(f"""
    {_LIMIT}
     WHERE (CAST(:workspace_id AS uuid) IS NULL AND l.workspace_id IS NULL)
        OR (CAST(:workspace_id AS uuid) IS NOT NULL AND (l.workspace_id = :workspace_id OR l.workspace_id IS NULL))
     ORDER BY w.name NULLS FIRST, l.channel NULLS FIRST, l.per LIMIT :most
""")


def concerning(connection: Connection, workspace_id: UUID | None, most: int) -> list[Limit]:
    """Return the rate limits that apply to a workspace.

    Without a workspace, return the limits that apply to all workspaces.
    """
    return [Limit(*row) for row in connection.execute(_CONCERNING, {"workspace_id": workspace_id, "most": most})]


def of(connection: Connection, workspace_id: UUID, channel: str) -> list[Limit]:
    """Return the rate limits that apply to one channel of a workspace, the slowest first."""
    return [Limit(*row) for row in connection.execute(_OF, {"workspace_id": workspace_id, "channel": channel})]


@dataclass(frozen=True, slots=True)
class Limitable:
    """What the rate limits need to know about a leased follow-up."""

    id: UUID
    ended: bool
    """Whether the follow-up was cancelled, or sent by another worker, so that no rate limit applies."""
    workspace_id: UUID
    chat_id: UUID
    channel: str
    since: datetime
    """The earliest time at which the follow-up could be sent.

    This is the later of the due date and the time at which the due date was set.
    """
    left: timedelta | None
    """Time until the messaging window or the allowed lateness ends, or None if neither applies."""

    @property
    def is_over(self) -> bool:
        """Return whether the follow-up has ended, or would end now instead of being sent."""
        return self.ended or (self.left is not None and not self.left)


# LATERAL makes PostgreSQL look up each follow-up by its key, even if the statistics are wrong.
_LIMITABLE = text(f"""
    SELECT f.id, f.status <> 'pending' AS ended, f.workspace_id, f.chat_id, c.channel,
           GREATEST(f.due_date, f.scheduled_at) AS since, GREATEST({ENDS_AT}, now()) - now() AS left, {ENDS_AT} AS ends
      FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[])) AS b(id, token)
     CROSS JOIN LATERAL (
           SELECT f.* FROM follow_ups f
            WHERE f.id = b.id
              AND (f.status <> 'pending' OR f.lease_token = b.token AND f.begun_at IS NULL AND f.lease_until > now())
           OFFSET 0
     ) f
     {CHAT}
""")  # noqa: S608 - no input, only the constants above


def limitable(connection: Connection, leases: Sequence[Lease], max_lateness: timedelta) -> list[Limitable]:
    """Return what the rate limits need to know about each valid lease.

    The list includes follow-ups that have ended.
    """
    parameters = batch_of(leases) | {"max_lateness": max_lateness, "window": WINDOW}
    return [
        Limitable(
            row.id,
            row.ended,
            row.workspace_id,
            row.chat_id,
            row.channel,
            row.since,
            None if row.ends is None else row.left,
        )
        for row in connection.execute(_LIMITABLE, parameters)
    ]


_DEFER = text(f"""
    WITH leased AS MATERIALIZED (
        SELECT f.id, GREATEST(now() + b.wait, {DUE}) AS again
          FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[]), CAST(:waits AS interval[])) AS b(id, token, wait)
         {LEASED}
    )
    UPDATE follow_ups f
       SET next_attempt_at = leased.again, limited_until = leased.again, lease_until = NULL
      FROM leased
     WHERE f.id = leased.id
    RETURNING f.id, f.next_attempt_at
""")  # noqa: S608 - no input, only the constant above


def defer_if_leased(connection: Connection, waits: Sequence[tuple[Lease, timedelta]]) -> set[UUID]:
    """Defer each leased follow-up by its own delay, without using up an attempt.

    Return the follow-ups that were deferred.
    """
    parameters = batch_of([lease for lease, _ in waits]) | {"waits": [wait for _, wait in waits]}
    rows = connection.execute(_DEFER, parameters).all()
    if rows:
        commit_checks.by_time(connection, rows)
    return {row.id for row in rows}


_DEFERRED = f"""f.status = 'pending' AND f.waits_for IS NULL
           AND {DUE} BETWEEN now() AND now() + CAST(:longest AS interval)
           AND f.limited_until = f.next_attempt_at AND f.lease_until IS NULL"""

_LOCK_DEFERRED = text(f"""
    SELECT f.id FROM follow_ups f
     WHERE {_DEFERRED} AND f.id <> ALL(CAST(:without AS uuid[]))
       AND (CAST(:workspace_id AS uuid) IS NULL OR f.workspace_id = CAST(:workspace_id AS uuid))
       AND (CAST(:channel AS text) IS NULL
            OR EXISTS (SELECT FROM chats c
                        WHERE c.workspace_id = f.workspace_id AND c.id = f.chat_id AND c.channel = :channel))
     ORDER BY {DUE}
     LIMIT :most
       FOR NO KEY UPDATE SKIP LOCKED
""")  # noqa: S608 - no input, only the constant above
_RELEASE = text("UPDATE follow_ups f SET next_attempt_at = NULL WHERE f.id = ANY(CAST(:ids AS uuid[]))")
BATCH = 1000
"""Number of follow-ups released in one transaction."""


def release(
    connection: Connection, scope: tuple[UUID | None, str | None], longest: timedelta, without: Collection[UUID] = ()
) -> Halved[UUID, int]:
    """Release up to a thousand follow-ups deferred by a rate limit, so that they become due.

    Follow-ups whose deferral ends more than ``longest`` from now are not released. ``scope`` is the workspace and the
    channel of the limit; None means every workspace or channel. Returns the released follow-ups, and the follow-ups
    whose rows cannot be written.
    """
    workspace_id, channel = scope
    parameters = {"workspace_id": workspace_id, "channel": channel, "longest": longest, "most": BATCH}
    ids = connection.scalars(_LOCK_DEFERRED, parameters | {"without": uuid_array(without)}).all()
    return halve_within(connection, ids, partial(_release, connection))


def _release(connection: Connection, ids: Sequence[UUID]) -> int:
    return connection.execute(_RELEASE, {"ids": uuid_array(ids)}).rowcount


# The key of a workspace queue consists of the last 20 bits of the workspace's id (`followups.store.leases.key_of`).
_WORKSPACES = text("""
    SELECT w.id FROM workspaces w
     WHERE ('x' || right(CAST(w.id AS text), 5))::bit(20)::int = ANY(CAST(:keys AS int[]))
""")


def workspaces_of(connection: Connection, keys: Iterable[int]) -> list[UUID]:
    """Return the workspaces whose queues have these keys.

    The query reads all workspaces, which takes 48 ms for 50,000 of them.
    """
    return list(connection.scalars(_WORKSPACES, {"keys": list(keys)}))


# Each workspace is searched separately, because one workspace may own almost all the follow-ups that are due soon.
_LOCK_DEFERRED_OF = text(f"""
    WITH deferred AS MATERIALIZED (
        SELECT f.id, f.next_attempt_at
          FROM unnest(CAST(:workspace_ids AS uuid[])) AS w(id)
         CROSS JOIN LATERAL (
             SELECT f.id, f.next_attempt_at FROM follow_ups f
              WHERE f.workspace_id = w.id AND {_DEFERRED}
              ORDER BY f.workspace_id, {DUE}, f.id
              LIMIT :most
         ) f
         ORDER BY f.next_attempt_at, f.id
         LIMIT :most
    )
    SELECT f.id
      FROM deferred
     CROSS JOIN LATERAL (
         SELECT f.id FROM follow_ups f WHERE f.id = deferred.id AND {_DEFERRED} FOR NO KEY UPDATE SKIP LOCKED
     ) f
""")  # noqa: S608 - no input, only the constants above


def release_workspaces(connection: Connection, workspace_ids: Iterable[UUID], longest: timedelta, most: int) -> int:
    """Release up to ``most`` deferred follow-ups of the given workspaces; return how many were released.

    The follow-ups whose deferral ends first are released first. A follow-up whose row cannot be written stays deferred
    until its deferral ends.
    """
    parameters = {"workspace_ids": uuid_array(workspace_ids), "longest": longest, "most": most}
    ids = connection.scalars(_LOCK_DEFERRED_OF, parameters).all()
    return sum(halve_within(connection, ids, partial(_release, connection)).done)
