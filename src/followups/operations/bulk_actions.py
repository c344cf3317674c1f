"""Carries out the console's bulk actions in the worker processes, batch by batch.

A batch holds the lock on its action's row, so no two workers do the same, and the progress is recorded in the
transaction of the batch. A worker that dies leaves the rest to any other.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from followups import scheduling
from followups.delivery import events
from followups.errors import ChatNotFoundError, ConflictError, OutsideMessagingWindowError
from followups.models import FollowUp
from followups.states import ReasonCode, Status, finish
from followups.store import audit, browse, bulk_actions
from followups.store.audit import Action, Actor, Event, Way
from followups.store.browse import Place, Wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.models import BulkAction

CANCELS = 200
"""Follow-ups in one batch of a cancel, which takes some tens of milliseconds."""

RETRIES = 50
"""Follow-ups in one batch of a retry, which locks their chats one after the other."""

SEEN_EVERY = 1.0
"""Least seconds between two searches for actions."""

BY_HAND = finish(Status.CANCELLED, ReasonCode.CANCELLED_BY_API)


class BulkRunner:
    """A thread in a worker process while there is an action. A call while it runs does nothing."""

    def __init__(self, engine: Engine, nudge: Callable[[], None]) -> None:
        """``nudge`` asks for a tick, after follow-ups have become due."""
        self._engine = engine
        self._nudge = nudge
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Carry out the waiting actions, in a thread. Returns at once."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="bulk", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop after the current batch; other workers go on with the rest."""
        self._stopping.set()
        if self._thread and self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set() and run_batch(self._engine):
                self._nudge()
        except Exception as error:  # noqa: BLE001 - the next tick tries again, whatever it was
            events.failed("bulk", error, self._engine)
        self._stopping.wait(SEEN_EVERY)


def run_batch(engine: Engine) -> bool:
    """Carry out one batch of the oldest action; return whether there was one."""
    with Session(engine) as session, session.begin():
        action = bulk_actions.lock_next(session)
        if action is None:
            return False
        if action.stopped_at is not None:
            _record(session, action, [], {}, None, finished=True)
            return True
        cancels = action.kind == "cancel"
        size = CANCELS if cancels else RETRIES
        wanted = Wanted.of(action.chosen | {"until": action.created_at.isoformat()})
        after = Place(action.ended_at_time, action.ended_at_id) if action.ended_at_time and action.ended_at_id else None
        places = browse.batch(session.connection(), wanted, after, size)
        ids = [place.id for place in places]
        if cancels:
            done, passed = bulk_actions.cancel_if_not_begun(session.connection(), ids, BY_HAND)
        else:
            done, passed = _retry(session, ids)
        _record(session, action, done, passed, places[-1] if places else None, finished=len(places) < size)
    if cancels:
        events.ended((one, BY_HAND) for one in done)
    return True


def _retry(session: Session, ids: Sequence[UUID]) -> tuple[list[UUID], dict[str, int]]:
    """Make a new follow-up from each failed one, in the order of their chats, as every transaction locks them."""
    done: list[UUID] = []
    passed: dict[str, int] = {}
    found = [one for one in (session.get(FollowUp, each) for each in ids) if one is not None]
    for one in sorted(found, key=lambda each: (each.chat_id, each.id)):
        try:
            with session.begin_nested():
                done.append(scheduling.retry_once(session, one.id).id)
        except OutsideMessagingWindowError:
            passed["window closed"] = passed.get("window closed", 0) + 1
        except ChatNotFoundError:
            passed["chat removed"] = passed.get("chat removed", 0) + 1
        except ConflictError as error:
            why = error.slug.replace("-", " ")
            passed[why] = passed.get(why, 0) + 1
    return done, passed


def _record(
    session: Session,
    action: BulkAction,
    done: Sequence[UUID],
    passed: dict[str, int],
    place: Place | None,
    *,
    finished: bool,
) -> None:
    totals = {why: action.passed_over.get(why, 0) + passed.get(why, 0) for why in {**action.passed_over, **passed}}
    number = action.done + len(done)
    bulk_actions.record_progress(session, action, number, json.dumps(totals), place, finished=finished)
    if done:
        what = Action.FOLLOW_UPS_CANCELLED if action.kind == "cancel" else Action.FOLLOW_UPS_RETRIED
        actor = Actor(Way.CONSOLE, name=action.created_by)
        # The batches share the action's id, so that they add up in one event.
        event = Event(actor, what, action.workspace_id, number=len(done), id=action.id)
        audit.record(session.connection(), event)
