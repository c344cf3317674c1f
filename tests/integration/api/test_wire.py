"""HTTP/1.1 on the wire: which requests are accepted, and how long the server waits for slow clients."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import h11
import pytest

from followups.api import gate, server
from stack import wait_until
from web import CHAT_MESSAGES, FOLLOW_UPS, Api, key_of, served

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from followups.settings import Settings
    from world import World

HEALTH = b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n"


def address_of(api: Api) -> tuple[str, int]:
    """Return the API's host and port."""
    url = urlsplit(api.url)
    assert url.hostname
    return url.hostname, url.port or 80


def answers(address: tuple[str, int], sent: bytes, methods: Sequence[str], key: str = "", most: int = 1) -> list[int]:
    """Send the bytes and return the statuses of the responses, as parsed by h11.

    ``methods`` lists the requests' HTTP methods in order; the last one applies to all further requests. After ``most``
    responses, the server must be silent for a moment. Every ``KEY`` in ``sent`` is replaced by the API key.
    """
    statuses: list[int] = []
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(sent.replace(b"KEY", key.encode()))
        pending = b""
        while pending or (pending := piece_of(connection, 10 if len(statuses) < most else 0.1)):
            client = h11.Connection(h11.CLIENT)
            method = methods[min(len(statuses), len(methods) - 1)]
            client.send(h11.Request(method=method, target="/", headers=[("host", "a")]))
            client.send(h11.EndOfMessage())
            client.receive_data(pending)
            while not isinstance(event := client.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Response):
                    statuses.append(event.status_code)
                elif event is h11.NEED_DATA:
                    client.receive_data(piece_of(connection, 10))
            pending = client.trailing_data[0]
            if client.their_state is h11.MUST_CLOSE:
                assert not pending
                assert not piece_of(connection, 10)
    return statuses


def piece_of(connection: socket.socket, wait: float) -> bytes:
    """Return the next bytes received, or empty bytes after a close or a timeout."""
    connection.settimeout(wait)
    try:
        return connection.recv(65_536)
    except (TimeoutError, ConnectionResetError):
        return b""


def posted(head: bytes, body: bytes = b"") -> bytes:
    """Return a POST request with an API key."""
    return b"POST /api/v1/chat-messages HTTP/1.1\r\nhost: a\r\nauthorization: KEY\r\n" + head + b"\r\n\r\n" + body


