"""The ``followups list`` command."""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 - Typer reads the annotations
from typing import TYPE_CHECKING, Annotated
from uuid import UUID  # noqa: TC003 - Typer reads the annotations

import typer

from followups.cli import connection
from followups.cli.documents import follow_up_document
from followups.cli.entry import examples
from followups.cli.options import Codes, parse_moment, workspace_id_of
from followups.cli.output import Json, console, print_json, print_table, remark
from followups.states import Status  # noqa: TC001 - Typer reads the annotations
from followups.store import listing
from followups.store.listing import ListFilter
from followups.wording import readable

if TYPE_CHECKING:
    from followups.models import FollowUp

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

MAX_LIMIT = 1000
AFTER = "Only follow-ups due at this time or later, as in 2030-01-31T09:00:00Z."
BEFORE = "Only follow-ups due before this time."
WIDE = 150
"""Minimum width of a terminal for a table with a column for the chat."""


@app.command(
    "list",
    epilog=examples(
        "followups list --status pending",
        "followups list --workspace acme --chat 6a1f3f0e-4f0e-4b39-8f5b-0f6a3f1f7c11",
        "followups list --status failed --reason retries_exhausted --due-after 2030-01-31T09:00:00Z",
        "followups list --status failed --status cancelled --limit 100 --json",
    ),
)
def list_(  # noqa: PLR0913 - one for each option
    *,
    workspace: Annotated[
        str | None, typer.Option(help="Only follow-ups of this workspace.", show_default="all")
    ] = None,
    chat: Annotated[list[UUID] | None, typer.Option(help="Only follow-ups of this chat; may be repeated.")] = None,
    status: Annotated[list[Status] | None, typer.Option(help="Only follow-ups in this state; may be repeated.")] = None,
    reason: Codes = None,
    due_after: Annotated[datetime | None, typer.Option(parser=parse_moment, metavar="TIME", help=AFTER)] = None,
    due_before: Annotated[datetime | None, typer.Option(parser=parse_moment, metavar="TIME", help=BEFORE)] = None,
    trigger: Annotated[list[UUID] | None, typer.Option(help="Only follow-ups created after this chat message.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_LIMIT, help="Maximum number of follow-ups.")] = 20,
    page: Annotated[int, typer.Option(min=1, help="The number of the page.")] = 1,
    message: Annotated[bool, typer.Option("--message", help="Show the message texts too (JSON only).")] = False,
    json: Json = False,
) -> None:
    """List follow-ups, newest first. Run followups show ID to see why a follow-up is in its current state."""
    wanted = ListFilter(
        chat_ids=tuple(chat or ()),
        statuses=tuple(status or ()),
        trigger_chat_message_ids=tuple(trigger or ()),
        codes=tuple(reason or ()),
        due_after=due_after,
        due_before=due_before,
    )
    with connection.session() as session:
        owner = workspace_id_of(session, workspace)
        found, more = listing.page(session, owner, wanted, page_number=page, page_size=limit)
    if json:
        print_json([follow_up_document(each, message=message) for each in found])
        return
    wide = not console().is_terminal or console().width >= WIDE
    headings = ("ID", "STATUS", "DUE", *(("CHAT",) if wide else ()), "REASON")
    print_table(headings, (_row(each, wide=wide) for each in found), empty="There is no such follow-up.")
    if more:
        remark(f"There are more follow-ups; --page {page + 1} shows the next page, --limit shows more at once.")


def _row(follow_up: FollowUp, *, wide: bool) -> list[str]:
    chat = [str(follow_up.chat_id)] if wide else []
    return [
        str(follow_up.id),
        follow_up.status,
        readable(follow_up.due_date),
        *chat,
        (follow_up.reason or "").partition("\n")[0],
    ]
