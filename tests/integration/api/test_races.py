"""Tests of races: a reply and a create, a cancel and a delivery, a PATCH and a tick.

In each test, one transaction stops halfway while it holds locks. A second transaction starts, and then the first one
continues. The tests need no sleep: PostgreSQL reports when the second transaction waits.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID, uuid4

import pytest
from sqlalchemy.orm import Session

from followups import scheduling
from followups.channels import Channel
from followups.states import Status
from followups.store import chats, claims, leases
from stack import wait_until
from web import FOLLOW_UPS, in_days, is_problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection, Engine

    from followups.store.leases import Lease
    from web import Api

T = TypeVar("T")

MINUTE = timedelta(minutes=1)
PAIRS = 40


def claim(connection: Connection) -> list[Lease]:
    """Claim all due follow-ups."""
    return claims.claim(connection, claims.ClaimSearch(timedelta(seconds=2), MINUTE, window=5000, most=1000)).leases


def begin(connection: Connection, taken: list[Lease]) -> list[UUID]:
    """Begin the follow-ups of these leases and return the ids of those that have begun."""
    world = leases.Rules(lease=MINUTE, max_lateness=timedelta(0), early=MINUTE)
    return [taken[number - 1].id for number, *_ in leases.begin_if_leased(connection, taken, world)]


def due_now(api: Api) -> tuple[dict[str, object], list[Lease]]:
    """Create a due follow-up, claim it, and return it with its lease."""
    created = api.create(due="2020-01-01T00:00:00Z")
    with api.world.engine.begin() as connection:
        return created, [lease for lease in claim(connection) if str(lease.id) == created["id"]]


def waits(api: Api) -> bool:
    """Return whether a request is waiting for a lock."""
    query = "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return bool(api.world.scalar(query))


def in_background(pool: ThreadPoolExecutor, api: Api, work: Callable[[], T]) -> Callable[[], T]:
    """Start a request in the background, and wait until a lock blocks it.

    Return a function that waits for the request to finish and returns its response.
    """
    future = pool.submit(work)
    wait_until(lambda: waits(api))
    assert not future.done()
    return future.result


@pytest.fixture
def engine(web_engine: Engine) -> Engine:
    """Return an engine for the web process's database."""
    return web_engine


class TestReplyAgainstCreate:
    """A follow-up that is created during a reply's transaction is cancelled or rejected."""

    def test_create_first(self, api: Api, engine: Engine) -> None:
        """A reply waits for a running create request, and then cancels the follow-up that was created."""
        chat_id = api.chat()
        with ThreadPoolExecutor(1) as pool, Session(engine) as session:
            created = scheduling.schedule(
                session,
                workspace_id=api.world.workspace_id,
                chat_id=UUID(chat_id),
                message="?",
                due_date=datetime.now(UTC) + MINUTE,
            )
            answer = in_background(pool, api, lambda: api.message(chat_id, "user"))
            session.commit()
            assert answer().json()["cancelledFollowUpIds"] == [str(created.id)]
        assert api.read({"id": str(created.id)})["reason"] == "user_replied"

    def test_reply_first(self, api: Api, engine: Engine) -> None:
        """If a create request arrives during a reply's transaction, the request waits and is then rejected."""
        chat_id = api.chat()
        body = {"chatId": chat_id, "dueDate": in_days(1), "message": "?"}
        with ThreadPoolExecutor(1) as pool, Session(engine) as session:
            chats.receive(
                session,
                api.world.workspace_id,
                message_id=uuid4(),
                chat_id=UUID(chat_id),
                role=chats.Role.USER,
                created_at=None,
            )
            answer = in_background(pool, api, lambda: api.post(FOLLOW_UPS, body))
            session.commit()
            is_problem(answer(), 409, "nothing-to-follow-up")
        assert api.ids() == []

    def test_many(self, api: Api) -> None:
        """After concurrent creates and replies, a chat in which the user wrote last has no pending follow-up."""
        chat_ids = [api.chat() for _ in range(PAIRS)]
        together = threading.Barrier(2)

        def create(chat_id: str) -> int:
            together.wait()
            return api.post(FOLLOW_UPS, {"chatId": chat_id, "dueDate": in_days(1), "message": "?"}).status_code

        def reply(chat_id: str) -> list[str]:
            together.wait()
            cancelled: list[str] = api.message(chat_id, "user").json()["cancelledFollowUpIds"]
            return cancelled

        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
            pairs = list(zip(one.map(create, chat_ids), two.map(reply, chat_ids), strict=True))
        assert {(status, len(cancelled)) for status, cancelled in pairs} <= {(201, 1), (409, 0)}
        assert api.ids(statuses="pending") == []


