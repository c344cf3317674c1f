"""Sentences that explain the consequences of a due date before it is saved."""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING

from followups import checks
from followups.channels import Channel, is_open
from followups.sending_hours import opens_at
from followups.store import pauses, sending_hours

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session

    from followups.console.visit import Visit
    from followups.models import Chat


def foreseen(visit: Visit, session: Session, chat: Chat, due: datetime, now: datetime) -> list[str]:
    """Return sentences about what follows from a due date in this chat, beginning with the date and time themselves.

    Raises `InvalidRequestError` for a due date at the edge of the calendar.
    """
    checks.check_time(due, "due_date")
    t, zone = visit.t, visit.zone
    said = [
        t(
            "{local} in {zone} is {utc} UTC.",
            local=zone.written(due),
            zone=zone.name,
            utc=due.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        )
    ]
    moment = due
    if due <= now:
        said.append(t("That has passed, so it goes out at once."))
        moment = now
    channel = Channel(chat.channel)
    hours = sending_hours.find(session, chat.workspace_id)
    if hours is not None:
        try:
            opening = opens_at(hours, moment)
        except LookupError:
            opening = moment
        if opening > moment:
            said.append(
                t(
                    "It is outside the sending hours ({hours}): it is held until {opening}.",
                    hours=hours.in_words,
                    opening=zone.day(opening),
                )
            )
            moment = opening
    if not is_open(channel, chat.last_user_message_at, moment):
        said.append(t("The channel's messaging window has closed by then, so it would fail."))
    if pause := pauses.of(session.connection(), chat.workspace_id, chat.channel):
        said.append(
            t("It is paused since {since}: unless that has ended by then, it is held.", since=zone.written(pause.since))
        )
    return said
