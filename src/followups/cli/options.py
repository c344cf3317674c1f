"""Arguments and options that several commands share, and the usage errors (exit code 2) they raise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from followups.channels import Channel
from followups.errors import WorkspaceNotFoundError
from followups.states import ReasonCode
from followups.store import workspaces

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

EXAMPLE_ID = "0b0b6e34-0d0f-4d3c-9d5e-3f5a0c6f5a51"
EXAMPLE_CHAT = "6a1f3f0e-4f0e-4b39-8f5b-0f6a3f1f7c11"

FollowUpId = Annotated[UUID, typer.Argument(metavar="ID", show_default=False, help="As in followups list.")]
OneFollowUp = Annotated[
    UUID | None, typer.Argument(metavar="[ID]", show_default=False, help="Of one follow-up, as in followups list.")
]

Codes = Annotated[
    list[ReasonCode] | None, typer.Option("--reason", help="Only with this reason code; may be repeated.")
]

Workspace = Annotated[str | None, typer.Option("--workspace", help="Of this workspace.", show_default="all")]
OneChannel = Annotated[Channel | None, typer.Option("--channel", help="On this channel.", show_default="all")]


def workspace_id_of(session: Session, name: str | None) -> UUID | None:
    """Return the id of the workspace, or None if no name is given.

    Raises a usage error for an unknown name.
    """
    if name is None:
        return None
    try:
        return workspaces.find(session, name).id
    except WorkspaceNotFoundError:
        message = f"there is no workspace {name!r}; followups workspace list shows which there are"
        raise typer.BadParameter(message, param_hint="--workspace") from None


def require_either(follow_up_id: UUID | None, many: object, options: str) -> None:
    """Raise a usage error unless the ID of one follow-up or a bulk option is given."""
    if bool(follow_up_id) == bool(many):
        message = f"name one follow-up by its ID, or many by {options}."
        raise typer.BadParameter(message)


def refuse_bulk_options(**options: object) -> None:
    """Raise a usage error if a bulk option is given together with the ID of one follow-up."""
    for name, value in options.items():
        if value:
            message = "goes with many follow-ups, not with the ID of one."
            raise typer.BadParameter(message, param_hint=f"--{name.replace('_', '-')}")
