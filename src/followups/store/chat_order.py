"""Order within a chat: a later follow-up waits until the earlier one ends.

The column ``waits_for`` of a waiting follow-up contains the id of its immediate predecessor. Waiting follow-ups are not
in the index for claims. When a follow-up ends, only the follow-up directly behind it is unblocked. Even if 100,000
follow-ups wait behind a stuck one, each is refused only once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from followups import binary_arrays
from followups.event_loop import driver_rows
from followups.halving import halve_within, halving_steps
from followups.statements import Rule, Statement, run
from followups.store import commit_checks
from followups.store.fragments import DUE_READ, NEXT_TOKEN, OPEN
from followups.store.leases import Lease, key_of, uuid_array

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from datetime import timedelta
    from uuid import UUID

    from sqlalchemy import Connection

    from followups.statements import Steps

    Refused = Callable[[UUID, Exception], None]

# The row lock keeps the earlier follow-up from ending before this transaction commits. When a follow-up ends, it
# unblocks the follow-up that is parked behind it. An earlier follow-up that another transaction has locked is skipped.
# If an earlier follow-up is skipped, the caller soon tries again.
_LOCK_EARLIER = text(f"""
    SELECT f.id FROM follow_ups f
     WHERE f.id = ANY(CAST(:ids AS uuid[])) AND {OPEN}
     ORDER BY f.id
       FOR SHARE SKIP LOCKED
""")  # noqa: S608 - no input, only the constant above

_PARK = text(f"""
    WITH leased AS MATERIALIZED (
        SELECT f.id, b.earlier
          FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[]), CAST(:earlier AS uuid[]))
               AS b(id, token, earlier)
         CROSS JOIN LATERAL (
             SELECT f.* FROM follow_ups f
              WHERE f.id = b.id AND f.lease_token = b.token AND {OPEN} AND f.begun_at IS NULL
                FOR NO KEY UPDATE SKIP LOCKED
         ) f
          -- The earlier follow-up may have changed since it was selected, so its order is checked again under the lock.
          JOIN follow_ups e ON e.id = b.earlier AND e.workspace_id = f.workspace_id AND e.chat_id = f.chat_id
           AND (e.due_date, e.id) < (f.due_date, f.id)
    )
    UPDATE follow_ups f SET waits_for = leased.earlier, lease_until = NULL
      FROM leased
     WHERE f.id = leased.id
    RETURNING f.id
""")  # noqa: S608 - no input, only the constant above


def park_if_leased(connection: Connection, pairs: Sequence[tuple[Lease, UUID]]) -> set[UUID]:
    """Park the later follow-up of each given pair; return the parked follow-ups."""
    pending = set(connection.scalars(_LOCK_EARLIER, {"ids": sorted({earlier for _, earlier in pairs})}))
    leased = [(lease, earlier) for lease, earlier in pairs if earlier in pending]
    if not leased:
        return set()
    parameters = {
        "ids": [lease.id for lease, _ in leased],
        "tokens": [lease.token for lease, _ in leased],
        "earlier": [earlier for _, earlier in leased],
    }
    return set(connection.scalars(_PARK, parameters))


PILE = 1000
"""Maximum number of due follow-ups of one chat that a single statement parks.

