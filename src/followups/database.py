"""The engine and its sessions."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    InvalidatePoolError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from psycopg.abc import PQGen
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry

T = TypeVar("T")

MILLISECOND = timedelta(milliseconds=1)
CONNECT_TIMEOUT = 5
"""Seconds until an unreachable server is reported."""
STATEMENT_TIMEOUT = timedelta(seconds=30)
"""After which the server ends a statement; every one of ours takes milliseconds."""
SILENCE_MARGIN = timedelta(seconds=5)
"""How much longer than that a server may be silent until the connection is given up: it is half-open, or the
server hangs, and its own timeout will never be heard of."""
TCP_USER_TIMEOUT = 10_000
"""Milliseconds without an acknowledgement after which a half-open connection is given up."""

RECENTLY = 1.0
"""Seconds during which a connection that has just been used needs no test."""

BY_KEY = " -c jit=off" + "".join(
    f" -c enable_{method}=off" for method in ("seqscan", "bitmapscan", "hashjoin", "mergejoin")
)
"""Planner options for workers: every statement of theirs looks up a batch by key or walks an index, and must
go on doing so when a burst of inserts has made the table's statistics wrong. Measured right after an insert
of 20,000 rows: begin takes 17 ms a hundred without, 4 ms with. Nothing is compiled for them either: that would take
longer than they do."""

ONCE_PLANNED = f"{BY_KEY} -c plan_cache_mode=force_generic_plan"
"""The same for the pipeline, whose statements go by key whatever is in their batch. PostgreSQL would plan anew for each
batch of less than ten: begin takes 1.1 ms then, and 0.5 by the plan that it has. A claim may have another plan for each
of its limits."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that does not wait for ever for a server that has fallen silent.

    libpq has no limit of its own, and TCP sees nothing wrong where a machine in between goes on acknowledging.
    """

    patience: float | None = None
    """Seconds that one exchange may take, with however many rows it is made; None: as long as it takes."""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Wait for an answer as psycopg does; raise `psycopg.OperationalError`, and close, when none comes."""
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
        """Wait for an answer as psycopg does; raise `psycopg.OperationalError`, and close, when none comes."""
        started = time.monotonic()
        try:
            return await super().wait(gen, interval, timeout or self.patience)
        except psycopg.OperationalError as error:
            if timeout or not _fell_silent(self, started):
                raise
            raise _given_up(self) from error


Bounded = BoundedConnection | BoundedAsyncConnection


def _fell_silent(connection: Bounded, since: float) -> bool:
    """Say whether an exchange that began then (monotonic seconds) failed since nothing came for so long."""
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
    options: str = "",
    statement_timeout: timedelta | None = STATEMENT_TIMEOUT,
) -> Engine:
    """Return an engine for ``database_url`` (``postgresql://...``), which connects when first used.

    A connection is tested when it is taken from the pool, so that a restarted server costs one
    reconnect and no failed request. One that is silent for ``statement_timeout`` and a margin is given up;
    with None, for migrations, a statement may take as long as it takes.
    """
    url = _url(database_url)
    engine = create_engine(url, **_arguments(url, pool_size, application_name, options, statement_timeout))
    patience = _patience(statement_timeout)

    def connect(_dialect: object, _record: object, arguments: Sequence[Any], named: Mapping[str, Any]) -> object:
        connection = BoundedConnection.connect(*arguments, **named)
        connection.patience = patience
        return connection

    event.listen(engine, "do_connect", connect)
    return engine


def make_async_engine(
    database_url: str,
    *,
    pool_size: int = 5,
    application_name: str = "followups",
    options: str = "",
    statement_timeout: timedelta = STATEMENT_TIMEOUT,
) -> AsyncEngine:
    """Return the same for one event loop, whose work runs by `followups.transactions.in_loop`.

    It tests only a connection that nobody used for `RECENTLY`: callers come many times a second, and a test takes
    as long as a statement.
    """
    url = _url(database_url)
    arguments = _arguments(url, pool_size, application_name, options, statement_timeout)
    # No reset either: a connection comes back by the end of a `with`, which has rolled back what was not committed.
    engine = create_async_engine(url, **arguments | {"pool_pre_ping": False, "pool_reset_on_return": None})
    _test_what_lay_idle(engine.sync_engine)
    patience = _patience(statement_timeout)

    async def connect(*arguments: Any, **named: Any) -> BoundedAsyncConnection:  # noqa: ANN401 - psycopg's own
        connection = await BoundedAsyncConnection.connect(*arguments, **named)
        connection.patience = patience
        return connection

    def choose(_dialect: object, _record: object, _arguments: object, named: dict[str, Any]) -> None:
        named["async_creator_fn"] = connect

    event.listen(engine.sync_engine, "do_connect", choose)
    return engine


