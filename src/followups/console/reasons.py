"""Explanations of why follow-ups were sent or not sent.

A follow-up in a list has the same explanation as in ``followups show``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

from followups.channels import window_closes_at
from followups.operations.explain import Circumstances, explain
from followups.states import Status
from followups.store import chat_order, last_tick, pauses, rate_limits, sending_hours

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.console.services import ConsoleServices
    from followups.store.browse import Row
    from followups.wording import Sentence

_RETRIED = text("SELECT retry_of, id FROM follow_ups WHERE retry_of = ANY(CAST(:ids AS uuid[]))")


def of_rows(services: ConsoleServices, session: Session, rows: Sequence[Row], now: datetime) -> Mapping[UUID, Sentence]:
    """Return the explanation of each row, keyed by the row's id.

    The data that several explanations share are read once for each workspace and channel.
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
