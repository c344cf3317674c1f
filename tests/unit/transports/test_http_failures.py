"""Failures of the transport ``http``: a call that fails before sending its request is retried.

If a call fails after its request has been sent, the outcome is unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import ssl
import struct
import time
import zlib
from typing import TYPE_CHECKING

import pytest
import trustme

from followups.transports.http import HttpTransport
from followups.transports.port import Outcome, Rejected, Retry, Sent, Unknown
from unit.transports.doubles import (
    MESSAGE,
    Request,
    a_delivery,
    answer,
    certified,
    listening,
    opened,
    scripted,
    settings_for,
    stay_silent,
)

if TYPE_CHECKING:
    from pathlib import Path

MESSAGE_ID = "6f1b1f0e-3a53-4f6e-9a5f-1d2b3c4d5e6f"
NAMED = f'{{"chatMessageId": "{MESSAGE_ID}"}}'.encode()


async def outcome_at(url: str, **settings: object) -> Outcome:
    """Send once to ``url``, by default within 10 s, and return the outcome."""
    async with opened(HttpTransport(settings_for(url, **({"transport_timeout": 10} | settings)))) as transport:
        return await transport.send(a_delivery())


async def test_a_refused_connection_is_retried(free_port: int) -> None:
    """A call to a port without a listener is retried, since nothing was sent."""
    assert await outcome_at(f"http://127.0.0.1:{free_port}") == Retry("no connection: Connection refused")


async def test_an_unknown_host_is_retried() -> None:
    """A call to an unknown host name is retried."""
    assert await outcome_at("http://nowhere.invalid") == Retry("no connection: the host name was not found (DNS)")


async def test_a_failed_tls_handshake_is_retried(no_tls: str) -> None:
    """If the TLS handshake fails, the call is retried, because nothing has been sent."""
    outcome = await outcome_at(no_tls)
    assert isinstance(outcome, Retry)
    assert outcome.detail == "no connection: TLS failed (wrong version number)"


@pytest.mark.parametrize("limit", [0.2, 0.0002])
async def test_a_timeout_while_connecting_is_retried(limit: float) -> None:
    """If connecting takes longer than the timeout, the call is retried, because nothing was sent.

    A timeout of less than a millisecond is also a timeout, although libcurl counts whole milliseconds.
    """
    with socket.create_server(("127.0.0.1", 0)) as silent:
        outcome = await outcome_at(f"https://127.0.0.1:{silent.getsockname()[1]}", transport_timeout=limit)
    assert outcome == Retry(f"no connection within {limit} s")


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "end"])
@pytest.mark.parametrize(
    ("version", "part"),
    [
        (ssl.TLSVersion.TLSv1_2, 0),
        (ssl.TLSVersion.TLSv1_2, 0.5),
        (ssl.TLSVersion.TLSv1_2, 1),
        (ssl.TLSVersion.TLSv1_3, 0.5),
    ],
)
async def test_a_connection_that_breaks_during_the_tls_handshake_is_retried(
    version: ssl.TLSVersion, part: float, authority: trustme.CA, *, reset: bool
) -> None:
    """If the connection breaks during the TLS handshake, nothing was sent, so the call is retried."""
    secure = certified(authority)
    secure.maximum_version = version

    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        incoming.write(await reader.read(65_536))
        with contextlib.suppress(ssl.SSLWantReadError):
            secure.wrap_bio(incoming, outgoing, server_side=True).do_handshake()
        messages = outgoing.read()
        writer.write(messages[: round(part * len(messages))])
        await writer.drain()
        await asyncio.sleep(0.02)  # until the client has read them
        if reset:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    async with listening(break_off) as url:
        outcome = await outcome_at(url.replace("http:", "https:"))
    assert isinstance(outcome, Retry)
    assert outcome.detail.startswith("no connection: TLS failed (")


async def test_no_answer_in_time_is_unknown() -> None:
    """If the timeout expires after the request was sent, the outcome is unknown."""
    async with scripted(stay_silent) as server:
        began = time.monotonic()
        assert await outcome_at(server.url, transport_timeout=0.2) == Unknown("no answer within 0.2 s")
        assert 0.19 < time.monotonic() - began < 5


async def test_no_answer_on_a_kept_connection_is_unknown() -> None:
    """If a kept connection stays silent until the timeout, the outcome is unknown and nothing is sent again."""
    async with (
        scripted(answer(200)) as server,
        opened(HttpTransport(settings_for(server.url, transport_timeout=0.4))) as transport,
    ):
        assert await transport.send(a_delivery()) == Sent(None, 200)
        server.answer = stay_silent
        assert await transport.send(a_delivery()) == Unknown("no answer within 0.4 s")
        assert (server.connections, len(server.requests)) == (1, 2)


@pytest.mark.parametrize(
    ("start", "piece", "outcome"),
    [
        (b"", b"HTTP/1.1 102 Processing\r\n\r\n", Unknown("no answer within 0.4 s")),
        (b"HTTP/1.1 200 OK\r\nx-slow: ", b"x", Unknown("no answer within 0.4 s")),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" ", Sent(None, 200, "the body of the answer did not arrive in time")),
    ],
    ids=["informational", "header", "body"],
)
async def test_an_answer_in_slow_drips_ends_at_the_timeout(start: bytes, piece: bytes, outcome: Outcome) -> None:
    """An endpoint that answers a few bytes at a time costs its call the timeout; a complete head counts."""

    async def drip(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(start)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)

    async with scripted(drip) as server:
        began = time.monotonic()
        assert await outcome_at(server.url, transport_timeout=0.4) == outcome
        assert 0.39 < time.monotonic() - began < 5
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "fragment",
    [b"", b"HTTP/1.1 20", b"HTTP/1.1 200 OK\r\ncontent-", b"\x16\x03\x01 no HTTP at all\r\n\r\n", b"\x00" * 100_000],
    ids=["nothing", "half a status line", "half the headers", "no HTTP", "NULs"],
)
@pytest.mark.parametrize("deduplicates", [True, False])
async def test_an_answer_that_breaks_off_before_its_body_is_unknown(fragment: bytes, *, deduplicates: bool) -> None:
    """If the head of a response is incomplete, the outcome is unknown and the request is not repeated."""

    async def break_off(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(fragment)

    async with scripted(break_off) as server:
        outcome = await outcome_at(server.url, transport_deduplicates=deduplicates)
        assert isinstance(outcome, Unknown)
        assert outcome.detail.startswith(("the connection broke before an answer arrived", "no valid answer arrived"))
        assert len(server.requests) == 1


async def test_a_reset_connection_is_unknown() -> None:
    """If the connection is reset after the request has been sent, the outcome is unknown."""

    async def reset(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.transport.abort()

    async with scripted(reset) as server:
        assert isinstance(await outcome_at(server.url), Unknown)


@pytest.fixture(params=["plain", "tls"])
def context(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ssl.SSLContext | None:
    """Return a TLS context that the client trusts, or None for plain HTTP."""
    if request.param == "plain":
        return None
    authority, made = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(made)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return made


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "fresh"])
@pytest.mark.parametrize("reset", [True, False], ids=["reset", "end"])
@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (b"", Unknown),
        (b"HTTP/1.1 200 OK\r\ncontent-", Unknown),
        (b"HTTP/1.1 100 Continue\r\n\r\n", Unknown),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n{", Sent),
        (b"HTTP/1.1 500 No\r\ncontent-length: 999\r\n\r\n{", Retry),
    ],
    ids=["nothing", "headers", "informational", "body", "body of an error"],
)
async def test_however_a_connection_breaks_the_request_went_out_once(
    said: bytes, outcome: type, context: ssl.SSLContext | None, *, kept: bool, reset: bool
) -> None:
    """If a new or reused connection breaks, the outcome depends on the data received before.

    A request is not repeated on another connection.
    """

    async def break_off(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(said)
        await asyncio.sleep(0.02)
        if reset:
            writer.transport.abort()

    async with scripted(answer(200), context) as server:
        async with opened(HttpTransport(settings_for(server.url))) as transport:
            if kept:
                assert await transport.send(a_delivery()) == Sent(None, 200)
            server.answer = break_off
            assert isinstance(await transport.send(a_delivery()), outcome)
        assert (server.connections, len(server.requests)) == (1, 1 + kept)


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "end"])
async def test_an_answer_before_the_end_of_the_request_counts(context: ssl.SSLContext | None, *, reset: bool) -> None:
    """If the receiver answers before it has read the whole request, and then disconnects, the answer counts."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read(1000)
        writer.write(answer(413, b"too large", connection="close"))
        await writer.drain()
        if reset:
            await asyncio.sleep(0.02)
            writer.transport.abort()

    connections = 0
    async with listening(refuse, context) as url, opened(HttpTransport(settings_for(url))) as transport:
        for _ in range(2):
            outcome = await transport.send(a_delivery(message="x" * 4_000_000))
            assert outcome == Rejected("HTTP 413 too large", 413)
    assert connections == 2


