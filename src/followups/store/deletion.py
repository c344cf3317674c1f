"""Deletion of a workspace, or of a chat, with everything that belongs to it.

Rows are deleted in batches, each in a short transaction that skips locked rows. Pending follow-ups end before they are
deleted. A workspace is paused while it is being deleted.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.errors import ChatNotFoundError
from followups.models import Base
from followups.states import ReasonCode, Status, finish
from followups.store import bulk_cancel, chats, pauses
from followups.store.bulk_cancel import CancelCursor, CancelScope
from followups.store.fragments import NEXT_TOKEN

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

BATCH = 1000
"""Number of rows deleted in one transaction of about twenty milliseconds."""

REMOVED = finish(Status.CANCELLED, ReasonCode.CHAT_REMOVED)


@dataclass(frozen=True, slots=True)
class DeletionScope:
    """What to delete: a workspace, or one of its chats."""

    workspace_id: UUID
    chat_id: UUID | None = None

    @property
    def parameters(self) -> dict[str, object]:
        """The parameters of the deletion's SQL statements."""
        return {"workspace_id": self.workspace_id, "chat_id": self.chat_id}

    @property
    def rows(self) -> str:
        """The SQL condition for the rows that belong to the workspace or chat to delete."""
        return "workspace_id = :workspace_id" + (" AND chat_id = :chat_id" if self.chat_id else "")


IN_BATCHES = ("follow_ups", "chat_messages", "idempotency_keys", "chats", "audit_events")
"""Tables whose rows are deleted in batches, because there may be many rows."""

_AT_ONCE = [
    table
    for table in reversed(Base.metadata.sorted_tables)  # a table comes before the tables that it refers to
    if "workspace_id" in table.columns and table.name not in IN_BATCHES
]

_LOCK_WORKSPACE = text("SELECT FROM workspaces WHERE id = :workspace_id FOR UPDATE")
_MARK = text("UPDATE workspaces SET deletion_began_at = COALESCE(deletion_began_at, now()) WHERE id = :workspace_id")
_DELETE_KEYS = text("DELETE FROM api_keys WHERE workspace_id = :workspace_id")


def begin(session: Session, scope: DeletionScope) -> None:
    """Stop all scheduling and sending for the workspace or chat; a second call changes nothing.

    A workspace's API keys are deleted, and the workspace stays paused until its deletion is complete. A chat is
    removed.
    """
    if scope.chat_id is not None:
        with suppress(ChatNotFoundError):  # the chat has already been removed
            chats.remove_chat(session, scope.workspace_id, scope.chat_id)
        return
    # Another transaction may be creating an API key in this workspace. Locking the workspace waits until every such
    # transaction has ended.
    for statement in (_LOCK_WORKSPACE, _MARK, _DELETE_KEYS):
        session.execute(statement, scope.parameters)
    pauses.pause(session.connection(), pauses.PauseScope(scope.workspace_id, None))


def cancel(connection: Connection, scope: DeletionScope, after: CancelCursor) -> bulk_cancel.Cancelled:
    """Cancel the next batch of pending follow-ups, and prevent retries of the follow-ups in flight."""
    pending = CancelScope(scope.workspace_id, scope.chat_id, bulk_cancel.now(connection))
    return bulk_cancel.cancel_if_not_begun(connection, pending, REMOVED, after)


def end_lost(connection: Connection, scope: DeletionScope) -> int:
    """End follow-ups whose lease was lost, as a dispatcher does; return their number."""
    statement = text(f"""
        WITH lost AS MATERIALIZED (
            SELECT id FROM follow_ups
             WHERE {scope.rows} AND status = 'pending' AND begun_at IS NOT NULL AND lease_until <= now()
               FOR NO KEY UPDATE SKIP LOCKED
        )
        UPDATE follow_ups f
           SET status = :status, reason = :reason, finished_at = now(), updated_at = now(),
               begun_at = NULL, lease_until = NULL, lease_token = {NEXT_TOKEN}, waits_for = NULL
          FROM lost
         WHERE f.id = lost.id
    """)  # noqa: S608 - no input, only the constants above
    final = {"status": REMOVED.status.value, "reason": REMOVED.reason}
    return connection.execute(statement, scope.parameters | final).rowcount


