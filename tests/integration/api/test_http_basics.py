"""Tests of the API before authentication: limits per client, and requests without a valid key."""

from __future__ import annotations

import gzip
import json
import re
import socket
from contextlib import ExitStack
from http.client import HTTPResponse
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy import text

from followups.api import gate, server
from followups.api.request_limits import UNKNOWN_KEYS_SHARE
from stack import wait_until
from web import CHAT_MESSAGES, FOLLOW_UPS, Api, client_of, is_problem, key_of, pointers, served
from world import World

if TYPE_CHECKING:
    import httpx

    from followups.settings import Settings

HOSTILE = {"host": "attacker.example", "x-forwarded-host": "attacker.example", "x-forwarded-proto": "http"}


def raw(api: Api, request: bytes, wait: float = 5) -> bytes:
    """Send bytes on a new connection; return all data until the connection closes or falls silent."""
    url = urlsplit(str(api.client.base_url))
    assert url.hostname
    with socket.create_connection((url.hostname, url.port or 80), timeout=wait) as connection:
        connection.sendall(request)
        answer = b""
        try:
            while chunk := connection.recv(65536):
                answer += chunk
        except TimeoutError:
            pass
        return answer


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", FOLLOW_UPS])
def test_head(api: Api, path: str) -> None:
    """For every path, HEAD returns the same status and headers as GET, without a body."""
    got, head = api.client.get(path), api.client.head(path)
    assert head.status_code == got.status_code
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]
    assert head.headers.get("content-length") or head.headers.get("transfer-encoding")


def test_head_of_one(api: Api) -> None:
    """HEAD works wherever GET does; elsewhere, a 405 response lists the allowed methods."""
    assert api.client.head(f"{FOLLOW_UPS}/{api.create()['id']}").status_code == 200
    refused = api.client.head(CHAT_MESSAGES)
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert api.client.delete("/healthz").headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/healthz"), ("GET", FOLLOW_UPS), ("GET", "/nothing"), ("PUT", FOLLOW_UPS), ("GET", "/docs")],
)
def test_headers_of_every_answer(api: Api, method: str, path: str) -> None:
    """Every response, with any status, forbids content sniffing and caching."""
    headers = api.client.request(method, path).headers
    assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")


def test_headers_of_the_response_to_malformed_http(api: Api) -> None:
    """Even a response to malformed HTTP forbids content sniffing and caching."""
    answer = raw(api, b"nonsense\r\n\r\n").lower()
    assert b"x-content-type-options: nosniff" in answer
    assert b"cache-control: no-store" in answer


def test_documentation(api: Api) -> None:
    """The documentation page loads only local, cacheable files and has no inline script."""
    page = api.client.get("/docs")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert not re.search(r"https?://|//|<script>", page.text.replace("<!doctype html>", ""))
    loaded = re.findall(r'(?:src|href)="(docs/[^"]+)"', page.text)
    assert len(loaded) == 3
    for each in loaded:
        file = api.client.get(f"/{each}")
        assert file.status_code == 200
        assert "max-age" in file.headers["cache-control"]
    assert api.client.get("/docs/secrets.txt").status_code == 404


def test_links_contain_no_client_headers(api: Api) -> None:
    """Pagination links are relative; they contain only known filters and nothing from request headers."""
    chat = api.chat()
    for _ in range(3):
        api.create(chat)
    page = api.client.get(f"{FOLLOW_UPS}?chatIds[]={chat.upper()}&pageSize=1&pageNumber=2", headers=HOSTILE)
    assert {name: link["url"] for name, link in page.links.items()} == {
        "next": f"?chatIds={chat}&pageNumber=3&pageSize=1",
        "prev": f"?chatIds={chat}&pageNumber=1&pageSize=1",
    }


