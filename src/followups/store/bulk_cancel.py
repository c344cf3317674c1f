"""Bulk cancellation for operators: count, preview, cancel.

It works in batches, each a short transaction of whole follow-ups. A batch returns where it ended, and the next one
starts there; so a locked row is passed over once, and not met again and again.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from sqlalchemy import text

from followups.states import Status
from followups.store import chat_order
from followups.store.follow_ups import cancelled_or_asked_to
from followups.store.fragments import honest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, TextClause

    from followups.states import Final

BATCH = 500
"""Follow-ups in one transaction, which takes some ten milliseconds."""

NIL = UUID(int=0)
FIRST = datetime(1, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Pending:
    """What to cancel: everything of a workspace, or of one chat in it, created until ``until``."""

    workspace_id: UUID
    chat_id: UUID | None
    until: datetime

    @property
    def parameters(self) -> dict[str, object]:
        """The statement's parameters."""
        return {"workspace_id": self.workspace_id, "chat_id": self.chat_id, "until": self.until}


def _where(pending: Pending) -> str:
    one_chat = " AND chat_id = :chat_id" if pending.chat_id else ""
    asked = "(begun_at IS NULL OR cancel_requested IS NULL)"  # those already asked to stop are skipped
    return f"workspace_id = :workspace_id AND status = 'pending' AND created_at <= :until{one_chat} AND {asked}"


class Count(NamedTuple):
    """How many there are, and how many of them are being delivered right now."""

    number: int
    in_flight: int


def count_pending(connection: Connection, pending: Pending) -> Count:
    """Count what would be cancelled."""
    query = f"SELECT count(*), count(begun_at) FROM follow_ups WHERE {_where(pending)}"  # noqa: S608 - no input
    return Count(*connection.execute(text(query), pending.parameters).one())


def some_pending(connection: Connection, pending: Pending, most: int) -> list[UUID]:
    """Return the first few, in the order in which they would be cancelled."""
    query = f"SELECT id FROM follow_ups WHERE {_where(pending)} ORDER BY chat_id, due_date, id LIMIT :most"  # noqa: S608 - no input
    return list(connection.scalars(text(query), pending.parameters | {"most": most}))


class Place(NamedTuple):
    """Where a batch ended, in the order of the chats."""

    chat_id: UUID = NIL
    due_date: datetime = FIRST
    id: UUID = NIL


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The result of a batch. ``ended`` is None at the end."""

    cancelled: Sequence[UUID]
    in_flight: int
    """Not cancelled, but not retried either."""
    ended: Place | None


@lru_cache
def _cancel(where: str, *, by_code: bool) -> TextClause:
    reason = honest("CAST(:reason AS text)", "f") if by_code else "CAST(:reason AS text)"
    return text(f"""
        WITH held AS MATERIALIZED (
            SELECT id FROM follow_ups
             WHERE {where} AND (chat_id, due_date, id) > (:after_chat, :after_due, :after_id)
             ORDER BY chat_id, due_date, id
             LIMIT :most
               FOR NO KEY UPDATE SKIP LOCKED
        )
        UPDATE follow_ups f
           SET {cancelled_or_asked_to(reason)}
          FROM held
         WHERE f.id = held.id
        RETURNING f.id, f.status, f.chat_id, f.due_date
    """)  # noqa: S608 - no input, only the conditions above


def cancel_if_not_begun(connection: Connection, pending: Pending, final: Final, after: Place) -> Cancelled:
    """Cancel the next batch. One in flight is only kept from a retry; locked rows are skipped."""
    place = {"after_chat": after.chat_id, "after_due": after.due_date, "after_id": after.id, "most": BATCH}
    statement = _cancel(_where(pending), by_code=final.code is not None)
    parameters = pending.parameters | place | {"status": final.status.value, "reason": final.reason}
    rows = connection.execute(statement, parameters).all()
    ended = [row.id for row in rows if row.status == Status.CANCELLED]
    chat_order.unblock(connection, ended)
    last = max((Place(row.chat_id, row.due_date, row.id) for row in rows), default=None)
    return Cancelled(ended, len(rows) - len(ended), last)


# As of now, without what is created while the batches run.
_NOW = text("SELECT now()")


def now(connection: Connection) -> datetime:
    """Return the database's now."""
    moment: datetime = connection.execute(_NOW).scalar_one()
    return moment


_CHATS_WORKSPACES = text("""
    SELECT w.id FROM workspaces w JOIN chats c ON c.workspace_id = w.id AND c.id = :chat_id ORDER BY w.name
""")


def workspaces_of_chat(connection: Connection, chat_id: UUID) -> list[UUID]:
    """Return the workspaces that have a chat with this id: a chat's key is both together."""
    return list(connection.scalars(_CHATS_WORKSPACES, {"chat_id": chat_id}))
