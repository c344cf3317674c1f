"""The sandbox over HTTP: deliveries, controls, and the page with its events."""

from __future__ import annotations

import json
import re
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from standardwebhooks import Webhook

from followups.errors import TransportConfigurationError
from followups.transports.sandbox import server
from followups.transports.sandbox.behaviour import Behaviour
from followups.transports.sandbox.chats import SandboxChats
from followups.transports.sandbox.server import build_app, serving
from unit.transports.doubles import BODY, SIGNING_SECRET, fetch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def client(chats: SandboxChats, secret: str | None = None) -> AsyncIterator[aiohttp.ClientSession]:
    """Run a server for ``chats`` and yield a client session."""
    async with serving(build_app(chats, secret=secret)) as url, aiohttp.ClientSession(url) as session:
        yield session


@pytest.fixture
def chats() -> SandboxChats:
    """Return the chats that the server uses."""
    return SandboxChats()


@pytest.fixture
async def http(chats: SandboxChats) -> AsyncIterator[aiohttp.ClientSession]:
    """Return a client session for the server."""
    async with client(chats) as session:
        yield session


async def test_a_delivery_is_answered_with_the_messages_id(http: aiohttp.ClientSession, chats: SandboxChats) -> None:
    """If a delivery to ``POST /messages`` has no idempotency key, the follow-up's id serves as the key."""
    status, answer = await fetch(http, "POST", "/messages", BODY)
    assert (status, list(answer)) == (200, ["chatMessageId"])
    assert chats.ledger.records()[0].idempotency_key == BODY["followUpId"]
    async with http.post("/messages", json=BODY, headers={"idempotency-key": "other"}):
        assert chats.ledger.records()[1].idempotency_key == "other"


@pytest.mark.parametrize(
    "body", [None, [], {}, BODY | {"dueDate": "noon"}, BODY | {"dueDate": "2026-03-01T12:00:00"}, BODY | {"attempt": 0}]
)
async def test_an_invalid_delivery_is_rejected(http: aiohttp.ClientSession, chats: SandboxChats, body: object) -> None:
    """An invalid delivery is rejected with 400; the error names the field, not the text."""
    status, answer = await fetch(http, "POST", "/messages", body)
    assert status == 400
    assert "hello" not in answer["error"]
    assert (chats.ledger.summary()["invalid"], chats.ledger.summary()["requests"]) == (1, 0)


async def test_a_signature_is_verified_where_there_is_a_secret(chats: SandboxChats) -> None:
    """If a secret is set, deliveries without a valid signature are rejected with 401."""
    body, now = json.dumps(BODY), datetime.now(UTC)
    signature = Webhook(SIGNING_SECRET).sign("id", now, body)
    stamp = str(int(now.timestamp()))
    async with client(chats, SIGNING_SECRET) as http:
        for headers, expected in (
            ({"webhook-id": "id", "webhook-timestamp": stamp, "webhook-signature": signature}, 200),
            ({"webhook-id": "id", "webhook-timestamp": stamp, "webhook-signature": f"v1,AAAA {signature}"}, 200),
            ({"webhook-id": "no", "webhook-timestamp": stamp, "webhook-signature": signature}, 401),
            ({"webhook-id": "id", "webhook-timestamp": "1", "webhook-signature": signature}, 401),
            ({"webhook-id": "id", "webhook-timestamp": stamp, "webhook-signature": "no comma"}, 401),
            ({"webhook-id": "id", "webhook-timestamp": stamp, "webhook-signature": "v1,not base64"}, 401),
            ({}, 401),
        ):
            async with http.post("/messages", data=body, headers=headers) as response:
                assert response.status == expected, headers
    assert chats.ledger.summary()["invalid"] == 5


