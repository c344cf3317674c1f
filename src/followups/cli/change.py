"""``followups cancel``, ``reschedule`` and ``retry``: change single follow-ups, or many at once."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import typer
from sqlalchemy import func, select

from followups import scheduling
from followups.cli import connection
from followups.cli.bulk import DryRun, Yes  # noqa: TC001 - Typer reads the annotations
from followups.cli.bulk_commands import Manner, cancel_many, retry_many
from followups.cli.documents import follow_up_document
from followups.cli.examples import examples
from followups.cli.filters import Codes  # noqa: TC001 - likewise
from followups.cli.nudge import ask_for_tick, nudge_if_soon
from followups.cli.output import Json, print_json, remark, say
from followups.cli.times import Due, Since, parse_due, parse_since, readable

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

ID = "0b0b6e34-0d0f-4d3c-9d5e-3f5a0c6f5a51"
FollowUpId = Annotated[UUID, typer.Argument(metavar="ID", show_default=False, help="As in followups list.")]
CHAT = "6a1f3f0e-4f0e-4b39-8f5b-0f6a3f1f7c11"
ONE = "Of one follow-up, as in followups list."
SINCE = "2h (ago), or 2030-01-31T09:00:00Z (with an offset): when they failed."
DUE = "2030-01-31T09:00:00Z (with an offset), +10m, or now."


@app.command(
    epilog=examples(
        f"followups cancel {ID} --reason 'the customer called'",
        f"followups cancel --chat {CHAT} --dry-run",
        "followups cancel --workspace acme --reason 'wrong campaign'",
    )
)
def cancel(  # noqa: PLR0913 - one for each option
    follow_up_id: Annotated[UUID | None, typer.Argument(metavar="[ID]", show_default=False, help=ONE)] = None,
    *,
    chat: Annotated[UUID | None, typer.Option(help="All that is pending in this chat.", show_default=False)] = None,
    workspace: Annotated[
        str | None,
        typer.Option(help="All that is pending in this workspace.", show_default=False),
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why, in your own words.", show_default="cancelled_by_api")] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Cancel a pending follow-up. Once this succeeds, the follow-up is never sent. Repeating it changes nothing.

    It fails when the follow-up has finished, or while it is being delivered.

    With --chat or --workspace, everything pending there is cancelled, in batches. If interrupted, run the command again
    to continue. A follow-up that is being delivered at that moment is not cancelled, but it is not retried either.
    """
    _either(follow_up_id, chat or workspace, "--chat or --workspace")
    if follow_up_id is None:
        cancel_many(workspace=workspace, chat=chat, reason=reason, manner=Manner(dry_run, yes, json))
        return
    _not_of_one(dry_run=dry_run)
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
    """Give a pending follow-up another due date. A date in the past means at once."""
    with connection.session() as session:
        now = session.execute(select(func.now())).scalar_one()
        follow_up = scheduling.amend(session, follow_up_id, {"due_date": due.resolve(now)})
    nudge_if_soon(follow_up.due_date, now)
    if json:
        print_json(follow_up_document(follow_up))
    else:
        say(f"{follow_up.id} is due {readable(follow_up.due_date)}")


@app.command(
    epilog=examples(
        f"followups retry {ID}",
        f"followups retry {ID} --due +1h",
        "followups retry --failed --since 2h --reason retries_exhausted --dry-run",
    )
)
def retry(  # noqa: PLR0913 - one for each option
    follow_up_id: Annotated[UUID | None, typer.Argument(metavar="[ID]", show_default=False, help=ONE)] = None,
    due: Annotated[Due | None, typer.Option(parser=parse_due, metavar="TIME", help=DUE, show_default="now")] = None,
    *,
    failed: Annotated[bool, typer.Option("--failed", help="All that failed --since then.")] = False,
    since: Annotated[
        Since | None, typer.Option(parser=parse_since, metavar="TIME", help=SINCE, show_default=False)
    ] = None,
    workspace: Annotated[str | None, typer.Option(help="Only of this workspace.", show_default="all")] = None,
    reason: Codes = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Create a new follow-up from a failed one, with the same message and chat. Prints the new one's id.

    The failed one stays as it is. The rules for creating one apply: the chat's last message must not be the user's, and
    its messaging window must be open.

    With --failed --since, every follow-up that failed since then and has not been retried yet is retried now, in
    batches. If interrupted, run the command again to continue; no follow-up is retried twice. Those that the rules
    refuse are skipped and counted.
    """
    _either(follow_up_id, failed, "--failed --since TIME")
    if follow_up_id is None:
        if since is None or due is not None:
            message = "--failed needs --since, as in --since 2h, and takes no --due."
            raise typer.BadParameter(message)
        retry_many(since=since, workspace=workspace, codes=reason or (), manner=Manner(dry_run, yes, json))
        ask_for_tick()
        return
    _not_of_one(dry_run=dry_run, since=since, workspace=workspace, reason=reason)
    with connection.session() as session:
        now = session.execute(select(func.now())).scalar_one()
        follow_up = scheduling.retry(session, follow_up_id, due_date=(due or Due.NOW).resolve(now))
    nudge_if_soon(follow_up.due_date, now)
    if json:
        print_json(follow_up_document(follow_up))
    else:
        say(str(follow_up.id))
        remark(f"A new follow-up, due {readable(follow_up.due_date)}; {follow_up_id} stays failed.")


def _either(follow_up_id: UUID | None, many: object, options: str) -> None:
    if bool(follow_up_id) == bool(many):
        message = f"name one follow-up by its ID, or many by {options}."
        raise typer.BadParameter(message)


def _not_of_one(**options: object) -> None:
    for name, value in options.items():
        if value:
            message = "goes with many follow-ups, not with the ID of one."
            raise typer.BadParameter(message, param_hint=f"--{name.replace('_', '-')}")
