"""Tests of database access in an event loop through the driver: sessions, errors, transactions."""

from __future__ import annotations

import asyncio
import re
from contextlib import ExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from sqlalchemy.exc import DataError, OperationalError

from followups import event_loop
from followups.database import make_async_engine
from followups.database_errors import is_passing, is_read_only
from followups.event_loop import Database
from followups.session_settings import SESSION
from followups.statements import Statement
from followups.store import sending_hours
from followups.transactions import in_loop
from foreign import HOSTILE, read_only, refused_once, set_defaults, url_for_any_server
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy import Engine

    from followups.statements import Steps
    from world import World

SESSIONS = 3
NAMES = Statement("""
    SELECT name, current_setting(name, true) AS value FROM unnest(CAST(:names AS text[])) AS wanted (name)
""")
ONE = Statement("SELECT 1")
FAIL = Statement("UPDATE workspaces SET name = (1 / 0)::text")
RENAME = Statement("UPDATE workspaces SET name = name || :more RETURNING name")


@asynccontextmanager
async def database(url: str, size: int = SESSIONS, limit: float = 10) -> AsyncIterator[Database]:
    """Open a database engine for this event loop, and close it at the end."""
    made = Database(url, pool_size=size, application_name="tests", statement_timeout=timedelta(seconds=limit))
    yield made
    await made.close()


async def fetch(of: Database, statement: Statement, **parameters: Any) -> Any:
    """Execute a statement in a separate transaction and return its rows."""

    def steps() -> Steps[Any]:
        return (yield statement(**parameters))

    async with of.transaction() as connection:
        return await event_loop.run(connection, steps())


async def fail_after_rename(of: Database) -> None:
    """Rename a row in a transaction and then raise an error."""
    async with of.transaction() as connection:
        await event_loop.rows_of(connection, RENAME.driver_sql, {"more": "-"})
        raise RuntimeError


async def fill(of: Database) -> None:
    """Open all sessions that the pool allows, and use each of them once."""
    together = asyncio.Barrier(SESSIONS)

    async def use() -> None:
        async with of.reading() as connection:
            await together.wait()
            await event_loop.rows_of(connection, "SELECT 1", {})

    await asyncio.gather(*(use() for _ in range(SESSIONS)))


async def test_settings(database_url: str) -> None:
    """Sessions of the event loop use the project's settings, not the server's defaults."""
    set_defaults(database_url, HOSTILE)
    async with database(database_url) as mine:
        rows = await fetch(mine, NAMES, names=[*SESSION, "transaction_isolation", "statement_timeout"])
    found = {row.name: row.value for row in rows if row.value is not None}
    own = {"transaction_isolation": "read committed", "statement_timeout": "10s"}
    assert found == own | {name: value for name, value in SESSION.items() if name in found}


async def test_transactions(world: World, database_url: str) -> None:
    """A transaction commits at the end of its block, and rolls back after an error.

    After a commit or a rollback, the connection can be used for another transaction.
    """
    name = world.scalar("SELECT name FROM workspaces")
    async with database(database_url, size=1) as mine:
        await fetch(mine, RENAME, more="+")
        with pytest.raises(RuntimeError):
            await fail_after_rename(mine)
        with pytest.raises(psycopg.errors.DivisionByZero):
            await fetch(mine, Statement("SELECT 1 / 0"))
        assert [row.name for row in await fetch(mine, Statement("SELECT name FROM workspaces"))] == [f"{name}+"]


async def test_each_statement_of_a_reader_is_a_transaction(database_url: str) -> None:
    """A read-only connection leaves no transaction open."""
    async with database(database_url, size=1) as mine:
        async with mine.reading() as connection:
            await event_loop.rows_of(connection, "SELECT 1", {})
            assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        async with mine.transaction() as connection:
            await event_loop.rows_of(connection, "SELECT 1", {})
            assert connection.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS


async def test_cancelled_in_a_statement(world: World, database_url: str) -> None:
    """If a task is cancelled during a statement, its connection is dropped and the next task gets a new one."""
    async with database(database_url, size=1) as mine:
        task = asyncio.create_task(fetch(mine, Statement("SELECT pg_sleep(60)")))
        sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'"
        await asyncio.to_thread(wait_until, lambda: world.scalar(sleeping))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await fetch(mine, Statement("SELECT 1 AS one"))


