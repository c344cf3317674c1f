"""The ``followups chat delete`` command."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID  # noqa: TC003 - Typer reads the annotations

import typer

from followups.cli import batches, connection
from followups.cli.batches import BulkOptions, DryRun, Yes
from followups.cli.entry import examples
from followups.cli.options import EXAMPLE_CHAT
from followups.cli.output import Json  # noqa: TC001 - likewise
from followups.errors import ChatNotFoundError
from followups.models import Chat
from followups.store import workspaces
from followups.store.deletion import DeletionScope

EXAMPLE = f"followups chat delete {EXAMPLE_CHAT} --workspace acme"

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", epilog=examples(EXAMPLE))


@app.callback()
def group() -> None:
    """Delete a chat and everything in it."""


@app.command(epilog=examples(EXAMPLE, f"{EXAMPLE} --dry-run"))
def delete(
    chat_id: Annotated[UUID, typer.Argument(metavar="ID", help="The chat.", show_default=False)],
    *,
    workspace: Annotated[str, typer.Option(help="Its workspace.", show_default=False)],
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Delete a chat: its follow-ups with their texts, its message records, and its stored API responses.

    Pending follow-ups are cancelled as chat_removed. Attempts in flight finish first, and nothing is sent afterwards.
    The command asks you to type the chat's ID, unless --yes is given. If interrupted, run the command again to
    continue. The deletion is recorded as one audit event. Logs, backups and the archives of followups prune are not
    changed. If the platform creates the chat again, it begins as a new chat without history.
    """
    with connection.session() as session:
        owner = workspaces.find(session, workspace).id
        if session.get(Chat, (owner, chat_id)) is None:
            raise ChatNotFoundError
    batches.carry_out_deletion(
        DeletionScope(owner, chat_id), f"chat {chat_id}", str(chat_id), BulkOptions(dry_run, yes, json)
    )
