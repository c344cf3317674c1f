"""Deletion of a workspace or a chat.

Pending follow-ups are cancelled, attempts in flight finish, and then everything is deleted. To continue an interrupted
deletion, run it again. One audit event remains, with the number of deleted follow-ups.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING
from uuid import uuid4

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from followups.errors import FollowUpsError
from followups.store import audit, deletion
from followups.store.audit import Action, Event
from followups.store.bulk_cancel import CancelCursor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta

    from sqlalchemy import Engine

    from followups.store.audit import Actor
    from followups.store.deletion import DeletionScope

    Batches = Iterator[dict[str, int]]

PAUSE = 0.2
"""Seconds between two passes, if follow-ups are still in flight or locked by another transaction."""

NAMES = {
    "follow_ups": "deleted",
    "chat_messages": "chatMessages",
    "idempotency_keys": "idempotencyKeys",
    "chats": "chats",
    "audit_events": "auditEvents",
}
"""For each table, the name under which a deletion returns the number of deleted rows."""


def delete(engine: Engine, actor: Actor, whole: DeletionScope, patience: timedelta) -> Batches:
    """Delete the workspace or chat in batches, and yield the counts of each batch.

    Once the first batch has begun, the workspace or chat accepts no new follow-ups. Raises `FollowUpsError` if
    follow-ups are still in flight or locked when ``patience`` has elapsed.
    """
    event = _event(actor, whole)
    with Session(engine) as session, session.begin():
        audit.record(session.connection(), event)
        deletion.begin(session, whole)
    deadline = time.monotonic() + patience.total_seconds()
    while True:
        for counts in _pass(engine, whole, event):
            if any(counts.values()):
                deadline = time.monotonic() + patience.total_seconds()
            yield counts
        if _complete(engine, whole):
            return
        if time.monotonic() > deadline:
            raise FollowUpsError(_what_is_left(engine, whole))
        time.sleep(PAUSE)


def _event(actor: Actor, whole: DeletionScope) -> Event:
    if whole.chat_id is not None:
        return Event(actor, Action.CHAT_DELETED, whole.workspace_id, whole.chat_id, number=0, id=uuid4())
    # The audit event's id is the workspace's id. A resumed deletion therefore records no second event.
    return Event(
        actor, Action.WORKSPACE_DELETED, whole.workspace_id, whole.workspace_id, number=0, id=whole.workspace_id
    )


def _pass(engine: Engine, whole: DeletionScope, event: Event) -> Batches:
    place: CancelCursor | None = CancelCursor()
    while place is not None:
        with engine.begin() as opened:
            batch = deletion.cancel(opened, whole, place)
        place = batch.ended
        yield {"cancelled": len(batch.cancelled)}
    with engine.begin() as opened:
        deletion.end_lost(opened, whole)
    for table, condition in deletion.conditions(whole).items():
        number = 1
        while number:
            with engine.begin() as opened:
                number = deletion.delete_batch(opened, whole, table, condition)
                if table == "follow_ups":
                    audit.record(opened, replace(event, number=number))
            yield {NAMES[table]: number}


def _complete(engine: Engine, whole: DeletionScope) -> bool:
    """Delete the row of the workspace or chat itself. Return False if other rows still refer to the row to delete."""
    try:
        with engine.begin() as opened:
            deletion.complete(opened, whole)
    except IntegrityError:
        return False
    return True


def _what_is_left(engine: Engine, whole: DeletionScope) -> str:
    with engine.connect() as opened:
        in_flight, number = deletion.left(opened, whole)
    if in_flight:
        why = f"the delivery of {_follow_ups(in_flight)} has not ended"
    else:
        why = f"other transactions have locked {_follow_ups(number)}, or the chats"
    return f"The deletion is not complete, because {why}: run the command again to continue."


def _follow_ups(number: int) -> str:
    return f"{number} follow-up{'' if number == 1 else 's'}"
