"""Workspaces: the tenants of the system."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import bindparam, select
from sqlalchemy.dialects.postgresql import insert

from followups.errors import InvalidRequestError, WorkspaceBeingDeletedError, WorkspaceNotFoundError
from followups.models import Workspace
from followups.wording import Sentence

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy.orm import Session

MAX_NAME_LENGTH = 200
"""Maximum length of the name of a workspace or an API key."""


def create(session: Session, name: str) -> tuple[Workspace, bool]:
    """Create the workspace; return the workspace and whether it is new. An existing workspace is not changed.

    Raises `InvalidRequestError` if the name is empty, longer than 200 characters or impossible to store. Raises
    `WorkspaceBeingDeletedError` if the workspace is being deleted.
    """
    name = name.strip()
    if not name:
        message = Sentence("The name of a workspace must have 1 to {most} characters.", most=MAX_NAME_LENGTH)
        raise InvalidRequestError(message, field="name")
    check_name(name)
    statement = insert(Workspace).values(name=name).on_conflict_do_nothing(index_elements=[Workspace.name])
    created = session.scalar(statement.returning(Workspace))
    return (created, True) if created else (find(session, name), False)


def find(session: Session, name: str, *, to_delete: bool = False) -> Workspace:
    """Return the workspace with the given name.

    Raises `WorkspaceNotFoundError`. Also raises `WorkspaceBeingDeletedError` for a workspace that is being deleted,
    unless ``to_delete`` is true.
    """
    name = name.strip()
    # No workspace's name contains unprintable characters. A query with unprintable characters could be rejected by
    # PostgreSQL or its driver.
    found = session.scalar(select(Workspace).where(Workspace.name == name)) if name.isprintable() else None
    if found is None:
        raise WorkspaceNotFoundError
    if found.deletion_began_at is not None and not to_delete:
        raise WorkspaceBeingDeletedError
    return found


_LOCK = (
    select(Workspace.id)
    .where(Workspace.id == bindparam("id"), Workspace.deletion_began_at.is_(None))
    .with_for_update(read=True, key_share=True)
)


def keep(session: Session, workspace_id: UUID) -> None:
    """Protect the workspace from deletion until the transaction ends. Raises `WorkspaceNotFoundError`."""
    if session.scalar(_LOCK, {"id": workspace_id}) is None:
        raise WorkspaceNotFoundError


def everything(session: Session) -> Sequence[Workspace]:
    """Return all workspaces in the order of their names."""
    return session.scalars(select(Workspace).order_by(Workspace.name)).all()


def check_name(name: str) -> None:
    """Reject a name that is longer than 200 characters, or cannot be stored or printed."""
    if len(name) > MAX_NAME_LENGTH or not (name or "-").isprintable():
        message = Sentence("A name must have at most {most} characters, all printable.", most=MAX_NAME_LENGTH)
        raise InvalidRequestError(message, field="name")


def first_names(session: Session, most: int) -> list[str]:
    """Return the names of workspaces in alphabetical order, up to ``most``."""
    return list(session.scalars(select(Workspace.name).order_by(Workspace.name).limit(most)))
