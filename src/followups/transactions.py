"""A transaction whose outcome is known even if the response to its commit is lost.

If a connection breaks during a commit, the transaction's outcome is unknown. If the outcome stays unknown, the process
may own leases without knowing it. The follow-ups of such leases would be delayed until the leases expire. A statement
therefore registers a query (`ask_if_lost`) that checks whether its changes are stored. If the commit's response is
lost, the registered query runs on the server that is then reachable. A promoted standby has either all rows of the
transaction or none. The lost transaction's id would prove nothing, because a new server may use this id again.
"""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple, Unpack

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.util.concurrency import await_only, greenlet_spawn, in_greenlet

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    Question = Callable[[Connection], bool | None]
    """A query that tells whether a statement's changes were committed.

    The query returns None if the statement's transaction may still be running.
    """

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

PATIENCE = timedelta(seconds=15)
"""How long the query is retried if the database is unreachable. A restart takes a few seconds.

If the database stays unreachable, the commit is assumed to have failed. If the commit succeeded after all, its leases
expire unused.
"""

PAUSE = timedelta(milliseconds=100)
"""The pause before the outcome of a commit is checked again."""

_QUESTION = "followups.question"


def transact(engine: Engine, work: Callable[[Connection], T]) -> T:
    """Run the work in one transaction, commit the transaction, and return the work's result.

    Raises any error that the work or the commit raises. If this function returns, the transaction has been committed.
    If this function raises the commit's error, the transaction was not committed. However, the outcome of the commit is
    uncertain if the database was unreachable for `PATIENCE`. The outcome is also uncertain if no query is registered
    and the response to the commit is lost.
    """
    with engine.connect() as connection:
        connection.info.pop(_QUESTION, None)  # left over from an earlier transaction on the same connection
        result = work(connection)
        question: Question | None = connection.info.pop(_QUESTION, None)
        try:
            connection.commit()
        except DBAPIError:
            if question is None or not _was_committed(engine, question):
                raise
    return result


def ask_if_lost(connection: Connection, question: Question) -> None:
    """Register the query that finds out whether the current transaction was committed.

    The query runs only if the response to the commit is lost. One query per transaction is enough, so only the first
    query is kept.
    """
    connection.info.setdefault(_QUESTION, question)


def _was_committed(engine: Engine, question: Question) -> bool:
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() < deadline:
        try:
            with engine.connect() as connection:
                answer = question(connection)
        except (DBAPIError, PoolTimeoutError):
            answer = None
        if answer is not None:
            return answer
        _pause()
    return False


async def in_loop(engine: AsyncEngine, work: Callable[[Engine, Unpack[Ts]], T], *arguments: *Ts) -> T:
    """Run the synchronous function ``work(engine, ...)`` without blocking the event loop.

    This function uses no thread. At each round trip, threads would compete with the event loop for Python's global
    lock. A version with four threads sent only 1,500 follow-ups/s. The event loop spent 39 % of its time waiting for
    Python's global lock.
    """
    return await greenlet_spawn(work, engine.sync_engine, *arguments)


def _pause() -> None:
    if in_greenlet():
        await_only(asyncio.sleep(PAUSE.total_seconds()))
    else:
        time.sleep(PAUSE.total_seconds())
