"""Pauses set by operators, and how they end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.halving import halve_within
from followups.store.leases import uuid_array

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Connection

BATCH = 1000
"""Number of follow-ups released in one transaction."""


@dataclass(frozen=True, slots=True)
class PauseScope:
    """The workspace and the channel that a pause applies to; None means every workspace or channel."""

    workspace_id: UUID | None
    channel: str | None

    @property
    def parameters(self) -> dict[str, object]:
        """The parameters of the SQL statement."""
        return {"workspace_id": self.workspace_id, "channel": self.channel}


@dataclass(frozen=True, slots=True)
class ActivePause:
    """A pause in force, and the number of due follow-ups it holds."""

    id: UUID
    workspace: str | None
    channel: str | None
    since: datetime
    held: int


_PAUSE = text("""
    INSERT INTO pauses (workspace_id, channel) VALUES (CAST(:workspace_id AS uuid), CAST(:channel AS text))
    ON CONFLICT DO NOTHING
""")
_THIS = """
    workspace_id IS NOT DISTINCT FROM CAST(:workspace_id AS uuid)
    AND channel IS NOT DISTINCT FROM CAST(:channel AS text)
"""
_RESUME = text(f"UPDATE pauses SET ended_at = now() WHERE {_THIS} AND ended_at IS NULL")  # noqa: S608 - no input, only the constant above
_STANDING = text("""
    SELECT p.id, w.name AS workspace, p.channel, p.created_at AS since,
           (SELECT count(*) FROM follow_ups f WHERE f.pause_id = p.id AND f.status = 'pending') AS held
      FROM pauses p LEFT JOIN workspaces w ON w.id = p.workspace_id
     WHERE p.ended_at IS NULL
     ORDER BY w.name NULLS FIRST, p.channel NULLS FIRST
""")


def pause(connection: Connection, scope: PauseScope) -> bool:
    """Pause the scope; return False if the scope was already paused."""
    return connection.execute(_PAUSE, scope.parameters).rowcount == 1


def resume(connection: Connection, scope: PauseScope) -> bool:
    """End the scope's pause, and return whether the scope was paused.

    Afterwards, the caller must call `release_orphaned` to release the held follow-ups.
    """
    return connection.execute(_RESUME, scope.parameters).rowcount == 1


def standing(connection: Connection) -> Sequence[ActivePause]:
    """Return all pauses in force."""
    return [ActivePause(*row) for row in connection.execute(_STANDING)]


_OF = text("""
    SELECT p.id, w.name AS workspace, p.channel, p.created_at AS since, 0 AS held
      FROM pauses p LEFT JOIN workspaces w ON w.id = p.workspace_id
     WHERE p.ended_at IS NULL AND (p.workspace_id = :workspace_id OR p.workspace_id IS NULL)
       AND (p.channel = :channel OR p.channel IS NULL)
     ORDER BY p.created_at LIMIT 1
""")


def of(connection: Connection, workspace_id: UUID, channel: str) -> ActivePause | None:
    """Return the oldest pause in force on this channel of this workspace, or None.

    ``held`` is always 0, because the follow-ups held by the pause are not counted.
    """
    row = connection.execute(_OF, {"workspace_id": workspace_id, "channel": channel}).one_or_none()
    return ActivePause(*row) if row else None


_IN_FORCE = text("""
    SELECT p.id, w.name AS workspace, p.channel, p.created_at AS since,
           (SELECT count(*) FROM (SELECT FROM follow_ups f
                                   WHERE f.pause_id = p.id AND f.status = 'pending'
                                     AND (CAST(:workspace_id AS uuid) IS NULL OR f.workspace_id = :workspace_id)
                                   LIMIT 10001) AS found) AS held
      FROM pauses p LEFT JOIN workspaces w ON w.id = p.workspace_id
     WHERE p.ended_at IS NULL
       AND (CAST(:workspace_id AS uuid) IS NULL OR p.workspace_id IS NULL OR p.workspace_id = :workspace_id)
     ORDER BY w.name NULLS FIRST, p.channel NULLS FIRST
     LIMIT :most