def _test_what_lay_idle(engine: Engine) -> None:
    def note(_connection: object, record: ConnectionPoolEntry) -> None:
        record.info["used"] = time.monotonic()

    def test(connection: DBAPIConnection, record: ConnectionPoolEntry, _proxy: object) -> None:
        if time.monotonic() - record.info.get("used", math.inf) > RECENTLY:
            try:
                engine.dialect.do_ping(connection)
            except psycopg.OperationalError as error:
                raise InvalidatePoolError from error  # all of them are made anew

    event.listen(engine, "checkin", note)
    event.listen(engine, "checkout", test)


def _url(database_url: str) -> URL:
    return make_url(database_url).set(drivername="postgresql+psycopg")


def _arguments(
    url: URL, pool_size: int, application_name: str, options: str, statement_timeout: timedelta | None
) -> dict[str, Any]:
    theirs = url.query.get("options", "")
    limit = statement_timeout // MILLISECOND if statement_timeout else 0
    return {
        "pool_size": pool_size,
        # A connection beyond the pool would be made for one transaction and closed after it, which costs
        # more than to wait for one.
        "max_overflow": 0,
        "pool_pre_ping": True,
        # A caller waits this many seconds for a connection, and is then told so.
        "pool_timeout": 10,
        # Statement parameters hold message texts: they must never stand in an error or a log.
        "hide_parameters": True,
        "connect_args": {
            "application_name": application_name,
            "connect_timeout": CONNECT_TIMEOUT,
            # A process that is frozen in the middle of a transaction must not hold its row locks for longer either.
            # What the URL asks for (a search_path) comes first.
            "options": f"{theirs} -c statement_timeout={limit} -c idle_in_transaction_session_timeout={limit}"
            f" -c timezone=UTC{options}",
            "keepalives_idle": 10,
            "keepalives_interval": 3,
            "keepalives_count": 3,
            "tcp_user_timeout": TCP_USER_TIMEOUT,
        },
    }


def _patience(statement_timeout: timedelta | None) -> float | None:
    if statement_timeout is None:
        return None
    return (statement_timeout + min(SILENCE_MARGIN, statement_timeout)).total_seconds()


PASSING_CLASSES = frozenset({"08", "25", "40", "53", "55", "57", "58"})
"""Classes of SQLSTATE that pass by themselves (PostgreSQL, appendix A): connection, a read-only server in the
middle of a failover, deadlock, out of resources, object in use, operator intervention, system error."""


def is_passing(error: Exception) -> bool:
    """Say whether trying the same again may help: the database was away, busy, or broke a deadlock."""
    if isinstance(error, PoolTimeoutError | OperationalError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    return error.connection_invalidated or str(getattr(error.orig, "sqlstate", None))[:2] in PASSING_CLASSES


ROW_STATES = frozenset({"P0001", "XX001", "XX002"})
"""SQLSTATE of what one row may cause besides bad data and broken constraints: a trigger's refusal, a damaged page."""


def concerns_a_row(error: Exception) -> bool:
    """Return whether the content of one row may be the cause, so that the same without that row would succeed."""
    if isinstance(error, DataError | IntegrityError):
        return True
    if isinstance(error, DBAPIError):
        return str(getattr(error.orig, "sqlstate", None)) in ROW_STATES
    return not isinstance(error, SQLAlchemyError)


def make_sessions(engine: Engine) -> sessionmaker[Session]:
    """Return a factory of sessions whose objects stay readable after the commit."""
    return sessionmaker(engine, expire_on_commit=False)
