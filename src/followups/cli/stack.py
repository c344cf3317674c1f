"""The whole system on this machine, embedded: for ``followups up`` and ``followups demo``."""

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
from followups.cli.procfile import argv, search_path
from followups.embedded import EmbeddedError, EmbeddedPostgres, EmbeddedValkey, Processes, answers, free_port
from followups.settings import load_settings
from followups.store import api_keys, workspaces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from uuid import UUID

    from followups.cli.signals import StopSignals
    from followups.embedded import Child
    from followups.settings import Settings

READY_WITHIN = timedelta(seconds=90)
"""A start takes some five seconds on two cores; this is for a machine that is busy with other things."""

GRACE = timedelta(seconds=6)
"""How long a process may take to end; then it is killed, which costs a lease and no message."""

POLL = timedelta(milliseconds=50)

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to run, and who is told."""

    port: int
    """Of the API."""
    tell: Callable[[str], None]
    """Told what is being started."""
    signals: StopSignals
    """Whether it is to stop."""
    data: Path | None = None
    """Where PostgreSQL's data and the logs are kept; None: nowhere."""
    overrides: Mapping[str, object] = field(default_factory=dict)
    """Settings, by field; those that are not here come from the environment."""
    echo: Callable[[str, str], None] | None = None
    """Told every (process, line) of the logs."""


@dataclass(frozen=True, slots=True)
class Stack:
    """What runs."""

    settings: Settings
    api: str
    """The API's address, without a path."""
    sandbox: str
    """The sandbox's address, without a path."""
    logs: Path
    _signals: StopSignals
    _processes: Processes
    _servers: tuple[EmbeddedPostgres | EmbeddedValkey, ...]

    def check(self) -> None:
        """Raise KeyboardInterrupt when it is to stop, `EmbeddedError` (with its log's end) when a process has ended."""
        self._signals.check()
        servers = [server._child() for server in self._servers]  # noqa: SLF001 - they show it to nobody else
        for child in [*servers, *self._processes.children]:
            if not child.running:
                raise EmbeddedError(_obituary(child))

    def create_key(self, workspace: str, name: str) -> tuple[UUID, str]:
        """Create an API key, and its workspace if it is new; return the workspace's id and the key."""
        engine = database.make_engine(self.settings.database_url.get_secret_value(), pool_size=1)
        try:
            with Session(engine) as session, session.begin():
                owner, _ = workspaces.create(session, workspace)
                return owner.id, api_keys.create(session, owner.id, name)[1]
        finally:
            engine.dispose()


def _obituary(child: Child) -> str:
    code = child.exit_code
    how = f"with code {code}" if code is None or code >= 0 else f"by signal {-code}"
    return f"{child.command.name} ended {how}. The end of its log:\n{child.tail()}"


@contextmanager
def running(plan: Plan) -> Iterator[Stack]:
    """Start everything, yield when the API says that it is ready, and stop everything. Raises `EmbeddedError`."""
    with ExitStack() as stack:
        try:
            yield _started(plan, stack)
        finally:
            plan.signals.quieten()
            plan.tell("Stopping")


def _started(plan: Plan, stack: ExitStack) -> Stack:
    plan.tell("Starting PostgreSQL and Valkey")
    postgres = stack.enter_context(EmbeddedPostgres(plan.data and plan.data / "postgres"))
    plan.signals.check()
    # Not kept: the broker holds hints only, and a hint of yesterday is worth nothing.
    valkey = stack.enter_context(EmbeddedValkey())
    logs = plan.data and plan.data / "logs"
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    processes = stack.enter_context(Processes(logs, plan.echo))
    sandbox = f"http://{LOOPBACK}:{free_port()}"
    settings = _settings(plan, postgres.url(), valkey.url(), sandbox)
    plan.tell("Migrating")
    schema.migrate(postgres.url())
    plan.signals.check()
    plan.tell("Starting sandbox, web, worker and beat")
    api, servers = f"http://{LOOPBACK}:{plan.port}", (postgres, valkey)
    started = Stack(settings, api, sandbox, processes.logs, plan.signals, processes, servers)
    _spawn(processes, started, plan.port)
    _wait_until_ready(started)
    return started


def _settings(plan: Plan, database_url: str, broker_url: str, sandbox: str) -> Settings:
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
        "sandbox": [sys.executable, "-m", "followups.transports.sandbox_server", "--port", sandbox_port],
        # On this machine only: whoever can reach the network needs no way in.
        "web": argv("web", "--host", LOOPBACK),
        "worker": argv("worker"),
        "beat": argv("beat"),
    }
    for name, command in commands.items():
        processes.spawn(name, command, environment=environment, grace=GRACE)


def _wait_until_ready(stack: Stack) -> None:
    deadline = time.monotonic() + READY_WITHIN.total_seconds()
    # The sandbox takes messages, and database, migrations, broker and a tick (so beat and worker) are there.
    for ready in (answers(f"{stack.sandbox}/sandbox/summary"), answers(f"{stack.api}/readyz")):
        while not ready():
            stack.check()
            if time.monotonic() > deadline:
                message = f"It was not ready after {READY_WITHIN.total_seconds():g} s; the logs are in {stack.logs}."
                raise EmbeddedError(message)
            time.sleep(POLL.total_seconds())
