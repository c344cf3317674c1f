"""The ``followups show`` command."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID  # noqa: TC003 - Typer reads the annotations

import typer
from rich.table import Table

from followups.cli import connection
from followups.cli.documents import event_document, failure_document, follow_up_document, hours_document, limit_document
from followups.cli.entry import examples
from followups.cli.output import Json, cell, console, print_json
from followups.operations.circumstances import explained
from followups.operations.explain import lag_of, stopped
from followups.settings import get_settings
from followups.wording import details_of, readable, rfc3339, span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from followups.models import AuditEvent, FailedAttempt
    from followups.operations.circumstances import Explained
    from followups.store.pauses import ActivePause

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

MILLISECOND = timedelta(milliseconds=1)


@app.command(
    epilog=examples(
        "followups show 0b0b6e34-0d0f-4d3c-9d5e-3f5a0c6f5a51",
        "followups show 0b0b6e34-0d0f-4d3c-9d5e-3f5a0c6f5a51 --json",
    )
)
def show(
    follow_up_id: Annotated[
        UUID, typer.Argument(metavar="ID", show_default=False, help="The follow-up's ID, as shown by followups list.")
    ],
    *,
    message: Annotated[bool, typer.Option("--message", help="Show the message text too.")] = False,
    json: Json = False,
) -> None:
    """Explain why a follow-up was sent, was not sent, or is not sent yet, with all known details.

    The output shows the follow-up's state and the reason for it, the result of each attempt, and the time of the next
    attempt. It also shows pauses, sending hours, rate limits, an open breaker, the order of its chat, and manual
    changes with their authors. Find the ID with followups list --chat.
    """
    with connection.session() as session:
        found = explained(session, follow_up_id, get_settings())
    if json:
        print_json(_document(found, message=message))
    else:
        _print(found, message=message)


def _document(found: Explained, *, message: bool) -> dict[str, Any]:
    follow_up, lag = found.follow_up, lag_of(found.follow_up)
    return follow_up_document(follow_up, message=message) | {
        "workspace": found.workspace,
        "channel": found.chat.channel,
        "externalChatId": found.chat.external_id,
        "explanation": str(found.explanation),
        "nextAttemptAt": rfc3339(follow_up.next_attempt_at),
        "waitsFor": follow_up.waits_for and str(follow_up.waits_for),
        "heldUntil": rfc3339(follow_up.held_until),
        "pausedBy": _paused_by(found.around.pause),
        "sendingHours": hours_document(found.around.hours),
        "rateLimits": [limit_document(limit) for limit in found.around.limits],
        "breaker": found.around.breaker and found.around.breaker.state,
        "limitedUntil": rfc3339(follow_up.limited_until),
        "retryOf": follow_up.retry_of and str(follow_up.retry_of),
        "retriedAs": found.around.retried_as and str(found.around.retried_as),
        "createdByKey": follow_up.created_by_key and str(follow_up.created_by_key),
        "inFlight": follow_up.in_flight,
        "leaseUntil": rfc3339(follow_up.lease_until),
        "cancelRequested": follow_up.cancel_requested,
        "acceptedAt": rfc3339(follow_up.accepted_at),
        "acceptedDurationMs": _milliseconds(follow_up.accepted_duration),
        "lagMs": _milliseconds(lag),
        "attempts": follow_up.attempts,
        "lostLeases": follow_up.losses,
        "snoozes": follow_up.snoozes,
        "failedAttempts": [failure_document(failure) for failure in found.failures],
        "changes": [event_document(event) for event in found.events],
    }


def _milliseconds(duration: timedelta | None) -> float | None:
    return None if duration is None else round(duration / MILLISECOND, 3)


def _paused_by(pause: ActivePause | None) -> dict[str, Any] | None:
    if pause is None:
        return None
    return {"workspace": pause.workspace, "channel": pause.channel, "since": rfc3339(pause.since)}


def _print(found: Explained, *, message: bool) -> None:
    target = console()
    grid = Table.grid(padding=(0, 2))
    for name, value in _facts(found):
        grid.add_row(cell(name, "dim"), cell(value))
    if message:
        grid.add_row(cell("message", "dim"), cell(found.follow_up.message, lines=True))
    target.print(grid)
    target.print()
    target.print(cell(str(found.explanation), "bold"))
    if found.failures:
        target.print()
        target.print(_failures(found.failures))
    if found.events:
        target.print()
        target.print(_changes(found.events))


def _facts(found: Explained) -> list[tuple[str, str]]:
    follow_up, lag = found.follow_up, lag_of(found.follow_up)
    facts = {
        "id": str(follow_up.id),
        "status": follow_up.status,
        "reason": follow_up.reason,
        "due": _relative(follow_up.due_date, found.now),
        "next attempt": _next_attempt(found),
        "paused": found.around.pause and str(stopped(found.around.pause)),
        "held until": follow_up.held_until and _relative(follow_up.held_until, found.now),
        "sending hours": found.around.hours and str(found.around.hours),
        "finished": readable(follow_up.finished_at) if follow_up.finished_at else None,
        "lag": lag and f"{'-' if lag < timedelta(0) else ''}{span(lag)}",
        "accepted in": follow_up.accepted_duration and span(follow_up.accepted_duration),
        "attempts": f"{follow_up.attempts} of {get_settings().max_attempts}",
        "snoozed": f"{follow_up.snoozes} times" if follow_up.snoozes else None,
        "workers lost": f"{follow_up.losses} times" if follow_up.losses else None,
        "in flight since": readable(follow_up.begun_at) if follow_up.in_flight else None,
        "leased until": readable(follow_up.lease_until) if follow_up.lease_until else None,
        "waits for": follow_up.waits_for and str(follow_up.waits_for),
        "retry of": follow_up.retry_of and str(follow_up.retry_of),
        "retried as": found.around.retried_as and str(found.around.retried_as),
        "workspace": found.workspace,
        "chat": f"{follow_up.chat_id} ({found.chat.channel}{f', {name}' if (name := found.chat.external_id) else ''})",
        "chat message": follow_up.chat_message_id and str(follow_up.chat_message_id),
        "created": readable(follow_up.created_at),
        "created by": found.created_by and f"API key {found.created_by.title}",
        "updated": readable(follow_up.updated_at),
        "after": str(follow_up.trigger_chat_message_id),
    }
    return [(name, value) for name, value in facts.items() if value]


def _next_attempt(found: Explained) -> str | None:
    if found.follow_up.pause_id is not None:
        return "when it is resumed"
    moment = found.follow_up.next_attempt_at
    return _relative(moment, found.now) if moment else None


def _relative(moment: datetime, now: datetime) -> str:
    distance = moment - now
    return f"{readable(moment)} ({f'in {span(distance)}' if distance > timedelta(0) else f'{span(distance)} ago'})"


def _failures(failures: Sequence[FailedAttempt]) -> Table:
    table = Table("ATTEMPT", "AT", "OUTCOME", "TOOK", "DETAIL", box=None, pad_edge=False)
    for failure in failures:
        took = "-" if failure.duration is None else span(failure.duration)
        row = (str(failure.number), readable(failure.at), failure.outcome, took, failure.detail)
        table.add_row(*map(cell, row))
    return table


def _changes(events: Sequence[AuditEvent]) -> Table:
    """Return a table of the manual changes, oldest first."""
    table = Table("CHANGED", "BY", "ACTION", "DETAILS", box=None, pad_edge=False)
    for event in events:
        row = (readable(event.at), str(event.by), event.action, details_of(event.details))
        table.add_row(*map(cell, row))
    return table