@pytest.mark.parametrize(
    ("head", "outcome"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n" + NAMED, Sent),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nff\r\n{", Sent),
        (b"HTTP/1.1 403 No\r\ncontent-length: 999\r\n\r\nblocked", Rejected),
        (b"HTTP/1.1 500 No\r\ncontent-length: 999\r\n\r\nblocked", Retry),
    ],
)
async def test_the_status_decides_when_the_body_breaks_off(head: bytes, outcome: type) -> None:
    """If a response's body is cut off, only the message id is lost."""

    async def break_off(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(head)

    async with scripted(break_off) as server:
        received = await outcome_at(server.url)
    assert isinstance(received, outcome)
    if isinstance(received, Sent):
        assert received.chat_message_id is None
        assert received.detail.startswith("the body of the answer is incomplete")


async def test_the_status_decides_when_the_body_is_slow() -> None:
    """If the timeout expires during a 200 response's body, the message counts as sent."""

    async def dawdle(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n" + NAMED)
        await asyncio.sleep(60)

    async with scripted(dawdle) as server:
        outcome = await outcome_at(server.url, transport_timeout=0.5)
    assert outcome == Sent(None, 200, "the body of the answer did not arrive in time")


async def test_a_slow_rejection_keeps_the_received_part() -> None:
    """If a rejection's body arrives too slowly, the reason keeps the part received in time."""

    async def dawdle(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(b"HTTP/1.1 403 No\r\ncontent-length: 999\r\n\r\nblocked")
        await asyncio.sleep(60)

    async with scripted(dawdle) as server:
        assert await outcome_at(server.url, transport_timeout=0.5) == Rejected("HTTP 403 blocked", 403)


async def test_no_more_than_64_kib_of_an_answer_is_read() -> None:
    """If a response exceeds 64 KiB, the connection is closed and only the status counts."""
    written = 0

    async def flood(writer: asyncio.StreamWriter, _request: Request) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n" + NAMED)
        with contextlib.suppress(ConnectionError):
            while written < 500_000_000:
                writer.write(b" " * 65_536)
                written += 65_536
                await writer.drain()

    async with scripted(flood) as server:
        outcome = await outcome_at(server.url)
    assert outcome == Sent(None, 200, "the body of the answer is longer than 64 KiB")
    assert written < 50_000_000


async def test_64_kib_are_read() -> None:
    """If a response body has exactly the maximum size, it is read completely."""
    async with scripted(answer(200, NAMED.ljust(65_536))) as server:
        outcome = await outcome_at(server.url)
    assert isinstance(outcome, Sent)
    assert str(outcome.chat_message_id) == MESSAGE_ID


async def test_a_compressed_answer_is_not_asked_for_and_understood() -> None:
    """The transport does not request compression, but decompresses a compressed response."""
    async with scripted(answer(200, gzip.compress(NAMED), content_encoding="gzip")) as server:
        outcome = await outcome_at(server.url)
        assert isinstance(outcome, Sent)
        assert str(outcome.chat_message_id) == MESSAGE_ID
        assert server.requests[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("body", [b"\x1f\x8b\x08garbage", gzip.compress(NAMED, mtime=0)[:20], b"x\x9cgarbage"])
async def test_an_invalid_compressed_answer_is_sent(body: bytes) -> None:
    """If a 2xx response cannot be decompressed, the message still counts as sent."""
    async with scripted(answer(200, body, content_encoding="gzip")) as server:
        assert await outcome_at(server.url) == Sent(None, 200, "the body of the answer cannot be decompressed")


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_compressed_reason_is_understood(*, chunked: bool) -> None:
    """The reason of a rejection is read from a compressed body, too."""
    body = gzip.compress(b"blocked by the recipient")
    headers = b"HTTP/1.1 403 No\r\ncontent-encoding: gzip\r\n"
    if chunked:
        reply = headers + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        reply = headers + b"content-length: %d\r\n\r\n%b" % (len(body), body)
    async with scripted(reply) as server:
        assert await outcome_at(server.url) == Rejected("HTTP 403 blocked by the recipient", 403)


async def test_an_uncompressed_body_may_look_compressed() -> None:
    """A text that only begins like a compressed body is read as it is."""
    async with scripted(answer(403, b"x^2 is not allowed")) as server:
        assert await outcome_at(server.url) == Rejected("HTTP 403 x^2 is not allowed", 403)


@pytest.mark.parametrize("encoding", ["br", "zstd", "unknown"])
async def test_another_compression_is_not_json(encoding: str) -> None:
    """If a 2xx response has another compression than gzip or deflate, the message counts as sent, without an id."""
    async with scripted(answer(200, b"\x8b\x02\x80{}\x03", content_encoding=encoding)) as server:
        assert await outcome_at(server.url) == Sent(None, 200, "the body of the answer is not JSON")


async def test_one_layer_of_compression_is_removed() -> None:
    """A response may be compressed with deflate; of several layers, only one is removed.

    libcurl would remove several, and could spend all its time on a few bytes.
    """
    levels = [(zlib.compress(NAMED, level), True) for level in range(10)]
    for body, names in (*levels, (gzip.compress(gzip.compress(NAMED)), False)):
        async with scripted(answer(200, body, content_encoding="gzip, gzip")) as server:
            outcome = await outcome_at(server.url)
            assert isinstance(outcome, Sent)
            assert bool(outcome.chat_message_id) == names


async def test_a_decompressed_answer_is_bounded() -> None:
    """If a compressed answer expands to many MiB, at most 64 KiB are read."""
    async with scripted(answer(200, gzip.compress(bytes(50_000_000)), content_encoding="gzip")) as server:
        assert await outcome_at(server.url) == Sent(None, 200, "the body of the answer is longer than 64 KiB")


async def test_an_informational_answer_is_not_final() -> None:
    """After a 103 Early Hints response, only the final response counts."""
    async with scripted(b"HTTP/1.1 103 Early Hints\r\n\r\n" + answer(200, NAMED)) as server:
        assert isinstance(await outcome_at(server.url), Sent)


async def test_the_next_call_succeeds() -> None:
    """After a broken connection, the next call succeeds."""
    broken = True

    async def once(writer: asyncio.StreamWriter, _request: Request) -> None:
        if not broken:
            writer.write(answer(200))

    async with scripted(once) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        assert isinstance(await transport.send(a_delivery()), Unknown)
        broken = False
        assert await transport.send(a_delivery()) == Sent(None, 200)


async def test_an_unsolicited_response_is_discarded() -> None:
    """If bytes arrive between two calls, neither call is affected and the connection is not reused."""
    async with scripted(answer(200)) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        assert await transport.send(a_delivery()) == Sent(None, 200)
        server.writer.write(answer(200, NAMED))
        await asyncio.sleep(0.1)
        assert await transport.send(a_delivery()) == Sent(None, 200)
        assert (server.connections, len(server.requests)) == (2, 2)


async def test_closing_ends_calls_in_flight_as_unknown() -> None:
    """If `close` interrupts a call, the outcome of the call is unknown."""
    async with scripted(stay_silent) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        call = asyncio.create_task(transport.send(a_delivery()))
        await server.requested.wait()
        await transport.close()
        outcome = await call
    assert isinstance(outcome, Unknown)
    assert MESSAGE not in repr(outcome)


@pytest.mark.parametrize("steps", range(1, 10))
async def test_a_frozen_call_sends_nothing_after_its_deadline(steps: int) -> None:
    """If a call is frozen at any step, it sends nothing after its deadline.

    After the deadline, another worker may hold the lease.
    """
    came: list[float] = []

    def listen() -> None:  # this function runs in a thread that is not frozen
        connection, _ = silent.accept()
        with connection:
            connection.settimeout(5)
            if connection.recv(1):
                came.append(time.monotonic())

    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(5)
        listening = loop.run_in_executor(None, listen)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        async with opened(HttpTransport(settings_for(url, transport_timeout=0.2))) as transport:
            sending = loop.create_task(transport.send(a_delivery()))
            for _ in range(steps):  # iterations of the event loop
                await asyncio.sleep(0)
            time.sleep(0.3)  # noqa: ASYNC251 - the test freezes the whole process
            woken = time.monotonic()
            outcome = await sending
        with contextlib.suppress(TimeoutError):
            await listening
    assert came or outcome == Retry("no connection within 0.2 s")
    assert isinstance(outcome, Retry) == (not came)
    assert all(moment < woken for moment in came)
