"""The ``followups audit`` command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated
from uuid import UUID  # noqa: TC003 - Typer reads the annotations

import typer
from sqlalchemy import func, select

from followups.cli import connection
from followups.cli.documents import event_document
from followups.cli.entry import examples
from followups.cli.options import EXAMPLE_ID, Since, parse_since, workspace_id_of
from followups.cli.output import Json, print_json, print_table, remark
from followups.store import audit as store
from followups.store.audit import Action, AuditFilter
from followups.wording import details_of, readable

if TYPE_CHECKING:
    from followups.models import AuditEvent

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

MAX_LIMIT = 1000
SINCE = "2h (ago), or 2030-01-31T09:00:00Z (with an offset)."
HEADINGS = ("AT", "BY", "WORKSPACE", "ACTION", "TARGET", "NUMBER", "DETAILS")


@app.command(
    epilog=examples(
        "followups audit --workspace acme --since 7d",
        "followups audit --action api_key.created --action api_key.revoked",
        f"followups audit --follow-up {EXAMPLE_ID} --json",
    )
)
def audit(
    *,
    workspace: Annotated[
        str | None, typer.Option(help="Only events of this workspace, which may have been deleted.", show_default="all")
    ] = None,
    since: Annotated[
        Since | None, typer.Option(parser=parse_since, metavar="TIME", help=SINCE, show_default="ever")
    ] = None,
    action: Annotated[
        list[Action] | None, typer.Option(help="Only events with this action; may be repeated.", show_default="all")
    ] = None,
    follow_up: Annotated[UUID | None, typer.Option(help="Only events of this follow-up.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LIMIT, help="Maximum number of events.")] = 20,
    json: Json = False,
) -> None:
    """Show who changed what and when, newest first.

    The audit log records the creation, revocation and expiry of API keys; pauses, rate limits and sending hours; bulk
    commands; deleted chats and workspaces; and each change to an existing follow-up by PATCH, a command or
    followups.cancel. Deliveries are not recorded, nor are cancellations by a reply. Each event is recorded in the same
    transaction as the change, without any message text. FOLLOWUPS_AUDIT_RETENTION sets how long events are kept.
    """
    with connection.session() as session:
        moment = since.resolve(session.execute(select(func.now())).scalar_one()) if since else None
        wanted = AuditFilter(workspace=workspace, since=moment, actions=tuple(action or ()), target_id=follow_up)
        found = store.newest(session, wanted, limit + 1)
        if not found:
            workspace_id_of(session, workspace)
    shown = found[:limit]
    if json:
        print_json([event_document(event) for event in shown])
        return
    print_table(HEADINGS, map(_row, shown), empty="There is no such event.")
    if len(found) > limit:
        remark("There are more events; --limit shows more at once, --since only recent ones.")


def _row(event: AuditEvent) -> list[str]:
    return [
        readable(event.at),
        str(event.by),
        event.workspace or "-",
        event.action,
        str(event.target_id or "-"),
        f"{event.number:,}",
        details_of(event.details),
    ]
