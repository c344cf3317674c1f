"""``followups cancel``, ``reschedule`` and ``retry``: what an operator does to a follow-up."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import typer
from sqlalchemy import func, select

from followups import scheduling
from followups.cli import connection
from followups.cli.documents import follow_up_document
from followups.cli.examples import examples
from followups.cli.nudging import nudge_if_soon
from followups.cli.output import Json, print_json, remark, say
from followups.cli.times import Due, parse_due, readable

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

ID = "0b0b6e34-0d0f-4d3c-9d5e-3f5a0c6f5a51"
FollowUpId = Annotated[UUID, typer.Argument(metavar="ID", show_default=False, help="As in followups list.")]
DUE = "2030-01-31T09:00:00Z (with an offset), +10m, or now."


@app.command(epilog=examples(f"followups cancel {ID} --reason 'the customer called'"))
def cancel(
    follow_up_id: FollowUpId,
    *,
    reason: Annotated[str | None, typer.Option(help="Why, in your own words.", show_default="cancelled_by_api")] = None,
    json: Json = False,
) -> None:
    """Cancel a pending follow-up: when this says so, it is never sent. Repeating it changes nothing.

    It fails for one that has finished, and for one that is being delivered at this moment.
    """
    with connection.session() as session:
        follow_up = scheduling.cancel(session, follow_up_id, reason=reason)
    if json:
        print_json(follow_up_document(follow_up))
    else:
        say(f"{follow_up.id} is cancelled: {follow_up.reason}")


@app.command(epilog=examples(f"followups reschedule {ID} --due +10m", f"followups reschedule {ID} --due now"))
def reschedule(
    follow_up_id: FollowUpId,
    due: Annotated[Due, typer.Option(parser=parse_due, metavar="TIME", help=DUE, show_default=False)],
    *,
    json: Json = False,
) -> None:
    """Give a pending follow-up another due date; one that has passed means at once."""
    with connection.session() as session:
        now = session.execute(select(func.now())).scalar_one()
        follow_up = scheduling.amend(session, follow_up_id, {"due_date": due.resolve(now)})
    nudge_if_soon(follow_up.due_date, now)
    if json:
        print_json(follow_up_document(follow_up))
    else:
        say(f"{follow_up.id} is due {readable(follow_up.due_date)}")


@app.command(epilog=examples(f"followups retry {ID}", f"followups retry {ID} --due +1h"))
def retry(
    follow_up_id: FollowUpId,
    due: Annotated[Due | None, typer.Option(parser=parse_due, metavar="TIME", help=DUE, show_default="now")] = None,
    *,
    json: Json = False,
) -> None:
    """Make a new follow-up, of the same message and chat, from a failed one. Prints the new one's id.

    The failed one stays as it is. The rules of creating one hold: the chat's last message must not be the
    user's, and its messaging window must be open.
    """
    with connection.session() as session:
        now = session.execute(select(func.now())).scalar_one()
        follow_up = scheduling.retry(session, follow_up_id, due_date=(due or Due.NOW).resolve(now))
    nudge_if_soon(follow_up.due_date, now)
    if json:
        print_json(follow_up_document(follow_up))
    else:
        say(str(follow_up.id))
        remark(f"A new follow-up, due {readable(follow_up.due_date)}; {follow_up_id} stays failed.")
