"""The rules that every caller follows to create, change and cancel follow-ups.

Each function works in the caller's own transaction and does not commit it. The row itself is the job, so nothing else
has to be enqueued. The REST API and the command line call the same functions.

Each function locks its chat until the transaction ends. A transaction that works on several chats must process them in
ascending order of their ids; `followups.store` documents the order of all locks.

The transaction must use READ COMMITTED, PostgreSQL's default isolation level. The rules require that each statement
sees everything that was committed before it began. In autocommit mode or at a stricter isolation level, a
`TransactionError` is raised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pydantic.alias_generators import to_camel
from sqlalchemy import func, select, text

from followups.channels import WINDOWED_CHANNELS
from followups.checks import check_changes, check_moment, check_planned, final_of, trigger_of
from followups.database import is_read_committed
from followups.errors import (
    AlreadyFinishedError,
    AlreadyRetriedError,
    ChatNotFoundError,
    ConflictError,
    DeliveryInProgressError,
    FollowUpNotFoundError,
    FollowUpsError,
    SomeRefusedError,
    TooManyPendingError,
    TransactionError,
)
from followups.statements import Rule, Statement, run
from followups.states import FINAL, Status
from followups.store import audit, chat_order, chats, follow_ups, quotas, retries, sending_hours
from followups.store.audit import Action, Event, Way, user_of_process
from followups.store.follow_ups import Planned
from followups.store.quotas import Kind
from followups.wording import Sentence

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.models import Chat, FollowUp
    from followups.statements import Steps
    from followups.store.audit import Actor


def schedule(session: Session, *, workspace_id: UUID, chat_id: UUID, message: str, due_date: datetime) -> FollowUp:
    """Create a follow-up that is sent into the chat at ``due_date`` unless cancelled first.

    A follow-up with a due date in the past is sent immediately. If one transaction schedules into several chats,
    process the chats in ascending order of their ids (``sorted(chat_ids)``). In any other order, two transactions may
    deadlock. If the workspace has a quota, deadlocks remain possible, because the quota stays locked between calls. In
    that case, use `schedule_many`, which locks all chats before the quota.

    Raises `InvalidRequestError` (message not of 1..65,536 characters or with a NUL, due date without an offset),
    `ChatNotFoundError`, `NothingToFollowUpError` (no messages, or the last message is the user's),
    `OutsideMessagingWindowError`, `TooManyPendingError`, `QuotaExceededError` and `TransactionError` (AUTOCOMMIT, or
    stricter than READ COMMITTED).
    """
    _check_transaction(session)
    return run(session, scheduling(workspace_id, chat_id, message, due_date))


def scheduling(
    workspace_id: UUID, chat_id: UUID, message: str, due_date: datetime, created_by_key: UUID | None = None
) -> Steps[FollowUp]:
    """Apply the rule of `schedule`, for synchronous and asynchronous callers."""
    check_planned(Planned(chat_id, message, due_date))
    chat = yield from chats.lock_chat.steps(workspace_id, chat_id)
    trigger = trigger_of(chat)
    yield from check_window.steps(chat, due_date)
    created = yield from follow_ups.insert_unless_full.steps(
        workspace_id=workspace_id,
        chat_id=chat_id,
        message=message,
        due_date=due_date,
        trigger_chat_message_id=trigger,
        created_by_key=created_by_key,
    )
    if created is None:
        raise TooManyPendingError
    return created


def scheduling_alone(
    workspace_id: UUID, chat_id: UUID, message: str, due_date: datetime, key_id: UUID
) -> Steps[FollowUp | None]:
    """Apply the rule of `schedule` in a single statement, without a transaction.

    Return None if the rule cannot be applied in a single statement. In that case, nothing has been changed. The caller
    then uses `scheduling`, which creates the follow-up or raises the error.
    """
    check_planned(Planned(chat_id, message, due_date))
    return (
        yield from follow_ups.create_if_clear.steps(
            workspace_id=workspace_id, chat_id=chat_id, message=message, due_date=due_date, key_id=key_id
        )
    )


def schedule_many(session: Session, *, workspace_id: UUID, planned: Sequence[Planned]) -> list[FollowUp]:
    """Create all given follow-ups of a workspace, or none; return them in the given order.

    The rules of `schedule` apply. The number of SQL statements does not depend on the number of follow-ups; 1,000
    follow-ups take about 100 ms. The chats are locked in ascending order of their ids. Raises `SomeRefusedError`, which
    maps the index of each refused follow-up to its error. Also raises `QuotaExceededError` or `TransactionError`.
    """
    _check_transaction(session)
    return run(session, _scheduling_many(workspace_id, planned))


def _scheduling_many(workspace_id: UUID, planned: Sequence[Planned]) -> Steps[list[FollowUp]]:
    refused = {index: error for index, one in enumerate(planned) if (error := _refusal(check_planned, one))}
    valid = [one for index, one in enumerate(planned) if index not in refused]
    locked = yield from chats.lock_many.steps(workspace_id, {one.chat_id for one in valid})
    room = yield from follow_ups.room_in.steps(workspace_id, list(locked))
    now = hours = None
    if any(chat.channel in WINDOWED_CHANNELS for chat in locked.values()):
        (row,) = yield _NOW()
        now, hours = row.now, (yield from sending_hours.find.steps(workspace_id))

    def check(one: Planned) -> None:
        chat = locked.get(one.chat_id)
        if chat is None:
            raise ChatNotFoundError
        trigger_of(chat)
        if now and chat.channel in WINDOWED_CHANNELS:
            check_moment(chat, max(one.due_date, now), hours)
        room[one.chat_id] -= 1
        if room[one.chat_id] < 0:
            raise TooManyPendingError

    for index, one in enumerate(planned):
        if index not in refused and (error := _refusal(check, one)):
            refused[index] = error
    if refused:
        raise SomeRefusedError(dict(sorted(refused.items())), len(planned))
    yield from quotas.take.steps(workspace_id, Kind.PENDING, len(planned))
    new = [(uuid4(), one, trigger_of(locked[one.chat_id])) for one in planned]
    return (yield from follow_ups.insert_many.steps(workspace_id, new))


def _refusal(check: Callable[[Planned], None], planned: Planned) -> FollowUpsError | None:
    try:
        check(planned)
    except FollowUpsError as error:
        return error
    return None


def cancel(session: Session, follow_up_id: UUID, *, reason: str | None = None, actor: Actor | None = None) -> FollowUp:
    """Cancel a pending follow-up. Once the transaction has committed, the follow-up is never sent.

    ``reason`` is stored as given; the default is ``cancelled_by_api``. If the follow-up is already cancelled, the call
    changes nothing. A transaction that cancels in several chats must process the chats in the same order as `schedule`.
    The audit log records the ``actor``, by default the user of this process.

    Raises `FollowUpNotFoundError`, `AlreadyFinishedError`, `DeliveryInProgressError` and `TransactionError`.
    """
    changes: dict[str, Any] = {"status": Status.CANCELLED}
    if reason is not None:
        changes["reason"] = reason
    return amend(session, follow_up_id, changes, actor=actor)


def retry(
    session: Session, follow_up_id: UUID, *, due_date: datetime | None = None, actor: Actor | None = None
) -> FollowUp:
    """Create a new follow-up from a failed follow-up, which itself is not changed.

    Raises the same errors as `schedule`.
    """
    old = _failed(session, follow_up_id)
    new = _repeat(session, old, retries.last_of(session, old.id), due_date)
    details = {"retriedAs": str(new.id)}
    by = actor or user_of_process(Way.PYTHON)
    audit.record(session.connection(), Event(by, Action.FOLLOW_UP_RETRIED, old.workspace_id, old.id, details=details))
    return new


def retry_once(session: Session, follow_up_id: UUID) -> FollowUp:
    """Create a new follow-up, due now, from a failed one that has no retry yet.

    The caller records the audit event. Raises `AlreadyRetriedError` if the failed follow-up has already been retried.
    Also raises the errors of `schedule`.
    """
    old = _failed(session, follow_up_id)
    if retries.last_of(session, old.id) != old.id:
        raise AlreadyRetriedError
    return _repeat(session, old, old.id, None)


def _failed(session: Session, follow_up_id: UUID) -> FollowUp:
    """Lock a failed follow-up's chat against other retries, and return the follow-up."""
    old = follow_ups.find(session, follow_up_id, None)
    if old is None:
        raise FollowUpNotFoundError
    if old.status != Status.FAILED:
        message = Sentence("Only a failed follow-up can be retried; this one is {status}.", status=Sentence(old.status))
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
    retries.mark_as_retry(session, new.id, last)
    return new


def amend(
    session: Session,
    follow_up_id: UUID,
    changes: Mapping[str, Any],
    *,
    workspace_id: UUID | None = None,
    actor: Actor | None = None,
) -> FollowUp:
    """Change fields of a follow-up (names in snake_case), or end it with a final ``status``.

    If ``workspace_id`` is None, the follow-up may belong to any workspace. Fields that already have the requested value
    are ignored. The audit log records the ``actor``, by default the user of this process.

    Raises `InvalidRequestError`, `FollowUpNotFoundError`, `ChatNotFoundError`, `NothingToFollowUpError`,
    `OutsideMessagingWindowError`, `TooManyPendingError`, `AlreadyFinishedError`, `DeliveryInProgressError` and
    `TransactionError`.
    """
    _check_transaction(session)
    by = actor or user_of_process(Way.PYTHON)
    return run(session, amending(follow_up_id, changes, workspace_id, by))


def amending(
    follow_up_id: UUID, changes: Mapping[str, Any], workspace_id: UUID | None, actor: Actor
) -> Steps[FollowUp]:
    """Apply the rule of `amend`, for synchronous and asynchronous callers."""
    check_changes(changes)
    found, locked = yield from _lock(follow_up_id, changes.get("chat_id"), workspace_id)
    fresh = {name: value for name, value in changes.items() if getattr(found, name) != value}
    if not fresh:
        return found
    # On an event loop, the caller passes the workspace's id.
    event = _event(actor, workspace_id or found.workspace_id, found, fresh)
    if found.status in FINAL:
        changed = yield from _amend_finished(found, fresh)
    else:
        checks_chat = changes.keys() & {"due_date", "chat_id"}
        chat = _present(locked, changes.get("chat_id", found.chat_id)) if checks_chat else None
        changed = yield from _amend_pending(found, fresh, chat)
    yield from audit.record.steps(event)
    return changed


def _event(actor: Actor, workspace_id: UUID, found: FollowUp, fresh: Mapping[str, Any]) -> Event:
    """Return the audit event of a change.

    The event contains the names of the changed fields and the old and new due dates, but no message text.
    """
    details: dict[str, object] = {"fields": sorted(to_camel(name) for name in fresh)}
    action = Action.FOLLOW_UP_CHANGED
    if "due_date" in fresh:
        details |= {"from": found.due_date.isoformat(), "to": fresh["due_date"].isoformat()}
    if "status" in fresh:
        action = Action.FOLLOW_UP_ENDED
        details |= {"status": fresh["status"].value}
    return Event(actor, action, workspace_id, found.id, details=details)


def _lock(
    follow_up_id: UUID, target: UUID | None, workspace_id: UUID | None
) -> Steps[tuple[FollowUp, Mapping[UUID, Chat]]]:
    """Lock and return the follow-up and two chats: the follow-up's own chat and the ``target`` chat.

    The chats are locked before the follow-up. Raises `FollowUpNotFoundError`, and `DeliveryInProgressError` for a
    follow-up in flight.
    """
    while True:
        locked = yield from chats.lock_chats_of.steps(follow_up_id, workspace_id, target)
        if found := (yield from follow_ups.find_and_lock_if_not_begun.steps(follow_up_id, locked)):
            return found, locked
        found = yield from follow_ups.find.steps(follow_up_id, workspace_id)
        if found is None:
            raise FollowUpNotFoundError
        if found.status in FINAL:
            return found, locked
        if found.chat_id in locked:
            raise DeliveryInProgressError
        # While this transaction waited for the lock, another one moved the follow-up to another chat.


def _present(locked: Mapping[UUID, Chat], chat_id: UUID) -> Chat:
    chat = locked.get(chat_id)
    if chat is None or chat.removed_at is not None:
        raise ChatNotFoundError
    return chat


_ISOLATION = text("SELECT current_setting('transaction_isolation')")
LOOSEST = frozenset({"read committed", "read uncommitted"})
"""The two isolation levels that PostgreSQL treats as READ COMMITTED."""


def _check_transaction(session: Session) -> None:
    """Refuse autocommit and isolation levels with a single snapshot per transaction."""
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


def _amend_finished(found: FollowUp, fresh: Mapping[str, Any]) -> Steps[FollowUp]:
    fills_in = fresh.keys() == {"chat_message_id"} and found.status == Status.SENT and found.chat_message_id is None
    if fills_in:
        named = yield from follow_ups.name_chat_message_if_unnamed.steps(found.id, fresh["chat_message_id"])
        if named:
            return named
    raise AlreadyFinishedError


def _amend_pending(found: FollowUp, fresh: Mapping[str, Any], chat: Chat | None) -> Steps[FollowUp]:
    fields = {name: value for name, value in fresh.items() if name not in {"status", "reason", "finished_at"}}
    if "chat_id" in fields and chat is not None:
        trigger_of(chat)
        if (yield from follow_ups.is_full.steps(chat.workspace_id, chat.id)):
            raise TooManyPendingError
    if chat is not None:
        yield from check_window.steps(chat, fields.get("due_date", found.due_date))
    changed: FollowUp | None = found
    if fields:
        changed = yield from follow_ups.change_if_not_begun.steps(found.id, fields)
    if changed and "status" in fresh:
        final = final_of(fresh["status"], fresh.get("reason"))
        changed = yield from follow_ups.end_if_not_begun.steps(found.id, final, fresh.get("finished_at"))
    if changed is None:
        raise DeliveryInProgressError
    if fresh.keys() & {"due_date", "chat_id", "status"}:
        yield from chat_order.unblock.steps([found.id])
    return changed


_NOW = Statement("SELECT now() AS now")


@Rule
def check_window(chat: Chat, due_date: datetime) -> Steps[None]:
    """Refuse a due date at which the channel's messaging window is closed.

    The due date may be outside the sending hours. For a due date outside sending hours, the messaging window must still
    be open when sending hours begin.
    """
    if chat.channel in WINDOWED_CHANNELS:
        (row,) = yield _NOW()
        hours = yield from sending_hours.find.steps(chat.workspace_id)
        check_moment(chat, max(due_date, row.now), hours)
