"""Tests for `followups.schedule_many`, which schedules all follow-ups in one transaction, or none."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

import followups
from followups.errors import (
    ChatNotFoundError,
    InvalidRequestError,
    NothingToFollowUpError,
    OutsideMessagingWindowError,
    SomeRefusedError,
    TooManyPendingError,
    TransactionError,
)
from followups.store import chats
from followups.store.chats import Role
from followups.store.follow_ups import MOST_PENDING
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from followups import FollowUp, Planned
    from world import World

DUE = datetime.now(UTC) + timedelta(days=1)


def schedule_many(world: World, planned: Sequence[Planned]) -> list[FollowUp]:
    """Schedule all given follow-ups in a separate transaction."""
    with Session(world.engine, expire_on_commit=False) as session, session.begin():
        return followups.schedule_many(session, workspace_id=world.workspace_id, planned=planned)


def planned(chat_id: UUID, message: str = "?", due: datetime = DUE) -> Planned:
    """Return a `Planned` follow-up for the chat."""
    return followups.Planned(chat_id, message, due)


def test_rows_in_the_order_given(world: World) -> None:
    """Follow-ups are created in the given order, and several may belong to one chat."""
    one, other = world.chat(), world.chat()
    created = schedule_many(world, [planned(other, "a"), planned(one, "b"), planned(other, "c")])
    assert [(row.message, row.chat_id, row.status) for row in created] == [
        ("a", other, "pending"),
        ("b", one, "pending"),
        ("c", other, "pending"),
    ]
    alone = followups.schedule
    with Session(world.engine) as session, session.begin():
        twin = alone(session, workspace_id=world.workspace_id, chat_id=other, message="a", due_date=DUE)
        mine = world.row(created[0].id)
        assert mine.trigger_chat_message_id == twin.trigger_chat_message_id
        assert (mine.due_date, mine.lease_token, mine.attempts) == (twin.due_date, 0, 0)
    assert schedule_many(world, []) == []


def test_refused_by_index(world: World) -> None:
    """If some follow-ups are rejected, none is created, and the error lists the reasons by index."""
    good, windowed = world.chat(), world.chat()
    world.sql("UPDATE chats SET channel = 'whatsapp' WHERE id = :id", id=windowed)
    replied = world.chat()
    with Session(world.engine) as session, session.begin():
        chats.receive(session, world.workspace_id, message_id=uuid4(), chat_id=replied, role=Role.USER, created_at=None)
    with pytest.raises(SomeRefusedError, match="6 of 8 follow-ups cannot be scheduled") as refused:
        schedule_many(
            world,
            [
                planned(good),
                planned(uuid4()),
                planned(replied),
                planned(windowed),
                planned(good, ""),
                planned(good, "\x00"),
                planned(good, due=datetime(2030, 1, 1)),  # noqa: DTZ001 - a naive datetime is tested
                planned(good),
            ],
        )
    assert {index: type(error) for index, error in refused.value.refused.items()} == {
        1: ChatNotFoundError,
        2: NothingToFollowUpError,
        3: OutsideMessagingWindowError,
        4: InvalidRequestError,
        5: InvalidRequestError,
        6: InvalidRequestError,
    }
    assert "[1] The chat was not found." in str(refused.value)
    assert world.rows() == []


def test_full_chat(world: World) -> None:
    """The chat's limit applies to its existing follow-ups plus those that the call would create."""
    full = world.full_chat()
    with pytest.raises(SomeRefusedError) as refused:
        schedule_many(world, [planned(world.chat()), planned(full)])
    assert {index: type(error) for index, error in refused.value.refused.items()} == {1: TooManyPendingError}
    empty = world.chat()
    with pytest.raises(SomeRefusedError, match="1 of 10,001") as refused:
        schedule_many(world, [planned(empty)] * (MOST_PENDING + 1))
    assert list(refused.value.refused) == [MOST_PENDING]


def test_another_workspaces_chat(world: World) -> None:
    """A chat that belongs to another workspace is reported as not found."""
    from world import World as Another  # noqa: PLC0415 - the name is used by a fixture

    with pytest.raises(SomeRefusedError) as refused:
        schedule_many(world, [planned(Another(world.engine).chat())])
    assert type(refused.value.refused[0]) is ChatNotFoundError


def test_the_number_of_statements_is_constant(world: World) -> None:
    """Scheduling a thousand follow-ups takes under a second and no more statements than scheduling one."""
    targets = [world.chat() for _ in range(20)]
    statements: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(world.engine, "before_cursor_execute", note)
    counts = []
    for number in (1, 1000):
        statements.clear()
        begun = time.perf_counter()
        schedule_many(world, [planned(targets[each % 20]) for each in range(number)])
        counts.append(len(statements))
    event.remove(world.engine, "before_cursor_execute", note)
    assert counts[0] == counts[1] <= 4
    print(f"schedule_many: {1000 / (time.perf_counter() - begun):.0f} follow-ups/s")  # noqa: T201 - prints the measurement
    assert world.scalar("SELECT count(*) FROM follow_ups") == 1001


def test_locks_in_ascending_order(world: World) -> None:
    """Two transactions that schedule into the same chats in opposite orders do not deadlock."""
    targets = [world.chat() for _ in range(10)]
    errors: list[Exception] = []

    def repeat(order: list[UUID]) -> None:
        try:
            for _ in range(20):
                schedule_many(world, [planned(chat_id) for chat_id in order])
        except Exception as error:  # noqa: BLE001 - the assertion below shows it
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(order,)) for order in (targets, targets[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_concurrent_reply(world: World) -> None:
    """If a reply arrives during `schedule_many`, it waits and then cancels the new follow-ups."""
    chat_id = world.chat()
    replies: list[chats.RecordedMessage] = []

    def reply() -> None:
        with Session(world.engine) as session, session.begin():
            replies.append(
                chats.receive(
                    session, world.workspace_id, message_id=uuid4(), chat_id=chat_id, role=Role.USER, created_at=None
                )
            )

    with Session(world.engine) as session:
        created = followups.schedule_many(session, workspace_id=world.workspace_id, planned=[planned(chat_id)])
        ids = tuple(row.id for row in created)
        thread = threading.Thread(target=reply)
        thread.start()
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        wait_until(lambda: world.scalar(waiting))
        session.commit()
        thread.join()
    assert replies[0].cancelled == ids


def test_stricter_isolation_is_refused(world: World) -> None:
    """`schedule_many`, like `schedule`, rejects isolation levels stricter than READ COMMITTED."""
    strict = world.engine.execution_options(isolation_level="SERIALIZABLE")
    with Session(strict) as session, pytest.raises(TransactionError):
        followups.schedule_many(session, workspace_id=world.workspace_id, planned=[planned(world.chat())])
