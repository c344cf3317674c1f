"""RFC 9457 error responses of a running web process, and the size limits of requests."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from web import CHAT_MESSAGES, CHATS, FOLLOW_UPS, is_problem, pointers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from web import Api

MEGABYTE = 1024 * 1024
ID = "6a1f3f0e-4f0e-4b39-8f5b-0f6a3f1f7c11"


@pytest.mark.parametrize("path", ["/", "/api/v1/nothing", f"{FOLLOW_UPS}/", f"{FOLLOW_UPS}/{ID}/x", "/docs/x", "/%00"])
def test_unknown_path(api: Api, path: str) -> None:
    """A request for an unknown path returns 404."""
    is_problem(api.get(path), 404, "not-found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", FOLLOW_UPS, "GET, HEAD, POST"),
        ("PUT", f"{FOLLOW_UPS}/{ID}", "GET, HEAD, PATCH"),
        ("GET", f"{CHATS}/{ID}", "DELETE, PUT"),
        ("GET", CHAT_MESSAGES, "POST"),
        ("POST", "/healthz", "GET, HEAD"),
        ("TRACE", FOLLOW_UPS, "GET, HEAD, POST"),
    ],
)
def test_method_not_allowed(api: Api, method: str, path: str, allowed: str) -> None:
    """An unsupported method returns 405 with a list of the supported methods."""
    answer = api.client.request(method, path)
    is_problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == allowed


def test_unknown_method(api: Api) -> None:
    """A request with an unknown HTTP method is rejected as a bad request."""
    is_problem(api.client.request("BREW", FOLLOW_UPS), 400, "bad-request")


def test_all_errors_are_listed(api: Api) -> None:
    """A 422 response points at every invalid field, not only at the first."""
    problem = is_problem(api.post(FOLLOW_UPS, {"chatId": 1, "dueDate": "soon"}), 422, "invalid-request")
    assert sorted(pointers(problem)) == ["#/chatId", "#/dueDate", "#/message"]
    assert all(error["detail"] for error in problem["errors"])


def test_body_too_large(api: Api) -> None:
    """A body above the size limit is rejected with 413, even if its length is not declared.

    The web process continues to serve requests.
    """
    for content in (b"x" * (MEGABYTE + 1), chunks(MEGABYTE + 1)):
        answer = api.client.post(FOLLOW_UPS, content=content)
        is_problem(answer, 413, "request-entity-too-large")
        assert answer.headers["connection"] == "close"
    assert api.client.post(FOLLOW_UPS, content=b" " * MEGABYTE).status_code == 422


def chunks(size: int) -> Iterator[bytes]:
    """Yield the given number of bytes, divided into pieces."""
    for _ in range(0, size, 65_536):
        yield b"x" * 65_536


def test_endless_body_is_not_read(api: Api) -> None:
    """If the declared length exceeds the limit, the request is rejected before its body is read."""
    with connect(api) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
        assert b" 413 " in connection.recv(100)


@pytest.mark.parametrize("pieces", [1, 2])
def test_header_too_long(api: Api, pieces: int) -> None:
    """If a header exceeds the size limit, the request is rejected with 431 before it is complete."""
    header = b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 40_000
    with connect(api) as connection:
        connection.sendall(header + (b"\r\n\r\n" if pieces == 1 else b""))
        head, body = received(connection)
    assert b" 431 " in head
    assert json.loads(body)["type"].endswith("/request-header-fields-too-large")


def test_endless_header(api: Api) -> None:
    """The server closes the connection of a client that sends an endless header."""
    endless = b"GET /healthz HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 100 * MEGABYTE
    with connect(api) as connection, pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
        connection.sendall(endless)
    assert api.get("/healthz").status_code == 200


@pytest.mark.parametrize("line", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\xf8\r\n\r\n"])
def test_data_that_is_not_http(api: Api, line: bytes) -> None:
    """If a client sends data that is not HTTP, it gets 400 with an RFC 9457 problem."""
    with connect(api) as connection:
        connection.sendall(line)
        head, body = received(connection)
    assert b" 400 " in head
    assert json.loads(body)["status"] == 400


def test_many_silent_connections(api: Api) -> None:
    """Clients that send only the beginning of a request do not delay any other client."""
    silent = [connect(api) for _ in range(300)]
    try:
        for connection in silent:
            connection.sendall(b"POST /api/v1/chat-messages HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert api.create()
        assert api.get("/healthz").status_code == 200
    finally:
        for connection in silent:
            connection.close()


def test_client_that_hangs_up(api: Api) -> None:
    """A client that disconnects during its request does not affect the process."""
    with connect(api) as connection:
        connection.sendall(b"POST /api/v1/chat-messages HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    assert api.get("/healthz").status_code == 200


def connect(api: Api) -> socket.socket:
    """Return a connection to the web process."""
    place = urlsplit(api.url)
    return socket.create_connection((place.hostname, place.port), timeout=5)


def received(connection: socket.socket) -> tuple[bytes, bytes]:
    """Receive until the process closes the connection; return the response's head and body."""
    data = b""
    while piece := connection.recv(65_536):
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return head, body
