"""Fixtures for all tests: one PostgreSQL and one Valkey per run, started on first use.

The controller of pytest-xdist starts and stops the servers, and sends their URLs through a socket. The controller
outlives the xdist workers; with ``-n 0``, the controller is the only process. Unit tests start no server, and no server
is started twice. If an xdist worker crashes, no server is left running.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from datetime import timedelta
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from uuid import uuid4

import psycopg
import pytest
import redis
from hypothesis import settings as hypothesis_settings

from databases import OWNER, create_database, drop_database, make_roles, url_of
from followups.settings import Settings, get_settings, load_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

    from followups.embedded import EmbeddedPostgres, EmbeddedValkey
    from steps import Steps
    from world import World

TEMPLATE, UNFINISHED = "template_migrated", "template_unfinished"
"""The name of the database that each test copies, and its name until all migrations have run."""

TEMPLATE_LOCK = 4_071_969
"""The advisory lock for creating the template: any number that nothing else uses."""

pytest_plugins = ["pgbouncer", "redis_server", "stack_fixtures"]

# Tests start hundreds of processes. Without stored bytecode, each process would compile every module that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Some tests send Ctrl-C. A process that a shell started in the background ignores Ctrl-C, as do its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes depends on the load of the machine.
hypothesis_settings.register_profile("no deadline", deadline=None)
hypothesis_settings.load_profile("no deadline")

SLOW = ("tests/acceptance/", "tests/console/", "tests/deploy/", "tests/faults/")
"""The directories of tests that start processes.

One xdist worker runs all tests of a file. A slow file at the end would leave the other workers idle.
"""

SERVERS = pytest.StashKey["Servers"]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with slow tests first, and disable the time limit for long tests, which limit their own time."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLOW))
    for item in items:
        if item.get_closest_marker("faults_long") or item.get_closest_marker("large"):
            item.add_marker(pytest.mark.timeout(0))


class Servers:
    """PostgreSQL and Valkey, started on first use; each client receives both URLs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._postgres: EmbeddedPostgres | None = None
        self._valkey: EmbeddedValkey | None = None
        self._listener: Listener | None = None
        self._thread: threading.Thread | None = None

    def urls(self) -> tuple[str, str]:
        """Start the servers if necessary, and return both URLs."""
        from followups.embedded import (  # noqa: PLC0415 - not for unit tests
            EmbeddedPostgres,
            EmbeddedValkey,
            memory_directory,
        )

        with self._lock:
            if self._postgres is None:
                self._postgres = EmbeddedPostgres(parent=memory_directory())
                self._postgres.start()
                make_roles(self._postgres.url(), UNFINISHED)
            if self._valkey is None:
                self._valkey = EmbeddedValkey()
                self._valkey.start()
            return self._postgres.url(), self._valkey.url()

    def address(self) -> str:
        """Return the path of a private socket from which other processes read the servers' URLs."""
        if self._listener is None:
            self._listener = Listener(family="AF_UNIX")
            self._thread = threading.Thread(target=self._serve, args=(self._listener,), daemon=True)
            self._thread.start()
        return str(self._listener.address)

    def stop(self) -> None:
        """Stop the servers and the thread that listens on the socket."""
        if self._listener and self._thread:
            with Client(self._listener.address, family="AF_UNIX") as connection:
                connection.send("stop")
            self._thread.join()
            self._listener.close()
        for server in (self._valkey, self._postgres):
            if server:
                server.stop()

    def _serve(self, listener: Listener) -> None:
        while True:
            with listener.accept() as connection:
                if connection.recv() == "stop":
                    return
                try:
                    connection.send(self.urls())
                except Exception as error:  # noqa: BLE001 - whatever it was, the test that asked should show it
                    connection.send(error)


class Node(Protocol):
    """A worker of pytest-xdist, as seen by the controller."""

    config: pytest.Config
    workerinput: dict[str, str]


