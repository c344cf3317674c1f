"""The ``followups up`` command."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path  # noqa: TC003 - Typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Never
from uuid import UUID, uuid4

import typer

from followups.cli.entry import examples
from followups.cli.output import print_line, remark
from followups.embedded.postgres import make_data_directory
from followups.embedded.stop_signals import StopSignals
from followups.embedded.system import LOOPBACK, StartPlan, running
from followups.errors import FollowUpsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from followups.embedded.system import Stack

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

SHOWN = ("FOLLOWUPS_DATABASE_URL", "FOLLOWUPS_BROKER_URL", "FOLLOWUPS_TRANSPORT_URL")
"""Settings that other commands need to connect to the system started by `followups up`."""

IN_FIVE_SECONDS = "$(date -u -d '+5 seconds' +%FT%TZ 2>/dev/null || date -u -v+5S +%FT%TZ)"
"""Shell code for the RFC 3339 time five seconds from now.

The code works with the `date` command of GNU, BSD and macOS.
"""

WORKSPACE = "local"
HIGHEST_PORT = 65_535
LOOK = timedelta(milliseconds=200)
"""Interval between two checks that every process is still running."""


@app.command(epilog=examples("followups up", "followups up --port 9000 --data ./followups-data"))
def up(
    *,
    port: Annotated[int, typer.Option(min=1, max=HIGHEST_PORT, help="The port on which the API listens.")] = 8000,
    data: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="The directory that keeps the database and the logs between runs.",
            show_default="temporary",
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the processes' logs on stderr.")] = False,
) -> None:
    """Run everything on this machine: PostgreSQL, Valkey, web, beat, worker, and a sandbox chat.

    Nothing needs to be installed or configured. Messages are sent to the sandbox chat. The command prints the URLs, an
    API key and an example request. The system is reachable only from this machine. Ctrl-C stops everything.
    """
    _require_free(port)
    if data is not None:
        make_data_directory(data)
    # Ctrl-C is the normal way to end this command.
    with suppress(KeyboardInterrupt), StopSignals() as signals:
        plan = StartPlan(port, remark, signals, data=data, echo=_echo if verbose else None)
        with running(plan) as stack:
            _run_until_stopped(stack, data)


def _run_until_stopped(stack: Stack, data: Path | None) -> Never:
    _, key = stack.create_key(WORKSPACE, "followups up")
    console = stack.create_console_link() if stack.settings.console else "switched off (FOLLOWUPS_CONSOLE)"
    addresses = Addresses(stack.api, console, stack.sandbox, stack.logs, data, stack.settings.environment())
    print_line(welcome(addresses, key), lines=True)
    while True:
        stack.check()
        time.sleep(LOOK.total_seconds())


def _require_free(port: int) -> None:
    try:
        with socket.create_server((LOOPBACK, port)):
            pass
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        message = f"Port {port} is not available ({reason}); choose another one with --port."
        raise FollowUpsError(message) from None


def _echo(process: str, line: str) -> None:
    remark(f"{process:8}| {line}")


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses that `followups up` prints."""

    api: str
    console: str
    """A link that signs an operator in to the console, and works only once."""
    sandbox: str
    logs: Path
    data: Path | None
    environment: Mapping[str, str]


def welcome(where: Addresses, key: str) -> str:
    """Return the welcome text: addresses, the API key, an example request, and other commands to try."""
    exports = "\n".join(f"export {name}='{where.environment[name]}'" for name in SHOWN)
    return f"""
Ready.

  REST API       {where.api}/api/v1/
  Documentation  {where.api}/docs
  Console        {where.console}
  Sandbox chat   {where.sandbox}/  (watch the messages arrive there)
  API key        {key}
  Logs           {where.logs}
  Data           {where.data or "temporary; --data DIR keeps it"}

Paste this: an agent writes in a chat, and a follow-up is due five seconds later.

{request(where.api, key, uuid4(), uuid4())}

To use other commands (followups stats --watch, list, show) in another terminal, first run

{exports}

Ctrl-C stops everything.
"""


def request(api: str, key: str, chat_id: UUID, message_id: UUID) -> str:
    """Return shell commands that record an agent's message and then schedule a follow-up."""
    headers = f"-H 'authorization: Bearer {key}' -H 'content-type: application/json'"
    return f"""\
curl -sS {api}/api/v1/chat-messages \\
  {headers} \\
  -d '{{"id": "{message_id}", "chatId": "{chat_id}", "role": "agent"}}'
curl -sS {api}/api/v1/chat-message-follow-ups \\
  {headers} \\
  -d '{{"chatId": "{chat_id}", "message": "Hello! Are you still there?",
       "dueDate": "'"{IN_FIVE_SECONDS}"'"}}'"""