@pytest.mark.parametrize("query", ["statuses[0]=pending", "chatIds[0]=x", "chatId=x", "limit=5", "pagenumber=2"])
def test_unknown_parameter(api: Api, query: str) -> None:
    """An unknown query parameter is rejected with 422 and named in the error.

    If unknown filters were ignored, the list would contain every follow-up.
    """
    problem = is_problem(api.get(f"{FOLLOW_UPS}?{query}"), 422, "invalid-request")
    assert pointers(problem) == [f"#/{query.partition('=')[0]}"]


def test_few_errors_are_listed(api: Api) -> None:
    """A response lists at most 20 errors in at most 20 kB, even if more fields are invalid."""
    path = f"{FOLLOW_UPS}/{api.create()['id']}"
    for body in ({f"unknown{number}": 1 for number in range(80)}, {f"unknown{number}": 1 for number in range(50_000)}):
        answer = api.client.patch(path, json=body)
        assert 1 <= len(is_problem(answer, 422, "invalid-request")["errors"]) <= 20
        assert len(answer.content) < 20_000
    assert len(api.client.patch(path, json={"x" * 900_000: 1}).content) < 20_000
    many = api.get(f"{FOLLOW_UPS}?" + "&".join(["chatIds=x"] * 2_000))
    assert len(is_problem(many, 422, "invalid-request")["errors"]) == 20


def test_a_compressed_body(api: Api) -> None:
    """A compressed body is rejected with 415 and the reason; `Content-Encoding: identity` is accepted."""
    body = gzip.compress(json.dumps({"role": "agent"}).encode())
    problem = is_problem(
        api.client.post(CHAT_MESSAGES, content=body, headers={"content-encoding": "gzip"}),
        415,
        "unsupported-media-type",
    )
    assert "compressed" in problem["detail"]
    assert (
        api.client.put(
            f"/api/v1/chats/{api.chat()}", json={"channel": "widget"}, headers={"content-encoding": "identity"}
        ).status_code
        == 200
    )


def test_two_lengths(api: Api) -> None:
    """A request with both Content-Length and Transfer-Encoding gets a 400, and the connection is closed."""
    request = (
        b"POST /api/v1/chat-messages HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"
        b"0\r\n\r\nGET /healthz HTTP/1.1\r\nhost: a\r\n\r\n"
    )
    answer = raw(api, request)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.count(b"HTTP/1.1") == 1


def test_a_body_without_a_valid_key_is_not_read(api: Api) -> None:
    """A request without a valid API key is answered before its body is read, and its connection is closed."""
    for key in (b"", b"authorization: nonsense\r\n", b"authorization: " + b"fup_" + b"x" * 43 + b"\r\n"):
        request = b"POST /api/v1/chat-messages HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n" + key + b"\r\n{"
        answer = raw(api, request)
        assert answer.startswith(b"HTTP/1.1 401")
        assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("path", ["/healthz", "/docs", "/nothing"])
@pytest.mark.parametrize("head", ["content-length: 1000000", "transfer-encoding: chunked"])
def test_a_body_of_another_path_is_not_read(api: Api, path: str, head: str) -> None:
    """Outside the API and the console, requests are answered before their body is read.

    After the response, the server closes the connection.
    """
    answer = raw(api, f"POST {path} HTTP/1.1\r\nhost: a\r\n{head}\r\n\r\n".encode())
    assert answer.startswith((b"HTTP/1.1 405", b"HTTP/1.1 404"))
    assert answer.count(b"HTTP/1.1") == 1
    assert b"connection: close" in answer.lower()


def test_a_length_of_zero_keeps_the_connection(api: Api) -> None:
    """After a request with an empty body, the connection accepts further requests."""
    request = b"GET /healthz HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n"
    stranger = request.replace(b"/healthz", FOLLOW_UPS.encode())
    answer = raw(api, request + stranger + request, wait=1)
    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"401", b"200"]


