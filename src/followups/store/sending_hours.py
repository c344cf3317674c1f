"""Statements that read, set and remove the sending hours of workspaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert

from followups.errors import InvalidRequestError
from followups.models import WorkspaceSendingHours as Row
from followups.sending_hours import span_of, zone_of
from followups.statements import Rule, Statement
from followups.store.holds import columns_of, hours_of
from followups.wording import Sentence

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.sending_hours import SendingHours
    from followups.statements import Steps

_ONE = Statement("SELECT {columns} FROM sending_hours WHERE workspace_id = :workspace_id", Row)


@Rule
def find(workspace_id: UUID) -> Steps[SendingHours | None]:
    """Return the workspace's sending hours, or None if it has none."""
    rows = yield _ONE(workspace_id=workspace_id)
    return hours_of(rows[0]).hours if rows else None


def everything(session: Session) -> dict[UUID, SendingHours]:
    """Return the sending hours of every workspace that has any."""
    return {row.workspace_id: hours_of(row).hours for row in session.scalars(select(Row))}


def put(session: Session, workspace_id: UUID, hours: SendingHours) -> None:
    """Set the workspace's sending hours.

    Raises `InvalidRequestError` for an unknown time zone or an empty set of days. After changing the sending hours,
    call `followups.store.holds.release_held` to release follow-ups that the old hours held.
    """
    if zone_of(hours.time_zone) is None:
        message = Sentence(
            "There is no time zone {zone!r}; use a name of the IANA database, such as Europe/Berlin.",
            zone=hours.time_zone,
        )
        raise InvalidRequestError(message, field="time_zone")
    now = session.execute(select(func.now())).scalar_one()
    try:
        open_from, open_until = span_of(hours, now)
    except LookupError as error:
        message = Sentence("These hours are never open: {hours}.", hours=hours.in_words)
        raise InvalidRequestError(message, field="days") from error
    values = columns_of(hours) | {"open_from": open_from, "open_until": open_until}
    statement = insert(Row).values(workspace_id=workspace_id, **values)
    session.execute(statement.on_conflict_do_update(index_elements=[Row.workspace_id], set_=values))


def clear(session: Session, workspace_id: UUID) -> bool:
    """Remove the workspace's sending hours; return whether there were any."""
    statement = delete(Row).where(Row.workspace_id == workspace_id).returning(Row.workspace_id)
    return session.scalar(statement) is not None
