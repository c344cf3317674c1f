"""``followups pause`` and ``followups resume``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from sqlalchemy.orm import Session

from followups.cli import batches, connection
from followups.cli.documents import pause_document
from followups.cli.entry import examples
from followups.cli.options import OneChannel, Workspace, workspace_id_of
from followups.cli.output import Json, print_json, print_line, print_table, remark
from followups.operations import administration, bulk
from followups.store import pauses
from followups.store.pauses import PauseScope
from followups.wording import readable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import Engine

    from followups.channels import Channel
    from followups.store.pauses import ActivePause

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

UNDER_WAY = 10.0
"""Longest time, in seconds, that a pause waits for transactions that may be beginning attempts."""
LOOK = 0.02


@app.command(
    epilog=examples(
        "followups pause --workspace acme",
        "followups pause --workspace acme --channel whatsapp",
        "followups pause --channel whatsapp",
        "followups pause --list",
    )
)
def pause(
    *,
    workspace: Workspace = None,
    channel: OneChannel = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Show what is paused, and how many follow-ups each pause holds.")
    ] = False,
    json: Json = False,
) -> None:
    """Stop sending for a workspace, a channel, or a channel of a workspace, until it is resumed.

    Attempts in flight finish, but no attempt begins after this command has returned. Follow-ups that become due are
    held. A held follow-up keeps all its attempts, can be cancelled or rescheduled, and blocks later follow-ups of its
    chat. After the pause, follow-ups that are past FOLLOWUPS_MAX_LATENESS or their messaging window fail as too_late or
    window_closed. Repeating the command changes nothing.
    """
    if list_:
        _list(json=json)
        return
    with connection.engine() as engine:
        with Session(engine) as session, session.begin():
            scope = _scope(session, workspace, channel)
            new = administration.pause(session, connection.actor(), scope)
        _wait_for_begins(engine)
        with engine.connect() as opened:
            standing = pauses.standing(opened)
    if json:
        print_json([pause_document(each) for each in standing])
    else:
        print_line(f"{_named(workspace, channel)} is paused" + ("." if new else " already."))


@app.command(epilog=examples("followups resume --workspace acme", "followups resume --channel whatsapp"))
def resume(*, workspace: Workspace = None, channel: OneChannel = None, json: Json = False) -> None:
    """End the pause that was set with exactly these options. Due follow-ups are sent immediately, earliest first.

    If interrupted, run the command again. If the command is not run again, the remaining follow-ups are sent within the
    duration of a lease.
    """
    with connection.engine() as engine:
        with Session(engine) as session, session.begin():
            scope = _scope(session, workspace, channel)
            was_paused = administration.resume(session, connection.actor(), scope)
        with engine.connect() as opened:
            number = pauses.count_orphaned(opened)
        freed = _release(engine, number)
        with engine.connect() as opened:
            standing = pauses.standing(opened)
    connection.ask_for_tick()
    if json:
        print_json({"resumed": was_paused, "freed": freed, "paused": [pause_document(each) for each in standing]})
        return
    if was_paused or freed:
        print_line(f"{_named(workspace, channel)} is resumed; held follow-ups that continue: {freed:,}.")
    else:
        print_line(f"{_named(workspace, channel)} was not paused.")
    for each in standing:
        remark(f"Still paused: {_named(each.workspace, each.channel)}")


def _scope(session: Session, workspace: str | None, channel: Channel | None) -> PauseScope:
    if workspace is None and channel is None:
        message = "give --workspace, --channel, or both."
        raise typer.BadParameter(message)
    return PauseScope(workspace_id_of(session, workspace), channel and channel.value)


def _wait_for_begins(engine: Engine) -> None:
    end = time.monotonic() + UNDER_WAY
    with engine.connect() as opened:
        transactions = pauses.workers_transactions(opened)
        while pauses.still_open(opened, transactions):
            if time.monotonic() > end:
                remark("A worker's transaction has been open for a long time; attempts that it has begun continue.")
                return
            time.sleep(LOOK)


def _release(engine: Engine, number: int) -> int:
    released = 0
    with batches.progress(batches.BulkPreview(verb="resume", done="resumed", number=number, sample=())) as bar:
        task = bar.add_task("Resume", total=number)
        for batch in bulk.release_paused(engine):
            released += batch["resumed"]
            bar.advance(task, batch["resumed"])
    return released


def _list(*, json: bool) -> None:
    with connection.session() as session:
        standing = pauses.standing(session.connection())
    if json:
        print_json([pause_document(each) for each in standing])
        return
    print_table(("WORKSPACE", "CHANNEL", "SINCE", "HELD"), _rows(standing), empty="Nothing is paused.")


def _rows(standing: Sequence[ActivePause]) -> Iterator[tuple[str, ...]]:
    for each in standing:
        yield (each.workspace or "all", each.channel or "all", readable(each.since), f"{each.held:,}")


def _named(workspace: str | None, channel: str | None) -> str:
    if workspace is None:
        return f"Channel {channel}, of every workspace,"
    return f"Workspace {workspace}" + (f", channel {channel}," if channel else "")
