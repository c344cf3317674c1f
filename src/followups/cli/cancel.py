"""``followups cancel``: cancel one follow-up, or all pending follow-ups of a chat or workspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated
from uuid import UUID  # noqa: TC003 - Typer reads the annotations

import typer
from sqlalchemy.orm import Session

from followups import checks, scheduling
from followups.cli import batches, connection
from followups.cli.batches import BulkOptions, DryRun, Yes
from followups.cli.documents import follow_up_document
from followups.cli.entry import examples
from followups.cli.options import (
    EXAMPLE_CHAT,
    EXAMPLE_ID,
    OneFollowUp,
    refuse_bulk_options,
    require_either,
    workspace_id_of,
)
from followups.cli.output import Json, print_json, print_line
from followups.operations import bulk
from followups.states import Status
from followups.store import bulk_cancel

if TYPE_CHECKING:
    from followups.store.bulk_cancel import CancelScope

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(
    epilog=examples(
        f"followups cancel {EXAMPLE_ID} --reason 'the customer called'",
        f"followups cancel --chat {EXAMPLE_CHAT} --dry-run",
        "followups cancel --workspace acme --reason 'wrong campaign'",
    )
)
def cancel(  # noqa: PLR0913 - one for each option
    follow_up_id: OneFollowUp = None,
    *,
    chat: Annotated[UUID | None, typer.Option(help="All pending follow-ups of this chat.", show_default=False)] = None,
    workspace: Annotated[
        str | None,
        typer.Option(help="All pending follow-ups of this workspace.", show_default=False),
    ] = None,
    reason: Annotated[
        str | None, typer.Option(help="The reason, in your own words.", show_default="cancelled_by_api")
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Cancel a pending follow-up, which is then never sent. Repeating the command changes nothing.

    The command fails if the follow-up has finished or is being delivered.

    With --chat or --workspace, all pending follow-ups of the chat or workspace are cancelled, in batches. If
    interrupted, run the command again to continue. A follow-up whose attempt is in flight is not cancelled. If that
    attempt fails, the follow-up is not retried.
    """
    require_either(follow_up_id, chat or workspace, "--chat or --workspace")
    if follow_up_id is None:
        _cancel_many(workspace=workspace, chat=chat, reason=reason, manner=BulkOptions(dry_run, yes, json))
        return
    refuse_bulk_options(dry_run=dry_run)
    with connection.session() as session:
        follow_up = scheduling.cancel(session, follow_up_id, reason=reason, actor=connection.actor())
    if json:
        print_json(follow_up_document(follow_up))
    else:
        print_line(f"{follow_up.id} is cancelled: {follow_up.reason}")


def _cancel_many(*, workspace: str | None, chat: UUID | None, reason: str | None, manner: BulkOptions) -> None:
    if reason is not None:
        checks.check_reason(reason, Status.CANCELLED)
    final = checks.final_of(Status.CANCELLED, reason)
    with connection.engine() as engine:
        with Session(engine) as session:
            chosen = _chosen(session, workspace, chat)
            opened = session.connection()
            counts = [bulk_cancel.count_pending(opened, each) for each in chosen]
            sample = [str(one) for each in chosen for one in bulk_cancel.some_pending(opened, each, batches.SAMPLE)]
        in_flight = sum(count.in_flight for count in counts)
        plan = batches.BulkPreview(
            verb="cancel",
            done="cancelled",
            number=sum(count.number for count in counts),
            sample=sample[: batches.SAMPLE],
            remark=f"{in_flight:,} of them are in flight; they are not cancelled, but not retried either."
            * bool(in_flight),
        )
        batches.carry_out(plan, lambda: bulk.cancel(engine, connection.actor(), chosen, final), manner)


def _chosen(session: Session, workspace: str | None, chat: UUID | None) -> list[CancelScope]:
    chosen = bulk.pending_of(session, workspace_id_of(session, workspace), chat)
    if not chosen:
        message = f"there is no chat {chat}{f' in {workspace!r}' if workspace else ''}"
        raise typer.BadParameter(message, param_hint="--chat")
    return chosen
