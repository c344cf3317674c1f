"""Statements that create, find, change and end follow-ups, one at a time or by chat.

Each statement's WHERE clause checks that the change is still allowed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import select

from followups.halving import halving_steps
from followups.models import FailedAttempt, FollowUp
from followups.statements import Rule, Statement
from followups.states import Status, finish
from followups.store import quotas
from followups.store.api_keys import IS_VALID
from followups.store.fragments import NEXT_TOKEN, WINDOWED, honest
from followups.store.leases import uuid_array
from followups.store.quotas import Kind
from followups.telemetry.traces import current_traceparent

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.statements import Steps
    from followups.states import Final, ReasonCode


MOST_PENDING = 10_000
"""The largest number of pending follow-ups in a chat. A reply cancels all pending follow-ups of a full chat in one
transaction, within half a second.
"""

FIELDS = (
    "id",
    "created_at",
    "updated_at",
    "chat_id",
    "chat_message_id",
    "due_date",
    "finished_at",
    "message",
    "reason",
    "status",
    "trigger_chat_message_id",
)
"""The fields of the API. Asynchronous code reads only the API's fields of a follow-up."""

# The sort order matches an index, so that only this chat's pending follow-ups are read.
_FULL = f"""EXISTS (
    SELECT FROM follow_ups
     WHERE workspace_id = :workspace_id AND chat_id = :chat_id AND status = 'pending'
     ORDER BY due_date, id OFFSET {MOST_PENDING - 1})"""
_IS_FULL = Statement(f"SELECT {_FULL} AS is_full")
_INSERT = Statement(
    f"""
    INSERT INTO follow_ups (workspace_id, chat_id, message, due_date, trigger_chat_message_id, created_by_key,
                            traceparent)
    SELECT :workspace_id, :chat_id, :message, :due_date, :trigger_chat_message_id, CAST(:created_by_key AS uuid),
           CAST(:traceparent AS text)
     WHERE NOT {_FULL} AND {quotas.unless_limited(Kind.PENDING)}
    RETURNING {{columns}}
    """,
    FollowUp,
    FIELDS,
)


@Rule
def insert_unless_full(
    *,
    workspace_id: UUID,
    chat_id: UUID,
    message: str,
    due_date: datetime,
    trigger_chat_message_id: UUID,
    created_by_key: UUID | None,
) -> Steps[FollowUp | None]:
    """Insert a pending follow-up and return it, or None if the chat is full.

    The caller must have locked the chat. Raises `QuotaExceededError`.
    """
    values = {
        "workspace_id": workspace_id,
        "chat_id": chat_id,
        "message": message,
        "due_date": due_date,
        "trigger_chat_message_id": trigger_chat_message_id,
        "created_by_key": created_by_key,
        "traceparent": current_traceparent() or None,
    }
    created: Sequence[FollowUp] = yield _INSERT(**values, within_quota=False)
    if not created:  # the chat is full, or the workspace has a quota
        yield from quotas.take.steps(workspace_id, Kind.PENDING, 1)
        created = yield _INSERT(**values, within_quota=True)
    return created[0] if created else None


FAR_FROM_FULL = MOST_PENDING - 1_000
"""`create_if_clear` inserts a follow-up only if its chat has fewer pending follow-ups than this limit.

`create_if_clear` counts only follow-ups that were committed before it locked the chat. For each database connection,
the count may miss one follow-up created at the same time.
"""

