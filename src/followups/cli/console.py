"""``followups console``: sign-in links for the console."""

from __future__ import annotations

import os
from datetime import timedelta  # noqa: TC003 - Typer reads the annotations
from enum import StrEnum
from typing import Annotated

import typer

from followups.cli import connection
from followups.cli.entry import examples
from followups.cli.options import parse_age, workspace_id_of
from followups.cli.output import Json, print_json, print_line, remark
from followups.settings import get_settings
from followups.store import audit, console_sessions
from followups.store.audit import Action, Event, Way
from followups.store.console_sessions import LINK, LONGEST_LINK, SHORTEST_LINK, Grant
from followups.wording import readable, rfc3339

app = typer.Typer(
    add_completion=False, rich_markup_mode="markdown", epilog=examples("followups console link --workspace acme")
)


class ConsoleRole(StrEnum):
    """The console role of the person who uses the sign-in link."""

    VIEWER = "viewer"
    AGENT = "agent"
    ADMIN = "admin"
    OPERATOR = "operator"


@app.callback()
def group() -> None:
    """Sign people in to the console, which the `web` process serves at /console."""


@app.command(
    epilog=examples(
        "followups console link",
        "followups console link --workspace acme",
        "followups console link --workspace acme --role agent --expires 10m",
    )
)
def link(
    *,
    workspace: Annotated[
        str | None, typer.Option(help="The workspace that the person sees.", show_default="all workspaces")
    ] = None,
    role: Annotated[
        ConsoleRole | None,
        typer.Option(help="The person's role.", show_default="operator; admin with --workspace"),
    ] = None,
    expires: Annotated[
        timedelta | None,
        typer.Option(parser=parse_age, metavar="TIME", help="How long the link can be used.", show_default="1h"),
    ] = None,
    json: Json = False,
) -> None:
    """Print a link that signs a person in to the web console. The link works once, so send it to only one person.

    A viewer can only look at pages. An agent can also schedule, change, cancel, retry and immediately send follow-ups.
    An admin can also change the settings and read the audit log. An operator can do everything in all workspaces.

    The link starts with FOLLOWUPS_PUBLIC_URL if it is set, otherwise with this machine's name and $PORT (default 8000).
    """
    granted = role or (ConsoleRole.OPERATOR if workspace is None else ConsoleRole.ADMIN)
    if granted is ConsoleRole.OPERATOR and workspace is not None:
        message = "an operator sees all workspaces: leave out --workspace, or choose another role"
        raise typer.BadParameter(message, param_hint="--role")
    lifetime = LINK if expires is None else expires
    if not SHORTEST_LINK <= lifetime <= LONGEST_LINK:
        message = "a link can be used for 10 seconds to 7 days"
        raise typer.BadParameter(message, param_hint="--expires")
    actor = audit.user_of_process(Way.COMMAND)
    with connection.session() as session:
        workspace_id = workspace_id_of(session, workspace)
        grant = Grant(granted.value, workspace_id, actor.name)
        token, expires_at = console_sessions.make_link(session, grant, lifetime)
        event = Event(actor, Action.CONSOLE_LINK_CREATED, workspace_id, details={"role": granted.value})
        audit.record(session.connection(), event)
    address = get_settings().public_url or f"http://127.0.0.1:{os.environ.get('PORT') or 8000}"
    url = f"{address}/console/login#token={token}"
    if json:
        print_json({"url": url, "role": granted.value, "workspace": workspace, "expiresAt": rfc3339(expires_at)})
        return
    print_line(url)
    remark(f"The link works once, until {readable(expires_at)}, as {granted.value} of {workspace or 'all workspaces'}.")
