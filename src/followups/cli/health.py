"""``followups health``: liveness checks for process supervisors.

The checks need no settings, no Celery and no broker.
"""

from __future__ import annotations

import os
from typing import Annotated, NoReturn

import typer

from followups.cli.entry import examples
from followups.cli.output import print_line, remark
from followups.operations.doctor.process_checks import WEB_PORT, trouble_of_web
from followups.telemetry.heartbeat import SETTING, directory_of, read_states
from followups.urls import port_of

UNHEALTHY = 1
WRONG_USAGE = 2

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="markdown",
    epilog=examples("followups health worker", "followups health beat", "followups health web"),
)


@app.callback()
def group() -> None:
    """Check whether a process on this machine is alive: exit code 0 if so, 1 if it should be restarted.

    A process that is waiting for an unreachable database or broker counts as alive. The output shows what the process
    is waiting for. See also `doctor`.
    """


Name = Annotated[str, typer.Option("--name", "-n", help="Only the worker with this node name (worker1, worker1@host).")]


@app.command(epilog=examples("followups health worker", "followups health worker --name worker1"))
def worker(*, name: Name = "") -> None:
    """Check that every worker on this machine consumes, ticks and sends, or show what it is waiting for.

    The check also detects a worker that answers `celery inspect ping` but consumes nothing from its queues.
    """
    _check("worker", name, "celery -A followups.worker worker")


@app.command(epilog=examples("followups health beat"))
def beat(*, name: Name = "") -> None:
    """Check that beat is sending its ticks."""
    _check("beat", name, "celery -A followups.worker beat")


@app.command(epilog=examples("followups health web", "PORT=5000 followups health web"))
def web(
    *,
    port: Annotated[str, typer.Option("--port", envvar="PORT", help="The port on which web listens.")] = WEB_PORT,
    host: Annotated[str, typer.Option("--host", help="The address on which web listens.")] = "127.0.0.1",
) -> None:
    """Check that the `web` process answers requests."""
    port = port_of(port, WEB_PORT)
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        _exit_with("PORT should be a number from 1 to 65535.", WRONG_USAGE)
    if trouble := trouble_of_web(host, int(port)):
        _exit_with(trouble, UNHEALTHY)
    print_line(f"Web answers at {host}:{port}.")


def _check(role: str, name: str, command: str) -> None:
    directory = directory_of(os.environ.get(SETTING))
    states = read_states(directory, role, name)
    if not states:
        which = f"{role} {name}" if name else role
        _exit_with(f"No {which} has a heartbeat in {directory}: start {command}, or set {SETTING}.", UNHEALTHY)
    for state in states:
        if state.trouble:
            _exit_with(f"The {role} {state.name} (process {state.pid}) {state.trouble}: restart it.", UNHEALTHY)
    names = ", ".join(state.name for state in states)
    print_line(f"{len(states)} {role}{'s' if len(states) > 1 else ''} of this machine alive: {names}.")
    for state in states:
        if state.waits:
            print_line(f"The {role} {state.name} cannot work: {state.waits}. See followups doctor.")


def _exit_with(sentence: str, code: int) -> NoReturn:
    remark(f"followups: {sentence}")
    raise typer.Exit(code)