def conditions(scope: DeletionScope) -> dict[str, str]:
    """Return the tables in order of deletion, each with the SQL condition for its rows."""
    found = {"follow_ups": f"{scope.rows} AND status <> 'pending'", "chat_messages": scope.rows}
    of_workspace = "workspace_id = :workspace_id"
    if scope.chat_id is not None:
        # The stored response to a create request contains the chat's id.
        names_chat = "position(convert_to(CAST(:chat_id AS text), 'UTF8') IN body) > 0"
        return found | {"idempotency_keys": f"{of_workspace} AND {names_chat}"}
    empty = " AND ".join(
        f"NOT EXISTS (SELECT FROM {table} o WHERE o.workspace_id = chats.workspace_id AND o.chat_id = chats.id)"
        for table in found
    )
    return found | {
        "idempotency_keys": of_workspace,
        "chats": f"{of_workspace} AND {empty}",
        "audit_events": f"{of_workspace} AND id <> :workspace_id",
    }


_EVENTS = ", events AS (DELETE FROM audit_events a USING gone WHERE a.target_id = gone.id)"


def delete_batch(connection: Connection, scope: DeletionScope, table: str, condition: str) -> int:
    """Delete the next batch of a table's rows; return how many were deleted.

    Audit events about a follow-up are deleted with the follow-up. Rows are deleted by their physical position (ctid).
    If a row was just updated, its position has changed, so only the next batch deletes the row.
    """
    returned, events = ("id", _EVENTS) if table == "follow_ups" else ("1", "")
    statement = text(f"""
        WITH gone AS (
            DELETE FROM {table}
             WHERE ctid = ANY(ARRAY(SELECT ctid FROM {table} WHERE {condition} LIMIT :most FOR UPDATE SKIP LOCKED))
            RETURNING {returned}
        ){events}
        SELECT count(*) FROM gone
    """)  # noqa: S608 - no input, only the constants above
    number: int = connection.execute(statement, scope.parameters | {"most": BATCH}).scalar_one()
    return number


_CHAT = text("DELETE FROM chats WHERE workspace_id = :workspace_id AND id = :chat_id")
_WORKSPACE = text("DELETE FROM workspaces WHERE id = :workspace_id")


def complete(connection: Connection, scope: DeletionScope) -> None:
    """Delete the workspace or chat itself, and its rows in tables that are not deleted in batches.

    Raises `IntegrityError` if a follow-up or a message still refers to the workspace or chat.
    """
    for table in _AT_ONCE:
        if scope.chat_id is None or "chat_id" in table.columns:
            connection.execute(text(f"DELETE FROM {table.name} WHERE {scope.rows}"), scope.parameters)  # noqa: S608 - no input
    connection.execute(_WORKSPACE if scope.chat_id is None else _CHAT, scope.parameters)


def left(connection: Connection, scope: DeletionScope) -> tuple[int, int]:
    """Return the numbers of in-flight and of remaining follow-ups, each counted up to a thousand."""
    statement = text(f"""
        SELECT count(begun_at), count(*) FROM (SELECT begun_at FROM follow_ups WHERE {scope.rows} LIMIT 1000) counted
    """)  # noqa: S608 - no input
    in_flight, number = connection.execute(statement, scope.parameters).one()
    return in_flight, number


def count(connection: Connection, scope: DeletionScope) -> int:
    """Return the number of follow-ups of the workspace or chat."""
    statement = text(f"SELECT count(*) FROM follow_ups WHERE {scope.rows}")  # noqa: S608 - no input
    number: int = connection.execute(statement, scope.parameters).scalar_one()
    return number