def pytest_configure(config: pytest.Config) -> None:
    """Remove the service's settings from the environment, and create the object that starts the servers."""
    for name in list(os.environ):
        ours = name.startswith("FOLLOWUPS_") and not name.startswith("FOLLOWUPS_TEST_")
        if ours or name in {"DATABASE_URL", "REDIS_URL"}:
            del os.environ[name]
    if not hasattr(config, "workerinput"):
        config.stash[SERVERS] = Servers()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Node) -> None:
    """Pass the path of the servers' Unix socket to each worker of pytest-xdist."""
    node.workerinput["servers"] = node.config.stash[SERVERS].address()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop the test servers if they were started."""
    if servers := config.stash.get(SERVERS, None):
        servers.stop()


@pytest.fixture(scope="session")
def server_urls(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Return the URLs of PostgreSQL (database ``postgres``) and Valkey (database 0) of this run."""
    if servers := request.config.stash.get(SERVERS, None):
        return servers.urls()
    with Client(request.config.workerinput["servers"], family="AF_UNIX") as connection:  # type: ignore[attr-defined]
        connection.send("urls")
        answer = connection.recv()
    if isinstance(answer, Exception):
        raise answer
    postgres, valkey = answer
    return postgres, valkey


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Return a directory that every user can enter, unlike pytest's temporary directories.

    If root runs the tests, another user runs PostgreSQL, and must be able to enter this directory.
    """
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture(scope="session")
def postgres_url(server_urls: tuple[str, str]) -> str:
    """Return a superuser's connection URL for the database ``postgres`` on this run's server."""
    return server_urls[0]


@pytest.fixture(scope="session")
def template_database(postgres_url: str) -> str:
    """Return the template database's name; the first caller creates and migrates the database."""
    from followups.schema import migrate  # noqa: PLC0415 - not for unit tests

    with psycopg.connect(postgres_url, autocommit=True) as connection:
        # the lock is held until the connection is closed
        connection.execute("SELECT pg_advisory_lock(%s)", [TEMPLATE_LOCK])
        if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [TEMPLATE]).fetchone() is None:
            migrate(url_of(postgres_url, UNFINISHED, OWNER))
            connection.execute(f"ALTER DATABASE {UNFINISHED} RENAME TO {TEMPLATE}")
    return TEMPLATE


@pytest.fixture
def database_url(postgres_url: str, template_database: str) -> Iterator[str]:
    """Return the URL of a migrated, empty database that only this test uses."""
    name = f"test_{uuid4().hex}"
    create_database(postgres_url, name, template_database)
    try:
        yield url_of(postgres_url, name)
    finally:
        drop_database(postgres_url, name)


@pytest.fixture
def broker_url(server_urls: tuple[str, str]) -> str:
    """Return the URL of an empty Valkey database that no other process of this run uses."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    url = f"{server_urls[1].rpartition('/')[0]}/{number}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def settings(database_url: str, broker_url: str) -> Settings:
    """Return settings for this test's database and broker, with short times and an unused transport URL."""
    return brisk_settings(database_url, broker_url)


def brisk_settings(database_url: str, broker_url: str) -> Settings:
    """Return settings with short times, and a transport URL on which no server listens."""
    return load_settings(
        database_url=database_url,
        broker_url=broker_url,
        transport_url="http://127.0.0.1:9/",  # the discard port, which refuses connections
        transport_timeout=timedelta(seconds=1),
        lease=timedelta(seconds=3),
        tick_interval=timedelta(milliseconds=100),
        retry_base=timedelta(milliseconds=20),
        retry_cap=timedelta(milliseconds=200),
        log_format="json",
    )


@pytest.fixture(autouse=True)
def _fresh_settings() -> Iterator[None]:
    """Clear cached settings after each test."""
    yield
    get_settings.cache_clear()


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """Return an engine for this test's database, configured as in a worker."""
    from followups.database import make_engine  # noqa: PLC0415 - not for unit tests
    from followups.session_settings import BY_KEY  # noqa: PLC0415 - not for unit tests

    engine = make_engine(database_url, options=BY_KEY)
    yield engine
    engine.dispose()


@pytest.fixture
def world(engine: Engine) -> World:
    """Return an empty workspace for the test to fill."""
    from world import World  # noqa: PLC0415 - not for unit tests

    return World(engine)


@pytest.fixture
def steps(engine: Engine, settings: Settings) -> Steps:
    """Return an object that runs the steps of a delivery on this test's database."""
    from steps import Steps  # noqa: PLC0415 - not for unit tests

    return Steps(engine, settings)
