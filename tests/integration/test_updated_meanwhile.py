"""Tests of rows that another transaction updates between the snapshot and the row lock of begin or settle."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import text

from followups.statements import Statement
from followups.store import leases, settlement
from followups.transports.port import Rejected, Sent
from stack import wait_until
from steps import attempt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

    from followups.transports.port import Outcome
    from steps import Steps
    from world import World

WAITING = """
    SELECT count(*) FROM pg_stat_activity
     WHERE datname = current_database() AND wait_event_type = 'Lock' AND wait_event = 'advisory'
"""


def waiting(sql: str) -> str:
    """Return the statement with a wait between its snapshot and its row locks."""
    batch = r"AS b\(id, token[^)]*\)"
    assert len(re.findall(batch, sql)) == 1
    return re.sub(batch, r"\g<0> CROSS JOIN LATERAL (SELECT pg_advisory_xact_lock_shared(1), b.id OFFSET 0) AS w", sql)


@pytest.fixture(autouse=True)
def all_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make begin and settle wait while a test holds the advisory lock."""
    for module, name in ((leases, "_BEGIN"), (settlement, "_SETTLE_SENT")):
        monkeypatch.setattr(module, name, Statement(waiting(getattr(module, name)._sql)))  # noqa: SLF001 - not public
    monkeypatch.setattr(settlement, "_SETTLE", text(waiting(settlement._SETTLE.text)))  # noqa: SLF001 - not public


@contextmanager
def updated_meanwhile(world: World, engine: Engine, change: str) -> Iterator[ThreadPoolExecutor]:
    """Apply ``change`` to all follow-ups while the statement that the block has submitted waits."""
    with ThreadPoolExecutor(1) as pool, engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(1)"))
        connection.commit()
        yield pool
        wait_until(lambda: world.scalar(WAITING))
        world.sql(f"UPDATE follow_ups SET {change}")  # noqa: S608 - only constants of this file
        connection.execute(text("SELECT pg_advisory_unlock(1)"))


def test_begin(world: World, engine: Engine, steps: Steps) -> None:
    """The first begin leaves the follow-up leased, and the second one begins it."""
    world.follow_up()
    lease = steps.lease()
    with updated_meanwhile(world, engine, "message = 'Changed'") as pool:
        first = pool.submit(steps.begin, [lease])
    assert (first.result().begun, first.result().retry_later) == ((), (lease,))
    (begun,) = steps.begin([lease]).begun
    assert begun.delivery.message == "Changed"


def test_begin_after_a_cancel(world: World, engine: Engine, steps: Steps) -> None:
    """A follow-up that is cancelled between begin's snapshot and its row lock never begins."""
    world.follow_up()
    lease = steps.lease()
    cancel = "status = 'cancelled', reason = 'asked', finished_at = now(), lease_until = NULL"
    with updated_meanwhile(world, engine, cancel) as pool:
        first = pool.submit(steps.begin, [lease])
    assert (first.result().begun, steps.begin([lease]).begun) == ((), ())


@pytest.mark.parametrize(
    ("outcome", "end"),
    [(Sent(uuid4(), 200), ("sent", None)), (Rejected("HTTP 400", 400), ("cancelled", "user_replied"))],
)
def test_settle(world: World, engine: Engine, steps: Steps, outcome: Outcome, end: tuple[str, str | None]) -> None:
    """The outcome is not stale, and the next settle records it. A cancel overrides only a failure."""
    follow_up = world.follow_up()
    made = attempt(steps.begun(), outcome)
    with updated_meanwhile(world, engine, "cancel_requested = 'user_replied'") as pool:
        first = pool.submit(steps.settle, [made])
    assert (first.result().settled, first.result().stale) == ((), 0)
    assert first.result().retry_later == (made.begun.lease,)
    assert world.failures(follow_up) == []
    (settled,) = steps.settle([made]).settled
    assert (settled.status, settled.reason) == end
    assert len(world.failures(follow_up)) == (end[0] != "sent")
