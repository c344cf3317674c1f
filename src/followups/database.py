"""Database engines and sessions."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from followups.database_errors import READ_ONLY, UnfitDatabaseError
from followups.session_settings import CONNECT_TIMEOUT, CONNECTION, SESSION
from followups.urls import database_url as parse

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from psycopg.abc import PQGen
    from sqlalchemy.engine.interfaces import DBAPIConnection, ExceptionContext
    from sqlalchemy.pool import ConnectionPoolEntry

T = TypeVar("T")

MILLISECOND = timedelta(milliseconds=1)
POOL_MARGIN = 5
"""Seconds that a caller waits for a pooled connection beyond the time that connecting may take."""
STATEMENT_TIMEOUT = timedelta(seconds=30)
"""Time limit of a statement on the server; ours take milliseconds."""
SILENCE_MARGIN = timedelta(seconds=5)
"""How much longer than that a server may be silent before the connection is given up: it is half-open, or the server
hangs and its own timeout will never be heard of.
"""
NO_CONNECT_TIMEOUT = 130
"""Seconds that psycopg waits if the URL's `connect_timeout` is 0, which means no limit."""

ENCODING = "UTF8"
MAKE_ANOTHER = "make one with ENCODING 'UTF8' (from template0), move the data, and set FOLLOWUPS_DATABASE_URL to it"
"""What to do about a database with another encoding."""

CHANGES_SESSIONS = (
    "a pooler before it gives each transaction another session (transaction pooling): "
    "use session pooling (pool_mode = session in PgBouncer), or a port without the pooler"
)
"""What to do about a pooler that loses our settings, locks and prepared statements."""

POOLER_ROUNDS = 4
"""How often two connections are asked for their sessions; under load, sessions change at the first time."""

_OURS = "followups.set_up"

RECENTLY = 1.0
"""Seconds after its last use during which a connection needs no test."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that gives up on a server that has fallen silent.

    libpq has no such limit, and TCP detects nothing while a machine in between acknowledges.
    """

    patience: float | None = None
    """Seconds that one exchange may take, however many rows it returns, or None for no limit."""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Wait for an answer as psycopg does; close and raise `psycopg.OperationalError` if none arrives."""
        started = time.monotonic()
        try:
            return super().wait(gen, interval, timeout or self.patience)
        except psycopg.OperationalError as error:
            if timeout or not _fell_silent(self, started):
                raise
            raise _given_up(self) from error


class BoundedAsyncConnection(psycopg.AsyncConnection[Any]):
    """The same for an event loop."""

    patience: float | None = None

    async def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:  # noqa: ASYNC109 - psycopg's own
        """Wait for an answer as psycopg does; close and raise `psycopg.OperationalError` if none arrives."""
        started = time.monotonic()
        try:
            return await super().wait(gen, interval, timeout or self.patience)
        except psycopg.OperationalError as error:
            if timeout or not _fell_silent(self, started):
                raise
            raise _given_up(self) from error


Bounded = BoundedConnection | BoundedAsyncConnection


def _fell_silent(connection: Bounded, since: float) -> bool:
    """Return whether an exchange that began at ``since`` (monotonic seconds) failed by the server's silence."""
    patience = connection.patience
    return patience is not None and time.monotonic() - since >= patience and not connection.closed


def _given_up(connection: Bounded) -> psycopg.OperationalError:
    connection.pgconn.finish()
    return psycopg.OperationalError(f"the server was silent for {connection.patience:g} s: the connection is given up")


