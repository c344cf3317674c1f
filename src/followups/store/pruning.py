"""Pruning deletes old finished follow-ups, old chat messages and expired idempotency keys.

Finished follow-ups are deleted with their failed attempts. Rows are deleted oldest first, in short transactions that
skip locked rows. Pending follow-ups are never deleted.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from sqlalchemy import text

from followups.store.idempotency import LIFETIME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection

BATCH = 1000
"""Number of rows deleted in one transaction of about twenty milliseconds."""

_OLD = "FROM follow_ups WHERE finished_at < :before AND status <> 'pending'"
_COUNT = text(f"SELECT count(*) {_OLD}")
_SOME = text(f"SELECT id {_OLD} ORDER BY finished_at LIMIT :most")
_PICK = text(f"SELECT * {_OLD} ORDER BY finished_at LIMIT :most FOR UPDATE SKIP LOCKED")
_FAILURES = text("""
    SELECT * FROM failed_attempts WHERE follow_up_id = ANY(CAST(:ids AS uuid[])) ORDER BY follow_up_id, id
""")
_DELETE = text("DELETE FROM follow_ups WHERE id = ANY(CAST(:ids AS uuid[])) AND status <> 'pending'")
_DELETE_OLD = text(f"""
    WITH old AS MATERIALIZED (SELECT id {_OLD} ORDER BY finished_at LIMIT :most FOR UPDATE SKIP LOCKED)
    DELETE FROM follow_ups f USING old WHERE f.id = old.id
""")  # noqa: S608 - likewise


def count_finished(connection: Connection, before: datetime) -> int:
    """Return how many follow-ups finished before the given time."""
    number: int = connection.execute(_COUNT, {"before": before}).scalar_one()
    return number


def some_finished(connection: Connection, before: datetime, most: int) -> list[UUID]:
    """Return the first few follow-ups that finished before the given time."""
    return list(connection.scalars(_SOME, {"before": before, "most": most}))


@dataclass(frozen=True, slots=True)
class Picked:
    """A follow-up that is about to be deleted, with its failed attempts."""

    row: Any
    failures: Sequence[Any]


def pick_finished(connection: Connection, before: datetime) -> list[Picked]:
    """Lock and return the next batch of follow-ups that finished before the given time.

    The caller must delete the returned follow-ups.
    """
    rows = connection.execute(_PICK, {"before": before, "most": BATCH}).all()
    failures: dict[UUID, list[Any]] = {row.id: [] for row in rows}
    for failure in connection.execute(_FAILURES, {"ids": list(failures)}):
        failures[failure.follow_up_id].append(failure)
    return [Picked(row, failures[row.id]) for row in rows]


def delete(connection: Connection, ids: Sequence[UUID]) -> int:
    """Delete these finished follow-ups; return how many were deleted."""
    return connection.execute(_DELETE, {"ids": list(ids)}).rowcount


def delete_finished(connection: Connection, before: datetime) -> int:
    """Delete the next batch of follow-ups that finished before the given time; return their number."""
    return connection.execute(_DELETE_OLD, {"before": before, "most": BATCH}).rowcount


_DELETE_KEYS = text("""
    WITH old AS MATERIALIZED (
        SELECT workspace_id, key FROM idempotency_keys
         WHERE created_at <= now() - CAST(:lifetime AS interval)
         ORDER BY created_at LIMIT :most
           FOR UPDATE SKIP LOCKED
    )
    DELETE FROM idempotency_keys k USING old WHERE k.workspace_id = old.workspace_id AND k.key = old.key
""")


def delete_expired_keys(connection: Connection) -> int:
    """Delete the next batch of expired idempotency keys; return how many were deleted."""
    return connection.execute(_DELETE_KEYS, {"lifetime": LIFETIME, "most": BATCH}).rowcount


class MessageCursor(NamedTuple):
    """The position at which a scan of chat messages by age has stopped."""

    created_at: datetime = datetime(1, 1, 1, tzinfo=UTC)
    id: UUID = UUID(int=0)


OLDEST = MessageCursor()

# Each chat's last message is kept, so that a repeat of that message is recognised. Each scan continues where the
# previous one ended, so it skips the messages that are kept.
_DELETE_MESSAGES = text("""
    WITH old AS MATERIALIZED (
        SELECT workspace_id, id, chat_id, created_at FROM chat_messages
         WHERE created_at < :before AND created_at >= :after AND (created_at, id) > (:after, :after_id)
         ORDER BY created_at, id LIMIT :most
    ), gone AS (
        DELETE FROM chat_messages m USING old
         WHERE m.workspace_id = old.workspace_id AND m.id = old.id AND NOT EXISTS (
               SELECT FROM chats c WHERE c.workspace_id = old.workspace_id AND c.id = old.chat_id
                                     AND c.last_message_id = old.id)
        RETURNING m.id
    )
    SELECT (SELECT count(*) FROM gone) AS number, created_at, id FROM old ORDER BY created_at DESC, id DESC LIMIT 1
""")


def delete_messages(connection: Connection, before: datetime, after: MessageCursor) -> tuple[int, MessageCursor | None]:
    """Read the next batch of old chat messages, and delete those that are no longer needed.

    Returns how many messages were deleted and where the scan ended. If no old message is left, the scan's end is None.
    """
    place = {"after": after.created_at, "after_id": after.id}
    row = connection.execute(_DELETE_MESSAGES, {"before": before, "most": BATCH} | place).one_or_none()
    return (row.number, MessageCursor(row.created_at, row.id)) if row else (0, None)
