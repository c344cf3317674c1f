"""``followups workspace``: the tenants."""

from __future__ import annotations

from typing import Annotated

import typer

from followups.cli import connection
from followups.cli.documents import workspace_document
from followups.cli.examples import examples
from followups.cli.output import Json, print_json, print_table, remark, say
from followups.cli.times import readable
from followups.store import workspaces

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="markdown",
    epilog=examples("followups workspace create acme", "followups workspace list"),
)


@app.callback()
def group() -> None:
    """Create and list workspaces: each has its own API keys, chats and follow-ups."""


@app.command(epilog=examples("followups workspace create acme", "followups workspace create acme --json"))
def create(
    name: Annotated[str, typer.Argument(help="Up to 200 characters.", show_default=False)], *, json: Json = False
) -> None:
    """Create a workspace. Creating one that exists changes nothing."""
    with connection.session() as session:
        workspace, new = workspaces.create(session, name)
    if json:
        print_json(workspace_document(workspace))
        return
    say(f"{workspace.name} ({workspace.id})" if new else f"{workspace.name} ({workspace.id}) exists already")
    remark(f"Next: followups api-key create --workspace '{workspace.name}'")


@app.command("list", epilog=examples("followups workspace list", "followups workspace list --json"))
def list_(*, json: Json = False) -> None:
    """List the workspaces, by name."""
    with connection.session() as session:
        found = workspaces.everything(session)
    if json:
        print_json([workspace_document(each) for each in found])
        return
    rows = [(each.name, str(each.id), readable(each.created_at)) for each in found]
    empty = "There is no workspace yet: followups workspace create NAME makes one."
    print_table(("NAME", "ID", "CREATED"), rows, empty=empty)
