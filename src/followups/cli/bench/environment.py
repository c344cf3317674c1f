"""The environment of a benchmark on the configured servers.

The environment consists of a separate schema, separate broker keys, and separate processes.
"""

from __future__ import annotations

import json
import secrets
import sys
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import redis
from sqlalchemy.orm import Session

from followups import schema
from followups.database import make_engine
from followups.embedded import EmbeddedError, Processes, answers, free_port
from followups.embedded.procfile import argv, search_path
from followups.settings import get_settings, load_settings
from followups.store import bench_schema, workspaces
from followups.urls import database_url as parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from uuid import UUID

    from sqlalchemy import Connection, Engine

    from followups.settings import Settings

GRACE = timedelta(seconds=30)
READY_WITHIN = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """The processes that a benchmark starts."""

    workers: int
    delay: float
    """Seconds that the receiver waits before it responds."""
    tell: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BenchEnvironment:
    """A prepared benchmark environment."""

    engine: Engine
    workspace_id: UUID
    _receiver: str
    _processes: Processes

    def check(self) -> None:
        """Raise `EmbeddedError` if a process has ended."""
        for child in self._processes.ended():
            message = f"{child.command.name} ended early. The end of its log:\n{child.tail()}"
            raise EmbeddedError(message)

    def requests(self) -> int:
        """Return the number of requests that the receiver has received."""
        with urllib.request.urlopen(f"{self._receiver}/count", timeout=10) as answer:  # noqa: S310 - our own loopback URL
            return int(json.load(answer)["requests"])


@contextmanager
def prepared(plan: BenchPlan) -> Iterator[BenchEnvironment]:
    """Yield an environment with a schema, receiver, beat and workers, and remove everything afterwards."""
    with ExitStack() as stack:
        name = f"{bench_schema.PREFIX}{secrets.token_hex(6)}"
        connection = stack.enter_context(_connection(get_settings()))
        bench_schema.create_schema(connection, name)
        stack.callback(bench_schema.drop_schema, connection, name)
        port = free_port()
        receiver = f"http://127.0.0.1:{port}"
        processes = Processes()
        settings = _settings(name, receiver, str(processes.logs))
        stack.callback(_forget, settings)
        stack.enter_context(processes)
        url = settings.database_url.get_secret_value()
        plan.tell("Making a schema of its own")
        schema.migrate(url)
        engine = make_engine(url, pool_size=2, application_name="followups-bench")
        stack.callback(engine.dispose)
        with Session(engine) as session, session.begin():
            workspace_id = workspaces.create(session, "bench")[0].id
        plan.tell(f"Starting receiver, beat and {plan.workers} worker{'s' if plan.workers > 1 else ''}")
        _start(processes, settings, plan, port)
        yield BenchEnvironment(engine, workspace_id, receiver, processes)
        plan.tell("Cleaning up")


@contextmanager
def _connection(settings: Settings) -> Iterator[Connection]:
    engine = make_engine(settings.database_url.get_secret_value(), pool_size=1, statement_timeout=None)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _settings(name: str, receiver: str, runtime: str) -> Settings:
    configured = get_settings()
    url = parse(configured.database_url.get_secret_value()).set(drivername="postgresql")
    options = f"{url.query.get('options', '')} -csearch_path={name}".strip()
    own = {
        "database_url": url.update_query_dict({"options": options}).render_as_string(hide_password=False),
        "broker_prefix": f"{configured.broker_prefix}{name}:",
        "transport": "http",
        "transport_url": f"{receiver}/messages",
        "runtime_dir": runtime,
    }
    return load_settings(**configured.model_dump() | own)


def _start(processes: Processes, settings: Settings, plan: BenchPlan, port: int) -> None:
    module = [sys.executable, "-m", "followups.embedded.receiver", "--port", str(port)]
    receiver = f"http://127.0.0.1:{port}"
    processes.spawn("receiver", module, ready=answers(f"{receiver}/count"), within=READY_WITHIN)
    with urllib.request.urlopen(f"{receiver}/control?delay={plan.delay}", timeout=10):  # noqa: S310 - our own loopback URL
        pass
    environment = settings.environment() | {"PATH": search_path()}
    processes.spawn("beat", argv("beat"), environment=environment, grace=GRACE)
    for number in range(plan.workers):
        named = environment | {"HONCHO_PROCESS_NAME": f"bench{number}"}
        log = processes.logs / f"worker{number}.log"
        processes.spawn(
            f"worker{number}",
            argv("worker"),
            environment=named,
            ready=lambda log=log: log.exists() and "ready." in log.read_text(),  # type: ignore[misc]
            within=READY_WITHIN,
            grace=GRACE,
        )


def _forget(settings: Settings) -> None:
    """Delete the keys that beat and the workers created in the broker."""
    with redis.Redis.from_url(settings.broker_url.get_secret_value()) as broker:
        for key in broker.scan_iter(match=f"{settings.broker_prefix}*", count=1000):
            broker.delete(key)
