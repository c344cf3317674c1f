"""Tests that the outcome of a transaction is known even if the commit's response is lost."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

import psycopg
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError, OperationalError

from commits import break_once
from followups import database, transactions
from followups.database import BoundedConnection, make_async_engine
from followups.transactions import ask_if_lost, in_loop, transact

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from world import World


def insert_workspace(connection: Connection) -> str:
    """Insert a workspace and return its name."""
    name = "acme"
    connection.execute(text("INSERT INTO workspaces (id, name) VALUES (gen_random_uuid(), :name)"), {"name": name})
    ask_if_lost(connection, lambda asked: asked.scalar(text("SELECT count(*) > 0 FROM workspaces WHERE name = 'acme'")))
    return name


def test_answer_lost_after_the_commit(world: World, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a commit succeeded but its answer was lost, the transaction counts as done."""
    break_once(monkeypatch, psycopg.Connection.commit)
    assert transact(engine, insert_workspace) == "acme"
    assert world.scalar("SELECT count(*) FROM workspaces WHERE name = 'acme'") == 1


def test_connection_lost_before_the_commit(world: World, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a connection is lost before the commit reaches the server, the transaction has failed."""
    break_once(monkeypatch, lambda _: None)
    with pytest.raises(OperationalError):
        transact(engine, insert_workspace)
    assert world.scalar("SELECT count(*) FROM workspaces WHERE name = 'acme'") == 0


def test_no_written_row_to_check(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a commit fails and no row was written, an error is raised, because the outcome cannot be checked."""
    break_once(monkeypatch, psycopg.Connection.commit)
    with pytest.raises(OperationalError):
        transact(engine, lambda connection: connection.scalar(text("SELECT 1")))


def test_no_extra_round_trip(engine: Engine) -> None:
    """If a commit is answered, no further statement checks its outcome."""
    said: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: said.append(arguments[2]))
    transact(engine, insert_workspace)
    assert len(said) == 1


def test_the_commit_check_of_a_failed_transaction_is_dropped(
    world: World, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a transaction fails, its commit check is not kept for the connection's next transaction."""

    def ask_and_fail(connection: Connection) -> None:
        ask_if_lost(connection, lambda _: False)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        transact(engine, ask_and_fail)
    break_once(monkeypatch, psycopg.Connection.commit)
    assert transact(engine, insert_workspace) == "acme"
    assert world.scalar("SELECT count(*) FROM workspaces WHERE name = 'acme'") == 1


def test_refused(world: World, engine: Engine) -> None:
    """A database error is raised unchanged, and its transaction is rolled back."""
    insert = text("INSERT INTO workspaces (id, name) VALUES (:id, 'again')")
    with pytest.raises(IntegrityError):
        transact(engine, lambda connection: connection.execute(insert, {"id": world.workspace_id}))
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1


def test_database_stays_unreachable(world: World, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the database stays unreachable, the error is raised after `PATIENCE`."""

    def gone(*_: object, **__: object) -> None:
        message = "no route to host"
        raise psycopg.OperationalError(message)

    assert world
    monkeypatch.setattr(transactions, "PATIENCE", timedelta(seconds=0.3))
    break_once(monkeypatch, lambda _: monkeypatch.setattr(BoundedConnection, "connect", gone))
    engine.dispose()
    started = time.monotonic()
    with pytest.raises(OperationalError, match="the connection broke"):
        transact(engine, insert_workspace)
    assert time.monotonic() - started >= 0.3


def server_process(engine: Engine) -> int:
    """Return the id of the server's process."""
    with engine.connect() as connection:
        return connection.execute(text("SELECT pg_backend_pid()")).scalar_one()


@pytest.mark.parametrize("recently", [0.0, 60.0])
async def test_an_idle_connection_is_tested_first(
    world: World, database_url: str, monkeypatch: pytest.MonkeyPatch, recently: float
) -> None:
    """A broken connection is replaced before use, unless it was used recently; then one statement fails."""
    monkeypatch.setattr(database, "RECENTLY", recently)
    engine = make_async_engine(database_url, pool_size=1)
    first = await in_loop(engine, server_process)
    assert world.scalar(f"SELECT pg_terminate_backend({first}, 5000)")
    if recently:
        with pytest.raises(OperationalError):
            await in_loop(engine, server_process)
    assert await in_loop(engine, server_process) != first
    await engine.dispose()


async def test_a_failed_transaction_is_rolled_back(world: World, database_url: str) -> None:
    """A failed transaction is rolled back before the next one uses its connection."""

    def insert_and_fail(engine: Engine) -> None:
        with engine.connect() as connection:
            insert_workspace(connection)
            raise ZeroDivisionError

    engine = make_async_engine(database_url, pool_size=1)
    with pytest.raises(ZeroDivisionError):
        await in_loop(engine, insert_and_fail)
    assert world.scalar("SELECT count(*) FROM workspaces WHERE name = 'acme'") == 0
    await in_loop(engine, lambda engine: transact(engine, insert_workspace))
    assert world.scalar("SELECT count(*) FROM workspaces WHERE name = 'acme'") == 1
    await engine.dispose()
