"""Database engines and sessions."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import psycopg
from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from followups import binary_arrays  # noqa: F401 - registers the arrays for our engines
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
"""A caller waits for a pooled connection this many seconds longer than the connect timeout."""
STATEMENT_TIMEOUT = timedelta(seconds=30)
"""Time limit of a statement on the server. Statements normally take milliseconds."""
SILENCE_MARGIN = timedelta(seconds=5)
"""A connection is closed if it is silent for the statement timeout plus this many seconds.

If the silence lasts longer, the connection is half-open or the server hangs.
"""
NO_CONNECT_TIMEOUT = 130
"""If `connect_timeout` is 0, psycopg waits this many seconds for a connection."""

ENCODING = "UTF8"
MAKE_ANOTHER = (
    "create a database with ENCODING 'UTF8' (from template0), move the data, and set FOLLOWUPS_DATABASE_URL to it"
)
"""Advice for the operator if the database has an unsupported encoding."""

CHANGES_SESSIONS = (
    "a pooler in front of it gives each transaction another session (transaction pooling): "
    "use session pooling (pool_mode = session in PgBouncer), or a port without the pooler"
)
"""Advice for the operator if a pooler loses session settings, locks and prepared statements."""

POOLER_ROUNDS = 4
"""Number of times that the server sessions of two connections are compared.

Under load, one comparison is enough to detect a pooler that changes server sessions.
"""

_MADE = "followups.made"

RECENTLY = 1.0
"""How many seconds after its last use a connection is reused without a test."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed if its server stops responding.

    libpq does not limit the wait for a response. TCP does not notice a dead server if a machine in between still
    acknowledges packets.
    """

    patience: float | None = None
    """Time limit in seconds for the response to one statement, or None for no limit."""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Wait for the server's response, as psycopg does.

        If no response arrives in time, close the connection and raise `psycopg.OperationalError`.
        """
        started = time.monotonic()
        try:
            return super().wait(gen, interval, timeout or self.patience)
        except psycopg.OperationalError as error:
            if timeout or not _fell_silent(self, started):
                raise
            raise _given_up(self) from error


class BoundedAsyncConnection(psycopg.AsyncConnection[Any]):
    """The asynchronous counterpart of `BoundedConnection`."""

    patience: float | None = None

    async def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:  # noqa: ASYNC109 - psycopg's own
        """Wait for the server's response, as psycopg does.

        If no response arrives in time, close the connection and raise `psycopg.OperationalError`.
        """
        started = time.monotonic()
        try:
            return await super().wait(gen, interval, timeout or self.patience)
        except psycopg.OperationalError as error:
            if timeout or not _fell_silent(self, started):
                raise
            raise _given_up(self) from error


Bounded = BoundedConnection | BoundedAsyncConnection


def _fell_silent(connection: Bounded, since: float) -> bool:
    """Return whether an exchange failed because the database server did not respond.

    ``since`` is the time at which the exchange began, in monotonic seconds.
    """
    patience = connection.patience
    return patience is not None and time.monotonic() - since >= patience and not connection.closed


def _given_up(connection: Bounded) -> psycopg.OperationalError:
    connection.pgconn.finish()
    return psycopg.OperationalError(
        f"the server was silent for {connection.patience:g} s, so the connection was closed"
    )


def make_engine(
    database_url: str,
    *,
    pool_size: int = 5,
    application_name: str = "followups",
    options: Mapping[str, str] | None = None,
    statement_timeout: timedelta | None = STATEMENT_TIMEOUT,
) -> Engine:
    """Return an engine for ``database_url`` (``postgresql://...``); it connects on first use.

    The engine's sessions use the settings in `SESSION` and the given ``options``. The pool tests each connection before
    use. After a server restart, the engine therefore reconnects, and no request fails. A connection is closed if its
    server does not respond within ``statement_timeout`` plus a margin. Migrations pass None as ``statement_timeout``,
    so that their statements have no time limit.
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
                pooler.check(session, connect_timeout(url), arguments, named)
            connection.autocommit = False
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        connection.patience = patience
        return connection

    event.listen(engine, "do_connect", connect)
    event.listen(engine, "connect", _note_time)
    _replace_dropped(engine)
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
    """Return an asynchronous engine, similar to that of `make_engine`, for one event loop.

    Transactions of this engine run in `followups.transactions.in_loop`. Testing a connection costs a round trip, so
    only connections that were idle for `RECENTLY` are tested.
    """
    url = parse(database_url)
    arguments = _arguments(url, pool_size, application_name)
    # The pool does not reset connections: the `with` block has already rolled back uncommitted changes.
    engine = create_async_engine(url, **arguments | {"pool_pre_ping": False, "pool_reset_on_return": None})
    _replace_dropped(engine.sync_engine)
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
                await asyncio.to_thread(pooler.check, session, connect_timeout(url), arguments, named)
            await connection.set_autocommit(False)
            await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
        connection.patience = patience
        return connection

    def choose(_dialect: object, _record: object, _arguments: object, named: dict[str, Any]) -> None:
        named["async_creator_fn"] = connect

    event.listen(engine.sync_engine, "do_connect", choose)
    event.listen(engine.sync_engine, "connect", _note_time)
    event.listen(engine.sync_engine, "handle_error", _drop_read_only)
    return engine


# A setting that this version of PostgreSQL does not have is skipped.
_SET_UP = """
    SELECT current_setting('server_encoding'), pg_backend_pid(), set_config(name, value, false)
      FROM unnest(%(names)s::text[], %(values)s::text[]) AS session (name, value)
     WHERE current_setting(name, true) IS NOT NULL
