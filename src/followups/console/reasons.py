"""Explanations: why a follow-up was sent or not, and what a new due date would mean.

A list explains a follow-up in the same words as ``followups show``.
"""

from __future__ import annotations

from datetime import UTC
from typing import TYPE_CHECKING

from sqlalchemy import text

from followups import checks
from followups.channels import Channel, is_open, window_closes_at
from followups.operations.explain import Circumstances, explain
from followups.sending_hours import opens_at
from followups.states import Status
from followups.store import chat_order, last_tick, pauses, rate_limits, sending_hours

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.console.services import ConsoleServices
    from followups.console.visit import Visit
    from followups.models import Chat
    from followups.store.browse import Row
    from followups.wording import Sentence


_RETRIED = text("SELECT retry_of, id FROM follow_ups WHERE retry_of = ANY(CAST(:ids AS uuid[]))")


def of_rows(services: ConsoleServices, session: Session, rows: Sequence[Row], now: datetime) -> Mapping[UUID, Sentence]:
    """Return the explanation of each row, keyed by the row's id.

    Data that several explanations need is read only once per workspace and channel.
    """
    connection = session.connection()
    failed = [row.follow_up.id for row in rows if row.follow_up.status == Status.FAILED]
    retried = {row.retry_of: row.id for row in connection.execute(_RETRIED, {"ids": failed})} if failed else {}
    pending = [row for row in rows if row.follow_up.status == Status.PENDING]
    breaker = services.breaker() if pending else None
    tick_age = last_tick.last_tick_age(connection) if pending else None
    places = {(row.follow_up.workspace_id, row.channel) for row in pending}
    paused = {place: pauses.of(connection, *place) for place in places}
    in_chat = chat_order.places(connection, [row.follow_up.id for row in pending]) if pending else {}
    limited = {place: rate_limits.of(connection, *place) for place in places}
    hours = {workspace_id: sending_hours.find(session, workspace_id) for workspace_id, _ in places}
    sentences = {}
    for row in rows:
        place = (row.follow_up.workspace_id, row.channel)
        around = Circumstances(
            pause=paused.get(place),
            hours=hours.get(place[0]),
            limits=limited.get(place, ()),
            breaker=breaker,
            tick_age=tick_age,
            place=in_chat.get(row.follow_up.id, 1),
            window_closes_at=window_closes_at(row.channel, row.last_user_message_at),
            retried_as=retried.get(row.follow_up.id),
        )
        sentences[row.follow_up.id] = explain(row.follow_up, services.settings, now, around)
    return sentences


def consequences_of(visit: Visit, session: Session, chat: Chat, due: datetime, now: datetime) -> list[str]:
    """Return sentences that explain what a due date means in this chat.

    Raises `InvalidRequestError` for a due date outside the accepted years.
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
        said.append(t("That time has passed, so the follow-up is sent immediately."))
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
                    "This is outside the sending hours ({hours}), so the follow-up is held until {opening}.",
                    hours=hours.in_words,
                    opening=zone.day(opening),
                )
            )
            moment = opening
    if not is_open(channel, chat.last_user_message_at, moment):
        said.append(t("The channel's messaging window has closed by then, so the follow-up would fail."))
    if pause := pauses.of(session.connection(), chat.workspace_id, chat.channel):
        said.append(
            t(
                "Sending has been paused since {since}: unless the pause has ended by then, the follow-up is held.",
                since=zone.written(pause.since),
            )
        )
    return said
