"""Tests of `Idempotency-Key` on create requests to a running web process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg
import pytest

from stack import wait_until
from web import FOLLOW_UPS, in_days, is_problem, pointers

if TYPE_CHECKING:
    from typing import Any

    import httpx

    from followups.settings import Settings
    from web import Api


def keyed(api: Api, body: dict[str, Any], key: str) -> httpx.Response:
    """Send a POST request with an idempotency key."""
    return api.post(FOLLOW_UPS, body, **{"idempotency-key": key})


def body_of(api: Api, **more: Any) -> dict[str, Any]:
    """Return a valid request body."""
    return {"chatId": api.chat(), "dueDate": in_days(1), "message": "?"} | more


def same(first: httpx.Response, second: httpx.Response) -> bool:
    """Return whether two responses are equal in status, content type, location and body."""
    names = ("content-type", "location")
    return (first.status_code, first.content, [first.headers.get(name) for name in names]) == (
        second.status_code,
        second.content,
        [second.headers.get(name) for name in names],
    )


def test_repeated_request(api: Api) -> None:
    """Repeating a create request with its idempotency key returns the first response, byte for byte.

    The first response is replayed even if the follow-up has been cancelled since.
    """
    body, key = body_of(api), str(uuid4())
    first = keyed(api, body, key)
    assert first.status_code == 201
    api.patch(first.json(), status="cancelled")
    assert same(keyed(api, body, key), first)
    assert api.ids() == [first.json()["id"]]


def test_same_content_in_other_bytes(api: Api) -> None:
    """Request bodies with the same idempotency key are compared by content, not byte by byte."""
    body, key = body_of(api, dueDate="2035-01-01T00:00:00Z"), "k" * 255
    first = keyed(api, body, key)
    assert same(keyed(api, dict(reversed(body.items())) | {"dueDate": "2035-01-01T01:00:00+01:00"}, key), first)


def test_other_body(api: Api) -> None:
    """A request that reuses an idempotency key with a different body gets 422 and creates nothing."""
    body = body_of(api)
    keyed(api, body, "key")
    problem = is_problem(keyed(api, body | {"message": "!"}, "key"), 422, "idempotency-key-reused")
    assert pointers(problem) == ["#/Idempotency-Key"]
    assert len(api.ids()) == 1


def test_a_rejection_is_repeated(api: Api) -> None:
    """If a create request is rejected because of its chat, the repeated request is rejected too.

    The rejection is replayed even if the chat would now allow the follow-up. A rejection because of an invalid body is
    not replayed.
    """
    body = body_of(api, chatId=str(uuid4()))
    assert keyed(api, body | {"message": ""}, "key").status_code == 422
    first = keyed(api, body, "key")
    is_problem(first, 404, "not-found")
    api.message(body["chatId"], "agent")
    assert same(keyed(api, body, "key"), first)
    assert keyed(api, body, "another").status_code == 201


def test_other_workspace(api: Api, other: Api) -> None:
    """The same idempotency key in two workspaces counts as two different keys."""
    keyed(api, body_of(api), "key")
    assert keyed(other, body_of(other), "key").status_code == 201


def test_keys_expire_after_a_day(api: Api) -> None:
    """After 24 hours an idempotency key can be reused.

    Expired responses are deleted whenever a new response is stored.
    """
    body = body_of(api)
    for key in "abc":
        keyed(api, body, key)
    api.world.sql(
        "UPDATE idempotency_keys SET created_at = now() - interval '24 hours' WHERE workspace_id = :id",
        id=api.world.workspace_id,
    )
    assert keyed(api, body | {"message": "!"}, "a").status_code == 201
    count = f"SELECT count(*) FROM idempotency_keys WHERE workspace_id = '{api.world.workspace_id}'"  # noqa: S608
    assert api.world.scalar(count) == 1


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_bad_key(api: Api, key: str) -> None:
    """An idempotency key has 1 to 255 characters."""
    problem = is_problem(keyed(api, body_of(api), key), 422, "invalid-request")
    assert pointers(problem) == ["#/Idempotency-Key"]


def test_still_running(api: Api, web_settings: Settings) -> None:
    """While a create request runs, another request with the same idempotency key gets 409.

    Once the first request has ended, a repeated request gets the same response.
    """
    body = body_of(api)
    with ThreadPoolExecutor(1) as pool, psycopg.connect(web_settings.database_url.get_secret_value()) as connection:
        connection.execute("SELECT FROM chats WHERE id = %s FOR UPDATE", [body["chatId"]])
        first = pool.submit(keyed, api, body, "key")
        wait_until(lambda: blocked(api))
        second = keyed(api, body, "key")
        is_problem(second, 409, "idempotency-key-in-use")
        assert second.headers["retry-after"] == "1"
        connection.rollback()
        assert first.result().status_code == 201
        assert same(keyed(api, body, "key"), first.result())


@pytest.mark.parametrize("step", ["chats", "idempotency_keys"])
def test_crash(api: Api, web_settings: Settings, step: str) -> None:
    """If the database session ends during a create request, a retry creates exactly one follow-up."""
    body = body_of(api)
    with ThreadPoolExecutor(1) as pool, psycopg.connect(web_settings.database_url.get_secret_value()) as connection:
        # An EXCLUSIVE lock lets reads continue, whereas writes (and FOR UPDATE) wait.
        connection.execute(f"LOCK TABLE {step} IN EXCLUSIVE MODE")
        first = pool.submit(keyed, api, body, "key")
        pid = wait_until(lambda: blocked(api))
        api.world.sql("SELECT pg_terminate_backend(:pid)", pid=pid)
        answer = first.result()
        connection.rollback()
    is_problem(answer, 503, "unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    assert api.ids() == []
    assert keyed(api, body, "key").status_code == 201
    assert len(api.ids()) == 1


def test_many_concurrent_requests(api: Api) -> None:
    """Of many concurrent requests with one idempotency key, exactly one creates a follow-up.

    Every other concurrent request gets 409 or the first request's response.
    """
    body, together = body_of(api), threading.Barrier(8)

    def send(_: int) -> httpx.Response:
        together.wait()
        return keyed(api, body, "key")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, range(8)))
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert len({answer.content for answer in answers if answer.status_code == 201}) == 1
    assert len(api.ids()) == 1


def blocked(api: Api) -> int | None:
    """Return the process id of a database session that waits for a lock."""
    query = (
        "SELECT max(pid) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        " AND application_name = 'followups-web'"
    )
    found: int | None = api.world.scalar(query)
    return found
