"""Scheduled chat follow-ups: each is sent once, when due, unless something cancels it first.

Python code schedules a follow-up in its own database transaction. The inserted row is the job, so nothing else has to
be enqueued::

    import followups

    with Session(engine) as session, session.begin():
        followups.schedule(session, workspace_id=w, chat_id=c, message="Still there?", due_date=due)

One call schedules many follow-ups, either all of them or none::

    planned = [followups.Planned(chat_id, "Still there?", due) for chat_id in chat_ids]
    followups.schedule_many(session, workspace_id=w, planned=planned)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from followups.models import FollowUp
    from followups.scheduling import cancel, schedule, schedule_many
    from followups.states import ReasonCode, Status
    from followups.store.follow_ups import Planned

__all__ = ["FollowUp", "Planned", "ReasonCode", "Status", "cancel", "schedule", "schedule_many"]

_HOMES = {
    "FollowUp": "followups.models",
    "Planned": "followups.store.follow_ups",
    "ReasonCode": "followups.states",
    "Status": "followups.states",
    "cancel": "followups.scheduling",
    "schedule": "followups.scheduling",
    "schedule_many": "followups.scheduling",
}


def __getattr__(name: str) -> object:
    """Import a name on first use, so that `followups --help` loads no database library."""
    if name not in _HOMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(_HOMES[name]), name)