Parking thousands of follow-ups one by one would delay every later follow-up.
"""

# Each follow-up is locked while another follow-up is placed behind it, as in `park_if_leased`. Locked rows are skipped.
# A follow-up behind a skipped row waits for the last follow-up before that row.
_PARK_PILE = text("""
    WITH chat AS MATERIALIZED (
        SELECT DISTINCT ON (workspace_id, chat_id) workspace_id, chat_id, due_date, id
          FROM follow_ups WHERE id = ANY(CAST(:ids AS uuid[]))
         ORDER BY workspace_id, chat_id, due_date DESC, id DESC
    ), due AS MATERIALIZED (
        SELECT f.* FROM chat
         CROSS JOIN LATERAL (
             SELECT f.id, f.workspace_id, f.chat_id, f.due_date FROM follow_ups f
              WHERE f.workspace_id = chat.workspace_id AND f.chat_id = chat.chat_id AND f.status = 'pending'
                AND (f.due_date, f.id) >= (chat.due_date, chat.id) AND f.due_date <= now()
              ORDER BY f.due_date, f.id
              LIMIT :most
                FOR NO KEY UPDATE SKIP LOCKED
         ) f
    ), pile AS MATERIALIZED (
        SELECT id, lag(id) OVER (PARTITION BY workspace_id, chat_id ORDER BY due_date, id) AS earlier FROM due
    )
    UPDATE follow_ups f SET waits_for = pile.earlier, lease_until = NULL
      FROM pile
     WHERE f.id = pile.id AND pile.earlier IS NOT NULL AND f.waits_for IS NULL AND f.begun_at IS NULL
""")


def park_pile(connection: Connection, parked: Collection[UUID]) -> int:
    """Park due follow-ups behind those already parked in their chat, in order; return how many.

    A parked follow-up's lease is removed, because `begin` would refuse the follow-up. Call this after `park_if_leased`,
    in the same transaction.
    """
    return connection.execute(_PARK_PILE, {"ids": list(parked), "most": PILE}).rowcount


# A constraint ensures that a waiting follow-up is pending. If the query also checked for the status pending, the
# planner might scan the index of all pending follow-ups. If a waiting follow-up's row is locked, `unblock_orphaned`
# unblocks the follow-up later.
_WAITING = "f.waits_for = ANY(CAST(:ids AS uuid[])) AND f.waits_for IS NOT NULL"

_LOCK_WAITING = Statement(f"SELECT f.id FROM follow_ups f WHERE {_WAITING} FOR NO KEY UPDATE SKIP LOCKED")  # noqa: S608 - no input, only the constant above
_UNBLOCK = Statement("UPDATE follow_ups f SET waits_for = NULL WHERE f.id = ANY(CAST(:ids AS uuid[])) RETURNING f.id")

_UNBLOCK_AND_LEASE = Statement(f"""
    WITH waiting AS MATERIALIZED (
        SELECT w.id, w.waits_for, f.id AS unlocked
          FROM (SELECT f.id, f.waits_for FROM follow_ups f WHERE {_WAITING}) w
          LEFT JOIN LATERAL (
             SELECT f.id FROM follow_ups f WHERE f.id = w.id AND f.waits_for = w.waits_for
                FOR NO KEY UPDATE SKIP LOCKED
         ) f ON true
    ), unblocked AS (
        UPDATE follow_ups f
           SET waits_for = NULL, lease_token = {NEXT_TOKEN}, lease_until = now() + CAST(:lease AS interval)
          FROM waiting
         WHERE f.id = waiting.unlocked
        RETURNING f.id, f.lease_token, {DUE_READ} AS due, f.losses, f.workspace_id
    )
    SELECT NULL AS blocked, unblocked.* FROM unblocked
     UNION ALL
    SELECT waiting.waits_for, waiting.id, NULL, NULL, NULL, NULL FROM waiting WHERE waiting.unlocked IS NULL
""")  # noqa: S608 - no input, only the constant above

_LOCK_FORGOTTEN = text("""
    SELECT f.id FROM follow_ups f
     WHERE f.id <> ALL(CAST(:without AS uuid[])) AND f.waits_for IS NOT NULL AND NOT EXISTS (
           SELECT FROM follow_ups e
            WHERE e.id = f.waits_for AND e.status = 'pending' AND e.workspace_id = f.workspace_id
              AND e.chat_id = f.chat_id AND (e.due_date, e.id) < (f.due_date, f.id))
     LIMIT :most
       FOR NO KEY UPDATE OF f SKIP LOCKED
""")
BATCH = 1000
"""Maximum number of overlooked follow-ups that one transaction unblocks."""


_FIRST = text("""
    SELECT id FROM follow_ups
     WHERE workspace_id = :workspace_id AND chat_id = :chat_id AND status = 'pending'
     ORDER BY due_date, id LIMIT 1
