"""Bulk actions in batches: cancel, retry, prune, and release follow-ups after a pause.

A generator commits each batch and then yields the batch's counts by name. After an interruption, each follow-up is
either completely processed or unchanged. Running the action again processes the remaining follow-ups.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic.alias_generators import to_camel
from sqlalchemy.orm import Session

from followups import scheduling
from followups.errors import (
    ChatNotFoundError,
    ConflictError,
    NotFoundError,
    NothingToFollowUpError,
    OutsideMessagingWindowError,
    QuotaExceededError,
)
from followups.store import audit, bulk_cancel, pauses, pruning, retries
from followups.store.audit import Action, Event
from followups.store.bulk_cancel import CancelCursor, CancelScope
from followups.store.pruning import OLDEST, MessageCursor
from followups.store.retries import FailureCursor, Failures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Connection, Engine

    from followups.errors import FollowUpsError
    from followups.states import Final
    from followups.store.audit import Actor

    Batches = Iterator[dict[str, int]]

PASSES = 5
PAUSE = 0.2
"""Maximum number of attempts to lock a locked row, and the pause between attempts in seconds."""

RETRIES = 500
"""Number of follow-ups fetched in one batch.

Each follow-up is retried in a separate transaction, which locks only the follow-up's chat. Transactions that lock
several chats could deadlock.
"""


def pending_of(session: Session, workspace_id: UUID | None, chat_id: UUID | None) -> list[CancelScope]:
    """Return the pending follow-ups of a workspace, or those with a chat's id in one or all workspaces.

    The result is empty for an unknown chat.
    """
    now = bulk_cancel.now(session.connection())
    if chat_id is None:
        return [] if workspace_id is None else [CancelScope(workspace_id, None, now)]
    found = bulk_cancel.workspaces_of_chat(session.connection(), chat_id)
    return [CancelScope(each, chat_id, now) for each in found if workspace_id in {None, each}]


def cancel(engine: Engine, actor: Actor, chosen: Sequence[CancelScope], final: Final) -> Batches:
    """Cancel pending follow-ups in batches.

    A follow-up in flight is not cancelled, but if its attempt fails, it is not retried. Rows that stay locked are
    counted but not cancelled.
    """
    for pending in chosen:
        details = {"code": final.code and final.code.value}
        event = Event(actor, Action.FOLLOW_UPS_CANCELLED, pending.workspace_id, pending.chat_id, details=details)
        for _ in range(PASSES):
            yield from _cancel_pass(engine, pending, final, event)
            with engine.connect() as opened:
                left = bulk_cancel.count_pending(opened, pending).number
            if not left:
                break
            time.sleep(PAUSE)
        else:
            yield {"heldByOthers": left}


def _cancel_pass(engine: Engine, pending: CancelScope, final: Final, event: Event) -> Batches:
    place: CancelCursor | None = CancelCursor()
    while place is not None:
        with engine.begin() as opened:
            batch = bulk_cancel.cancel_if_not_begun(opened, pending, final, place)
            if number := len(batch.cancelled) + batch.in_flight:
                audit.record(opened, replace(event, number=number))
        place = batch.ended
        yield {"cancelled": len(batch.cancelled), "inFlight": batch.in_flight}


def retry(engine: Engine, actor: Actor, failures: Failures) -> Batches:
    """For each failed follow-up that has not been retried, create a new follow-up that is due now."""
    after = FailureCursor()
    events: dict[UUID, Event] = {}  # the keys are the workspaces' ids
    while True:
        with engine.connect() as opened:
            batch = retries.some_failed(opened, failures, RETRIES, after)
        if not batch:
            return
        for one in batch:
            yield {_retry_one(engine, actor, one.id, events): 1}
        after = FailureCursor(batch[-1].finished_at, batch[-1].id)


def _retry_one(engine: Engine, actor: Actor, follow_up_id: UUID, events: dict[UUID, Event]) -> str:
    """Retry one follow-up and return the result."""
    try:
        with Session(engine) as session, session.begin():
            new = scheduling.retry_once(session, follow_up_id)
            event = Event(actor, Action.FOLLOW_UPS_RETRIED, new.workspace_id)
            audit.record(session.connection(), events.setdefault(new.workspace_id, event))
    except (ConflictError, NotFoundError, OutsideMessagingWindowError, QuotaExceededError) as error:
        return to_camel(retry_refusal(error).replace(" ", "_"))
    return "retried"


def retry_refusal(error: FollowUpsError) -> str:
    """Return a short reason for not retrying the follow-up."""
    match error:
        case ChatNotFoundError():
            return "chat removed"
        case NothingToFollowUpError():
            return "answered meanwhile"
        case _:
            return error.slug.replace("-", " ")


def prune(engine: Engine, actor: Actor, before: datetime, remove: Callable[[Connection, datetime], int]) -> Batches:
    """Delete old rows: finished follow-ups, chat messages, and expired idempotency keys.

    Finished follow-ups are deleted by calling ``remove``.
    """
    event = Event(actor, Action.FOLLOW_UPS_PRUNED, details={"before": before.isoformat()})
    number = 1
    while number:
        with engine.begin() as opened:
            number = remove(opened, before)
            if number:
                audit.record(opened, replace(event, number=number))
        yield {"deleted": number}
    place: MessageCursor | None = OLDEST
    while place is not None:
        with engine.begin() as opened:
            number, place = pruning.delete_messages(opened, before, place)
        yield {"chatMessages": number}
    number = 1
    while number:
        with engine.begin() as opened:
            number = pruning.delete_expired_keys(opened)
        yield {"idempotencyKeys": number}


def release_paused(engine: Engine) -> Batches:
    """Release the follow-ups whose pause has ended."""
    while True:
        with engine.begin() as opened:
            released = pauses.release_orphaned(opened)
        if not released:
            return
        yield {"resumed": released}
