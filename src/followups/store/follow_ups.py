"""Follow-ups, one at a time or by chat: create, find, change, end. Every change is guarded in its WHERE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, exists, func, literal_column, select, text, update
from sqlalchemy.dialects.postgresql import insert

from followups.halving import halve_within
from followups.models import FailedAttempt, FollowUp
from followups.states import Status, finish
from followups.store.fragments import NEXT_TOKEN, honest
from followups.store.leases import uuid_array
from followups.telemetry.traces import current_traceparent

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.states import Final, ReasonCode


MOST_PENDING = 10_000
"""Most pending follow-ups of a chat. A reply cancels all of them in one transaction, in half a second."""

# In the order of an index, so that only the chat's pending follow-ups are read.
_FULL = exists(
    select(FollowUp.id)
    .where(
        FollowUp.workspace_id == bindparam("workspace_id"),
        FollowUp.chat_id == bindparam("chat_id"),
        FollowUp.status == Status.PENDING,
    )
    .order_by(FollowUp.due_date, FollowUp.id)
    .offset(MOST_PENDING - 1)
)
_IS_FULL = select(_FULL)

# Built once, since building a statement costs more than running it. It inserts into the table, not the entity: the
# ORM's own INSERT is made for many rows, and takes 0.15 ms longer for one.
_TABLE = FollowUp.metadata.tables[FollowUp.__tablename__]
_GIVEN = ("workspace_id", "chat_id", "message", "due_date", "trigger_chat_message_id", "traceparent")
_ROW = select(*(bindparam(name, type_=_TABLE.columns[name].type) for name in _GIVEN)).where(~_FULL)
_INSERT = select(FollowUp).from_statement(
    insert(_TABLE).from_select(_GIVEN, _ROW, include_defaults=False).returning(*_TABLE.columns)
)


def insert_unless_full(
    session: Session,
    *,
    workspace_id: UUID,
    chat_id: UUID,
    message: str,
    due_date: datetime,
    trigger_chat_message_id: UUID,
) -> FollowUp | None:
    """Insert a pending follow-up and return it, or None if the chat is full.

    The caller has locked the chat.
    """
    values: dict[str, Any] = {
        "workspace_id": workspace_id,
        "chat_id": chat_id,
        "message": message,
        "due_date": due_date,
        "trigger_chat_message_id": trigger_chat_message_id,
        "traceparent": current_traceparent() or None,
    }
    created: FollowUp | None = session.scalar(_INSERT, values)
    return created


def is_full(session: Session, workspace_id: UUID, chat_id: UUID) -> bool:
    """Return whether the chat has `MOST_PENDING` pending follow-ups. The caller has locked the chat."""
    return bool(session.scalar(_IS_FULL, {"workspace_id": workspace_id, "chat_id": chat_id}))


_ONE = select(FollowUp).where(FollowUp.id == bindparam("id")).execution_options(populate_existing=True)
_MINE = _ONE.where(FollowUp.workspace_id == bindparam("workspace_id"))
_LOCKED_IN_CHAT = _ONE.where(
    FollowUp.begun_at.is_(None), FollowUp.chat_id.in_(bindparam("chat_ids", expanding=True))
).with_for_update(key_share=True)


def find(session: Session, follow_up_id: UUID, workspace_id: UUID | None) -> FollowUp | None:
    """Return the follow-up, or None. Without ``workspace_id`` every workspace is searched, as for operators."""
    query = _ONE if workspace_id is None else _MINE
    return session.scalar(query, {"id": follow_up_id, "workspace_id": workspace_id})


def find_and_lock_if_not_begun(session: Session, follow_up_id: UUID, chat_ids: Collection[UUID]) -> FollowUp | None:
    """Return the current follow-up, locked, or None if it is in flight or in another chat.

    The lock lasts until the transaction ends. The caller has locked these chats. A follow-up in flight is never locked,
    since its settlement must not wait for a caller's transaction.
    """
    return session.scalar(_LOCKED_IN_CHAT, {"id": follow_up_id, "chat_ids": list(chat_ids)})


def failures(session: Session, follow_up_id: UUID) -> Sequence[FailedAttempt]:
    """Return its failed attempts, oldest first."""
    query = select(FailedAttempt).where(FailedAttempt.follow_up_id == follow_up_id).order_by(FailedAttempt.id)
    return session.scalars(query).all()


_HONEST = text(honest("CAST(:reason AS text)", "follow_ups"))
"""For reasons by code; a caller's own words are stored as given."""


