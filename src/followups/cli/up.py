"""The ``followups up`` command."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path  # noqa: TC003 - Typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Never

import typer

from followups.cli.examples import examples
from followups.cli.output import remark, say
from followups.cli.signals import StopSignals
from followups.cli.system import LOOPBACK, Plan, running
from followups.cli.welcome import Addresses, welcome
from followups.errors import FollowUpsError

if TYPE_CHECKING:
    from followups.cli.system import Stack

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

WORKSPACE = "local"
HIGHEST_PORT = 65_535
LOOK = timedelta(milliseconds=200)
"""Interval between two checks that every process still runs."""


@app.command(epilog=examples("followups up", "followups up --port 9000 --data ./followups-data"))
def up(
    *,
    port: Annotated[int, typer.Option(min=1, max=HIGHEST_PORT, help="Where the API listens.")] = 8000,
    data: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Keep database and logs there between runs.", show_default="temporary"),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the processes' logs on stderr.")] = False,
) -> None:
    """Run everything on this machine: PostgreSQL, Valkey, web, beat, worker, and a sandbox chat as receiver.

    Nothing needs to be installed or configured. Prints the URLs, an API key and a request to paste. Only this machine
    can reach it. Ctrl-C stops everything.
    """
    _require_free(port)
    if data is not None:
        data.mkdir(parents=True, exist_ok=True)
    # Ctrl-C is the normal way to end it.
    with suppress(KeyboardInterrupt), StopSignals() as signals:
        plan = Plan(port, remark, signals, data=data, echo=_echo if verbose else None)
        with running(plan) as stack:
            _stay(stack, data)


def _stay(stack: Stack, data: Path | None) -> Never:
    _, key = stack.create_key(WORKSPACE, "followups up")
    say(welcome(Addresses(stack.api, stack.sandbox, stack.logs, data, stack.settings.environment()), key), lines=True)
    while True:
        stack.check()
        time.sleep(LOOK.total_seconds())


def _require_free(port: int) -> None:
    try:
        with socket.create_server((LOOPBACK, port)):
            pass
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        message = f"Port {port} cannot be listened on ({reason}); choose another one with --port."
        raise FollowUpsError(message) from None


def _echo(process: str, line: str) -> None:
    remark(f"{process:8}| {line}")