async def test_a_body_that_is_not_text_is_rejected(chats: SandboxChats) -> None:
    """A delivery whose body is not UTF-8 is rejected because it cannot be verified."""
    headers = {"webhook-id": "id", "webhook-timestamp": "1", "webhook-signature": "v1,AAAA"}
    async with client(chats, SIGNING_SECRET) as http, http.post("/messages", data=b"\xff", headers=headers) as response:
        assert response.status in {400, 401}


def test_an_invalid_secret_stops_the_start() -> None:
    """The sandbox, like the transport, fails at startup if the secret is invalid."""
    with pytest.raises(TransportConfigurationError):
        build_app(secret="not base64!")  # noqa: S106 - an invalid secret


async def test_behaviours_are_set_read_and_reset(http: aiohttp.ClientSession, chats: SandboxChats) -> None:
    """PUT, GET and DELETE set, read and reset behaviours, for one chat or for all chats."""
    path = "/sandbox/chats/c1/behaviour"
    status, shown = await fetch(http, "PUT", path, {"kind": "reject", "status": 410, "times": 2, "retryAfter": 3})
    assert (status, shown["status"], shown["retryAfter"]) == (200, 410, 3)
    assert (await fetch(http, "POST", "/messages", BODY))[0] == 410
    assert (await fetch(http, "GET", path))[1]["times"] == 1
    assert await fetch(http, "DELETE", path) == (204, None)
    assert (await fetch(http, "GET", path))[1]["kind"] == "accept"
    assert (await fetch(http, "PUT", "/sandbox/behaviour", {"kind": "fail"}))[0] == 200
    assert (await fetch(http, "GET", "/sandbox/behaviour"))[1]["kind"] == "fail"
    assert (await fetch(http, "POST", "/messages", BODY))[0] == 500
    assert await fetch(http, "DELETE", "/sandbox/behaviour") == (204, None)
    assert (await fetch(http, "POST", "/messages", BODY))[0] == 200
    assert chats.default == Behaviour()


@pytest.mark.parametrize("path", ["/sandbox/behaviour", "/sandbox/chats/c1/behaviour"])
async def test_an_invalid_behaviour_is_refused(http: aiohttp.ClientSession, path: str) -> None:
    """An invalid behaviour is rejected with 422 and an error that names the field."""
    status, answer = await fetch(http, "PUT", path, {"kind": "explode"})
    assert (status, answer["error"].partition(":")[0]) == (422, "kind")


async def test_a_dropped_request_gets_no_answer(http: aiohttp.ClientSession, chats: SandboxChats) -> None:
    """To drop a request, the sandbox accepts the message and closes the connection without a response."""
    await fetch(http, "PUT", "/sandbox/behaviour", {"kind": "drop"})
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await fetch(http, "POST", "/messages", BODY)
    assert chats.ledger.summary()["accepted"] == 1


async def test_a_rate_limit_has_a_retry_after(http: aiohttp.ClientSession) -> None:
    """A chat that simulates a rate limit responds with 429 and Retry-After."""
    await fetch(http, "PUT", "/sandbox/behaviour", {"kind": "rate_limit", "retryAfter": 7})
    async with http.post("/messages", json=BODY) as response:
        assert (response.status, response.headers["retry-after"]) == (429, "7")


async def test_the_record_can_be_read_and_cleared(http: aiohttp.ClientSession) -> None:
    """The sandbox's requests, summary and conversations can be read as JSON and cleared with DELETE."""
    await fetch(http, "POST", "/messages", BODY)
    status, said = await fetch(http, "POST", "/sandbox/chats/c2/messages", {"role": "user", "text": "hi"})
    assert (status, said["role"], said["text"]) == (201, "user", "hi")
    assert [each["chatId"] for each in (await fetch(http, "GET", "/sandbox/requests"))[1]] == ["c1"]
    assert (await fetch(http, "GET", "/sandbox/requests?chatId=c2"))[1] == []
    assert (await fetch(http, "GET", "/sandbox/summary"))[1]["accepted"] == 1
    assert [each["chatId"] for each in (await fetch(http, "GET", "/sandbox/chats"))[1]] == ["c2", "c1"]
    assert await fetch(http, "DELETE", "/sandbox") == (204, None)
    assert (await fetch(http, "GET", "/sandbox/requests"))[1] == []


