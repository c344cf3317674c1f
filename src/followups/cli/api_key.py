"""``followups api-key``: create, list and revoke API keys for the REST API."""

from __future__ import annotations

from datetime import timedelta  # noqa: TC003 - Typer reads the annotations
from typing import Annotated
from uuid import UUID  # noqa: TC003 - Typer reads the annotations

import typer

from followups.cli import connection
from followups.cli.documents import api_key_document
from followups.cli.entry import examples
from followups.cli.options import parse_age
from followups.cli.output import Json, print_json, print_line, print_table, remark
from followups.models import Workspace
from followups.operations import administration
from followups.store import api_keys, workspaces
from followups.wording import readable

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="markdown",
    epilog=examples("followups api-key create --workspace acme", "followups api-key list"),
)


@app.callback()
def group() -> None:
    """Create, list and revoke API keys. Each key belongs to one workspace. Only a hash of each key is stored."""


@app.command(
    epilog=examples(
        "followups api-key create --workspace acme --name website",
        "followups api-key create --workspace acme --expires 90d",
        "KEY=$(followups api-key create --workspace acme)",
    )
)
def create(
    workspace: Annotated[str, typer.Option(help="The workspace's name.", show_default=False)],
    name: Annotated[
        str, typer.Option(help="A name that distinguishes the key from other keys.", show_default=False)
    ] = "",
    *,
    expires: Annotated[
        timedelta | None,
        typer.Option(
            parser=parse_age, metavar="TIME", help="Refuse the key after this time, as in 90d.", show_default="never"
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Create an API key and print it on stdout. The key is shown only once."""
    with connection.session() as session:
        row, key = administration.create_key(
            session, connection.actor(), workspaces.find(session, workspace).id, name, expires
        )
    # The key is printed after the commit, so that a printed key always works.
    if json:
        print_json(api_key_document(row, workspace) | {"key": key})
        return
    print_line(key)
    remark(f"Store the key now: it cannot be shown again. Send it in the authorization header. Its id is {row.id}.")
    if row.expires_at:
        remark(f"The key expires at {readable(row.expires_at)}.")


@app.command("list", epilog=examples("followups api-key list", "followups api-key list --json"))
def list_(*, json: Json = False) -> None:
    """List the API keys, oldest first."""
    with connection.session() as session:
        found = api_keys.everything(session)
    if json:
        print_json([api_key_document(key, workspace) for key, workspace in found])
        return
    rows = [
        (
            key.prefix + "…",
            workspace,
            key.name,
            *(readable(moment) for moment in (key.last_used_at, key.expires_at, key.revoked_at)),
            str(key.id),
        )
        for key, workspace in found
    ]
    empty = "There is no API key yet; followups api-key create --workspace NAME creates one."
    print_table(("KEY", "WORKSPACE", "NAME", "LAST USED", "EXPIRES", "REVOKED", "ID"), rows, empty=empty)


@app.command(epilog=examples("followups api-key revoke 0b0b6e34-0d0f-4d3c-9d5e-3f5a0c6f5a51"))
def revoke(
    key_id: Annotated[
        UUID, typer.Argument(metavar="ID", help="The key's id, as shown by followups api-key list.", show_default=False)
    ],
    *,
    json: Json = False,
) -> None:
    """Revoke an API key, so that requests with it are refused from now on.

    Revoking a key twice has no further effect.
    """
    with connection.session() as session:
        row = administration.revoke_key(session, connection.actor(), key_id)
        workspace = session.get_one(Workspace, row.workspace_id).name
    if json:
        print_json(api_key_document(row, workspace))
        return
    print_line(f"{row.prefix}… has been revoked since {readable(row.revoked_at)}")