async def test_sessions_on_a_read_only_server_are_dropped(world: World, database_url: str) -> None:
    """If a write is rejected as read-only, all sessions of the pool are dropped, and later writes succeed."""
    assert world
    async with database(url_for_any_server(database_url)) as mine:
        with read_only(database_url):
            await fill(mine)
        with pytest.raises(psycopg.Error) as refused:
            await fetch(mine, RENAME, more="+")
        assert is_read_only(refused.value)
        assert is_passing(refused.value)
        for _ in range(SESSIONS):
            await fetch(mine, RENAME, more="+")


async def test_lost_sessions_are_dropped_together(world: World, database_url: str) -> None:
    """If the server closes all connections, the pool replaces all of them after the first error."""
    async with database(database_url) as mine:
        await fill(mine)
        world.scalar("""
            SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name = 'tests'
        """)
        with pytest.raises(psycopg.OperationalError) as lost:
            await fetch(mine, RENAME, more="+")
        assert is_passing(lost.value)
        for _ in range(SESSIONS):
            await fetch(mine, RENAME, more="+")


def written(engine: Engine, statement: Statement, **parameters: Any) -> list[tuple[Any, ...]]:
    """Execute a statement in a SQLAlchemy transaction and return its rows.

    If possible, the driver itself executes the statement.
    """
    with engine.begin() as connection:
        return [tuple(row) for row in event_loop.driver_rows(connection, statement, parameters)]


def open_sessions(engine: Engine) -> None:
    """Open all sessions that the pool allows, and use each of them once."""
    with ExitStack() as stack:
        for connection in [stack.enter_context(engine.connect()) for _ in range(SESSIONS)]:
            event_loop.driver_rows(connection, ONE, {})


async def test_in_a_greenlet(world: World, engine: Engine, database_url: str) -> None:
    """The driver and SQLAlchemy return the same rows and errors, and commit and roll back alike."""
    in_a_loop = make_async_engine(database_url, pool_size=1)
    name = world.scalar("SELECT name FROM workspaces")
    assert written(engine, RENAME, more="+") == [(f"{name}+",)]
    assert await in_loop(in_a_loop, partial(written, statement=RENAME, more="-")) == [(f"{name}+-",)]
    with pytest.raises(DataError) as refused:
        written(engine, FAIL)
    with pytest.raises(DataError, match=re.escape(str(refused.value.orig))):
        await in_loop(in_a_loop, partial(written, statement=FAIL))
    assert await in_loop(in_a_loop, partial(written, statement=RENAME, more="*")) == [(f"{name}+-*",)]
    await in_a_loop.dispose()


async def test_in_a_greenlet_lost_sessions_are_dropped_together(world: World, database_url: str) -> None:
    """After the first lost connection or rejected write, the pool replaces all its connections."""
    in_a_loop = make_async_engine(url_for_any_server(database_url), pool_size=SESSIONS, application_name="lost")
    write = partial(written, statement=RENAME, more="+")
    await in_loop(in_a_loop, open_sessions)
    world.scalar("""
        SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
         WHERE datname = current_database() AND application_name = 'lost'
    """)
    lost = await refused_once(in_a_loop, write, SESSIONS)
    assert isinstance(lost, OperationalError)
    assert is_passing(lost)
    await in_a_loop.dispose()
    with read_only(database_url):
        await in_loop(in_a_loop, open_sessions)
    assert is_read_only(await refused_once(in_a_loop, write, SESSIONS))
    await in_a_loop.dispose()


async def test_unreachable() -> None:
    """An unreachable server is reported immediately."""
    async with database("postgresql://nobody@127.0.0.1:9/nothing") as mine:
        with pytest.raises(psycopg.OperationalError) as unreachable:
            await fetch(mine, Statement("SELECT 1"))
        assert is_passing(unreachable.value)


async def test_a_query_without_rows(world: World, database_url: str) -> None:
    """If no sending hours are set, the asynchronous query for them returns None."""
    async with database(database_url) as mine, mine.reading() as connection:
        assert await event_loop.run(connection, sending_hours.find.steps(world.workspace_id)) is None
