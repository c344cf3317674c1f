"""Read-only databases: sessions opened on a read-only server are dropped, and errors name the cause."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError

from followups.database import make_async_engine, make_engine
from followups.database_errors import is_passing, is_read_only
from followups.event_loop import driver_rows
from followups.statements import Statement
from followups.transactions import in_loop
from foreign import read_only, refused_once, url_for_any_server

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from world import World

SESSIONS = 3
WRITE = Statement("UPDATE dispatcher_state SET last_tick_at = now() RETURNING id")


def fill(engine: Engine) -> None:
    """Open all sessions that the pool allows, and use each of them once."""
    with ExitStack() as stack:
        for _ in range(SESSIONS):
            stack.enter_context(engine.connect()).execute(text("SELECT 1"))


def write(engine: Engine) -> None:
    """Update a row."""
    with engine.begin() as connection:
        connection.execute(text(WRITE.driver_sql))


def write_as_a_claim(engine: Engine) -> None:
    """Update a row as a claim does: psycopg executes the statement without SQLAlchemy."""
    with engine.begin() as connection:
        driver_rows(connection, WRITE, {})


@pytest.mark.parametrize("write", [write, write_as_a_claim])
def test_sessions_opened_on_a_read_only_server_are_dropped(
    world: World, database_url: str, write: Callable[[Engine], None]
) -> None:
    """If a write is rejected as read-only, all sessions are dropped; the next write succeeds."""
    assert world
    engine = make_engine(url_for_any_server(database_url), pool_size=SESSIONS)
    with read_only(database_url):
        fill(engine)
    with pytest.raises(DBAPIError) as refused:
        write(engine)
    assert is_read_only(refused.value)
    assert is_passing(refused.value)
    for _ in range(SESSIONS):
        write(engine)
    engine.dispose()


async def test_an_event_loop_drops_its_sessions_too(world: World, database_url: str) -> None:
    """A worker's event loop drops its read-only sessions, even recently used ones."""
    assert world
    engine = make_async_engine(url_for_any_server(database_url), pool_size=SESSIONS)
    with read_only(database_url):
        await in_loop(engine, fill)
    assert is_read_only(await refused_once(engine, write, SESSIONS))
    await engine.dispose()


async def test_no_session_is_opened_on_a_read_only_server(database_url: str) -> None:
    """No session is opened on a read-only server unless the URL permits read-only servers."""
    engine, in_a_loop = make_engine(database_url), make_async_engine(database_url)

    def look(engine: Engine) -> None:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))

    with read_only(database_url):
        with pytest.raises(OperationalError) as refused:
            look(engine)
        with pytest.raises(OperationalError) as refused_in_a_loop:
            await in_loop(in_a_loop, look)
    assert is_read_only(refused.value)
    assert is_read_only(refused_in_a_loop.value)
    look(engine)
    await in_loop(in_a_loop, look)
    engine.dispose()
    await in_a_loop.dispose()


def test_another_failure_is_not_a_read_only_database(engine: Engine) -> None:
    """A failed statement or an unreachable server is not reported as a read-only database."""
    with engine.connect() as connection, pytest.raises(DBAPIError) as refused:
        connection.execute(text("SELECT 1 / 0"))
    assert not is_read_only(refused.value)
    away = make_engine("postgresql://nobody@127.0.0.1:9/nothing")
    with pytest.raises(OperationalError) as unreachable:
        away.connect()
    assert not is_read_only(unreachable.value)
    away.dispose()
