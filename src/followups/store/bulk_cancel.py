"""Bulk cancellation for operators: count, preview, cancel.

Follow-ups are cancelled in batches, each in a short transaction. Each batch starts after the last follow-up of the
previous batch. A locked row that one batch skipped is therefore not read again by later batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from sqlalchemy import text

from followups.halving import halve_within
from followups.states import Status
from followups.store import chat_order
from followups.store.follow_ups import cancelled_or_asked_to
from followups.store.fragments import honest
from followups.store.leases import uuid_array

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, TextClause

    from followups.states import Final

BATCH = 500
"""Number of follow-ups cancelled in one transaction of about ten milliseconds."""

NIL = UUID(int=0)
FIRST = datetime(1, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class CancelScope:
    """Pending follow-ups of a workspace or one of its chats, except any created after ``until``."""

    workspace_id: UUID
    chat_id: UUID | None
    until: datetime

    @property
    def parameters(self) -> dict[str, object]:
        """The parameters of the SQL statement."""
        return {"workspace_id": self.workspace_id, "chat_id": self.chat_id, "until": self.until}


def _where(pending: CancelScope) -> str:
    one_chat = " AND chat_id = :chat_id" if pending.chat_id else ""
    # skips follow-ups in flight whose cancellation was already requested
    asked = "(begun_at IS NULL OR cancel_requested IS NULL)"
    return f"workspace_id = :workspace_id AND status = 'pending' AND created_at <= :until{one_chat} AND {asked}"


class Count(NamedTuple):
    """The number of pending follow-ups, and how many of them are in flight."""

    number: int
    in_flight: int


def count_pending(connection: Connection, pending: CancelScope) -> Count:
    """Count how many follow-ups a bulk cancel would cancel."""
    query = f"SELECT count(*), count(begun_at) FROM follow_ups WHERE {_where(pending)}"  # noqa: S608 - no input
    return Count(*connection.execute(text(query), pending.parameters).one())


def some_pending(connection: Connection, pending: CancelScope, most: int) -> list[UUID]:
    """Return the first few follow-ups that a bulk cancel would cancel, in the order of cancellation."""
    query = f"SELECT id FROM follow_ups WHERE {_where(pending)} ORDER BY chat_id, due_date, id LIMIT :most"  # noqa: S608 - no input
    return list(connection.scalars(text(query), pending.parameters | {"most": most}))


class CancelCursor(NamedTuple):
    """The position at which a batch ended: the chat, due date and id of its last follow-up."""

    chat_id: UUID = NIL
    due_date: datetime = FIRST
    id: UUID = NIL


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The result of one batch of a bulk cancel. ``ended`` is None if no follow-up was left to cancel."""

    cancelled: Sequence[UUID]
    in_flight: int
    """Number of follow-ups in flight; their attempts finish but are not retried."""
    ended: CancelCursor | None


@lru_cache
def _lock(where: str) -> TextClause:
    return text(f"""
        SELECT chat_id, due_date, id FROM follow_ups
         WHERE {where} AND (chat_id, due_date, id) > (:after_chat, :after_due, :after_id)
         ORDER BY chat_id, due_date, id
         LIMIT :most
           FOR NO KEY UPDATE SKIP LOCKED
    """)  # noqa: S608 - no input, only the conditions above


@lru_cache
def _cancel(*, by_code: bool) -> TextClause:
    reason = honest("CAST(:reason AS text)", "f") if by_code else "CAST(:reason AS text)"
    return text(f"""
        UPDATE follow_ups f SET {cancelled_or_asked_to(reason)} WHERE f.id = ANY(CAST(:ids AS uuid[]))
        RETURNING f.id, f.status
    """)  # noqa: S608 - no input, only the conditions above


def cancel_if_not_begun(connection: Connection, pending: CancelScope, final: Final, after: CancelCursor) -> Cancelled:
    """Cancel the next batch of follow-ups, but only prevent the retry of those in flight.

    A follow-up is skipped if its row is locked or cannot be written.
    """
    place = {"after_chat": after.chat_id, "after_due": after.due_date, "after_id": after.id, "most": BATCH}
    rows = connection.execute(_lock(_where(pending)), pending.parameters | place).all()
    parameters = {"status": final.status.value, "reason": final.reason}

    def cancel(ids: Sequence[UUID]) -> Sequence[Any]:
        statement = _cancel(by_code=final.code is not None)
        return connection.execute(statement, parameters | {"ids": uuid_array(ids)}).all()

    written = list(chain.from_iterable(halve_within(connection, [row.id for row in rows], cancel).done))
    ended = [row.id for row in written if row.status == Status.CANCELLED]
    chat_order.unblock(connection, ended)
    return Cancelled(ended, len(written) - len(ended), max((CancelCursor(*row) for row in rows), default=None))


# All batches use the command's start time, so follow-ups created later are not cancelled.
_NOW = text("SELECT now()")


def now(connection: Connection) -> datetime:
    """Return the current time of the database."""
    moment: datetime = connection.execute(_NOW).scalar_one()
    return moment


_CHATS_WORKSPACES = text("""
    SELECT w.id FROM workspaces w JOIN chats c ON c.workspace_id = w.id AND c.id = :chat_id ORDER BY w.name
""")


def workspaces_of_chat(connection: Connection, chat_id: UUID) -> list[UUID]:
    """Return all workspaces that have a chat with this id; there may be several."""
    return list(connection.scalars(_CHATS_WORKSPACES, {"chat_id": chat_id}))