"""


def _session(options: Mapping[str, str] | None, statement_timeout: timedelta | None) -> dict[str, list[str]]:
    """Return the parameters of `_SET_UP`."""
    limit = str(statement_timeout // MILLISECOND if statement_timeout else 0)
    # If a process is suspended during a transaction, the idle timeout releases its row locks.
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
    """Raise `UnfitDatabaseError` for a database whose encoding cannot represent every text."""
    if row and row[0] != ENCODING:
        message = f"its encoding is {row[0]}, which cannot store every text: {MAKE_ANOTHER}"
        raise UnfitDatabaseError(message)


class _Pooler:
    """Checks once per engine whether a pooler gives each transaction a different session.

    Behind a pooler in transaction mode, sessions lose prepared statements, locks, and the settings of `_SET_UP`.
    """

    def __init__(self) -> None:
        """Create the object without checking for a pooler yet."""
        self._checked = False

    def is_before(self, connection: Bounded, row: Sequence[Any] | None) -> bool:
        """Return whether there may be a pooler in front of the server.

        Behind a pooler, the reported process id is not that of the server session.
        """
        return not self._checked and row is not None and row[1] != connection.info.backend_pid

    def check(
        self, session: Mapping[str, Any], patience: float, arguments: Sequence[Any], named: Mapping[str, Any]
    ) -> None:
        """Raise `UnfitDatabaseError` if two connections share a session, or if a connection changes sessions.

        Before the check, settings are changed on both connections. RDS Proxy pins a connection to a session only after
        a setting has been changed.
        """
        try:
            with (
                BoundedConnection.connect(*arguments, **{**named, "autocommit": True}) as one,
                BoundedConnection.connect(*arguments, **{**named, "autocommit": True}) as other,
            ):
                one.patience = other.patience = patience
                for each in (one, other):
                    each.execute(_SET_UP, session)
                pids = [each.execute("SELECT pg_backend_pid()").fetchone() for each in (one, other) * POOLER_ROUNDS]
        except psycopg.OperationalError:
            # no second check: if a pooler in session mode is full, every new connection has to wait
            self._checked = True
            return
        if pids[0] == pids[1] or pids != pids[:2] * POOLER_ROUNDS:
            raise UnfitDatabaseError(CHANGES_SESSIONS)
        self._checked = True


def _drop_read_only(context: ExceptionContext) -> None:
    """Close a read-only session and all older connections of its pool."""
    if getattr(context.original_exception, "sqlstate", None) == READ_ONLY:
        context.is_disconnect = True


def _note_time(_connection: object, record: ConnectionPoolEntry) -> None:
    record.info[_MADE] = time.monotonic()


def is_read_committed(connection: Connection) -> bool:
    """Return whether the connection still has the isolation level READ COMMITTED.

    For a connection that no engine of this module opened, the result is False.
    """
    driver = connection.connection.driver_connection
    if _MADE not in connection.info or driver is None or driver.autocommit:
        return False
    return driver.isolation_level in {None, psycopg.IsolationLevel.READ_COMMITTED}


_dropped_at: WeakKeyDictionary[Engine, float] = WeakKeyDictionary()


def drop_all(engine: Engine) -> None:
    """Make the engine replace each open connection at its next checkout.

    Call this function if the database server is unreachable or read-only. By itself, SQLAlchemy replaces connections
    only after an error that it raised.
    """
    _dropped_at[engine] = time.monotonic()


def _replace_dropped(engine: Engine) -> None:
    def check(_connection: object, record: ConnectionPoolEntry, _proxy: object) -> None:
        if record.info[_MADE] <= _dropped_at.get(engine, -math.inf):
            raise InvalidatePoolError

    event.listen(engine, "checkout", check)


def _test_what_lay_idle(engine: Engine) -> None:
    def note(_connection: object, record: ConnectionPoolEntry) -> None:
        record.info["used"] = time.monotonic()

    def test(connection: DBAPIConnection, record: ConnectionPoolEntry, _proxy: object) -> None:
        if time.monotonic() - record.info.get("used", math.inf) > RECENTLY:
            try:
                engine.dialect.do_ping(connection)
            except psycopg.OperationalError as error:
                raise InvalidatePoolError from error  # the pool reconnects all of its connections

    event.listen(engine, "checkin", note)
    event.listen(engine, "checkout", test)


def _arguments(url: URL, pool_size: int, application_name: str) -> dict[str, Any]:
    defaults = {name: value for name, value in CONNECTION.items() if name not in url.query}
    return {
        "pool_size": pool_size,
        # SQLAlchemy would open an overflow connection for one transaction and then close it. Opening an overflow
        # connection costs more than waiting for a pooled connection.
        "max_overflow": 0,
        "pool_pre_ping": True,
        # A caller waits this many seconds for a free connection, and then gets an error.
        "pool_timeout": connect_timeout(url) + POOL_MARGIN,
        # Statement parameters contain message texts, which must never appear in an error or a log.
        "hide_parameters": True,
        "connect_args": {**defaults, "application_name": application_name},
    }


def connect_timeout(url: URL) -> float:
    """Return the connect timeout in seconds."""
    try:
        seconds = float(str(url.query.get("connect_timeout", CONNECT_TIMEOUT)))
    except ValueError:
        return CONNECT_TIMEOUT  # psycopg itself rejects an invalid value
    return seconds if seconds > 0 else NO_CONNECT_TIMEOUT


def _patience(statement_timeout: timedelta | None) -> float | None:
    if statement_timeout is None:
        return None
    return (statement_timeout + min(SILENCE_MARGIN, statement_timeout)).total_seconds()


def make_sessions(engine: Engine) -> sessionmaker[Session]:
    """Return a session factory. Objects loaded by these sessions stay readable after the commit."""
    return sessionmaker(engine, expire_on_commit=False)