# The statement checks the chat's values at the time of the lock.
_CREATE_IF_CLEAR = Statement(
    f"""
    WITH chat AS (
        SELECT last_message_id FROM chats
         WHERE workspace_id = :workspace_id AND id = :chat_id AND removed_at IS NULL
           AND last_message_id IS NOT NULL AND last_message_role <> 'user' AND channel NOT IN ({WINDOWED})
           AND NOT EXISTS (SELECT FROM workspaces w WHERE w.id = :workspace_id AND w.deletion_began_at IS NOT NULL)
           AND NOT EXISTS (SELECT FROM quotas WHERE workspace_id = :workspace_id AND kind = '{Kind.PENDING.value}')
           AND {IS_VALID}
           FOR NO KEY UPDATE SKIP LOCKED
    )
    INSERT INTO follow_ups (workspace_id, chat_id, message, due_date, trigger_chat_message_id, created_by_key,
                            traceparent)
    SELECT :workspace_id, :chat_id, :message, :due_date, chat.last_message_id, :key_id, CAST(:traceparent AS text)
      FROM chat
     WHERE NOT EXISTS (
           SELECT FROM follow_ups
            WHERE workspace_id = :workspace_id AND chat_id = :chat_id AND status = 'pending'
            ORDER BY due_date, id OFFSET {FAR_FROM_FULL - 1})
    RETURNING {{columns}}
    """,  # noqa: S608 - no input, only the constants above
    FollowUp,
    FIELDS,
)


@Rule
def create_if_clear(
    *, workspace_id: UUID, chat_id: UUID, message: str, due_date: datetime, key_id: UUID
) -> Steps[FollowUp | None]:
    """Insert a pending follow-up and return it, or return None if one statement is not enough.

    This single statement replaces a transaction of several statements. The statement inserts a row only if the API key
    is valid, the chat is not locked, and the last message is not the user's. The channel must have no messaging window,
    and the workspace must have no quota.
    """
    created: Sequence[FollowUp] = yield _CREATE_IF_CLEAR(
        workspace_id=workspace_id,
        chat_id=chat_id,
        message=message,
        due_date=due_date,
        key_id=key_id,
        traceparent=current_traceparent() or None,
    )
    return created[0] if created else None


_ROOM = Statement(f"""
    SELECT chat.id, {MOST_PENDING} - (SELECT count(*) FROM (
               SELECT FROM follow_ups f
                WHERE f.workspace_id = :workspace_id AND f.chat_id = chat.id AND f.status = 'pending'
                ORDER BY f.due_date, f.id LIMIT {MOST_PENDING}) AS pending) AS room
      FROM unnest(CAST(:chat_ids AS uuid[])) AS chat (id)
""")  # noqa: S608 - no input, only the constant above
_INSERT_MANY = Statement(
    """
    INSERT INTO follow_ups (id, workspace_id, chat_id, message, due_date, trigger_chat_message_id, traceparent)
    SELECT new.id, :workspace_id, new.chat_id, new.message, new.due_date, new.trigger_id, CAST(:traceparent AS text)
      FROM unnest(CAST(:ids AS uuid[]), CAST(:chat_ids AS uuid[]), CAST(:messages AS text[]),
                  CAST(:due_dates AS timestamptz[]), CAST(:trigger_ids AS uuid[]))
           AS new (id, chat_id, message, due_date, trigger_id)
    RETURNING {columns}
    """,
    FollowUp,
    FIELDS,
)


class Planned(NamedTuple):
    """A follow-up to create, in the form that `followups.schedule_many` accepts."""

    chat_id: UUID
    message: str
    due_date: datetime


@Rule
def room_in(workspace_id: UUID, chat_ids: Collection[UUID]) -> Steps[dict[UUID, int]]:
    """Return how many more pending follow-ups each of the chats may have. The caller must have locked the chats."""
    rows = yield _ROOM(workspace_id=workspace_id, chat_ids=uuid_array(chat_ids))
    return {row.id: row.room for row in rows}


@Rule
def insert_many(workspace_id: UUID, new: Sequence[tuple[UUID, Planned, UUID]]) -> Steps[list[FollowUp]]:
    """Insert pending follow-ups with the given ids and triggers; return them in the same order.

    The caller must have locked the chats and checked them against `MOST_PENDING`.
    """
    rows: Sequence[FollowUp] = yield _INSERT_MANY(
        workspace_id=workspace_id,
        traceparent=current_traceparent() or None,
        ids=uuid_array(new_id for new_id, _, _ in new),
        chat_ids=uuid_array(planned.chat_id for _, planned, _ in new),
        messages=[planned.message for _, planned, _ in new],
        due_dates=[planned.due_date for _, planned, _ in new],
        trigger_ids=uuid_array(trigger_id for _, _, trigger_id in new),
    )
    created = {row.id: row for row in rows}
    return [created[new_id] for new_id, _, _ in new]