""")


def first_of(connection: Connection, workspace_id: UUID, chat_id: UUID) -> UUID | None:
    """Return the earliest pending follow-up of the chat, or None if the chat has none."""
    first: UUID | None = connection.scalar(_FIRST, {"workspace_id": workspace_id, "chat_id": chat_id})
    return first


MOST_PLACES = 100
"""The highest position that `places` returns, even for follow-ups further back in their chat."""

_PLACES = text("""
    SELECT f.id, (SELECT count(*) FROM (
                      SELECT FROM follow_ups e
                       WHERE e.workspace_id = f.workspace_id AND e.chat_id = f.chat_id AND e.status = 'pending'
                         AND (e.due_date, e.id) <= (f.due_date, f.id)
                       ORDER BY e.due_date, e.id LIMIT :most) AS counted) AS place
      FROM follow_ups f WHERE f.id = ANY(CAST(:ids AS uuid[]))
""")


def places(connection: Connection, ids: Collection[UUID]) -> dict[UUID, int]:
    """Return the position of each pending follow-up in its chat, from 1 up to `MOST_PLACES`."""
    found = connection.execute(_PLACES, {"ids": uuid_array(ids), "most": MOST_PLACES})
    return {row.id: row.place for row in found}


@Rule
def unblock(ended: Collection[UUID]) -> Steps[None]:
    """Unblock the follow-ups whose predecessors have just ended.

    Call this function in the transaction that has just ended the earlier follow-ups. A follow-up whose row cannot be
    written stays blocked, and `unblock_orphaned` reports it.
    """
    if ended:
        waiting = yield _LOCK_WAITING(ids=uuid_array(ended))
        yield from _unblock([row.id for row in waiting])


def _unblock(ids: Sequence[UUID], refused: Refused | None = None) -> Steps[list[Any]]:
    return (yield from halving_steps(ids, lambda part: _UNBLOCK(ids=uuid_array(part)), refused))


def unblock_and_lease(
    connection: Connection, ended: Collection[UUID], lease: timedelta
) -> tuple[list[Lease], list[UUID]]:
    """Unblock the follow-ups that waited for the ended ones, and lease them to the caller.

    The caller sends the leased follow-ups immediately. Returns the leases, and the ended follow-ups whose successor is
    locked by another transaction.
    """
    if not ended:
        return [], []
    rows = driver_rows(connection, _UNBLOCK_AND_LEASE, {"ids": binary_arrays.uuids(ended), "lease": lease})
    leases = [
        Lease(id_, token, due, losses, key_of(workspace_id))
        for blocked, id_, token, due, losses, workspace_id in rows
        if not blocked
    ]
    if leases:
        commit_checks.by_token(connection, ((one.id, one.token) for one in leases))
    return leases, [blocked for blocked, *_ in rows if blocked]


def unblock_writable(
    connection: Connection, ended: Collection[UUID], lease: timedelta
) -> tuple[list[Lease], list[UUID]]:
    """Unblock and lease follow-ups; savepoints keep an unwritable row from affecting the other rows.

    A follow-up whose row cannot be written stays blocked, and `unblock_orphaned` reports it.
    """
    parts = halve_within(connection, list(ended), lambda part: unblock_and_lease(connection, part, lease)).done
    return [lease for leases, _ in parts for lease in leases], [one for _, blocked in parts for one in blocked]


def unblock_orphaned(connection: Connection, refused: Refused | None = None, without: Collection[UUID] = ()) -> int:
    """Unblock up to a thousand follow-ups whose rows were locked when their predecessors ended.

    Returns the number of unblocked follow-ups. ``refused`` is called for each row that cannot be written. Rows in
    ``without`` are skipped.
    """
    ids = connection.scalars(_LOCK_FORGOTTEN, {"without": uuid_array(without), "most": BATCH}).all()
    return len(run(connection, _unblock(ids, refused)))