def end_if_not_begun(session: Session, follow_up_id: UUID, final: Final, finished_at: datetime | None) -> bool:
    """End a pending follow-up with no attempt in flight; return whether this call did."""
    statement = (
        update(FollowUp)
        .where(FollowUp.id == follow_up_id, FollowUp.status == Status.PENDING, FollowUp.begun_at.is_(None))
        .values(
            status=final.status.value,
            reason=_HONEST.bindparams(reason=final.reason) if final.code else final.reason,
            finished_at=finished_at or func.now(),
            updated_at=func.now(),
            lease_until=None,
            waits_for=None,
        )
    )
    return _rows(session, statement) == 1


_NEXT_TOKEN: Any = literal_column(NEXT_TOKEN.replace("f.", "follow_ups."))


def change_if_not_begun(session: Session, follow_up_id: UUID, values: dict[str, Any]) -> bool:
    """Write new values of API fields to a pending follow-up with no attempt in flight; return whether it did.

    A new due date or chat revokes the lease: the token grows, so that a hint under way finds nothing.
    """
    if values.keys() & {"due_date", "chat_id"}:
        values = values | {
            "next_attempt_at": None,
            "waits_for": None,
            "held_until": None,
            "pause_id": None,
            "lease_until": None,
            "lease_token": _NEXT_TOKEN,
        }
    if "due_date" in values:
        values = values | {"scheduled_at": func.now(), "sendable_from": None}
    if "chat_id" in values:
        # This must be later than the last message of the new chat, for which this transaction may have waited.
        values = values | {"scheduled_at": func.clock_timestamp()}
    statement = (
        update(FollowUp)
        .where(FollowUp.id == follow_up_id, FollowUp.status == Status.PENDING, FollowUp.begun_at.is_(None))
        .values(**values, updated_at=func.now())
    )
    return _rows(session, statement) == 1


def name_chat_message_if_unnamed(session: Session, follow_up_id: UUID, chat_message_id: UUID) -> bool:
    """Fill in the transport's message id of a sent follow-up that has none; return whether it did."""
    statement = (
        update(FollowUp)
        .where(FollowUp.id == follow_up_id, FollowUp.status == Status.SENT, FollowUp.chat_message_id.is_(None))
        .values(chat_message_id=chat_message_id, updated_at=func.now())
    )
    return _rows(session, statement) == 1


def _rows(session: Session, statement: Any) -> int:  # noqa: ANN401 - any UPDATE
    result = session.execute(statement, execution_options={"synchronize_session": False})
    return int(result.rowcount)  # type: ignore[attr-defined]


def cancelled_or_asked_to(reason: str) -> str:
    """Return SQL that cancels a row of ``follow_ups``, for ``reason`` (SQL too).

    An attempt in flight cannot be recalled: the request is stored, and settle does not retry the follow-up.
    """
    return f"""
           status = CASE WHEN begun_at IS NULL THEN :status ELSE status END,
           reason = CASE WHEN begun_at IS NULL THEN {reason} ELSE reason END,
           finished_at = CASE WHEN begun_at IS NULL THEN now() END,
           updated_at = CASE WHEN begun_at IS NULL THEN now() ELSE updated_at END,
           cancel_requested = CASE WHEN begun_at IS NULL THEN NULL ELSE COALESCE(cancel_requested, :reason) END,
           lease_until = CASE WHEN begun_at IS NULL THEN NULL ELSE lease_until END,
           waits_for = NULL
    """


# Locked in the order of the chat, as everywhere.
_LOCK_CHATS_PENDING = text("""
    SELECT id FROM follow_ups
     WHERE workspace_id = :workspace_id AND chat_id = :chat_id AND status = 'pending'
     ORDER BY due_date, id
       FOR NO KEY UPDATE
""")
_CANCEL = text(f"""
    UPDATE follow_ups f
       SET {cancelled_or_asked_to(honest("CAST(:reason AS text)", "f"))}
     WHERE f.id = ANY(CAST(:ids AS uuid[]))
    RETURNING f.id, f.status
""")  # noqa: S608 - no input, only the constant above


def cancel_chat_if_not_begun(session: Session, workspace_id: UUID, chat_id: UUID, code: ReasonCode) -> list[UUID]:
    """Cancel the chat's pending follow-ups and return them; one in flight is only kept from a retry.

    One whose row cannot be written stays pending, and begin reports it.
    """
    final = finish(Status.CANCELLED, code)
    parameters = {"status": final.status.value, "reason": final.reason}

    def cancel(ids: Sequence[UUID]) -> list[UUID]:
        rows = session.execute(_CANCEL, parameters | {"ids": uuid_array(ids)})
        return [row.id for row in rows if row.status == Status.CANCELLED]

    ids = session.scalars(_LOCK_CHATS_PENDING, {"workspace_id": workspace_id, "chat_id": chat_id}).all()
    return [one for part in halve_within(session.connection(), ids, cancel).done for one in part]
