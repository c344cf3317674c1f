"""The timeline of one follow-up: creation, changes, holds, attempts, acceptance and end."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from followups.states import Status
from followups.store.audit import Action
from followups.wording import Sentence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from followups.models import AuditEvent, FollowUp
    from followups.operations.circumstances import Explained

AT_ONCE = timedelta(seconds=1)
"""A follow-up that fails within this time after its hold was not held until the sending hours opened."""

ACTIONS = {
    Action.FOLLOW_UP_CHANGED: "Changed",
    Action.FOLLOW_UP_ENDED: "Ended by hand",
    Action.FOLLOW_UP_RETRIED: "Retried",
    Action.MESSAGES_SHOWN: "The message was shown",
}
"""Descriptions of the manual changes in a timeline. A follow-up's creation and rescheduling are not included."""

OUTCOMES = {
    "retry": "failed for now",
    "snoozed": "deferred",
    "rejected": "refused for good",
    "unknown": "outcome unknown",
    "lost": "worker lost",
}
"""Descriptions of the outcomes of attempts that did not send the message."""


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """One entry of the timeline."""

    at: datetime
    what: Sentence
    who: Sentence | None = None
    detail: str = ""
    """Untranslated text from the transport or a caller."""
    code: int | None = None
    took: timedelta | None = None


def timeline(found: Explained) -> list[TimelineEntry]:
    """Return all events of a follow-up, oldest first."""
    changes = [event for event in found.events if event.action != Action.FOLLOW_UP_CREATED]
    entries = [
        TimelineEntry(found.follow_up.created_at, Sentence("Created"), _creator(found)),
        *(TimelineEntry(event.at, _change(event), event.by) for event in changes),
        *(
            TimelineEntry(
                each.at,
                Sentence(
                    "Attempt {number}: {outcome}",
                    number=each.number,
                    outcome=Sentence(OUTCOMES.get(each.outcome, each.outcome)),
                ),
                detail=each.detail,
                code=each.status_code,
                took=each.duration,
            )
            for each in found.failures
        ),
        *_milestones(found.follow_up),
    ]
    return sorted(entries, key=lambda entry: entry.at)


def _creator(found: Explained) -> Sentence | None:
    """Return who created the follow-up, if that was recorded."""
    created = next((event for event in found.events if event.action == Action.FOLLOW_UP_CREATED), None)
    if created is not None:
        return created.by
    return Sentence("API key {actor}", actor=found.created_by.title) if found.created_by else None


def _change(event: AuditEvent) -> Sentence:
    moved = event.details
    if event.action == Action.FOLLOW_UP_CHANGED and "from" in moved:
        before, after = (datetime.fromisoformat(moved[name]) for name in ("from", "to"))
        return Sentence("Moved from {before} to {after}", before=before, after=after)
    return Sentence(ACTIONS.get(Action(event.action), event.action) if event.action in set(Action) else event.action)


def _milestones(one: FollowUp) -> Iterator[TimelineEntry]:
    # a hold also ends when it is too late to send the follow-up, or when the follow-up is cancelled
    unsent = one.finished_at if one.status != Status.SENT else None
    if one.held_until and (unsent is None or unsent - one.held_until >= AT_ONCE):
        yield TimelineEntry(one.held_until, Sentence("Held until the sending hours opened"))
    if one.in_flight and one.begun_at:
        yield TimelineEntry(one.begun_at, Sentence("Attempt {number} began", number=one.attempts))
    if one.accepted_at:
        accepted = Sentence("Accepted by the transport, attempt {number}", number=one.attempts)
        yield TimelineEntry(one.accepted_at, accepted, took=one.accepted_duration)
    if one.finished_at:
        ended = Sentence("Ended: {status}", status=Sentence(one.status))
        yield TimelineEntry(one.finished_at, ended, detail=one.reason or "")