@Rule
def is_full(workspace_id: UUID, chat_id: UUID) -> Steps[bool]:
    """Return whether the chat has `MOST_PENDING` pending follow-ups. The caller must have locked the chat."""
    (row,) = yield _IS_FULL(workspace_id=workspace_id, chat_id=chat_id)
    return bool(row.is_full)


_ONE = "SELECT {columns} FROM follow_ups WHERE follow_ups.id = :id"
_ANY = Statement(_ONE, FollowUp, FIELDS)
_MINE = Statement(f"{_ONE} AND follow_ups.workspace_id = :workspace_id", FollowUp, FIELDS)
_LOCK_IN_CHAT = Statement(
    f"{_ONE} AND follow_ups.begun_at IS NULL AND follow_ups.chat_id = ANY(CAST(:chat_ids AS uuid[])) FOR NO KEY UPDATE",
    FollowUp,
    FIELDS,
)


@Rule
def find(follow_up_id: UUID, workspace_id: UUID | None) -> Steps[FollowUp | None]:
    """Return the follow-up, or None if it does not exist.

    If ``workspace_id`` is None, as for operators, every workspace is searched.
    """
    if workspace_id is None:
        found: Sequence[FollowUp] = yield _ANY(id=follow_up_id)
    else:
        found = yield _MINE(id=follow_up_id, workspace_id=workspace_id)
    return found[0] if found else None


@Rule
def find_and_lock_if_not_begun(follow_up_id: UUID, chat_ids: Collection[UUID]) -> Steps[FollowUp | None]:
    """Lock a follow-up and return its row, or None if the follow-up is in flight or in another chat.

    The lock lasts until the transaction ends. The caller must have locked the chats. A follow-up in flight is not
    locked, because a lock would delay its settlement.
    """
    found: Sequence[FollowUp] = yield _LOCK_IN_CHAT(id=follow_up_id, chat_ids=list(chat_ids))
    return found[0] if found else None


def failures(session: Session, follow_up_id: UUID) -> Sequence[FailedAttempt]:
    """Return the failed attempts of a follow-up, oldest first."""
    query = select(FailedAttempt).where(FailedAttempt.follow_up_id == follow_up_id).order_by(FailedAttempt.id)
    return session.scalars(query).all()


_IF_NOT_BEGUN = "follow_ups.status = 'pending' AND follow_ups.begun_at IS NULL"
_REASON = "CAST(:reason AS text)"


def _ending(reason: str) -> Statement:
    return Statement(
        f"""
        UPDATE follow_ups
           SET status = :status, reason = {reason},
               finished_at = COALESCE(CAST(:finished_at AS timestamptz), now()), updated_at = now(),
               lease_until = NULL, waits_for = NULL
         WHERE follow_ups.id = :id AND {_IF_NOT_BEGUN}
        RETURNING {{columns}}
        """,  # noqa: S608 - no input, only the constants above
        FollowUp,
        FIELDS,
    )


_END = _ending(_REASON)
_END_HONESTLY = _ending(honest(_REASON, "follow_ups"))
"""SQL that ends a follow-up for a reason that has a code. A reason in a caller's own words is stored unchanged."""


@Rule
def end_if_not_begun(follow_up_id: UUID, final: Final, finished_at: datetime | None) -> Steps[FollowUp | None]:
    """End a pending follow-up that is not in flight, and return it; otherwise return None."""
    end = _END_HONESTLY if final.code else _END
    ended: Sequence[FollowUp] = yield end(
        id=follow_up_id, status=final.status.value, reason=final.reason, finished_at=finished_at
    )
    return ended[0] if ended else None


_TYPES = {
    "chat_id": "uuid",
    "chat_message_id": "uuid",
    "due_date": "timestamptz",
    "message": "text",
    "trigger_chat_message_id": "uuid",
}
"""The fields of a follow-up that may be changed, and their SQL types."""

_NEXT_TOKEN = NEXT_TOKEN.replace("f.", "follow_ups.")
_RESCHEDULED = (
    "next_attempt_at = NULL, waits_for = NULL, held_until = NULL, pause_id = NULL, lease_until = NULL,"
    f" lease_token = {_NEXT_TOKEN}"
)


