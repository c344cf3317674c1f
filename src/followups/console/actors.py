"""The author of a change made in the console, for the audit log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from followups.store import audit
from followups.store.audit import Actor, Event, Way

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.orm import Session

    from followups.console.visit import Visit
    from followups.store.audit import Action


def actor_of(visit: Visit) -> Actor:
    """Return the person's session as the actor of a change."""
    session = visit.person.session
    return Actor(Way.CONSOLE, session.id, session.name)


def record(
    visit: Visit, session: Session, action: Action, workspace_id: UUID | None, target_id: UUID, **details: object
) -> None:
    """Record the person's action in the audit log, in the same transaction as the change."""
    audit.record(session.connection(), Event(actor_of(visit), action, workspace_id, target_id, details=details))
