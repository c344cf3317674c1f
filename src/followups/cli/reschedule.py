"""``followups reschedule``: change the due date of a pending follow-up."""

from __future__ import annotations

from typing import Annotated

import typer
from sqlalchemy import func, select

from followups import scheduling
from followups.cli import connection
from followups.cli.documents import follow_up_document
from followups.cli.entry import examples
from followups.cli.options import DUE_HELP, EXAMPLE_ID, Due, FollowUpId, parse_due
from followups.cli.output import Json, print_json, print_line
from followups.wording import readable

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(
    epilog=examples(f"followups reschedule {EXAMPLE_ID} --due +10m", f"followups reschedule {EXAMPLE_ID} --due now")
)
def reschedule(
    follow_up_id: FollowUpId,
    due: Annotated[Due, typer.Option(parser=parse_due, metavar="TIME", help=DUE_HELP, show_default=False)],
    *,
    json: Json = False,
) -> None:
    """Change the due date of a pending follow-up. With a date in the past, the follow-up is due immediately."""
    with connection.session() as session:
        now = session.execute(select(func.now())).scalar_one()
        follow_up = scheduling.amend(session, follow_up_id, {"due_date": due.resolve(now)}, actor=connection.actor())
    connection.nudge_if_soon(follow_up.due_date, now)
    if json:
        print_json(follow_up_document(follow_up))
    else:
        print_line(f"{follow_up.id} is due {readable(follow_up.due_date)}")
