"""``followups migrate``: wait for the database, then upgrade its schema."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from alembic.util.exc import CommandError
from sqlalchemy.exc import OperationalError

from followups import schema
from followups.cli import honcho_release
from followups.cli.connection import engine, place_of
from followups.cli.examples import examples
from followups.cli.failures import reason_of
from followups.cli.output import remark, say
from followups.errors import FollowUpsError
from followups.settings import get_settings

if TYPE_CHECKING:
    from collections.abc import Callable

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

Versions = tuple[str | None, str | None]

FIRST_PAUSE = 0.25
LONGEST_PAUSE = 5.0
"""Longest pause between two tries, in seconds; each pause is twice the one before."""

TRANSIENT_REFUSALS = ("starting up", "shutting down", "recovery", "too many", "remaining connection slots")
"""SQLSTATEs of a server that is up but not ready; any other refusal, such as a wrong password, is final."""


@app.command(epilog=examples("followups migrate", "followups migrate --wait 0"))
def migrate(
    wait: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="How long to wait for the database, and for another migration."),
    ] = schema.WAIT,
) -> None:
    """Upgrade the database to the newest schema. It is safe to run several at once, and to repeat it.

    Under a plain `honcho start` it stays until all processes are stopped, because honcho stops every process as soon as
    one ends. Anywhere else it ends when it is done.
    """
    url = get_settings().database_url.get_secret_value()
    with engine() as made:
        before = _wait_until_reachable(lambda: schema.schema_versions(made), place_of(url), wait)[0]
        try:
            schema.migrate(url, wait=wait)
        except CommandError as error:
            message = (
                f"The database {place_of(url)} has the schema {before}, which this version does not know ({error});"
                " install the version of followups that made it, or a newer one."
            )
            raise FollowUpsError(message) from error
        after = schema.schema_versions(made)[0]
    say(f"The schema is {after}" + (", as it was" if before == after else f"; it was {before or 'empty'}"))
    if honcho_release.is_started_with_others():
        remark("Staying, because honcho stops every process as soon as one ends.")
        honcho_release.stay()


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