@lru_cache(maxsize=32)  # one entry for each set of fields
def _changing(names: frozenset[str]) -> Statement:
    """Return the SQL statement that changes these fields of a follow-up."""
    changes = [f"{name} = CAST(:{name} AS {_TYPES[name]})" for name in sorted(names)]
    if names & {"due_date", "chat_id"}:
        changes.append(_RESCHEDULED)
    if "chat_id" in names:
        # The chat is locked, so `clock_timestamp()` is later than the chat's last message.
        changes.append("scheduled_at = clock_timestamp()")
    elif "due_date" in names:
        changes.append("scheduled_at = now()")
    if "due_date" in names:
        changes.append("sendable_from = NULL")
    return Statement(
        f"""
        UPDATE follow_ups SET {", ".join(changes)}, updated_at = now()
         WHERE follow_ups.id = :id AND {_IF_NOT_BEGUN}
        RETURNING {{columns}}
        """,  # noqa: S608 - no input, only the names above
        FollowUp,
        FIELDS,
    )


@Rule
def change_if_not_begun(follow_up_id: UUID, values: Mapping[str, Any]) -> Steps[FollowUp | None]:
    """Change API fields of a pending follow-up that is not in flight; return the follow-up, or None.

    A new due date or chat increases the fencing token, so that earlier hints have no effect.
    """
    changed: Sequence[FollowUp] = yield _changing(frozenset(values))(id=follow_up_id, **values)
    return changed[0] if changed else None


_NAME_CHAT_MESSAGE = Statement(
    """
    UPDATE follow_ups SET chat_message_id = :chat_message_id, updated_at = now()
     WHERE follow_ups.id = :id AND follow_ups.status = 'sent' AND follow_ups.chat_message_id IS NULL
    RETURNING {columns}
    """,
    FollowUp,
    FIELDS,
)


@Rule
def name_chat_message_if_unnamed(follow_up_id: UUID, chat_message_id: UUID) -> Steps[FollowUp | None]:
    """Store the transport's message id in a sent follow-up that has none yet.

    Return the updated follow-up, or None if it already has a message id.
    """
    named: Sequence[FollowUp] = yield _NAME_CHAT_MESSAGE(id=follow_up_id, chat_message_id=chat_message_id)
    return named[0] if named else None


def cancelled_or_asked_to(reason: str) -> str:
    """Return SQL that cancels a row of ``follow_ups``; ``reason`` is SQL for the reason.

    An attempt in flight cannot be recalled. For an attempt in flight, a cancel request is stored, so that settle does
    not retry the follow-up.
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


# Every statement locks follow-ups in their order within the chat.
_LOCK_CHATS_PENDING = Statement("""
    SELECT id FROM follow_ups
     WHERE workspace_id = :workspace_id AND chat_id = :chat_id AND status = 'pending'
     ORDER BY due_date, id
       FOR NO KEY UPDATE
""")
_CANCEL = Statement(f"""
    UPDATE follow_ups f
       SET {cancelled_or_asked_to(honest("CAST(:reason AS text)", "f"))}
     WHERE f.id = ANY(CAST(:ids AS uuid[]))
    RETURNING f.id, f.status
""")  # noqa: S608 - no input, only the constant above


@Rule
def cancel_chat_if_not_begun(workspace_id: UUID, chat_id: UUID, code: ReasonCode) -> Steps[list[UUID]]:
    """Cancel the chat's pending follow-ups and return them; for those in flight, only prevent a retry.

    A follow-up whose row cannot be written is skipped here and remains pending; begin reports the row later.
    """
    final = finish(Status.CANCELLED, code)
    pending = yield _LOCK_CHATS_PENDING(workspace_id=workspace_id, chat_id=chat_id)
    if not pending:
        return []
    rows = yield from halving_steps(
        [row.id for row in pending],
        lambda ids: _CANCEL(status=final.status.value, reason=final.reason, ids=uuid_array(ids)),
    )
    return [row.id for row in rows if row.status == Status.CANCELLED]
