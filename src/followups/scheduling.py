"""The rules for creating, changing and cancelling follow-ups, for every caller alike.

Each function works in the caller's own transaction and commits nothing. The row is the job, so there is nothing else to
enqueue. The REST API and the command line call these functions too.

Each function locks its chat until the transaction ends. A transaction that works on several chats must process them in
ascending order of their ids; `followups.store` documents the order of all locks.

The transaction must be at READ COMMITTED, PostgreSQL's default. A statement then sees everything that was committed
before the statement began, as the rules need. Any other transaction is refused with a `TransactionError`.
"""

from __future__ import annotations

from datetime import UTC
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select, text

from followups.channels import Channel, is_open
from followups.database import is_read_committed
from followups.errors import (
    AlreadyFinishedError,
    AlreadyRetriedError,
    ChatNotFoundError,
    ConflictError,
    DeliveryInProgressError,
    FollowUpNotFoundError,
    InvalidRequestError,
    NothingToFollowUpError,
    OutsideMessagingWindowError,
    TooManyPendingError,
    TransactionError,
)
from followups.models import MAX_MESSAGE_LENGTH
from followups.sending_hours import opens_at
from followups.states import DEFAULT_CODES, FINAL, MAX_REASON_LENGTH, Status, finish
from followups.store import chat_order, chats, follow_ups, retries, sending_hours
from followups.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.models import Chat, FollowUp
    from followups.sending_hours import SendingHours
    from followups.states import Final

log = get_logger(__name__)

FIRST_YEAR, LAST_YEAR = 2, 9998
"""The years allowed: within Python's calendar by a margin, so that a time can be converted to any zone."""


def schedule(session: Session, *, workspace_id: UUID, chat_id: UUID, message: str, due_date: datetime) -> FollowUp:
    """Create a follow-up that is sent into the chat at ``due_date`` unless something cancels it first.

    A due date in the past means at once. In one transaction, schedule into several chats in ascending order of their
    ids (``sorted(chat_ids)``), or the transaction may deadlock with another one that works on the same chats.

    Raises `InvalidRequestError` (message not of 1..65,536 characters or with a NUL, due date without an offset),
    `ChatNotFoundError`, `NothingToFollowUpError` (no messages, or the last one is the user's),
    `OutsideMessagingWindowError`, `TooManyPendingError` and `TransactionError` (AUTOCOMMIT, or stricter than READ
    COMMITTED).
    """
    _check_transaction(session)
    check_message(message)
    check_time(due_date, "due_date")
    chat = chats.lock_chat(session, workspace_id, chat_id)
    trigger = trigger_of(chat)
    check_window(session, chat, due_date)
    created = follow_ups.insert_unless_full(
        session,
        workspace_id=workspace_id,
        chat_id=chat_id,
        message=message,
        due_date=due_date,
        trigger_chat_message_id=trigger,
    )
    if created is None:
        raise TooManyPendingError
    return created


def cancel(session: Session, follow_up_id: UUID, *, reason: str | None = None) -> FollowUp:
    """Cancel a pending follow-up, which is never sent once the transaction has committed.

    ``reason`` is stored as given; the default is ``cancelled_by_api``. Repeating the call changes nothing. The order of
    several chats is that of `schedule`. Raises `FollowUpNotFoundError`, `AlreadyFinishedError`,
    `DeliveryInProgressError` and `TransactionError`.
    """
    changes: dict[str, Any] = {"status": Status.CANCELLED}
    if reason is not None:
        changes["reason"] = reason
    return amend(session, follow_up_id, changes)


def retry(session: Session, follow_up_id: UUID, *, due_date: datetime | None = None) -> FollowUp:
    """Create a new follow-up from a failed one, which stays as it is. Raises as `schedule`."""
    old = _failed(session, follow_up_id)
    return _repeat(session, old, retries.last_of(session, old.id), due_date)


def retry_once(session: Session, follow_up_id: UUID) -> FollowUp:
    """Create a new follow-up, due now, from a failed one that has not been retried yet.

    Raises `AlreadyRetriedError` if it has, and otherwise as `schedule`.
    """
    old = _failed(session, follow_up_id)
    if retries.last_of(session, old.id) != old.id:
        raise AlreadyRetriedError
    return _repeat(session, old, old.id, None)


def _failed(session: Session, follow_up_id: UUID) -> FollowUp:
    """Return the follow-up with its chat locked, so that what it was retried as does not change."""
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
    retries.note(session, new.id, last)
    return new


def amend(
    session: Session, follow_up_id: UUID, changes: Mapping[str, Any], *, workspace_id: UUID | None = None
) -> FollowUp:
    """Change fields of a follow-up (names in snake_case), or end it by a final ``status``.

    A ``workspace_id`` of None gives an operator's view. Fields that already have the requested value are ignored.
    Raises `InvalidRequestError`, `FollowUpNotFoundError`, `ChatNotFoundError`, `NothingToFollowUpError`,
    `OutsideMessagingWindowError`, `TooManyPendingError`, `AlreadyFinishedError`, `DeliveryInProgressError` and
    `TransactionError`.
    """
    _check_transaction(session)
    _check_changes(changes)
    found, locked = _lock(session, follow_up_id, changes.get("chat_id"), workspace_id)
    fresh = {name: value for name, value in changes.items() if getattr(found, name) != value}
    if not fresh:
        return found
    if found.status in FINAL:
        _amend_finished(session, found, fresh)
    else:
        checks_chat = changes.keys() & {"due_date", "chat_id"}
        chat = _present(locked, changes.get("chat_id", found.chat_id)) if checks_chat else None
        _amend_pending(session, found, fresh, chat)
    session.refresh(found)
    return found


