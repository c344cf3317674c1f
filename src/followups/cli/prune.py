"""The ``followups prune`` command."""

from __future__ import annotations

import gzip
import json as json_module
import os
from contextlib import ExitStack
from datetime import timedelta  # noqa: TC003 - Typer reads the annotations
from pathlib import Path  # noqa: TC003 - likewise
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from sqlalchemy.orm import Session

from followups.api import schemas
from followups.cli import batches, connection
from followups.cli.batches import BulkOptions, DryRun, Yes
from followups.cli.documents import failure_document
from followups.cli.entry import examples
from followups.cli.options import parse_age
from followups.cli.output import Json  # noqa: TC001 - likewise
from followups.operations import bulk
from followups.store import bulk_cancel, pruning, workspaces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Connection, Engine

    from followups.store.pruning import Picked

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

ARCHIVE = "Write the deleted rows to this new file, one JSON object per line."


@app.command(
    epilog=examples(
        "followups prune --older-than 90d --dry-run",
        "followups prune --older-than 90d --archive 2030-01.jsonl.gz",
    )
)
def prune(
    *,
    older_than: Annotated[
        timedelta,
        typer.Option(
            parser=parse_age,
            metavar="AGE",
            help="Minimum time since the follow-ups finished, as in 90d.",
            show_default=False,
        ),
    ],
    archive: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl.gz", help=ARCHIVE, dir_okay=False, show_default=False)
    ] = None,
    message: Annotated[bool, typer.Option("--message", help="Archive the message texts too.")] = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Delete follow-ups that finished long ago, their failed attempts, and chat messages of the same age.

    Rows are deleted in batches of a thousand, oldest first, without blocking anything else. If interrupted, run the
    command again to continue. If an archive is given, rows are written to disk before they are deleted. After an
    interruption, the next archive may therefore repeat some rows of this archive. Workers prune once an hour, without
    an archive, when FOLLOWUPS_RETENTION is set.

    The last message of each chat is kept. Idempotency keys are deleted after 24 hours, regardless of the age given.
    """
    with connection.engine() as engine, ExitStack() as stack:
        with engine.connect() as opened:
            before = _moment(bulk_cancel.now(opened), older_than)
            number = pruning.count_finished(opened, before)
            sample = [str(one) for one in pruning.some_finished(opened, before, batches.SAMPLE)]
        if archive is not None and archive.exists():
            error = f"{archive} already exists; name a new file."
            raise typer.BadParameter(error, param_hint="--archive")
        plan = batches.BulkPreview(
            verb="delete", done="deleted", number=number, sample=sample, noun="finished follow-up"
        )

        def deletions() -> Iterator[dict[str, int]]:
            remove = _remover(engine, archive, stack, message=message) if archive else pruning.delete_finished
            return bulk.prune(engine, connection.actor(), before, remove)

        batches.carry_out(plan, deletions, BulkOptions(dry_run, yes, json))


def _moment(now: datetime, age: timedelta) -> datetime:
    try:
        return now - age
    except OverflowError:
        message = "that is before the first year of the calendar."
        raise typer.BadParameter(message, param_hint="--older-than") from None


def _remover(
    engine: Engine, archive: Path, stack: ExitStack, *, message: bool
) -> Callable[[Connection, datetime], int]:
    """Open the archive and return a function that archives and deletes one batch."""
    with Session(engine) as session:
        names = {each.id: each.name for each in workspaces.everything(session)}
    # Only the owner may read the archive, since it contains message texts from the database.
    descriptor = os.open(archive, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    file = stack.enter_context(os.fdopen(descriptor, "wb"))

    def move(opened: Connection, before: datetime) -> int:
        picked = pruning.pick_finished(opened, before)
        if picked:
            _write(file, [_document(each, names, message=message) for each in picked])
        return pruning.delete(opened, [each.row.id for each in picked])

    return move


def _write(file: IO[bytes], documents: Sequence[dict[str, Any]]) -> None:
    """Write a batch as a separate gzip member. If writing is interrupted, earlier batches stay readable."""
    lines = "".join(json_module.dumps(each, ensure_ascii=False) + "\n" for each in documents)
    file.write(gzip.compress(lines.encode()))
    file.flush()
    os.fsync(file.fileno())


def _document(picked: Picked, names: dict[UUID, str], *, message: bool) -> dict[str, Any]:
    row = picked.row
    document = schemas.FollowUp.model_validate(row, from_attributes=True).model_dump(mode="json", by_alias=True)
    return document | {
        "message": row.message if message else None,
        "workspace": names.get(row.workspace_id),
        "attempts": row.attempts,
        "retryOf": row.retry_of and str(row.retry_of),
        "failedAttempts": [failure_document(each) for each in picked.failures],
    }
