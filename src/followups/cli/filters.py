"""Options that select follow-ups, and a usage error (exit code 2) for values that don't fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from followups.channels import Channel
from followups.errors import WorkspaceNotFoundError
from followups.states import ReasonCode
from followups.store import workspaces

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.orm import Session

Codes = Annotated[
    list[ReasonCode] | None, typer.Option("--reason", help="Only with this reason code; may be repeated.")
]

Workspace = Annotated[str | None, typer.Option("--workspace", help="Of this workspace.", show_default="all")]
OneChannel = Annotated[Channel | None, typer.Option("--channel", help="On this channel.", show_default="all")]


def workspace_id_of(session: Session, name: str | None) -> UUID | None:
    """Return the id of the workspace, or None if no name is given. Raises a usage error for an unknown one."""
    if name is None:
        return None
    try:
        return workspaces.find(session, name).id
    except WorkspaceNotFoundError:
        message = f"there is no workspace {name!r}; followups workspace list shows which there are"
        raise typer.BadParameter(message, param_hint="--workspace") from None