def test_a_revoked_key_is_refused_at_once(api: Api) -> None:
    """A revoked API key is rejected immediately, even if the request's body is invalid."""
    assert api.get(FOLLOW_UPS).status_code == 200
    api.world.sql("UPDATE api_keys SET revoked_at = now()")
    assert api.get(FOLLOW_UPS).status_code == 401
    assert api.client.post(CHAT_MESSAGES, json={"id": 1}).status_code == 401
    head = f"POST {CHAT_MESSAGES} HTTP/1.1\r\nhost: a\r\nauthorization: {api.key}\r\ncontent-length: 9\r\n\r\n"
    assert raw(api, head.encode()).startswith(b"HTTP/1.1 401")  # the server responds without waiting for the body


def test_bodies_have_a_budget(settings: Settings, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a workspace's request bodies fill half of the shared memory, its requests get 503 until memory is free.

    Request bodies of other workspaces are still read.
    """
    monkeypatch.setattr(gate, "MAX_BUFFERED", 600_000)
    other_key = key_of(World(world.engine))[1]
    with (
        served(settings) as (host, port),
        client_of((host, port), key_of(world)[1]) as client,
        client_of((host, port), other_key) as other,
    ):
        head = f"POST {CHAT_MESSAGES} HTTP/1.1\r\nhost: a\r\ncontent-length: 250000\r\n"
        head += f"authorization: {client.headers['authorization']}\r\n\r\n"

        def refused_beside_a_slow_body() -> httpx.Response | None:
            with socket.create_connection((host, port)) as slow:
                slow.sendall(head.encode() + b" " * 200_000)
                answer = client.post(CHAT_MESSAGES, content=b" " * 200_000)
                assert other.post(CHAT_MESSAGES, content=b" " * 200_000).status_code == 422
                return (
                    answer if answer.status_code == 503 else None
                )  # otherwise, the slow request was rejected instead, or had not arrived yet

        answer = wait_until(refused_beside_a_slow_body, within=20)
        is_problem(answer, 503, "service-unavailable")
        assert answer.headers["retry-after"]
        wait_until(lambda: client.post(CHAT_MESSAGES, content=b" " * 200_000).status_code == 422, within=20)


def test_the_longest_idle_connection_is_closed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the connection limit, the connection that has been idle longest is closed for a new one."""
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    request = b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n"

    def served_on(connection: socket.socket) -> bool:
        connection.sendall(request)
        with HTTPResponse(connection) as response:
            response.begin()
            return response.read() != b"" and response.status == 200  # the body may arrive after the headers

    with served(settings) as address:
        connections: list[Any] = []
        for _ in range(4):
            connections.append(socket.create_connection(address, timeout=5))
            assert served_on(connections[-1])
        with pytest.raises(ConnectionError):
            served_on(connections[0])
        assert all(served_on(one) for one in connections[1:])
        for one in connections:
            one.close()


def test_unknown_keys_are_looked_up_with_a_limit(settings: Settings, world: World) -> None:
    """Only a few unknown API keys are looked up concurrently, however many requests arrive.

    If too many requests wait for a look-up of their API key, further requests get 429.
    """
    counted = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name = 'followups-web' AND datname = current_database() AND wait_event_type = 'Lock'"
    )
    with ExitStack() as stack, served(settings) as address:
        with world.engine.connect() as held:
            held.execute(text("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE"))
            unknown_keys = []
            for number in range(140):
                stranger = stack.enter_context(socket.create_connection(address, timeout=10))
                key = f"fup_{number:043}"
                stranger.sendall(f"GET {FOLLOW_UPS} HTTP/1.1\r\nhost: a\r\nauthorization: {key}\r\n\r\n".encode())
                unknown_keys.append(stranger)
            refused = unknown_keys[-1].recv(4096)
            assert refused.startswith(b"HTTP/1.1 429")
            assert b"retry-after" in refused.lower()
            wait_until(lambda: world.scalar(counted) == UNKNOWN_KEYS_SHARE, within=5)
        assert unknown_keys[0].recv(4096).startswith(b"HTTP/1.1 401")
        with client_of(address, key_of(world)[1]) as client:
            assert client.get(FOLLOW_UPS).status_code == 200