""")


def in_force(connection: Connection, workspace_id: UUID | None, most: int) -> list[ActivePause]:
    """Return up to ``most`` pauses, or those that apply to a workspace, each with at most 10,001 as ``held``."""
    return [ActivePause(*row) for row in connection.execute(_IN_FORCE, {"workspace_id": workspace_id, "most": most})]


_HELD = "f.pause_id IS NOT NULL AND f.status = 'pending'"
# The query reads only one index entry for each pause that still holds follow-ups. A pause ends when it is lifted or
# when its row is deleted manually.
_NOT_STANDING = f"""
    WITH RECURSIVE holding AS (
        (SELECT f.pause_id AS id FROM follow_ups f WHERE {_HELD} ORDER BY f.pause_id LIMIT 1)
         UNION ALL
        SELECT (SELECT f.pause_id FROM follow_ups f WHERE {_HELD} AND f.pause_id > holding.id
                 ORDER BY f.pause_id LIMIT 1)
          FROM holding WHERE holding.id IS NOT NULL
    ), ended AS MATERIALIZED (
        SELECT holding.id FROM holding
         WHERE holding.id IS NOT NULL
           AND NOT EXISTS (SELECT FROM pauses p WHERE p.id = holding.id AND p.ended_at IS NULL)
    )
"""  # noqa: S608 - no input, only the constant above
_COUNT_FORGOTTEN = text(f"""
    {_NOT_STANDING} SELECT count(*) FROM ended JOIN follow_ups f ON f.pause_id = ended.id AND {_HELD}
""")  # noqa: S608 - no input, only the constants above
_LOCK_FORGOTTEN = text(f"""
    {_NOT_STANDING}
    SELECT f.id FROM ended
     CROSS JOIN LATERAL (
         SELECT f.id FROM follow_ups f
          WHERE f.pause_id = ended.id AND {_HELD} AND f.id <> ALL(CAST(:without AS uuid[]))
          LIMIT :most
            FOR NO KEY UPDATE SKIP LOCKED
     ) f
""")  # noqa: S608 - no input, only the constants above
_FREE = text("""
    UPDATE follow_ups f SET next_attempt_at = NULL, pause_id = NULL WHERE f.id = ANY(CAST(:ids AS uuid[]))
""")
_FORGET = text("""
    DELETE FROM pauses p
     WHERE p.ended_at IS NOT NULL AND NOT EXISTS (
           SELECT FROM follow_ups f WHERE f.pause_id = p.id AND f.pause_id IS NOT NULL AND f.status = 'pending')
""")


def count_orphaned(connection: Connection) -> int:
    """Return how many follow-ups are held by pauses that are no longer in force."""
    number: int = connection.execute(_COUNT_FORGOTTEN).scalar_one()
    return number


def release_orphaned(
    connection: Connection, refused: Callable[[UUID, Exception], None] | None = None, without: Collection[UUID] = ()
) -> int:
    """Release up to a thousand follow-ups of each ended pause; return how many.

    A lifted pause is deleted once it holds no follow-ups. ``refused`` is called for each row that cannot be written.
    Rows in ``without`` are skipped.

    After a resume, `followups.operations.bulk.release_paused` calls this function until no follow-up is left to
    release. If these calls are interrupted, the dispatcher releases the remaining follow-ups.
    """

    def free(part: Sequence[UUID]) -> int:
        return connection.execute(_FREE, {"ids": uuid_array(part)}).rowcount

    ids = connection.scalars(_LOCK_FORGOTTEN, {"most": BATCH, "without": uuid_array(without)}).all()
    freed = sum(halve_within(connection, ids, free, refused).done)
    if not freed:
        connection.execute(_FORGET)
    return freed


# A running transaction always holds a lock on its virtual transaction id. Locks and application names are visible to
# every role. In pg_stat_activity, a role sees the start times of only its own transactions.
_WORKERS_OPEN = text("""
    SELECT l.virtualtransaction FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
     WHERE l.locktype = 'virtualxid' AND l.mode = 'ExclusiveLock'
       AND a.datname = current_database() AND a.application_name = 'followups-worker'
""")
_STILL_OPEN = text("""
    SELECT count(*) FROM pg_locks l
     WHERE l.locktype = 'virtualxid' AND l.mode = 'ExclusiveLock' AND l.virtualtransaction = ANY(:transactions)
""")


def workers_transactions(connection: Connection) -> list[str]:
    """Return the open transactions of workers.

    A transaction that began before a pause might not see the pause.
    """
    return list(connection.scalars(_WORKERS_OPEN))


def still_open(connection: Connection, transactions: Sequence[str]) -> int:
    """Return how many of the given worker transactions are still open."""
    number: int = connection.execute(_STILL_OPEN, {"transactions": list(transactions)}).scalar_one()
    return number
