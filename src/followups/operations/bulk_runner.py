"""Carries out the console's bulk actions in the worker processes, one batch after another.

Each batch locks the row of its bulk action, so no two workers carry out the same action at once. Each batch records the
bulk action's progress in its own transaction. If a worker crashes, another worker continues the action.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from followups import scheduling
from followups.database_errors import concerns_a_row
from followups.delivery import events
from followups.delivery.pruner import BackgroundThread
from followups.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
)
from followups.models import FollowUp
from followups.operations.bulk import retry_refusal
from followups.states import ReasonCode, Status, finish
from followups.store import audit, browse, bulk_actions, chats
from followups.store.audit import Action, Actor, Event, Way
from followups.store.browse import BrowseCursor, BrowseFilter

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.models import BulkAction

CANCELS = 200
"""The number of follow-ups in one batch of a bulk cancel; a batch takes a few tens of milliseconds."""

RETRIES = 50
"""Number of follow-ups in one retry batch. The chats of the follow-ups are locked one after the other."""

SEEN_EVERY = 1.0
"""Minimum seconds between two searches for bulk actions."""

PASSED_OVER = 60.0
"""Seconds for which a bulk action is skipped after a failed batch."""

BY_HAND = finish(Status.CANCELLED, ReasonCode.CANCELLED_BY_API)


SEARCH_LIMIT = timedelta(seconds=1)
"""Time limit of the search for a batch's follow-ups.

If a search exceeds the time limit, the next batch continues the search.
"""


class BatchError(Exception):
    """A batch of a bulk action failed."""

    def __init__(self, action_id: UUID, cause: Exception) -> None:
        """Store the id of the bulk action and the error of its batch."""
        super().__init__(f"{action_id}: {cause}")
        self.action_id = action_id
        self.cause = cause


class BulkRunner(BackgroundThread):
    """Carries out waiting bulk actions in a thread of a worker process. Any worker can continue a bulk action."""

    name = "bulk"

    def __init__(self, engine: Engine, nudge: Callable[[], None]) -> None:
        """Store the engine and ``nudge``, which requests a tick when follow-ups have become due."""
        super().__init__()
        self._engine = engine
        self._nudge = nudge
        self._passed_over: dict[UUID, float] = {}

    def _run(self) -> None:
        try:
            while not self._stopping.is_set() and self._run_batch():
                self._nudge()
            events.succeeded("bulk")  # a skipped bulk action does not delay other bulk actions
        except Exception as error:  # noqa: BLE001 - the next tick tries again, whatever it was
            events.failed("bulk", error, self._engine)
        self._stopping.wait(SEEN_EVERY)

    def _run_batch(self) -> bool:
        """Carry out the next batch of a bulk action; return False if there is none.

        A bulk action is skipped for a while after one of its batches has failed.
        """
        now = time.monotonic()
        self._passed_over = {one: until for one, until in self._passed_over.items() if until > now}
        try:
            return run_batch(self._engine, self._passed_over)
        except BatchError as error:
            events.failed("bulk", error.cause, self._engine)
            self._passed_over[error.action_id] = time.monotonic() + PASSED_OVER
            return True


def run_batch(engine: Engine, without: Collection[UUID] = ()) -> bool:
    """Carry out one batch of the oldest action that is not in ``without``.

    Return whether there was a bulk action to carry out. Raises `BatchError` if the batch fails.
    """
    action_id = None
    try:
        with Session(engine) as session, session.begin():
            action = bulk_actions.lock_next(session, without)
            if action is None:
                return False
            action_id = action.id
            ended = _carry_out(session, action)
    except Exception as error:
        if action_id is None:
            raise
        raise BatchError(action_id, error) from error
    events.ended((one, BY_HAND) for one in ended)
    return True


def _carry_out(session: Session, action: BulkAction) -> Sequence[UUID]:
    """Carry out one batch of the action. Return the ids of the follow-ups that were cancelled."""
    if action.stopped_at is not None:
        _record(session, action, [], {}, None, finished=True)
        return []
    cancels = action.kind == "cancel"
    size = CANCELS if cancels else RETRIES
    wanted = BrowseFilter.of(action.chosen | {"until": action.created_at.isoformat()})
    after = (
        BrowseCursor(action.ended_at_time, action.ended_at_id) if action.ended_at_time and action.ended_at_id else None
    )
    found = browse.search(session.connection(), wanted, after, size, SEARCH_LIMIT)
    if found is None:
        message = f"no follow-up was found within {SEARCH_LIMIT}"
        raise TimeoutError(message)
    ids = [row.follow_up.id for row in found.rows]
    if cancels:
        done, passed = bulk_actions.cancel_if_not_begun(session.connection(), ids, BY_HAND)
    else:
        done, passed = _retry(session, ids)
    _record(session, action, done, passed, found.following, finished=found.following is None)
    return done if cancels else []


def _retry(session: Session, ids: Sequence[UUID]) -> tuple[list[UUID], dict[str, int]]:
    """Create a new follow-up for each failed one.

    The chats are locked first, in ascending order of their ids. After the chats, the quotas are locked, in order of
    their workspaces.
    """
    done: list[UUID] = []
    passed: dict[str, int] = {}
    found = [one for one in (session.get(FollowUp, each) for each in ids) if one is not None]
    keys = sorted((one.workspace_id, one.chat_id, one.id) for one in found)
    for chat_id, workspace_id in sorted({(chat_id, workspace_id) for workspace_id, chat_id, _ in keys}):
        chats.lock_many(session, workspace_id, [chat_id])
    for _, _, follow_up_id in keys:
        try:
            with session.begin_nested():
                done.append(scheduling.retry_once(session, follow_up_id).id)
        except (ConflictError, InvalidRequestError, NotFoundError) as error:
            why = retry_refusal(error)
        except DBAPIError as error:
            if not concerns_a_row(error):
                raise
            why = bulk_actions.NOT_WRITABLE
        else:
            continue
        passed[why] = passed.get(why, 0) + 1
    return done, passed


def _record(
    session: Session,
    action: BulkAction,
    done: Sequence[UUID],
    passed: dict[str, int],
    place: BrowseCursor | None,
    *,
    finished: bool,
) -> None:
    totals = {why: action.passed_over.get(why, 0) + passed.get(why, 0) for why in {**action.passed_over, **passed}}
    number = action.done + len(done)
    bulk_actions.record_progress(session, action, number, json.dumps(totals), place, finished=finished)
    if audited := len(done) + passed.get(bulk_actions.IN_FLIGHT, 0):
        what = Action.FOLLOW_UPS_CANCELLED if action.kind == "cancel" else Action.FOLLOW_UPS_RETRIED
        actor = Actor(Way.CONSOLE, name=action.created_by)
        # All batches of an action share one audit event, whose id is the action's id. The audit event contains the sums
        # over all batches.
        event = Event(actor, what, action.workspace_id, number=audited, id=action.id)
        audit.record(session.connection(), event)