CHUNKED = b"transfer-encoding: chunked"


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (b"GET /healthz HTTP/1.1\r\n\r\n", [400]),
        (b"GET /healthz HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n", [400]),
        (b"GET /healthz HTTP/1.0\r\n\r\n", [200]),
        (b"GET /healthz HTTP/2.0\r\nhost: a\r\n\r\n", [400]),
        (b"GET /healthz HTTP/1.1\r\nhost: a\r\nx : y\r\n\r\n", [400]),
        (b"GET /healthz HTTP/1.1\r\nhost: a\r\nx: y\r\n z\r\n\r\n", [400]),
        (b"GET /healthz HTTP/1.1\r\nhost: a\r\nx: \0\r\n\r\n", [400]),
        (b"GET /healthz HTTP/1.1\nhost: a\n\n", [400]),
        (b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n", [400]),
        (b"GET http://other/healthz HTTP/1.1\r\nhost: a\r\n\r\n", [200]),
        (b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n" + HEALTH, [400]),
        (b"\r\n\r\n" + HEALTH, [200]),
        (posted(b"content-length: 2\r\ncontent-length: 2", b"{}"), [400]),
        (posted(b"content-length: +2", b"{}"), [400]),
        (posted(b"content-length: 2\r\nauthorization: KEY", b"{}"), [400]),
        (posted(b"content-length: 2\r\nidempotency-key: a\r\nidempotency-key: b", b"{}"), [400]),
        (posted(b"content-length: 2\r\ncontent-encoding: gzip\r\ncontent-encoding: identity", b"{}"), [400]),
        (posted(CHUNKED, b"2\r\n{}\r\n0\r\n\r\n").replace(b"HTTP/1.1", b"HTTP/1.0"), [400]),
        (b"GET /" + b"a" * 32_800 + b" HTTP/1.1\r\nhost: a\r\n\r\n", [431]),
        (posted(b"content-length: 2\r\n" + CHUNKED, b"0\r\n\r\n" + HEALTH), [400]),
        (posted(CHUNKED + b"\r\ncontent-length: 2", b"0\r\n\r\n" + HEALTH), [400]),
        (posted(CHUNKED + b", identity", b"0\r\n\r\n"), [400]),
        (posted(b"transfer-encoding: gzip, chunked", b"0\r\n\r\n"), [400]),
        (posted(b"transfer-encoding: xchunked", b"0\r\n\r\n"), [400]),
        (posted(CHUNKED, b"g\r\n{}\r\n0\r\n\r\n"), [400]),
        (posted(CHUNKED, b"2\n{}\n0\n\n"), [400]),
        (posted(CHUNKED, b"2;a=b\r\n{}\r\n0\r\n\r\n" + HEALTH), [422, 200]),
        (posted(CHUNKED, b"2\r\n{}\r\n0\r\nhost: b\r\nx: y\r\n\r\n" + HEALTH), [422, 200]),
        (posted(b"content-length: 2", b"{}junk\r\n\r\n"), [422, 400]),
        (posted(b"connection: upgrade\r\nupgrade: websocket\r\ncontent-length: 2", b"{}"), [400]),
        (HEALTH.replace(b"host: a", b"host: a\r\nconnection: upgrade\r\nupgrade: h2c") + HEALTH, [200, 200]),
        (HEALTH * 3, [200, 200, 200]),
        (HEALTH + b"nonsense\r\n\r\n", [200, 400]),
        (b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n" + HEALTH, [200]),
    ],
)
def test_malformed_requests(api: Api, sent: bytes, statuses: list[int]) -> None:
    """A malformed or ambiguous HTTP/1.1 request gets a 400, and the connection is closed."""
    method = "POST" if sent.startswith(b"POST") else "GET"
    assert answers(address_of(api), sent, [method], api.key, len(statuses)) == statuses


def test_answers_without_a_body(api: Api) -> None:
    """A response without a body is followed directly by the next response on the connection."""
    chat = api.chat()
    removal = f"DELETE /api/v1/chats/{chat} HTTP/1.1\r\nhost: a\r\nauthorization: KEY\r\n\r\n".encode()
    sent = HEALTH.replace(b"GET", b"HEAD") + removal + HEALTH
    assert answers(address_of(api), sent, ["HEAD", "DELETE", "GET"], api.key, 3) == [200, 204, 200]


def test_a_trailer_is_ignored(api: Api) -> None:
    """Header fields after the body are ignored, because headers are checked before the body."""
    chat = api.chat()
    for text in ("one", "two"):
        body = f'{{"chatId": "{chat}", "dueDate": "2035-01-01T00:00:00Z", "message": "{text}"}}'
        sent = posted(CHUNKED, f"{len(body):x}\r\n{body}\r\n0\r\nidempotency-key: same\r\n\r\n".encode())
        assert answers(
            address_of(api), sent.replace(CHAT_MESSAGES.encode(), FOLLOW_UPS.encode()), ["POST"], api.key
        ) == [201]


def test_pipelined_requests_are_limited(api: Api) -> None:
    """A few pipelined requests are accepted; if there are too many, the connection ends with 400."""
    statuses = answers(address_of(api), HEALTH * 2_000, ["GET"], most=server.MAX_PIPELINED)
    assert statuses[-1] == 400
    assert statuses[:-1] == [200] * len(statuses[:-1])
    assert len(statuses) <= server.MAX_PIPELINED + 2


@pytest.mark.parametrize("start", [b"GET /", b"GET /healthz HTTP/1.1\r\nhost: a\r\nx: ", HEALTH + b"GET /"])
def test_an_endless_head(api: Api, start: bytes) -> None:
    """An endless request head gets a 431 as soon as it exceeds the size limit."""
    with socket.create_connection(address_of(api), timeout=10) as connection:
        received = b""
        try:
            connection.sendall(start)
            for _ in range(20):
                connection.sendall(b"x" * 16_384)
            while piece := connection.recv(65_536):
                received += piece
        except ConnectionError:
            pass
    assert b" 431 " in received or not received  # the response can be lost if the client is still sending


def test_chunk_overhead_counts_towards_the_body(api: Api) -> None:
    """A body with too many chunks, or an endless chunk extension, is rejected as too large."""
    assert answers(address_of(api), posted(CHUNKED, b"1\r\n \r\n" * 230_000), ["POST"], api.key) == [413]
    assert answers(address_of(api), posted(CHUNKED, b"1\r\n \r\n" * 50_000), ["POST"], api.key) == [413]
    read_timeout = b"80\r\n" + b" " * 128 + b"\r\n"
    assert answers(address_of(api), posted(CHUNKED, read_timeout * 7_000 + b"0\r\n\r\n"), ["POST"], api.key) == [422]
    assert answers(address_of(api), posted(CHUNKED, b"1;" + b"x" * 1_400_000), ["POST"], api.key) == [413]


@pytest.fixture
def read_timeout(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """Serve the application with a short time limit for clients that do not read their responses."""
    monkeypatch.setattr(server, "READ_WITHIN", 0.5)
    with served(settings) as address:
        yield address


def unread(address: tuple[str, int], sent: bytes) -> socket.socket:
    """Send bytes over a new connection with a small receive window, without reading the response."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(10)
    connection.connect(address)
    connection.sendall(sent)
    return connection


def big_page(world: World, size: int = 40) -> bytes:
    """Create follow-ups with messages of maximum length; return a request that lists them."""
    chat = world.chat()
    for _ in range(size):
        world.follow_up(chat, message="\N{GRINNING FACE}" * 65_536)
    key = key_of(world)[1]
    return f"GET {FOLLOW_UPS}?pageSize={size} HTTP/1.1\r\nhost: a\r\nauthorization: {key}\r\n\r\n".encode()


def is_cut(connection: socket.socket) -> bool:
    """Read until the connection is closed, and return whether the response is incomplete."""
    received = b""
    try:
        while piece := connection.recv(1 << 20):
            received += piece
    except ConnectionResetError:
        return True
    return not received.endswith(b"]\r\n0\r\n\r\n")


def test_a_client_that_does_not_read_is_disconnected(read_timeout: tuple[str, int], world: World) -> None:
    """A client that does not read its response is disconnected, but a slow reader gets the whole response."""
    page = big_page(world)
    with unread(read_timeout, page) as silent:
        time.sleep(3)
        assert is_cut(silent)
    with unread(read_timeout, page.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        time.sleep(0.2)
        assert not is_cut(slow)


def test_unread_answers_have_a_budget(settings: Settings, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """If unread responses exceed their memory limit, a connection with an unread response is closed."""
    page = big_page(world)
    monkeypatch.setattr(server, "MAX_UNSENT", 100_000)
    with served(settings) as address, unread(address, page) as first:
        time.sleep(1)
        with unread(address, page) as second:
            assert is_cut(first) or is_cut(second)


def test_unread_connections_are_closed_at_the_limit(
    settings: Settings, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no connection is idle, a connection with an unread response is closed for a new connection."""
    page = big_page(world)
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    with served(settings) as address:
        waiting = [unread(address, page) for _ in range(3)]

        def is_served() -> bool:
            with socket.create_connection(address, timeout=5) as connection:
                try:
                    connection.sendall(HEALTH)
                    return connection.recv(4096).startswith(b"HTTP/1.1 200")
                except ConnectionError:
                    return False

        wait_until(is_served, within=20)
        for connection in waiting:
            connection.close()


def test_pipelined_bodies_share_the_budget(settings: Settings, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelined request bodies share a memory limit; memory is freed when a client disconnects."""
    monkeypatch.setattr(gate, "MAX_BUFFERED", 100_000)
    key = key_of(world)[1]
    body = posted(b"content-length: 48000", b" " * 48_000)
    with served(settings) as address:
        # the third body arrives while the first two are still in memory
        assert 503 in answers(address, body * 3, ["POST"], key, 3)
        for _ in range(3):
            with socket.create_connection(address, timeout=5) as leaving:
                leaving.sendall(body.replace(b"KEY", key.encode())[:-1])
        wait_until(lambda: answers(address, body, ["POST"], key) == [422], within=20)