async def test_requests_can_be_read_page_by_page(http: aiohttp.ClientSession) -> None:
    """Requests are numbered; each page contains the requests that follow a given number."""
    for attempt in (1, 2, 3):
        await fetch(http, "POST", "/messages", BODY | {"attempt": attempt})
    _, page = await fetch(http, "GET", "/sandbox/requests?after=1&limit=1")
    assert [(each["number"], each["attempt"]) for each in page] == [(2, 2)]
    _, rest = await fetch(http, "GET", "/sandbox/requests?after=2")
    assert [(each["number"], each["attempt"]) for each in rest] == [(3, 3)]
    assert (await fetch(http, "GET", "/sandbox/requests?after=x"))[0] == 422


@pytest.mark.parametrize("body", [{}, {"text": ""}, {"role": "god", "text": "x"}, []])
async def test_an_invalid_chat_message_is_rejected(http: aiohttp.ClientSession, body: object) -> None:
    """A chat message with an invalid role or text is rejected with 422."""
    assert (await fetch(http, "POST", "/sandbox/chats/c1/messages", body))[0] == 422


async def test_the_page_loads_nothing_from_other_hosts(http: aiohttp.ClientSession) -> None:
    """The sandbox page escapes its data, and its policy blocks resources from other hosts."""
    async with http.get("/") as response:
        text, policy = await response.text(), response.headers["content-security-policy"]
        assert response.content_type == "text/html"
    assert "http://" not in text.replace("http-equiv", "")
    assert "https://" not in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(| style=", text)
    assert policy.startswith("default-src 'none'; connect-src 'self'; img-src data:; script-src 'sha256-")
    assert "unsafe" not in policy


async def events(http: aiohttp.ClientSession) -> AsyncIterator[tuple[str, Any]]:
    """Yield the name and data of each Server-Sent Event."""
    async with http.get("/sandbox/events") as response:
        assert response.content_type == "text/event-stream"
        while line := (await response.content.readline()).decode().strip():
            data = (await response.content.readline()).decode()
            await response.content.readline()
            yield line.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def test_the_stream_starts_with_a_snapshot(
    http: aiohttp.ClientSession, chats: SandboxChats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event stream starts with a snapshot and continues with updates of changed chats.

    After the sandbox is cleared, the event stream sends a snapshot again.
    """
    monkeypatch.setattr(server, "INTERVAL", 0.01)
    monkeypatch.setattr(server, "SHARE", 1.0)
    chats.add_message("c1", "user", "one")
    stream = events(http)
    name, state = await anext(stream)
    assert (name, [chat["chatId"] for chat in state["chats"]]) == ("snapshot", ["c1"])
    chats.add_message("c2", "user", "two")
    name, state = await anext(stream)
    assert (name, [chat["chatId"] for chat in state["chats"]]) == ("update", ["c2"])
    chats.default = Behaviour(kind="fail")
    name, state = await anext(stream)
    assert (name, state["default"]["kind"], state["chats"]) == ("update", "fail", [])
    chats.clear()
    name, state = await anext(stream)
    assert (name, state["chats"], state["summary"]["requests"]) == ("snapshot", [], 0)
    await stream.aclose()


async def test_an_idle_stream_sends_comments(http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle event stream sends comments, so that a lost connection is noticed."""
    monkeypatch.setattr(server, "INTERVAL", 0.01)
    monkeypatch.setattr(server, "SHARE", 1.0)
    monkeypatch.setattr(server, "HEARTBEAT", 0.02)
    async with http.get("/sandbox/events") as response:
        lines = [(await response.content.readline()).decode() for _ in range(5)]
    assert lines[3:] == [": still here\n", "\n"]
