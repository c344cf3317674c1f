"""A request locks a chat before its follow-ups, and is retried once after a deadlock."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

import followups
from followups import scheduling
from integration.api.test_races import in_background, waits
from stack import wait_until
from web import FOLLOW_UPS, in_days

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from sqlalchemy import Connection, Engine

    from web import Api

DAY = timedelta(days=1)


@pytest.fixture
def engine(web_engine: Engine) -> Engine:
    """Return an engine for the web process's database."""
    return web_engine


def schedule(session: Session, api: Api, chat_id: str) -> None:
    """Schedule a follow-up for tomorrow."""
    followups.schedule(
        session,
        workspace_id=api.world.workspace_id,
        chat_id=UUID(chat_id),
        message="?",
        due_date=datetime.now(UTC) + DAY,
    )


FIRST: dict[str, Callable[[Session, UUID], Any]] = {
    "cancel": lambda session, id_: followups.cancel(session, id_, reason="another one instead"),
    "message": lambda session, id_: scheduling.amend(session, id_, {"message": "Hello?"}),
    "due date": lambda session, id_: scheduling.amend(session, id_, {"due_date": datetime.now(UTC) + 2 * DAY}),
    "nothing": lambda session, id_: scheduling.amend(session, id_, {"message": "Still there?"}),
}


@pytest.mark.parametrize("change", FIRST)
def test_change_then_schedule_during_a_reply(api: Api, engine: Engine, change: str) -> None:
    """If a reply arrives while a transaction schedules follow-ups, the reply waits and then cancels them."""
    created = api.create()
    chat_id = created["chatId"]
    with ThreadPoolExecutor(1) as pool, Session(engine) as session:
        FIRST[change](session, UUID(created["id"]))
        answer = in_background(pool, api, lambda: api.message(chat_id, "user"))
        schedule(session, api, chat_id)
        session.commit()
        assert answer().status_code == 201
    assert api.ids(chatIds=chat_id, statuses="pending") == []


def test_moved_during_a_reply(api: Api, engine: Engine) -> None:
    """While a follow-up moves between two chats, a reply in either chat waits."""
    created, target = api.create(), api.chat()
    for chat_id, left in ((created["chatId"], [created["id"]]), (target, [])):
        with ThreadPoolExecutor(1) as pool, Session(engine) as session:
            scheduling.amend(session, UUID(created["id"]), {"chat_id": UUID(target), "message": chat_id})
            answer = in_background(pool, api, lambda chat_id=chat_id: api.message(chat_id, "user"))
            session.commit()
            assert answer().status_code == 201
        assert api.ids(chatIds=target, statuses="pending") == left


def test_moved_while_a_cancel_waits(api: Api, engine: Engine) -> None:
    """If a follow-up moves to another chat while a cancel waits, the cancel locks that chat first."""
    created, target = api.create(), api.chat()
    with ThreadPoolExecutor(1) as pool, Session(engine) as moving:
        scheduling.amend(moving, UUID(created["id"]), {"chat_id": UUID(target)})
        with Session(engine) as session:
            cancelling = pool.submit(followups.cancel, session, UUID(created["id"]), reason="called")
            wait_until(lambda: waits(api))
            moving.commit()
            assert cancelling.result(10).status == "cancelled"
            with pytest.raises(Exception, match="could not obtain lock"):
                api.world.sql("SELECT FROM chats WHERE id = :id FOR UPDATE NOWAIT", id=target)
            session.commit()


def test_finished_in_a_removed_chat(api: Api) -> None:
    """A repeated cancel of a follow-up has no effect, even if the chat was removed."""
    created = api.create()
    assert api.patch(created, status="cancelled").status_code == 200
    assert api.client.delete(f"/api/v1/chats/{created['chatId']}").status_code == 204
    assert api.patch(created, status="cancelled").status_code == 200


def deadlocked(api: Api, engine: Engine, request: Callable[[], Any], created: dict[str, Any]) -> Any:
    """Cause a deadlock that aborts a request, and return the request's response.

    Another transaction locks the follow-up, and then waits for the chat, which the request has locked.
    """
    with ThreadPoolExecutor(1) as pool, engine.connect() as connection:
        connection.execute(text("SELECT FROM follow_ups WHERE id = :id FOR UPDATE"), {"id": created["id"]})
        answer = in_background(pool, api, request)
        lock_chat(connection, created["chatId"])
        connection.commit()
        return answer()


def lock_chat(connection: Connection, chat_id: str) -> None:
    """Cause a deadlock with a request that has locked the chat; PostgreSQL aborts that request.

    A waiting transaction is checked for deadlocks only once, after it has waited for a second. If the request has
    already waited for more than a second, PostgreSQL aborts another transaction instead.
    """
    try:
        connection.execute(text("SELECT FROM chats WHERE id = :id FOR UPDATE"), {"id": chat_id})
    except OperationalError:
        pytest.skip("this machine was too slow: the server aborted the other transaction")


def test_reply_that_loses_a_deadlock(api: Api, engine: Engine) -> None:
    """If a deadlock aborts a reply, the reply is retried once and cancels the follow-up."""
    created = api.create()
    answer = deadlocked(api, engine, lambda: api.message(created["chatId"], "user"), created)
    assert (answer.status_code, answer.json()["cancelledFollowUpIds"]) == (201, [created["id"]])
    assert api.read(created)["reason"] == "user_replied"


def test_create_that_loses_a_deadlock(api: Api, engine: Engine) -> None:
    """If a deadlock aborts a create request with an Idempotency-Key, the retry creates one follow-up.

    The response to the create request can be replayed.
    """
    chat_id, key = api.chat(), str(uuid4())
    body = {"chatId": chat_id, "dueDate": in_days(1), "message": "?"}
    with ThreadPoolExecutor(1) as pool, engine.connect() as connection:
        # The request holds the chat's lock, and the test's transaction waits for that lock.
        connection.execute(text("LOCK TABLE idempotency_keys IN SHARE ROW EXCLUSIVE MODE"))
        answer = in_background(pool, api, lambda: api.post(FOLLOW_UPS, body, **{"idempotency-key": key}))
        lock_chat(connection, chat_id)
        connection.commit()
        created = answer()
    assert created.status_code == 201
    assert api.post(FOLLOW_UPS, body, **{"idempotency-key": key}).json() == created.json()
    assert api.ids(chatIds=chat_id) == [created.json()["id"]]
