"""A system under test, started with the Procfile's commands; `celery` is the script in tests/bin."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text

import pgbouncer
import web
from conftest import brisk_settings
from databases import OWNER, SERVICE, make_roles, url_as, url_of
from faults import history
from faults.failpoints import Failpoints
from faults.promises import Record, Verdict, check
from faults.proxy import Proxy
from faults.replica import Replicated
from followups.database import make_engine
from followups.embedded import EmbeddedPostgres, EmbeddedValkey, Processes, memory_directory
from followups.embedded import postgres as embedded
from followups.schema import migrate
from followups.session_settings import BY_KEY
from stack import COMMANDS, Stack, wait_until
from world import World

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from uuid import UUID

    from followups.embedded import Child
    from followups.settings import Settings

PROCFILE = dict(
    line.split(": ", 1) for line in (Path(__file__).parents[2] / "Procfile").read_text().splitlines() if ": " in line
)


@dataclass
class Rig(Stack):
    """A `Stack` that runs the Procfile's commands, with failpoints and a log of acknowledged requests."""

    rng: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311 - not for secrets
    postgres: EmbeddedPostgres | Replicated | None = None
    valkey: EmbeddedValkey | None = None
    """This system's own Valkey, or None if the system uses the shared Valkey, which must keep running."""
    created: set[UUID] = field(default_factory=set)
    cancelled: dict[UUID, float] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        directory = self.processes.logs / "failpoints"
        directory.mkdir()
        self.failpoints = Failpoints(directory)
        self.world.alter(history.INSTALL)

    def process(self, name: str, command: str, *more: str, environment: Mapping[str, str] | None = None) -> Child:
        """Start a line of the Procfile under a given name, with ``more`` arguments appended."""
        path = os.pathsep.join([str(COMMANDS), str(Path(sys.executable).parent), os.environ["PATH"]])
        own = {"HONCHO_PROCESS_NAME": name, "PATH": path}
        return self.processes.spawn(
            name,
            ["/bin/sh", "-c", f'exec {PROCFILE[command]} "$@"', command, *more],
            environment=self.environment() | own | dict(environment or {}),
        )

    def worker(self, *more: str, ready: bool = True, harmed: bool = False, **environment: str) -> Child:
        """Start another worker and wait until it consumes; only a ``harmed`` worker has failpoints."""
        name = f"worker.{next(self._numbers)}"
        injected = self.failpoints.environment() if harmed else {}
        child = self.process(name, "worker", *more, environment=injected | environment)
        if ready:
            wait_until(lambda: "ready." in child.command.log.read_text() or not child.running, within=60)
            assert child.running, child.tail()
        return child

    def beat(self, **environment: str) -> Child:
        """Start another beat without waiting until it is ready."""
        return self.process(f"beat.{next(self._numbers)}", "beat", environment=environment)

    def web(self) -> web.Api:
        """Start another web process and wait for it; return a client with an API key."""
        _, url = web.start(self.processes, self.environment(), f"web.{next(self._numbers)}")
        return web.Api(url, self.world)

    def start(self, workers: int = 1, beats: int = 1, *, harmed: bool = False) -> list[Child]:  # type: ignore[override]
        """Start the chat server, beats and workers; wait until all workers read the queue, and return them."""
        for _ in range(beats):  # the processes that take longest to start are started first
            self.beat()
        started = [self.worker(ready=False, harmed=harmed) for _ in range(workers)]
        self.sandbox()
        for child in started:
            wait_until(lambda child=child: "ready." in child.command.log.read_text() or not child.running, within=60)
            assert child.running, child.tail()
        return started

    def bulk(self, count: int, spread: float = 0.0, *, per_chat: int = 1) -> list[UUID]:
        """Insert ``count`` follow-ups, ``per_chat`` in each new chat, due within ``spread`` seconds from now."""
        due = [timedelta(seconds=self.rng.random() * spread) for _ in range(count)]
        if per_chat == 1:
            ids = self.world.burst(due)
        else:
            chats = [self.world.chat() for _ in range(0, count, per_chat)]
            places = [(chats[number // per_chat], ahead) for number, ahead in enumerate(due)]
            ids = self.world.follow_ups_at_once(places)
        self.created.update(ids)
        return ids

    def held(self, count: int) -> list[UUID]:
        """Insert follow-ups that fall due when released, so that their chats can be configured first."""
        ids = self.world.burst([timedelta(days=1)] * count)
        self.created.update(ids)
        return ids

    def release(self, ids: Sequence[UUID], spread: float = 0.0) -> None:
        """Make held follow-ups fall due within ``spread`` seconds from now."""
        self.world.sql(
            "UPDATE follow_ups SET due_date = now() + random() * :spread * interval '1 s', scheduled_at = now()"
            " WHERE id = ANY(:ids)",
            ids=list(ids),
            spread=spread,
        )

    def cancel(self, api: web.Api, follow_up_id: UUID) -> int:
        """Cancel a follow-up through the API; record the acknowledgement and return the status code."""
        code = api.client.patch(f"{web.FOLLOW_UPS}/{follow_up_id}", json={"status": "cancelled"}).status_code
        if code == 200:
            self.cancelled[follow_up_id] = time.monotonic()
        return code

    def settle_down(self, within: float = 30) -> float:
        """Wait until no follow-up is pending, and return the seconds waited."""
        started = time.monotonic()
        query = "SELECT count(*) FROM follow_ups WHERE status = 'pending'"
        wait_until(lambda: self.world.scalar(query) == 0, within, every=0.05)
        return time.monotonic() - started

    def ask_each(self, workers: Sequence[Child]) -> None:
        """Freeze each of two workers in turn, so that the other one reads both queues."""
        for idle, busy in (workers, reversed(workers)):
            idle.signal(signal.SIGSTOP)
            self.bulk(1)
            self.settle_down(within=60)
            idle.signal(signal.SIGCONT)
            assert busy.running

    def verdict(self, **known: Any) -> Verdict:
        """Check the promises against everything that has happened so far."""
        record = Record(frozenset(self.created), self.cancelled, **known)
        return check(self.world.engine, self.received(), record)

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return all log lines of one event from the logs of all processes."""
        names = [path.stem for path in self.processes.logs.glob("*.log")]
        return [line for name in names for line in self.log_events(event, name)]


SERVERS = "FOLLOWUPS_TEST_SERVERS"
REPLICATED, POOLED = "replicated", "pooled"


def chosen_servers() -> frozenset[str]:
    """Return the types of servers in FOLLOWUPS_TEST_SERVERS: ``replicated``, ``pooled`` or both.

    The types are separated by commas. ``replicated`` is a primary with a synchronous standby. After a restart of
    PostgreSQL, the standby takes over. ``pooled`` puts a PgBouncer in session mode in front of PostgreSQL. If
    FOLLOWUPS_TEST_SERVERS is empty, a plain server is used.
    """
    chosen = frozenset(os.environ.get(SERVERS, "").replace(",", " ").split())
    if unknown := chosen - {REPLICATED, POOLED}:
        message = f"{SERVERS} knows {REPLICATED} and {POOLED}, not {', '.join(sorted(unknown))}."
        raise ValueError(message)
    if POOLED in chosen and pgbouncer.PROGRAM is None:
        pytest.skip(pgbouncer.MISSING)
    return chosen


@contextmanager
def own_servers(
    rng: random.Random,
    *,
    proxied: bool = False,
    kinds: frozenset[str] | None = None,
    binaries: Path = embedded.BINARIES,
) -> Iterator[tuple[Rig, Sequence[Proxy]]]:
    """Return a system whose servers a test may kill, behind proxies if ``proxied``.

    ``kinds`` selects the types of servers; None means `chosen_servers`. ``binaries`` selects the PostgreSQL version of
    replicated servers.
    """
    kinds = chosen_servers() if kinds is None else kinds
    with ExitStack() as stack:
        single = EmbeddedPostgres(parent=memory_directory())
        postgres = stack.enter_context(Replicated(binaries=binaries) if REPLICATED in kinds else single)
        valkey = stack.enter_context(EmbeddedValkey())
        make_roles(postgres.url())
        url = url_of(postgres.url(), SERVICE)
        migrate(url_as(url, OWNER))
        pooled = stack.enter_context(pgbouncer.PgBouncer(url)).url() if POOLED in kinds else url
        urls = [pooled, valkey.url()]
        proxies = [stack.enter_context(Proxy(url)) for url in urls] if proxied else []
        settings = brisk_settings(*(proxy.url for proxy in proxies)) if proxied else brisk_settings(*urls)
        engine = make_engine(url, options=BY_KEY)
        stack.callback(engine.dispose)
        yield stack.enter_context(running(settings, engine, rng, postgres=postgres, valkey=valkey)), proxies


@contextmanager
def running(settings: Settings, engine: Any, rng: random.Random, **servers: Any) -> Iterator[Rig]:
    """Return a system that the test can start; its processes are stopped after the test."""
    with Processes() as processes:
        rig = Rig(settings, World(engine), processes, rng=rng, **servers)
        try:
            yield rig
        finally:
            for child in processes.children:  # a frozen process cannot end by itself
                child.signal(signal.SIGCONT)


class Load:
    """Creates follow-ups at a steady rate in a thread, until stopped or until ``seconds`` have passed."""

    def __init__(self, rig: Rig, rate: float, seconds: float, spread: float = 1.0) -> None:
        """Store the load: ``rate`` follow-ups per second, each due within ``spread`` seconds."""
        self._rig, self._rate, self._spread = rig, rate, spread
        self._end = time.monotonic() + seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self.ids: list[UUID] = []
        self.refused = 0

    def __enter__(self) -> Load:  # noqa: PYI034 - no subclasses
        """Start adding follow-ups."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop adding follow-ups and wait for the thread."""
        self._stopping.set()
        self._thread.join()

    def wait(self) -> None:
        """Wait until all follow-ups have been inserted."""
        self._thread.join()

    def _run(self) -> None:
        interval = 0.1
        owed = 0.0
        while not self._stopping.wait(interval) and time.monotonic() < self._end:
            owed += self._rate * interval
            count, owed = int(owed), owed % 1
            try:
                self.ids += self._rig.bulk(count, self._spread)
            except Exception:  # noqa: BLE001 - the database is unreachable: the client was told so
                self.refused += count


def rows_of(rig: Rig, query: str, **parameters: Any) -> list[Any]:
    """Return the rows of a query."""
    with rig.world.engine.connect() as connection:
        return list(connection.execute(text(query), parameters))
