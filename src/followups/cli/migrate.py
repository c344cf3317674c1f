"""``followups migrate``: wait for the database, then upgrade its schema.

honcho stops all processes as soon as one ends. If ``release`` ended by itself, honcho would stop web, worker and beat.
After a plain ``honcho start``, this command therefore keeps running until honcho stops it. After any other start, such
as ``honcho start release``, the command ends once the schema is upgraded.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from alembic.util.exc import CommandError
from sqlalchemy.exc import OperationalError

from followups import schema
from followups.cli.connection import engine
from followups.cli.entry import examples
from followups.cli.output import print_line, remark
from followups.embedded.stop_signals import StopSignals
from followups.errors import FollowUpsError, reason_of
from followups.settings import get_settings
from followups.urls import place_of

if TYPE_CHECKING:
    from collections.abc import Callable

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

Versions = tuple[str | None, str | None]

FIRST_PAUSE = 0.25
LONGEST_PAUSE = 5.0
"""Maximum pause between two attempts to connect, in seconds.

Each pause is twice as long as the previous one.
"""

LOOK = 0.2
"""Seconds between two checks for a stop signal."""

ANCESTORS = 4
"""Maximum number of ancestor processes to examine.

Between honcho and this process, there may be a shell and another honcho process.
"""

TRANSIENT_REFUSALS = ("starting up", "shutting down", "recovery", "too many", "remaining connection slots")
"""Parts of the error messages with which a PostgreSQL server refuses connections for a while.

Any other refusal, such as a wrong password, is final.
"""


@app.command(epilog=examples("followups migrate", "followups migrate --wait 0"))
def migrate(
    wait: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="How long to wait for the database, and for another migration."),
    ] = schema.WAIT,
) -> None:
    """Upgrade the database to the newest schema. Running the command repeatedly or concurrently is safe.

    In a plain `honcho start`, this command keeps running after the upgrade: as soon as one process ends, honcho stops
    all others. In all other cases the command ends after the upgrade.
    """
    url = get_settings().database_url.get_secret_value()
    with engine() as made:
        before = _wait_until_reachable(lambda: schema.schema_versions(made), place_of(url), wait)[0]
        try:
            schema.migrate(url, wait=wait)
        except CommandError as error:
            message = (
                f"The database {place_of(url)} has the schema {before}, which this version does not know ({error});"
                " install the version of followups that created it, or a newer one."
            )
            raise FollowUpsError(message) from error
        after = schema.schema_versions(made)[0]
    print_line(f"The schema is {after}" + (", unchanged" if before == after else f"; it was {before or 'empty'}"))
    if _is_started_with_others():
        remark("Not ending, because honcho stops every process as soon as one ends.")
        _wait_for_stop()


def _wait_until_reachable(ask: Callable[[], Versions], place: str, wait: float) -> Versions:
    deadline, pause = None, FIRST_PAUSE
    while True:
        try:
            return ask()
        except OperationalError as error:
            if not _may_pass(error):
                raise
            if deadline is None:
                deadline = time.monotonic() + wait
                reason = reason_of(error.orig or error)
                remark(f"The database {place} cannot be reached ({reason}); waiting up to {wait:g} s.")
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            time.sleep(min(pause, left))
            pause = min(pause * 2, LONGEST_PAUSE)


def _may_pass(error: OperationalError) -> bool:
    said = str(error.orig)
    return "FATAL:" not in said or any(words in said for words in TRANSIENT_REFUSALS)


def _is_started_with_others() -> bool:
    """Return whether this process is the `release` process of a plain ``honcho start``.

    A plain ``honcho start`` starts every process of the Procfile.
    """
    is_release = os.environ.get("HONCHO_PROCESS_NAME", "").startswith("release.")
    return is_release and "release" not in _words_of_ancestors()


def _wait_for_stop() -> None:
    """Block until a stop signal arrives."""
    with StopSignals() as signals, suppress(KeyboardInterrupt):
        while True:
            signals.check()
            time.sleep(LOOK)


def _words_of_ancestors() -> set[str]:
    words, pid = set[str](), os.getppid()
    # Without /proc, the parent processes are unknown, and a plain `honcho start` is assumed.
    with suppress(OSError, IndexError):
        for _ in range(ANCESTORS):
            words.update(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0"))
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return words
