"""Quotas for a workspace's pending follow-ups and chats."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from psycopg.errors import DeadlockDetected
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

import followups
from followups.errors import QuotaExceededError
from followups.store import quotas
from followups.store.follow_ups import Planned
from followups.store.quotas import Kind
from integration.api.test_races import in_background
from web import CHATS, FOLLOW_UPS, in_days, is_problem, pointers

if TYPE_CHECKING:
    import httpx

    from web import Api

DUE = datetime(2035, 1, 1, tzinfo=UTC)


def allow(api: Api, kind: Kind, most: int) -> None:
    """Set a quota for the API client's workspace."""
    with api.world.engine.begin() as connection:
        quotas.put(connection, api.world.workspace_id, kind, most)


def post(api: Api, chat: str, **headers: str) -> httpx.Response:
    """Create a follow-up."""
    return api.post(FOLLOW_UPS, {"chatId": chat, "dueDate": in_days(1), "message": "?"}, **headers)


def test_pending_follow_ups(api: Api, other: Api) -> None:
    """A workspace at its quota can create a follow-up only after another one has ended.

    Other workspaces are not affected.
    """
    chats = [api.chat() for _ in range(4)]
    allow(api, Kind.PENDING, 3)
    created = [post(api, chat).json() for chat in chats[:3]]
    problem = is_problem(post(api, chats[3]), 422, "quota-exceeded")
    assert problem["detail"] == "The workspace may have at most 3 pending follow-ups; there is room for 0 more."
    assert pointers(problem) == ["#"]
    assert other.create()
    api.patch(created[0], status="cancelled")
    assert post(api, chats[3]).status_code == 201
    is_problem(post(api, chats[0]), 422, "quota-exceeded")
    assert len(api.ids(statuses="pending")) == 3


def test_concurrent_creates_do_not_exceed_the_quota(api: Api) -> None:
    """Concurrent create requests use up the quota but never exceed it."""
    chats = [api.chat() for _ in range(20)]
    allow(api, Kind.PENDING, 5)
    with ThreadPoolExecutor(20) as pool:
        statuses = [answer.status_code for answer in pool.map(lambda chat: post(api, chat), chats)]
    assert sorted(statuses) == [201] * 5 + [422] * 15


def test_a_quota_rejection_is_not_stored(api: Api) -> None:
    """A create request rejected by a quota can succeed later with the same Idempotency-Key."""
    chat = api.chat()
    allow(api, Kind.PENDING, 0)
    body = {"chatId": chat, "dueDate": "2035-01-01T00:00:00Z", "message": "?"}
    is_problem(api.post(FOLLOW_UPS, body, **{"idempotency-key": "k"}), 422, "quota-exceeded")
    allow(api, Kind.PENDING, 1)
    assert api.post(FOLLOW_UPS, body, **{"idempotency-key": "k"}).status_code == 201


def test_from_python(api: Api) -> None:
    """A quota also applies to `schedule`; `schedule_many` creates all of its follow-ups or none."""
    world, chats = api.world, [UUID(api.chat()) for _ in range(3)]
    allow(api, Kind.PENDING, 2)
    many = [Planned(chat, "?", DUE) for chat in chats]
    with Session(world.engine) as session, session.begin():
        with pytest.raises(QuotaExceededError, match="room for 2 more"):
            followups.schedule_many(session, workspace_id=world.workspace_id, planned=many)
        assert len(followups.schedule_many(session, workspace_id=world.workspace_id, planned=many[:2])) == 2
        with pytest.raises(QuotaExceededError):
            followups.schedule(
                session, workspace_id=world.workspace_id, chat_id=chats[2], message="?", due_date=DUE + timedelta(1)
            )
    assert len(api.ids()) == 2


def test_several_calls_in_one_transaction(api: Api) -> None:
    """Under a quota, two transactions with several `schedule` calls each may deadlock; one is aborted.

    To create several follow-ups, use `schedule_many`: it locks all chats first, and then the quota.
    """
    world, (one, two) = api.world, sorted(UUID(api.chat()) for _ in range(2))
    allow(api, Kind.PENDING, 10)

    def create(session: Session, chat: UUID) -> bool:
        try:
            followups.schedule(session, workspace_id=world.workspace_id, chat_id=chat, message="?", due_date=DUE)
        except OperationalError as error:
            assert isinstance(error.orig, DeadlockDetected)  # noqa: PT017 - one of the two has it, either one
            session.rollback()
            return False
        return True

    with ThreadPoolExecutor(1) as pool, Session(world.engine) as first, Session(world.engine) as second:
        assert create(first, one)
        later = in_background(pool, api, lambda: create(second, two))
        assert sorted([create(first, two), later()]) == [False, True]

    planned = [Planned(chat, "?", DUE) for chat in (two, one)]
    with ThreadPoolExecutor(1) as pool, Session(world.engine) as first, Session(world.engine) as second:
        many = partial(followups.schedule_many, workspace_id=world.workspace_id, planned=planned)
        assert len(many(first)) == 2
        created = in_background(pool, api, lambda: many(second))
        first.commit()
        assert len(created()) == 2


def test_without_a_quota_there_is_no_extra_statement(api: Api) -> None:
    """Without a quota, a create request executes no additional SQL statement."""
    world, chat = api.world, UUID(api.chat())
    statements: list[str] = []
    with Session(world.engine) as session, session.begin():
        session.connection()
        event.listen(world.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
        followups.schedule(session, workspace_id=world.workspace_id, chat_id=chat, message="?", due_date=DUE)
    assert not [each for each in statements if "quotas" in each and "INSERT INTO follow_ups" not in each]


def test_chats(api: Api) -> None:
    """If a workspace has reached its chat quota, neither PUT nor a message creates chats.

    After a chat is removed, a new chat can be created.
    """
    first, second, third = (str(uuid4()) for _ in range(3))
    allow(api, Kind.CHATS, 2)
    assert api.client.put(f"{CHATS}/{first}", json={"channel": "api"}).status_code == 201
    assert api.message(second, "agent").status_code == 201
    is_problem(api.client.put(f"{CHATS}/{third}", json={"channel": "api"}), 422, "quota-exceeded")
    is_problem(api.message(third, "user"), 422, "quota-exceeded")
    assert api.client.put(f"{CHATS}/{first}", json={"channel": "widget"}).status_code == 200
    assert api.message(second, "agent").status_code == 201
    assert api.client.delete(f"{CHATS}/{first}").status_code == 204
    assert api.client.put(f"{CHATS}/{third}", json={"channel": "api"}).status_code == 201
    is_problem(api.client.put(f"{CHATS}/{first}", json={"channel": "api"}), 422, "quota-exceeded")
    allow(api, Kind.CHATS, 3)
    assert api.client.put(f"{CHATS}/{first}", json={"channel": "api"}).status_code == 201
