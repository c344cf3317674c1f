"""``followups retry``: create new follow-ups from failed follow-ups, singly or in bulk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from followups import scheduling
from followups.cli import batches, connection
from followups.cli.batches import BulkOptions, DryRun, Yes
from followups.cli.documents import follow_up_document
from followups.cli.entry import examples
from followups.cli.options import (
    DUE_HELP,
    EXAMPLE_ID,
    Codes,
    Due,
    OneFollowUp,
    Since,
    parse_due,
    parse_since,
    refuse_bulk_options,
    require_either,
    workspace_id_of,
)
from followups.cli.output import Json, print_json, print_line, remark
from followups.operations import bulk
from followups.store import bulk_cancel, retries
from followups.store.retries import Failures
from followups.wording import readable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from followups.states import ReasonCode

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


SINCE = "2h (ago), or 2030-01-31T09:00:00Z (with an offset): the earliest time of the failure."


@app.command(
    epilog=examples(
        f"followups retry {EXAMPLE_ID}",
        f"followups retry {EXAMPLE_ID} --due +1h",
        "followups retry --failed --since 2h --reason retries_exhausted --dry-run",
    )
)
def retry(  # noqa: PLR0913 - one for each option
    follow_up_id: OneFollowUp = None,
    due: Annotated[
        Due | None, typer.Option(parser=parse_due, metavar="TIME", help=DUE_HELP, show_default="now")
    ] = None,
    *,
    failed: Annotated[
        bool, typer.Option("--failed", help="All follow-ups that have failed since the time in --since.")
    ] = False,
    since: Annotated[
        Since | None, typer.Option(parser=parse_since, metavar="TIME", help=SINCE, show_default=False)
    ] = None,
    workspace: Annotated[
        str | None, typer.Option(help="Only follow-ups of this workspace.", show_default="all")
    ] = None,
    reason: Codes = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Create a new follow-up from a failed one, with the same message and chat, and print its id.

    The failed follow-up is not changed. The rules for new follow-ups apply: the user must not have sent the chat's last
    message, and the chat's messaging window must be open.

    With --failed --since, all follow-ups that have failed since that time are retried in batches, unless they have been
    retried already. If interrupted, run the command again to continue; no follow-up is retried twice. Follow-ups that
    may not be created under these rules are skipped and counted.
    """
    require_either(follow_up_id, failed, "--failed --since TIME")
    if follow_up_id is None:
        if since is None or due is not None:
            message = "--failed needs --since, as in --since 2h, and takes no --due."
            raise typer.BadParameter(message)
        _retry_many(since=since, workspace=workspace, codes=reason or (), manner=BulkOptions(dry_run, yes, json))
        connection.ask_for_tick()
        return
    refuse_bulk_options(dry_run=dry_run, since=since, workspace=workspace, reason=reason)
    with connection.session() as session:
        now = session.execute(select(func.now())).scalar_one()
        follow_up = scheduling.retry(
            session, follow_up_id, due_date=(due or Due.NOW).resolve(now), actor=connection.actor()
        )
    connection.nudge_if_soon(follow_up.due_date, now)
    if json:
        print_json(follow_up_document(follow_up))
    else:
        print_line(str(follow_up.id))
        remark(f"A new follow-up, due {readable(follow_up.due_date)}; {follow_up_id} stays failed.")


def _retry_many(*, since: Since, workspace: str | None, codes: Sequence[ReasonCode], manner: BulkOptions) -> None:
    with connection.engine() as engine:
        with Session(engine) as session:
            owner = workspace_id_of(session, workspace)
            opened = session.connection()
            now = bulk_cancel.now(opened)
            failures = Failures(since.resolve(now), now, owner, tuple(codes))
            number = retries.count_failed(opened, failures)
            sample = [str(one.id) for one in retries.some_failed(opened, failures, batches.SAMPLE)]
        plan = batches.BulkPreview(verb="retry", done="retried", number=number, sample=sample)
        batches.carry_out(plan, lambda: bulk.retry(engine, connection.actor(), failures), manner)
