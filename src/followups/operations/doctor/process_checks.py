"""Checks workers through the broker, and the worker, beat and web processes of this machine."""

from __future__ import annotations

import http.client
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from followups.errors import named
from followups.operations.doctor import Finding
from followups.telemetry.heartbeat import directory_of, read_states

if TYPE_CHECKING:
    from collections.abc import Callable

    from followups.settings import Settings

Replies = list[dict[str, dict[str, Any]]]
"""Each worker's reply to `followups.worker.liveness.signs_of_life`, by worker name."""

RESTART = "Restart it; before the restart, py-spy dump --pid shows where it hangs."

WEB_PORT = "8000"
PATIENCE = 3.0
"""How many seconds doctor waits for `web`, which normally answers within milliseconds."""


def workers(ask: Callable[[], Replies]) -> Finding:
    """Check the state of all workers, as reported by ``ask``.

    A worker that has stopped consuming still replies to the query.
    """
    try:
        replies = ask()
    except Exception as error:  # noqa: BLE001 - whatever the broker's client raises
        return Finding("workers", named(error), "Repair the broker first.")
    # During an upgrade, a worker of an older version replies only that it is running.
    answers = {name: str(said.get("trouble", "")) for reply in replies for name, said in reply.items()}
    if not answers:
        advice = "Start a worker: honcho start worker, or celery -A followups.worker worker."
        return Finding("workers", "none answered", advice)
    detail = f"{len(answers)} answered: {', '.join(sorted(answers))}"
    troubles = [f"{name} {trouble}" for name, trouble in sorted(answers.items()) if trouble]
    waiting = sorted(f"{name} cannot work: {why}" for reply in replies for name, why in _waits(reply))
    return Finding("workers", "; ".join([detail, *troubles, *waiting]), RESTART if troubles else "")


def _waits(reply: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    return [(name, str(said["waits"])) for name, said in reply.items() if said.get("waits")]


def of_this_machine(settings: Settings) -> Finding:
    """Check this machine's heartbeat files and `web`. It is not a problem if a role has no process on this machine."""
    directory = directory_of(settings.runtime_dir)
    states = {role: read_states(directory, role) for role in ("worker", "beat")}
    told = [f"{len(found)} {role}{'' if len(found) == 1 else 's'}" for role, found in states.items()]
    told.append(f"web {_web()}")
    troubles = [
        f"the {role} {state.name} (process {state.pid}) {state.trouble}"
        for role, found in states.items()
        for state in found
        if state.trouble
    ]
    waiting = [f"the worker {state.name} cannot work: {state.waits}" for state in states["worker"] if state.waits]
    detail = "; ".join([f"on this machine {', '.join(told)}", *troubles, *waiting])
    return Finding("processes", detail, RESTART if troubles else "")


def _web() -> str:
    port = 0
    with suppress(ValueError):
        port = int(os.environ.get("PORT", WEB_PORT))
    if not 0 < port < 2**16:
        return "not checked: PORT is not a port number"
    return f"{'not there' if trouble_of_web('127.0.0.1', port) else 'answers'} on port {port}"


def trouble_of_web(host: str, port: int) -> str:
    """Check whether `web` answers. Return an error message if `web` does not answer, or else an empty string."""
    place = f"{host}:{port}"
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        up = b'"up"' in answer.read(1000)
    except (OSError, http.client.HTTPException) as error:
        return f"Web does not answer at {place} ({type(error).__name__}): restart it, or set PORT to web's port."
    finally:
        connection.close()
    if answer.status != http.HTTPStatus.OK or not up:
        return f"The program that answers at {place} is not web: HTTP {answer.status} to GET /healthz."
    return ""
