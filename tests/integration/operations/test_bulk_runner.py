"""Tests of the console's bulk actions, batch by batch, and of the follow-ups that they skip."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from followups.delivery import events
from followups.operations import bulk_runner
from followups.operations.bulk_runner import BatchError, BulkRunner, run_batch
from followups.states import Status
from followups.store import bulk_actions as rows
from followups.store import quotas
from followups.store.browse import BrowseFilter
from followups.store.quotas import Kind
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Engine

    from world import World

HOUR = timedelta(hours=1)


def action(world: World, kind: str, ids: Sequence[UUID]) -> UUID:
    """Insert a bulk action for the given follow-ups."""
    status = Status.PENDING if kind == "cancel" else Status.FAILED
    new = uuid4()
    with Session(world.engine) as session, session.begin():
        wanted = BrowseFilter(world.workspace_id, (status,), ids=tuple(ids))
        rows.create(
            session,
            id=new,
            workspace_id=world.workspace_id,
            kind=kind,
            chosen=wanted.document(),
            created_by="agent",
            expected=len(ids),
        )
    return new


def failed(world: World, chat_id: UUID | None = None) -> UUID:
    """Insert a failed follow-up."""
    return world.follow_up(chat_id, -HOUR, status="failed", reason="rejected", finished_at=text("now()"))


def unwritable(world: World, follow_up_id: UUID, column: str = "id") -> None:
    """Add a constraint that rejects every write of the follow-up or of its retry."""
    world.alter(f"ALTER TABLE follow_ups ADD CHECK ({column} IS DISTINCT FROM '{follow_up_id}') NOT VALID")


def limit(world: World, most: int) -> None:
    """Set the workspace's quota of pending follow-ups."""
    with world.engine.begin() as connection:
        quotas.put(connection, world.workspace_id, Kind.PENDING, most)


def state(world: World, action_id: UUID) -> tuple[Any, ...]:
    """Return the numbers of done and skipped follow-ups, and whether the action has finished."""
    query = f"SELECT row_to_json(b) FROM bulk_actions b WHERE id = '{action_id}'"  # noqa: S608 - the test's own id
    row = world.scalar(query)
    return row["done"], row["passed_over"], row["finished_at"] is not None


def test_a_retry_over_the_quota_is_skipped(world: World) -> None:
    """A bulk retry in the console skips and counts the follow-ups over the quota.

    The runner then performs the next bulk action.
    """
    limit(world, 2)
    one = action(world, "retry", [failed(world) for _ in range(5)])
    assert run_batch(world.engine)
    assert state(world, one) == (2, {"quota exceeded": 3}, True)
    assert not run_batch(world.engine)


def test_a_pruned_follow_up_is_skipped(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a follow-up is already pruned, a bulk action counts it as skipped."""
    gone, kept = failed(world), failed(world)
    real = bulk_runner.scheduling.retry_once
    monkeypatch.setattr(
        bulk_runner.scheduling, "retry_once", lambda session, each: real(session, uuid4() if each == gone else each)
    )
    one = action(world, "retry", [gone, kept])
    assert run_batch(world.engine)
    assert state(world, one) == (1, {"not found": 1}, True)


@pytest.mark.parametrize("kind", ["cancel", "retry"])
def test_an_unwritable_row_is_skipped(world: World, kind: str) -> None:
    """A row that cannot be written is skipped; the rest of its batch is processed."""
    ids = [world.follow_up(due=HOUR) if kind == "cancel" else failed(world) for _ in range(5)]
    unwritable(world, ids[2], "id" if kind == "cancel" else "retry_of")
    one = action(world, kind, ids)
    assert run_batch(world.engine)
    assert state(world, one) == (4, {"cannot be written": 1}, True)


def test_prevented_retries_are_audited(world: World) -> None:
    """A bulk cancel's audit event includes the number of prevented retries.

    Bulk cancels from the console and from the command line leave the same kind of event.
    """
    ids = [world.follow_up() for _ in range(2)]
    for each in ids:
        world.put_in_flight(each)
    one = action(world, "cancel", ids)
    assert run_batch(world.engine)
    assert state(world, one) == (0, {"in flight": 2}, True)
    assert world.scalar("SELECT sum(number) FROM audit_events WHERE action = 'follow_ups.cancelled'") == 2


def test_an_action_that_fails_blocks_no_other(world: World, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bulk action that fails is postponed and retried later, without blocking other bulk actions.

    A worker that runs a failing bulk action still counts as healthy.
    """
    monkeypatch.setattr(bulk_runner, "SEEN_EVERY", 0)
    bad, good = action(world, "cancel", []), action(world, "cancel", [world.follow_up(due=HOUR)])
    world.sql('UPDATE bulk_actions SET chosen = \'{"statuses": ["nonsense"]}\' WHERE id = :id', id=bad)
    with pytest.raises(BatchError):
        run_batch(engine)
    runner = BulkRunner(engine, lambda: None)
    runner.start()
    wait_until(lambda: state(world, good)[2])
    runner.stop()
    assert not state(world, bad)[2]
    assert events.outage() is None

    monkeypatch.setattr(bulk_runner, "PASSED_OVER", 0)
    world.sql("UPDATE bulk_actions SET chosen = '{}' WHERE id = :id", id=bad)
    later = BulkRunner(engine, lambda: None)
    later.start()
    wait_until(lambda: state(world, bad)[2])
    later.stop()


def test_a_retry_locks_its_chats_before_the_quota(world: World, engine: Engine) -> None:
    """A bulk retry locks the chats of its follow-ups before it locks the quota.

    While a bulk retry waits for a chat's lock, it must not hold the quota's lock. The transaction that locks the chat
    may be waiting for the quota's lock.
    """
    limit(world, 10)
    first, second = sorted([world.chat(), world.chat()])
    one = action(world, "retry", [failed(world, first), failed(world, second)])
    with engine.begin() as connection:
        connection.execute(text("SELECT FROM chats WHERE id = :id FOR NO KEY UPDATE"), {"id": second})
        own = connection.scalar(text("SELECT pg_backend_pid()"))
        batch = threading.Thread(target=run_batch, args=(engine,))
        batch.start()
        blocked = f"SELECT count(*) FROM pg_stat_activity WHERE {own} = ANY(pg_blocking_pids(pid))"  # noqa: S608 - the test's own id
        wait_until(lambda: world.scalar(blocked) == 1)
        connection.execute(text("SELECT FROM quotas FOR NO KEY UPDATE NOWAIT"))
    batch.join()
    assert state(world, one) == (2, {}, True)