def make_engine(
    database_url: str,
    *,
    pool_size: int = 5,
    application_name: str = "followups",
    options: Mapping[str, str] | None = None,
    statement_timeout: timedelta | None = STATEMENT_TIMEOUT,
) -> Engine:
    """Return an engine for ``database_url`` (``postgresql://...``), which connects when first used.

    Its sessions have the settings of `SESSION` and ``options``. A connection is tested when it is taken from the pool,
    so that a restarted server costs one reconnect and no failed request. A connection that is silent for
    ``statement_timeout`` and a margin is given up. Migrations pass None, so that their statements have no time limit.
    """
    url = parse(database_url)
    engine = create_engine(url, **_arguments(url, pool_size, application_name))
    session = _session(options, statement_timeout)
    patience = _patience(statement_timeout)
    pooler = _Pooler()

    def connect(_dialect: object, _record: object, arguments: Sequence[Any], named: Mapping[str, Any]) -> object:
        connection = BoundedConnection.connect(*arguments, **{**named, "autocommit": True})
        with _closed_if_refused(connection):
            connection.patience = connect_timeout(url)
            row = connection.execute(_SET_UP, session).fetchone()
            _check_encoding(row)
            if pooler.is_before(connection, row):
                pooler.check(connect_timeout(url), arguments, named)
            connection.autocommit = False
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        connection.patience = patience
        return connection

    event.listen(engine, "do_connect", connect)
    event.listen(engine, "connect", _note_set_up)
    event.listen(engine, "handle_error", _drop_read_only)
    return engine


def make_async_engine(
    database_url: str,
    *,
    pool_size: int = 5,
    application_name: str = "followups",
    options: Mapping[str, str] | None = None,
    statement_timeout: timedelta = STATEMENT_TIMEOUT,
) -> AsyncEngine:
    """Return an equal engine for one event loop; its work runs through `followups.transactions.in_loop`.

    It tests only connections that were idle for `RECENTLY`: they are taken many times a second, and a test takes as
    long as a statement.
    """
    url = parse(database_url)
    arguments = _arguments(url, pool_size, application_name)
    # No reset either: a connection returns at the end of a `with`, which has rolled back anything uncommitted.
    engine = create_async_engine(url, **arguments | {"pool_pre_ping": False, "pool_reset_on_return": None})
    _test_what_lay_idle(engine.sync_engine)
    session = _session(options, statement_timeout)
    patience = _patience(statement_timeout)
    pooler = _Pooler()

    async def connect(*arguments: Any, **named: Any) -> BoundedAsyncConnection:  # noqa: ANN401 - psycopg's own
        connection = await BoundedAsyncConnection.connect(*arguments, **{**named, "autocommit": True})
        with _closed_if_refused(connection):
            connection.patience = connect_timeout(url)
            row = await (await connection.execute(_SET_UP, session)).fetchone()
            _check_encoding(row)
            if pooler.is_before(connection, row):
                await asyncio.to_thread(pooler.check, connect_timeout(url), arguments, named)
            await connection.set_autocommit(False)
            await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
        connection.patience = patience
        return connection

    def choose(_dialect: object, _record: object, _arguments: object, named: dict[str, Any]) -> None:
        named["async_creator_fn"] = connect

    event.listen(engine.sync_engine, "do_connect", choose)
    event.listen(engine.sync_engine, "connect", _note_set_up)
    event.listen(engine.sync_engine, "handle_error", _drop_read_only)
    return engine


# Settings that this version of PostgreSQL does not have are skipped.
_SET_UP = """
    SELECT current_setting('server_encoding'), pg_backend_pid(), set_config(name, value, false)
      FROM unnest(%(names)s::text[], %(values)s::text[]) AS session (name, value)
     WHERE current_setting(name, true) IS NOT NULL
"""


