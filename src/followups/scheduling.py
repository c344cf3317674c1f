"""The rules for creating, changing and cancelling follow-ups, for every caller alike.

Each function works in the caller's own transaction and commits nothing: the row is the job, there is
nothing else to enqueue. The REST API and the command line call these too.

The transaction must be one at READ COMMITTED, PostgreSQL's default: a statement then sees everything that was committed
before it began, as the rules need. Every other one is refused with a `TransactionError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select, text

from followups.database import is_read_committed
from followups.errors import (
    AlreadyFinishedError,
    AlreadyRetriedError,
    ConflictError,
    DeliveryInProgressError,
    FollowUpNotFoundError,
    InvalidRequestError,
    NothingToFollowUpError,
    OutsideMessagingWindowError,
    TransactionError,
)
from followups.models import MAX_MESSAGE_LENGTH
from followups.quiet_hours import opens_at
from followups.states import DEFAULT_CODES, FINAL, MAX_REASON_LENGTH, Status, finish
from followups.store import chats, follow_ups, order, repetitions, sending_hours
from followups.windows import Channel, is_open

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.models import Chat, FollowUp
    from followups.states import Final


FIRST_YEAR, LAST_YEAR = 2, 9998
"""A day inside what Python can hold, so that a time can be read in any zone."""


def schedule(session: Session, *, workspace_id: UUID, chat_id: UUID, message: str, due_date: datetime) -> FollowUp:
    """Create a follow-up that is sent into the chat at ``due_date`` unless something cancels it first.

    A due date in the past means at once. Raises `InvalidRequestError` (message not of 1..65,536
    characters or with a NUL, due date without an offset), `ChatNotFoundError`,
    `NothingToFollowUpError` (no messages, or the last one is the user's),
    `OutsideMessagingWindowError` and `TransactionError` (AUTOCOMMIT, or stricter than READ COMMITTED).
    """
    _check_transaction(session)
    check_message(message)
    check_time(due_date, "due_date")
    chat = chats.lock_chat(session, workspace_id, chat_id)
    trigger = trigger_of(chat)
    check_window(session, chat, due_date)
    return follow_ups.insert_follow_up(
        session,
        workspace_id=workspace_id,
        chat_id=chat_id,
        message=message,
        due_date=due_date,
        trigger_chat_message_id=trigger,
    )


def cancel(session: Session, follow_up_id: UUID, *, reason: str | None = None) -> FollowUp:
    """Cancel a pending follow-up; when this returns and the transaction commits, it is never sent.

    ``reason`` is stored as given; without one it is ``cancelled_by_api``. Repeating it changes nothing.
    Raises `FollowUpNotFoundError`, `AlreadyFinishedError`, `DeliveryInProgressError` and `TransactionError`.
    """
    changes: dict[str, Any] = {"status": Status.CANCELLED}
    if reason is not None:
        changes["reason"] = reason
    return amend(session, follow_up_id, changes)


def retry(session: Session, follow_up_id: UUID, *, due_date: datetime | None = None) -> FollowUp:
    """Make a new follow-up from a failed one, which stays as it is. Errors as for `schedule`."""
    old = _failed(session, follow_up_id)
    return _repeat(session, old, repetitions.last_of(session, old.id), due_date)


def retry_once(session: Session, follow_up_id: UUID) -> FollowUp:
    """Make a new follow-up, due now, from a failed one of which none was made yet.

    Raises `AlreadyRetriedError` when one was, and what `schedule` raises.
    """
    old = _failed(session, follow_up_id)
    if repetitions.last_of(session, old.id) != old.id:
        raise AlreadyRetriedError
    return _repeat(session, old, old.id, None)


def _failed(session: Session, follow_up_id: UUID) -> FollowUp:
    """Return the follow-up, with the lock of its chat: what it was repeated as stays as it is."""
    old = follow_ups.find(session, follow_up_id, None)
    if old is None:
        raise FollowUpNotFoundError
    if old.status != Status.FAILED:
        message = f"Only a failed follow-up can be retried; this one is {old.status}."
        raise ConflictError(message)
    chats.lock_chat(session, old.workspace_id, old.chat_id)
    return old


def _repeat(session: Session, old: FollowUp, last: UUID, due_date: datetime | None) -> FollowUp:
    new = schedule(
        session,
        workspace_id=old.workspace_id,
        chat_id=old.chat_id,
        message=old.message,
        due_date=due_date or session.execute(select(func.now())).scalar_one(),
    )
    repetitions.note(session, new.id, last)
    return new


def amend(
    session: Session, follow_up_id: UUID, changes: Mapping[str, Any], *, workspace_id: UUID | None = None
) -> FollowUp:
    """Change fields of a follow-up (names in snake_case), or end it by a final ``status``.

    ``workspace_id`` None is an operator's view. What already stands so is no change. Raises
    `InvalidRequestError`, `FollowUpNotFoundError`, `ChatNotFoundError`, `NothingToFollowUpError`,
    `OutsideMessagingWindowError`, `AlreadyFinishedError`, `DeliveryInProgressError` and `TransactionError`.
    """
    _check_transaction(session)
    _check_changes(changes)
    chat = _lock_chats(session, follow_up_id, changes, workspace_id)
    locked = follow_ups.find_and_lock_if_not_begun(session, follow_up_id, workspace_id)
    found = locked or follow_ups.find(session, follow_up_id, workspace_id)
    if found is None:
        raise FollowUpNotFoundError
    fresh = {name: value for name, value in changes.items() if getattr(found, name) != value}
    if locked is None and found.status not in FINAL:
        raise DeliveryInProgressError
    if not fresh:
        return found
    if found.status in FINAL:
        _amend_finished(session, found, fresh)
    else:
        _amend_pending(session, found, fresh, chat)
    session.refresh(found)
    return found


_ISOLATION = text("SELECT current_setting('transaction_isolation')")
LOOSEST = frozenset({"read committed", "read uncommitted"})
"""To PostgreSQL the two are the same."""


def _check_transaction(session: Session) -> None:
    """Refuse a transaction that ends with each statement, or that looks at what was committed before it began."""
    connection = session.connection()
    if is_read_committed(connection):
        return
    driver = connection.connection.dbapi_connection
    if driver is not None and connection.dialect.detect_autocommit_setting(driver):
        level = "AUTOCOMMIT"
    elif (level := connection.scalar(_ISOLATION)) in LOOSEST:
        return
    message = (
        f"The session's transaction is at {level.upper()}, and followups needs READ COMMITTED: begin it with"
        ' session.connection(execution_options={"isolation_level": "READ COMMITTED"}), or give its engine that level.'
    )
    raise TransactionError(message)


def _amend_finished(session: Session, found: FollowUp, fresh: Mapping[str, Any]) -> None:
    fills_in = fresh.keys() == {"chat_message_id"} and found.status == Status.SENT and found.chat_message_id is None
    if not fills_in:
        raise AlreadyFinishedError
    follow_ups.name_chat_message_if_unnamed(session, found.id, fresh["chat_message_id"])


def _amend_pending(session: Session, found: FollowUp, fresh: Mapping[str, Any], chat: Chat | None) -> None:
    fields = {name: value for name, value in fresh.items() if name not in {"status", "reason", "finished_at"}}
    if "chat_id" in fields and chat is not None:
        trigger_of(chat)
    if chat is not None:
        check_window(session, chat, fields.get("due_date", found.due_date))
    if fields and not follow_ups.change_if_not_begun(session, found.id, fields):
        raise DeliveryInProgressError
    if "status" in fresh:
        final = final_of(fresh["status"], fresh.get("reason"))
        if not follow_ups.end_if_not_begun(session, found.id, final, fresh.get("finished_at")):
            raise DeliveryInProgressError
    if fresh.keys() & {"due_date", "chat_id", "status"}:
        order.wake(session.connection(), [found.id])


def final_of(status: Status, reason: str | None) -> Final:
    """Return how a caller's transition ends: the caller's own reason, or the code that stands for none."""
    if status is Status.SENT:
        return finish(status)
    return finish(status, words=reason) if reason else finish(status, DEFAULT_CODES[status])


def _lock_chats(
    session: Session, follow_up_id: UUID, changes: Mapping[str, Any], workspace_id: UUID | None
) -> Chat | None:
    """Lock the chat that a new due date or chat must be checked against, before the follow-up: as a reply does."""
    if not changes.keys() & {"due_date", "chat_id"}:
        return None
    found = follow_ups.find(session, follow_up_id, workspace_id)
    if found is None:
        raise FollowUpNotFoundError
    if found.status in FINAL or found.begun_at is not None:
        return None
    return chats.lock_chat(session, found.workspace_id, changes.get("chat_id", found.chat_id))


def trigger_of(chat: Chat) -> UUID:
    """Return the chat's last message. Raises `NothingToFollowUpError` when there is none, or it is the user's."""
    if chat.last_message_id is None or chat.last_message_role == chats.Role.USER:
        raise NothingToFollowUpError
    return chat.last_message_id


def check_window(session: Session, chat: Chat, due_date: datetime) -> None:
    """Refuse a due date outside the channel's messaging window; one in the past means now.

    One outside the workspace's sending hours will be held until they open, so it is then that must be inside.
    """
    channel = Channel(chat.channel)
    if is_open(channel, None, due_date):
        return
    now = session.execute(select(func.now())).scalar_one()
    moment = max(due_date, now)
    if not is_open(channel, chat.last_user_message_at, moment):
        raise OutsideMessagingWindowError(field="due_date")
    hours = sending_hours.find(session, chat.workspace_id)
    if hours is not None and not is_open(channel, chat.last_user_message_at, opening := opens_at(hours, moment)):
        message = (
            f"The due date is outside the workspace's sending hours ({hours}), which open at"
            f" {opening:%Y-%m-%dT%H:%M:%SZ}, outside the channel's messaging window."
        )
        raise OutsideMessagingWindowError(message, field="due_date")


def check_message(message: str) -> None:
    """Refuse a message that is empty, too long, or holds what PostgreSQL cannot store."""
    if not 1 <= len(message) <= MAX_MESSAGE_LENGTH:
        text = f"The message must have 1 to {MAX_MESSAGE_LENGTH:,} characters; this one has {len(message):,}."
        raise InvalidRequestError(text, field="message")
    check_text(message, "message")


def check_text(text: str, field: str) -> None:
    """Refuse what cannot be stored as text: a NUL character, a lone surrogate."""
    if "\x00" in text or any("\ud800" <= character <= "\udfff" for character in text):
        message = f"The {field.replace('_', ' ')} must not contain NUL characters or lone surrogates."
        raise InvalidRequestError(message, field=field)


def check_time(time: datetime, field: str) -> None:
    """Refuse a time that does not say where on earth it is meant, or that is at the edge of the calendar."""
    if time.utcoffset() is None:
        message = f"The {field.replace('_', ' ')} must carry an offset, as in 2030-01-31T09:00:00Z."
        raise InvalidRequestError(message, field=field)
    if not FIRST_YEAR <= time.year <= LAST_YEAR:
        message = f"The {field.replace('_', ' ')} must lie in the years {FIRST_YEAR} to {LAST_YEAR}."
        raise InvalidRequestError(message, field=field)


def _check_changes(changes: Mapping[str, Any]) -> None:
    if "message" in changes:
        check_message(changes["message"])
    for field in changes.keys() & {"due_date", "finished_at"}:
        check_time(changes[field], field)
    ends = changes.get("status") in FINAL
    for field in changes.keys() & {"reason", "finished_at"}:
        if not ends:
            message = f"A {field.replace('_', ' ')} goes only with a status of sent, failed or cancelled."
            raise InvalidRequestError(message, field=field)
    if "reason" in changes:
        check_reason(changes["reason"], changes["status"])


def check_reason(reason: str, status: Status) -> None:
    """Refuse a reason that is empty, too long or not storable, or that does not go with the status."""
    if status is Status.SENT:
        message = "A sent follow-up carries no reason."
        raise InvalidRequestError(message, field="reason")
    if not 1 <= len(reason) <= MAX_REASON_LENGTH:
        message = f"The reason must have 1 to {MAX_REASON_LENGTH:,} characters."
        raise InvalidRequestError(message, field="reason")
    check_text(reason, "reason")
