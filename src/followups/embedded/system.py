"""The whole system, run on this machine for ``followups up`` and ``followups demo``."""

from __future__ import annotations

import base64
import secrets
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from followups import database, schema
from followups.embedded import EmbeddedError, EmbeddedPostgres, EmbeddedValkey, Processes, answers, free_port
from followups.embedded.postgres import make_data_directory
from followups.embedded.processes import argv, search_path
from followups.operations import administration
from followups.settings import load_settings
from followups.store import console_sessions
from followups.store.audit import Way, user_of_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from uuid import UUID

    from followups.embedded import Child
    from followups.embedded.embedded_server import EmbeddedServer
    from followups.embedded.stop_signals import StopSignals
    from followups.settings import Settings

READY_WITHIN = timedelta(seconds=90)
"""How long the server may take to start. A start takes about five seconds on two idle cores, and longer on a busy
machine.
"""

GRACE = timedelta(seconds=6)
"""How long a process may take to stop before it is killed. A killed process loses leases, but no messages."""

POLL = timedelta(milliseconds=50)

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class StartPlan:
    """The components to start, and the functions that report progress."""

    port: int
    """Port of the API."""
    tell: Callable[[str], None]
    """A function that is called with a short message before each step, such as ``Migrating``."""
    signals: StopSignals
    """The recorder of stop signals; it is checked between the steps of the start."""
    data: Path | None = None
    """Directory for PostgreSQL's data and the logs, or None to keep neither."""
    overrides: Mapping[str, object] = field(default_factory=dict)
    """Settings by field name; all other settings are read from the environment."""
    echo: Callable[[str, str], None] | None = None
    """A function that is called for every log line, with the process's name and the line."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The running system."""

    settings: Settings
    api: str
    """The API's base URL, without a path."""
    sandbox: str
    """The sandbox's base URL, without a path."""
    logs: Path
    _signals: StopSignals
    _processes: Processes
    _servers: tuple[EmbeddedServer, ...]

    def check(self) -> None:
        """Raise KeyboardInterrupt after a stop signal, or `EmbeddedError` if a process has ended."""
        self._signals.check()
        servers = [server.child for server in self._servers]
        for child in [*servers, *self._processes.children]:
            if not child.running:
                raise EmbeddedError(_obituary(child))

    def create_console_link(self) -> str:
        """Create a single-use link that signs in to the console as an operator."""
        grant = console_sessions.Grant("operator", None, "this machine")
        engine = database.make_engine(self.settings.database_url.get_secret_value(), pool_size=1)
        try:
            with Session(engine) as session, session.begin():
                token, _ = console_sessions.make_link(session, grant, console_sessions.LONGEST_LINK)
        finally:
            engine.dispose()
        return f"{self.settings.public_url or self.api}/console/login#token={token}"

    def create_key(self, workspace: str, name: str) -> tuple[UUID, str]:
        """Create an API key, and its workspace if missing; return the workspace's id and the key."""
        engine = database.make_engine(self.settings.database_url.get_secret_value(), pool_size=1)
        actor = user_of_process(Way.COMMAND)
        try:
            with Session(engine) as session, session.begin():
                owner, _ = administration.create_workspace(session, actor, workspace)
                return owner.id, administration.create_key(session, actor, owner.id, name)[1]
        finally:
            engine.dispose()


def _obituary(child: Child) -> str:
    code = child.exit_code
    how = f"with code {code}" if code is None or code >= 0 else f"by signal {-code}"
    return f"{child.command.name} ended {how}. The end of its log:\n{child.tail()}"


@contextmanager
def running(plan: StartPlan) -> Iterator[Stack]:
    """Start all components, yield once the API is ready, and stop the components afterwards. Raises `EmbeddedError`."""
    with ExitStack() as stack:
        try:
            yield _started(plan, stack)
        finally:
            plan.signals.quieten()
            plan.tell("Stopping")


def _started(plan: StartPlan, stack: ExitStack) -> Stack:
    plan.tell("Starting PostgreSQL and Valkey")
    postgres = stack.enter_context(EmbeddedPostgres(plan.data and plan.data / "postgres"))
    plan.signals.check()
    # The broker's data is not kept, because hints from an earlier run are worthless.
    valkey = stack.enter_context(EmbeddedValkey())
    logs = plan.data and plan.data / "logs"
    if logs:
        make_data_directory(logs)
    processes = stack.enter_context(Processes(logs, plan.echo))
    sandbox = f"http://{LOOPBACK}:{free_port()}"
    settings = _settings(plan, postgres.service_url(), valkey.url(), sandbox)
    plan.tell("Migrating")
    schema.migrate(postgres.url())
    plan.signals.check()
    plan.tell("Starting sandbox, web, worker and beat")
    api, servers = f"http://{LOOPBACK}:{plan.port}", (postgres, valkey)
    started = Stack(settings, api, sandbox, processes.logs, plan.signals, processes, servers)
    _spawn(processes, started, plan.port)
    _wait_until_ready(started)
    return started


def _settings(plan: StartPlan, database_url: str, broker_url: str, sandbox: str) -> Settings:
    own = {
        "database_url": database_url,
        "broker_url": broker_url,
        "transport": "http",
        "transport_url": f"{sandbox}/messages",
        "transport_secret": f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}",
    }
    return load_settings(**{"log_format": "console", **plan.overrides, **own})


def _spawn(processes: Processes, stack: Stack, port: int) -> None:
    environment = stack.settings.environment() | {"PATH": search_path(), "PORT": str(port)}
    sandbox_port = stack.sandbox.rpartition(":")[2]
    commands = {
        "sandbox": [sys.executable, "-m", "followups.transports.sandbox.server", "--port", sandbox_port],
        # The servers listen only on the loopback interface; nothing else protects them or this API key.
        "web": argv("web", "--host", LOOPBACK),
        "worker": argv("worker"),
        "beat": argv("beat"),
    }
    for name, command in commands.items():
        processes.spawn(name, command, environment=environment, grace=GRACE)


def _wait_until_ready(stack: Stack) -> None:
    deadline = time.monotonic() + READY_WITHIN.total_seconds()
    # The API is ready only if the servers, beat and a worker are up and migrations are complete. A ready API also means
    # that the sandbox accepts messages.
    for ready in (answers(f"{stack.sandbox}/sandbox/summary"), answers(f"{stack.api}/readyz")):
        while not ready():
            stack.check()
            if time.monotonic() > deadline:
                message = (
                    f"The system was not ready after {READY_WITHIN.total_seconds():g} s; the logs are in {stack.logs}."
                )
                raise EmbeddedError(message)
            time.sleep(POLL.total_seconds())