def _lock(
    session: Session, follow_up_id: UUID, target: UUID | None, workspace_id: UUID | None
) -> tuple[FollowUp, Mapping[UUID, Chat]]:
    """Lock and return the follow-up and two chats: the follow-up's own and the ``target`` chat.

    The chats are locked first. Raises `FollowUpNotFoundError`, and `DeliveryInProgressError` for a follow-up in flight.
    """
    while True:
        locked = chats.lock_chats_of(session, follow_up_id, workspace_id, target)
        if found := follow_ups.find_and_lock_if_not_begun(session, follow_up_id, locked):
            return found, locked
        found = follow_ups.find(session, follow_up_id, workspace_id)
        if found is None:
            raise FollowUpNotFoundError
        if found.status in FINAL:
            return found, locked
        if found.chat_id in locked:
            raise DeliveryInProgressError
        # The follow-up was moved into another chat while this transaction waited for the first one.


def _present(locked: Mapping[UUID, Chat], chat_id: UUID) -> Chat:
    chat = locked.get(chat_id)
    if chat is None or chat.removed_at is not None:
        raise ChatNotFoundError
    return chat


_ISOLATION = text("SELECT current_setting('transaction_isolation')")
LOOSEST = frozenset({"read committed", "read uncommitted"})
"""Two isolation levels that are the same to PostgreSQL."""


def _check_transaction(session: Session) -> None:
    """Refuse a transaction that ends with each statement, or reads only what was committed before it."""
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
        if follow_ups.is_full(session, chat.workspace_id, chat.id):
            raise TooManyPendingError
    if chat is not None:
        check_window(session, chat, fields.get("due_date", found.due_date))
    if fields and not follow_ups.change_if_not_begun(session, found.id, fields):
        raise DeliveryInProgressError
    if "status" in fresh:
        final = final_of(fresh["status"], fresh.get("reason"))
        if not follow_ups.end_if_not_begun(session, found.id, final, fresh.get("finished_at")):
            raise DeliveryInProgressError
    if fresh.keys() & {"due_date", "chat_id", "status"}:
        chat_order.wake(session.connection(), [found.id])


def final_of(status: Status, reason: str | None) -> Final:
    """Return how a caller's transition ends: with the caller's own reason, or the default code."""
    if status is Status.SENT:
        return finish(status)
    return finish(status, words=reason) if reason else finish(status, DEFAULT_CODES[status])


def trigger_of(chat: Chat) -> UUID:
    """Return the chat's last message. Raises `NothingToFollowUpError` if there is none or it is the user's."""
    if chat.last_message_id is None or chat.last_message_role == chats.Role.USER:
        raise NothingToFollowUpError
    return chat.last_message_id


def check_window(session: Session, chat: Chat, due_date: datetime) -> None:
    """Refuse a due date outside the channel's messaging window; a due date in the past means now.

    A follow-up that is due outside the workspace's sending hours will be held until they open. That moment must be
    inside the messaging window too.
    """
    channel = Channel(chat.channel)
    if is_open(channel, None, due_date):
        return
    now = session.execute(select(func.now())).scalar_one()
    moment = max(due_date, now)
    if not is_open(channel, chat.last_user_message_at, moment):
        raise OutsideMessagingWindowError(field="due_date")
    hours = sending_hours.find(session, chat.workspace_id)
    if hours is None:
        return
    opening = _opening(chat.workspace_id, hours, moment)
    if not is_open(channel, chat.last_user_message_at, opening):
        message = (
            f"The due date is outside the workspace's sending hours ({hours}), which open at"
            f" {opening:%Y-%m-%dT%H:%M:%SZ}, outside the channel's messaging window."
        )
        raise OutsideMessagingWindowError(message, field="due_date")


def _opening(workspace_id: UUID, hours: SendingHours, moment: datetime) -> datetime:
    """Return when the hours are open, from ``moment`` on, or ``moment`` if their time zone is unknown.

    A time zone that this host does not know is no reason to refuse a caller's follow-up: the worker that begins it
    checks the hours again.
    """
    try:
        return opens_at(hours, moment)
    except LookupError:
        _log_unreadable(workspace_id, hours)
        return moment


@lru_cache(maxsize=1024)
def _log_unreadable(workspace_id: UUID, hours: SendingHours) -> None:
    """Log, once per process, that these sending hours cannot be checked."""
    log.error("sending_hours_unreadable", workspace_id=str(workspace_id), hours=str(hours))


def check_message(message: str) -> None:
    """Refuse a message that is empty, too long, or not storable in PostgreSQL."""
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
    """Refuse a time without an offset, or at the edge of the calendar."""
    if time.utcoffset() is None:
        message = f"The {field.replace('_', ' ')} must carry an offset, as in 2030-01-31T09:00:00Z."
        raise InvalidRequestError(message, field=field)
    if not all(FIRST_YEAR <= year <= LAST_YEAR for year in (time.year, _year_in_utc(time))):
        message = f"The {field.replace('_', ' ')} must lie in the years {FIRST_YEAR} to {LAST_YEAR}."
        raise InvalidRequestError(message, field=field)


def _year_in_utc(time: datetime) -> int:
    try:
        return time.astimezone(UTC).year
    except OverflowError:
        return LAST_YEAR + 1


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
    """Refuse a reason that is empty, too long, not storable, or not allowed with the status."""
    if status is Status.SENT:
        message = "A sent follow-up carries no reason."
        raise InvalidRequestError(message, field="reason")
    if not 1 <= len(reason) <= MAX_REASON_LENGTH:
        message = f"The reason must have 1 to {MAX_REASON_LENGTH:,} characters."
        raise InvalidRequestError(message, field="reason")
    check_text(reason, "reason")
