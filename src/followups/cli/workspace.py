"""``followups workspace``: create, list, configure and delete workspaces."""

from __future__ import annotations

import shlex
from datetime import time  # noqa: TC003 - Typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer
from sqlalchemy.orm import Session

from followups.cli import batches, connection
from followups.cli.batches import BulkOptions, DryRun, Yes
from followups.cli.documents import hours_document, workspace_document
from followups.cli.entry import examples
from followups.cli.options import parse_clock, parse_days
from followups.cli.output import Json, print_json, print_line, print_table, remark
from followups.operations import administration
from followups.sending_hours import EVERY_DAY, SendingHours
from followups.store import holds, sending_hours, workspaces
from followups.store.deletion import DeletionScope
from followups.wording import readable

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.models import Workspace

FROM = "When the sending hours begin."
TO = "When the sending hours end; on the next day if not later than --from."
DAYS = "The days, as in mon-fri or sat,sun."

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="markdown",
    epilog=examples("followups workspace create acme", "followups workspace list"),
)


@app.callback()
def group() -> None:
    """Create, list and delete workspaces, and set their sending hours."""


@app.command(epilog=examples("followups workspace create acme", "followups workspace create acme --json"))
def create(
    name: Annotated[str, typer.Argument(help="The workspace's name, up to 200 characters.", show_default=False)],
    *,
    json: Json = False,
) -> None:
    """Create a workspace. If the workspace already exists, nothing changes."""
    with connection.session() as session:
        workspace, new = administration.create_workspace(session, connection.actor(), name)
    if json:
        print_json(workspace_document(workspace))
        return
    print_line(f"{workspace.name} ({workspace.id})" if new else f"{workspace.name} ({workspace.id}) already exists")
    remark(f"Next: followups api-key create --workspace {shlex.quote(workspace.name)}")


@app.command("list", epilog=examples("followups workspace list", "followups workspace list --json"))
def list_(*, json: Json = False) -> None:
    """List the workspaces, ordered by name."""
    with connection.session() as session:
        found = workspaces.everything(session)
        hours = sending_hours.everything(session)
    if json:
        print_json([workspace_document(each) | {"sendingHours": hours_document(hours.get(each.id))} for each in found])
        return
    rows = [(each.name, str(each.id), readable(each.created_at), _sends(each, hours.get(each.id))) for each in found]
    empty = "There is no workspace yet; followups workspace create NAME creates one."
    print_table(("NAME", "ID", "CREATED", "SENDS"), rows, empty=empty)


@app.command(epilog=examples("followups workspace delete acme", "followups workspace delete acme --dry-run"))
def delete(
    name: Annotated[str, typer.Argument(help="The workspace.", show_default=False)],
    *,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Delete a workspace and everything in it: follow-ups, chats, API keys, pauses, limits, sending hours.

    As soon as the deletion starts, new follow-ups and requests with the workspace's API keys are refused. Pending
    follow-ups are cancelled as chat_removed. Attempts in flight finish first, and nothing is sent afterwards. The
    command asks you to type the workspace's name, unless --yes is given. If interrupted, run the command again to
    continue. The deletion is recorded as one audit event. Logs, backups and the archives of followups prune are not
    changed.
    """
    with connection.session() as session:
        found = workspaces.find(session, name, to_delete=True)
    whole = DeletionScope(found.id)
    batches.carry_out_deletion(whole, f"workspace {found.name}", found.name, BulkOptions(dry_run, yes, json))


@app.command(
    epilog=examples(
        "followups workspace hours acme --time-zone Europe/Berlin --from 08:00 --to 20:00 --days mon-fri",
        "followups workspace hours acme",
        "followups workspace hours acme --always",
    )
)
def hours(  # noqa: PLR0913 - one for each option
    name: Annotated[str, typer.Argument(help="The workspace.", show_default=False)],
    *,
    time_zone: Annotated[
        str | None, typer.Option(help="The time zone, as in Europe/Berlin.", show_default=False)
    ] = None,
    opening: Annotated[time | None, typer.Option("--from", parser=parse_clock, metavar="HH:MM", help=FROM)] = None,
    closing: Annotated[time | None, typer.Option("--to", parser=parse_clock, metavar="HH:MM", help=TO)] = None,
    days: Annotated[str | None, typer.Option("--days", metavar="WEEKDAYS", help=DAYS, show_default="every day")] = None,
    always: Annotated[
        bool, typer.Option("--always", help="Remove the sending hours, so that messages are sent at any time.")
    ] = False,
    json: Json = False,
) -> None:
    """Show, set or clear the sending hours, in which the workspace's messages may be sent.

    A follow-up that becomes due outside the sending hours is held until the hours next begin. A held follow-up keeps
    all its attempts. Held follow-ups are sent within a second after the sending hours begin, earliest due first. Their
    lateness (FOLLOWUPS_MAX_LATENESS) is counted from the beginning of the hours. If the channel's messaging window
    would close before the sending hours begin, the follow-up fails immediately as window_closed, and the API refuses
    such a due date.

    The hours are local times in the given time zone. If --to is not later than --from, the hours end on the next day.
    --days lists the days on which the hours begin. Follow-ups that are already held are checked again with the new
    hours.
    """
    given = (time_zone, opening, closing)
    wanted = (
        _given_hours(time_zone, opening, closing, days) if any(each is not None for each in (*given, days)) else None
    )
    if wanted and always:
        message = "--always cannot be combined with hours."
        raise typer.BadParameter(message)
    with connection.engine() as engine:
        with Session(engine) as session, session.begin():
            workspace = workspaces.find(session, name)
            if wanted:
                administration.set_hours(session, connection.actor(), workspace.id, wanted)
            elif always:
                administration.clear_hours(session, connection.actor(), workspace.id)
            stands = sending_hours.find(session, workspace.id)
            session.expunge_all()
        if wanted or always:
            _recheck_held(engine, workspace.id)
    if json:
        print_json(workspace_document(workspace) | {"sendingHours": hours_document(stands)})
    else:
        print_line(f"{workspace.name} sends {stands or 'at every hour'}")


def _sends(workspace: Workspace, hours: SendingHours | None) -> str:
    if workspace.deletion_began_at is not None:
        return f"never: being deleted since {readable(workspace.deletion_began_at)}"
    return str(hours or "always")


def _given_hours(time_zone: str | None, opening: time | None, closing: time | None, days: str | None) -> SendingHours:
    if time_zone is None or opening is None or closing is None:
        message = "hours need --time-zone, --from and --to, as in --time-zone Europe/Berlin --from 08:00 --to 20:00."
        raise typer.BadParameter(message)
    return SendingHours(time_zone, opening, closing, EVERY_DAY if days is None else parse_days(days))


def _recheck_held(engine: Engine, workspace_id: UUID) -> None:
    """Release held follow-ups, so that the new sending hours apply to them.

    The follow-ups are released in batches, so that other transactions do not wait for long.
    """
    freed = 1
    while freed:
        with engine.begin() as opened:
            freed = holds.release_held(opened, workspace_id)
    connection.ask_for_tick()
