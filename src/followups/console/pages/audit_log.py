"""The audit log: who made which change, and when."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from followups.console.visit import uuid_or_none
from followups.errors import InvalidRequestError, WorkspaceNotFoundError
from followups.store import audit, workspaces
from followups.store.audit import Action, AuditFilter

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.orm import Session
    from starlette.responses import Response

    from followups.console.visit import Visit

SIZE = 50
"""Number of events on a page."""


def show(visit: Visit) -> Response:
    """Show a page of the audit log."""
    action, name = visit.query.text("action"), visit.query.text("workspace")
    told = ""
    with visit.transaction() as session:
        try:
            wanted = AuditFilter(
                workspace_id=visit.person.workspace_id or _workspace(session, name),
                actions=(Action(action),) if action else (),
                target_id=visit.query.uuid("target"),
            )
        except (ValueError, InvalidRequestError):
            told, wanted = visit.t("There is no such filter."), AuditFilter(workspace_id=visit.person.workspace_id)
        found = audit.newest(session, wanted, SIZE + 1, _place(visit))
        session.expunge_all()
    events = found[:SIZE]
    older = ""
    if len(found) > SIZE:
        place = f"{events[-1].at.isoformat()}_{events[-1].id}"
        older = visit.url("/audit", action=action, workspace=name, after=place)
    return visit.page(
        "audit.html",
        422 if told else 200,
        told=told,
        events=events,
        actions=[each.value for each in Action],
        action=action,
        workspace=name,
        older=older,
    )


def _workspace(session: Session, name: str) -> UUID | None:
    try:
        return workspaces.find(session, name).id if name else None
    except WorkspaceNotFoundError as error:
        raise InvalidRequestError(error.sentence, field="workspace") from None


def _place(visit: Visit) -> tuple[datetime, UUID] | None:
    at, _, after = visit.query.text("after").rpartition("_")
    found = uuid_or_none(after)
    try:
        moment = datetime.fromisoformat(at)
    except ValueError:
        return None
    return (moment, found) if found and moment.utcoffset() is not None else None
