"""Workspaces: the tenants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert

from followups.errors import InvalidRequestError, WorkspaceNotFoundError
from followups.models import Workspace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session

MAX_NAME_LENGTH = 200
"""Most characters of a workspace's name, and of an API key's."""


def create(session: Session, name: str) -> tuple[Workspace, bool]:
    """Create the workspace; return it and whether it is new. An existing one stays as it is.

    Raises `InvalidRequestError` for a name that is empty, longer than 200 characters or not storable.
    """
    name = name.strip()
    if not name:
        message = f"The name of a workspace must have 1 to {MAX_NAME_LENGTH} characters."
        raise InvalidRequestError(message, field="name")
    check_name(name)
    statement = insert(Workspace).values(name=name).on_conflict_do_nothing(index_elements=[Workspace.name])
    created = session.scalar(statement.returning(Workspace))
    return (created, True) if created else (find(session, name), False)


def find(session: Session, name: str) -> Workspace:
    """Return the workspace with that name. Raises `WorkspaceNotFoundError`."""
    name = name.strip()
    # No workspace can have such a name, and PostgreSQL or its driver would refuse to look for one.
    found = session.scalar(select(Workspace).where(Workspace.name == name)) if name.isprintable() else None
    if found is None:
        raise WorkspaceNotFoundError
    return found


def everything(session: Session) -> Sequence[Workspace]:
    """Return all workspaces by name."""
    return session.scalars(select(Workspace).order_by(Workspace.name)).all()


def check_name(name: str) -> None:
    """Refuse a name that is longer than 200 characters, or cannot be stored or printed."""
    if len(name) > MAX_NAME_LENGTH or not (name or "-").isprintable():
        message = f"A name must have at most {MAX_NAME_LENGTH} characters, all printable."
        raise InvalidRequestError(message, field="name")
