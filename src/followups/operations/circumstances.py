"""Read what explains a follow-up's state: its chat, attempts, manual changes, and holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

import redis
from sqlalchemy import func, select

from followups.channels import window_closes_at
from followups.errors import FollowUpNotFoundError
from followups.flow_control.breaker import read
from followups.models import ApiKey, Chat, Workspace
from followups.operations.doctor.broker_checks import broker_client
from followups.operations.explain import Circumstances, explain
from followups.states import Status
from followups.store import audit, chat_order, follow_ups, last_tick, pauses, rate_limits, retries, sending_hours
from followups.wording import Sentence

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.flow_control.breaker import BreakerStatus
    from followups.models import AuditEvent, FailedAttempt, FollowUp
    from followups.settings import Settings

MOST_EVENTS = 100
"""Maximum number of manual changes shown with a follow-up. If a follow-up has more manual changes, only the newest are
shown.
"""

PATIENCE = timedelta(seconds=1)
"""How long to wait for the breaker's state, which comes from the broker. All other facts in an explanation come from
the database.
"""


@dataclass(frozen=True, slots=True)
class Explained:
    """A follow-up, with all the facts that explain its state."""

    follow_up: FollowUp
    workspace: str
    created_by: ApiKey | None
    """The API key that created the follow-up.

    The value is None if the follow-up was not created with an API key, or if the key has been deleted.
    """
    chat: Chat
    failures: Sequence[FailedAttempt]
    events: Sequence[AuditEvent]
    """The manual changes of the follow-up, oldest first."""
    now: datetime
    around: Circumstances
    explanation: Sentence
    """Why the follow-up is in its current state."""


def explained(session: Session, follow_up_id: UUID, settings: Settings) -> Explained:
    """Return the follow-up with everything that explains its state. Raises `FollowUpNotFoundError`."""
    follow_up = follow_ups.find(session, follow_up_id, None)
    if follow_up is None:
        raise FollowUpNotFoundError
    now = session.execute(select(func.now())).scalar_one()
    chat = session.get_one(Chat, (follow_up.workspace_id, follow_up.chat_id))
    around = _circumstances(session, follow_up, chat, settings)
    if follow_up.waits_for is not None:
        around = replace(around, first=_first(session, follow_up, around, now, settings))
    return Explained(
        follow_up,
        session.get_one(Workspace, follow_up.workspace_id).name,
        session.get(ApiKey, follow_up.created_by_key) if follow_up.created_by_key else None,
        chat,
        follow_ups.failures(session, follow_up_id),
        audit.newest(session, audit.AuditFilter(target_id=follow_up_id), MOST_EVENTS)[::-1],
        now,
        around,
        explain(follow_up, settings, now, around),
    )


def _circumstances(session: Session, follow_up: FollowUp, chat: Chat, settings: Settings) -> Circumstances:
    connection = session.connection()
    pending = follow_up.status == Status.PENDING
    last = retries.last_of(session, follow_up.id)
    return Circumstances(
        pause=pauses.of(connection, follow_up.workspace_id, chat.channel),
        hours=sending_hours.find(session, follow_up.workspace_id),
        limits=rate_limits.of(connection, follow_up.workspace_id, chat.channel),
        breaker=breaker_state(settings) if pending else None,
        tick_age=last_tick.last_tick_age(connection),
        place=chat_order.places(connection, [follow_up.id])[follow_up.id] if pending else 1,
        window_closes_at=window_closes_at(chat.channel, chat.last_user_message_at),
        retried_as=last if last != follow_up.id else None,
    )


def breaker_state(settings: Settings) -> BreakerStatus | None:
    """Return the breaker's state, or None if the broker cannot be reached."""
    try:
        with broker_client(settings, PATIENCE) as client:
            return read(client, settings)
    except (redis.RedisError, OSError):
        return None  # followups doctor reports an unreachable broker


def _first(
    session: Session, follow_up: FollowUp, around: Circumstances, now: datetime, settings: Settings
) -> Sentence | None:
    """Explain the chat's first pending follow-up. All later follow-ups of the chat wait for the first one."""
    first = chat_order.first_of(session.connection(), follow_up.workspace_id, follow_up.chat_id)
    found = follow_ups.find(session, first, None) if first and first != follow_up.id else None
    if found is None:
        return None
    explanation = explain(found, settings, now, replace(around, place=1))
    if first == follow_up.waits_for:
        return Sentence("About that follow-up: {explanation}", explanation=explanation)
    return Sentence("The first of the chat is {id}: {explanation}", id=first, explanation=explanation)
