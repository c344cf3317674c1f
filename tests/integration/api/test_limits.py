"""Rate limits per API key, and limits on slow clients."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from followups.api import gate, server
from followups.store import follow_ups
from stack import wait_until
from web import FOLLOW_UPS, client_of, is_problem, key_of, served

if TYPE_CHECKING:
    from collections.abc import Iterator

    from followups.settings import Settings
    from world import World


def test_requests_per_key(settings: Settings, world: World) -> None:
    """An API key over its rate limit gets an error with Retry-After; other keys do not."""
    with served(settings.model_copy(update={"api_rate_limit": 5})) as address:
        with client_of(address, key_of(world)[1]) as client:
            answers = [client.get(FOLLOW_UPS) for _ in range(7)]
        with client_of(address, key_of(world)[1]) as client:
            assert client.get(FOLLOW_UPS).status_code == 200
    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 2
    is_problem(answers[-1], 429, "too-many-requests")
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60


def test_no_limit(settings: Settings, world: World) -> None:
    """A rate limit of 0 allows any number of requests."""
    with (
        served(settings.model_copy(update={"api_rate_limit": 0})) as address,
        client_of(address, key_of(world)[1]) as client,
    ):
        assert {client.get(FOLLOW_UPS).status_code for _ in range(20)} == {200}


def test_an_error_reveals_nothing(
    settings: Settings, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an unexpected error, the 500 response does not contain the error's text.

    The log line still shows where the error was raised, but not the error's text.
    """

    def broken(*_: object) -> None:
        message = "DETAIL: Failing row contains (secret words)"
        raise RuntimeError(message)

    monkeypatch.setattr(follow_ups.find, "steps", broken)
    with served(settings) as address, client_of(address, key_of(world)[1]) as client:
        answer = client.get(f"{FOLLOW_UPS}/{uuid4()}")
    is_problem(answer, 500, "internal")
    logged = capsys.readouterr()
    assert "request_failed" in logged.out + logged.err
    for text in (answer.text, logged.out, logged.err):
        assert "secret" not in text
        assert "Traceback" not in text


@pytest.fixture
def short_timeouts(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """Serve the application with short client timeouts and return its address."""
    monkeypatch.setattr(server, "HEADER_WITHIN", 0.1)
    monkeypatch.setattr(gate, "BODY_WITHIN", 0.1)
    with served(settings) as address:
        yield address


@pytest.fixture
def few_connections(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """Serve the application with at most three connections and return its address."""
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    with served(settings) as address:
        yield address


def dialogue(address: tuple[str, int], *sent: bytes) -> bytes:
    """Send each part after the response to the previous part; return all data received."""
    with socket.create_connection(address, timeout=5) as connection:
        received = b""
        for piece in sent:
            connection.sendall(piece)
            if piece is not sent[-1]:
                received += connection.recv(65_536)
        while piece := connection.recv(65_536):
            received += piece
    return received


GET = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        [b""],
        [b"GET /healthz HTT"],
        [b"GET /healthz HTTP/1.1\r\nhost: x\r\n"],
        [GET, b"GET /healthz HTTP/1.1\r\n"],
        [b"POST /api/v1/chat-messages HTTP/1.1\r\nhost: x\r\nauthorization: KEY\r\ncontent-length: 9\r\n\r\n{"],
    ],
    ids=["silence", "half a line", "half a header", "half a second header", "half a body"],
)
def test_slow_client(short_timeouts: tuple[str, int], world: World, sent: list[bytes]) -> None:
    """If a client does not complete its request in time, it gets a 408 and is disconnected."""
    sent = [each.replace(b"KEY", key_of(world)[1].encode()) for each in sent]
    received = dialogue(short_timeouts, *sent)
    assert b"HTTP/1.1 408 Request Timeout" in received
    assert b"application/problem+json" in received


def test_too_many_connections(few_connections: tuple[str, int], world: World) -> None:
    """If the connection limit is reached and no connection is idle, a new connection is closed.

    Connections that were opened earlier are still served.
    """
    post = b"POST /api/v1/chat-messages HTTP/1.1\r\nhost: x\r\nauthorization: KEY\r\ncontent-length: 2\r\n\r\n{"
    open_ones = [socket.create_connection(few_connections, timeout=5) for _ in range(3)]
    try:
        for connection in open_ones:
            # the server waits for the rest of the body
            connection.sendall(post.replace(b"KEY", key_of(world)[1].encode()))
        wait_until(lambda: refused_now(few_connections), within=5)
        for connection in open_ones:
            connection.sendall(b"}")
            assert b" 422 " in connection.recv(65_536)
    finally:
        for connection in open_ones:
            connection.close()


def refused_now(address: tuple[str, int]) -> bool:
    """Return whether a new connection is closed without a response."""
    with socket.create_connection(address, timeout=5) as late:
        late.settimeout(0.2)
        try:
            return refused(late)
        except TimeoutError:
            return False


def refused(connection: socket.socket) -> bool:
    """Return whether the connection ends without a response."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_too_many_waiting(settings: Settings, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """If too many requests wait, the next one is rejected with Retry-After, but probes are served."""
    with served(settings) as address, client_of(address, key_of(world)[1]) as client:
        monkeypatch.setattr(gate, "MAX_WAITING", 0)
        answer = client.get(FOLLOW_UPS)
        is_problem(answer, 503, "service-unavailable")
        assert answer.headers["retry-after"] == "1"
        assert client.get("/healthz").status_code == 200
        monkeypatch.setattr(gate, "MAX_WAITING", 1)
        assert client.get(FOLLOW_UPS).status_code == 200