def _session(options: Mapping[str, str] | None, statement_timeout: timedelta | None) -> dict[str, list[str]]:
    """Return the parameters of `_SET_UP`."""
    limit = str(statement_timeout // MILLISECOND if statement_timeout else 0)
    # A process that is frozen in the middle of a transaction must not keep its row locks for longer either.
    limits = {"statement_timeout": limit, "idle_in_transaction_session_timeout": limit}
    settings = {**SESSION, **limits, **(options or {})}
    return {"names": list(settings), "values": list(settings.values())}


@contextmanager
def _closed_if_refused(connection: Bounded) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.pgconn.finish()
        raise


def _check_encoding(row: Sequence[Any] | None) -> None:
    """Raise `UnfitDatabaseError` for a database that cannot store every text."""
    if row and row[0] != ENCODING:
        message = f"its encoding is {row[0]}, which cannot store every text: {MAKE_ANOTHER}"
        raise UnfitDatabaseError(message)


class _Pooler:
    """Whether a pooler before the database gives each transaction another session, found out once for an engine.

    It loses what `_SET_UP` sets, prepared statements and locks.
    """

    def __init__(self) -> None:
        """Start without a finding."""
        self._checked = False

    def is_before(self, connection: Bounded, row: Sequence[Any] | None) -> bool:
        """Return whether a pooler may change sessions: it tells clients a process id that is not the session's."""
        return not self._checked and row is not None and row[1] != connection.info.backend_pid

    def check(self, patience: float, arguments: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Raise `UnfitDatabaseError` if two connections share sessions, or have not one session each."""
        try:
            with (
                BoundedConnection.connect(*arguments, **{**named, "autocommit": True}) as one,
                BoundedConnection.connect(*arguments, **{**named, "autocommit": True}) as other,
            ):
                one.patience = other.patience = patience
                pids = [each.execute("SELECT pg_backend_pid()").fetchone() for each in (one, other) * POOLER_ROUNDS]
        except psycopg.OperationalError:
            self._checked = True  # in session mode, a pool that is full keeps new clients waiting
            return
        if pids[0] == pids[1] or pids != pids[:2] * POOLER_ROUNDS:
            raise UnfitDatabaseError(CHANGES_SESSIONS)
        self._checked = True


def _drop_read_only(context: ExceptionContext) -> None:
    """Treat a read-only session as broken: drop it and every connection that its pool opened before."""
    if getattr(context.original_exception, "sqlstate", None) == READ_ONLY:
        context.is_disconnect = True


def _note_set_up(_connection: object, record: ConnectionPoolEntry) -> None:
    record.info[_OURS] = True


def is_read_committed(connection: Connection) -> bool:
    """Return whether this module's engine made the connection and its isolation is unchanged since."""
    driver = connection.connection.driver_connection
    if _OURS not in connection.info or driver is None or driver.autocommit:
        return False
    return driver.isolation_level in {None, psycopg.IsolationLevel.READ_COMMITTED}


def _test_what_lay_idle(engine: Engine) -> None:
    def note(_connection: object, record: ConnectionPoolEntry) -> None:
        record.info["used"] = time.monotonic()

    def test(connection: DBAPIConnection, record: ConnectionPoolEntry, _proxy: object) -> None:
        if time.monotonic() - record.info.get("used", math.inf) > RECENTLY:
            try:
                engine.dialect.do_ping(connection)
            except psycopg.OperationalError as error:
                raise InvalidatePoolError from error  # all of the pool's connections are made anew

    event.listen(engine, "checkin", note)
    event.listen(engine, "checkout", test)


def _arguments(url: URL, pool_size: int, application_name: str) -> dict[str, Any]:
    defaults = {name: value for name, value in CONNECTION.items() if name not in url.query}
    return {
        "pool_size": pool_size,
        # A connection beyond the pool would be made for one transaction and closed after it, which costs more than
        # waiting for one.
        "max_overflow": 0,
        "pool_pre_ping": True,
        # How many seconds a caller waits for a connection before it gets an error.
        "pool_timeout": connect_timeout(url) + POOL_MARGIN,
        # Statement parameters hold message texts, which must never be in an error or a log.
        "hide_parameters": True,
        "connect_args": {**defaults, "application_name": application_name},
    }


def connect_timeout(url: URL) -> float:
    """Return the time limit of connecting, in seconds."""
    try:
        seconds = float(str(url.query.get("connect_timeout", CONNECT_TIMEOUT)))
    except ValueError:
        return CONNECT_TIMEOUT  # psycopg rejects the value
    return seconds if seconds > 0 else NO_CONNECT_TIMEOUT


def _patience(statement_timeout: timedelta | None) -> float | None:
    if statement_timeout is None:
        return None
    return (statement_timeout + min(SILENCE_MARGIN, statement_timeout)).total_seconds()


def make_sessions(engine: Engine) -> sessionmaker[Session]:
    """Return a factory of sessions whose objects stay readable after the commit."""
    return sessionmaker(engine, expire_on_commit=False)