class TestCancelAgainstDeliver:
    """If a cancel returned 200, the message is never sent."""

    def test_begin_first(self, api: Api, engine: Engine) -> None:
        """A cancel waits for a running begin, and is then rejected with Retry-After."""
        created, taken = due_now(api)
        with ThreadPoolExecutor(1) as pool, engine.connect() as connection:
            assert begin(connection, taken) == [UUID(str(created["id"]))]
            answer = in_background(pool, api, lambda: api.patch(created, status="cancelled"))
            connection.commit()
            refused = answer()
        is_problem(refused, 409, "delivery-in-progress")
        assert int(refused.headers["retry-after"]) >= 1
        assert api.read(created)["status"] == "pending"

    def test_cancel_first(self, api: Api, engine: Engine) -> None:
        """During and after a cancel, begin starts no attempt, and it does not wait for the cancel."""
        created, taken = due_now(api)
        with Session(engine) as session, engine.connect() as connection:
            scheduling.cancel(session, UUID(str(created["id"])), reason="called")
            assert begin(connection, taken) == []
            connection.rollback()
            session.commit()
            assert begin(connection, taken) == []
        assert api.read(created)["reason"] == "called"

    def test_many(self, api: Api, engine: Engine) -> None:
        """In many concurrent cancels and begins, each follow-up is either cancelled or begun, never both."""
        pairs = [due_now(api) for _ in range(PAIRS)]
        together = threading.Barrier(2)

        def cancel(pair: tuple[dict[str, object], list[Lease]]) -> int:
            together.wait()
            return api.patch(pair[0], status="cancelled").status_code

        def deliver(pair: tuple[dict[str, object], list[Lease]]) -> bool:
            together.wait()
            with engine.begin() as connection:
                return bool(begin(connection, pair[1]))

        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
            outcomes = list(zip(one.map(cancel, pairs), two.map(deliver, pairs), strict=True))
        assert set(outcomes) <= {(200, False), (409, True)}

    def test_reply_while_begun(self, api: Api, engine: Engine) -> None:
        """A reply waits for a running begin, and then prevents any retry of that follow-up."""
        created, taken = due_now(api)
        with ThreadPoolExecutor(1) as pool, engine.connect() as connection:
            begin(connection, taken)
            answer = in_background(pool, api, lambda: api.message(str(created["chatId"]), "user"))
            connection.commit()
            assert answer().json()["cancelledFollowUpIds"] == []
        assert api.world.row(UUID(str(created["id"]))).cancel_requested == "user_replied"


class TestPatchAgainstTick:
    """Once a reschedule has been confirmed, the new due date applies even to a claimed follow-up."""

    def test_claim_first(self, api: Api, engine: Engine) -> None:
        """A reschedule that arrives during a claim waits, and then makes the claim's lease stale."""
        created = api.create(due="2020-01-01T00:00:00Z")
        with ThreadPoolExecutor(1) as pool, engine.connect() as connection:
            taken = [lease for lease in claim(connection) if str(lease.id) == created["id"]]
            answer = in_background(pool, api, lambda: api.patch(created, dueDate=in_days(1)))
            connection.commit()
            assert answer().status_code == 200
            assert len(taken) == 1
            assert begin(connection, taken) == []

    def test_patch_first(self, api: Api, engine: Engine) -> None:
        """If a reschedule is not yet committed, a tick neither waits nor claims the follow-up early."""
        created = api.create(due="2020-01-01T00:00:00Z")
        follow_up_id = UUID(created["id"])
        with Session(engine) as session, engine.connect() as connection:
            scheduling.amend(session, follow_up_id, {"due_date": datetime.now(UTC) + MINUTE})
            assert follow_up_id not in [lease.id for lease in claim(connection)]
            connection.commit()
            session.commit()
            assert follow_up_id not in [lease.id for lease in claim(connection)]


def test_chat_put_against_message(api: Api, engine: Engine) -> None:
    """If a PUT creates a chat while its first message arrives, the message is not lost."""
    chat_id = uuid4()
    with ThreadPoolExecutor(1) as pool, Session(engine) as session:
        chats.receive(
            session,
            api.world.workspace_id,
            message_id=uuid4(),
            chat_id=chat_id,
            role=chats.Role.AGENT,
            created_at=None,
        )
        put = {"channel": Channel.WIDGET.value}
        answer = in_background(pool, api, lambda: api.client.put(f"/api/v1/chats/{chat_id}", json=put))
        session.commit()
        assert answer().status_code == 200
    assert api.create(str(chat_id))["status"] == Status.PENDING


def test_remove_against_create(api: Api, engine: Engine) -> None:
    """If the chat is being removed, a create request waits and is then rejected with 404."""
    chat_id = UUID(api.chat())
    body = {"chatId": str(chat_id), "dueDate": in_days(1), "message": "?"}
    with ThreadPoolExecutor(1) as pool, Session(engine) as session:
        chats.remove_chat(session, api.world.workspace_id, chat_id)
        answer = in_background(pool, api, lambda: api.post(FOLLOW_UPS, body))
        session.commit()
        is_problem(answer(), 404, "not-found")
