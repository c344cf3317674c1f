"""Responses to the transport ``http`` on the wire: split, malformed, endless or unsolicited."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from followups.transports.http import HttpTransport
from followups.transports.http_exchange import HEAD_LIMIT
from followups.transports.port import Outcome, Rejected, Retry, Sent, Snoozed, Unknown
from unit.transports.doubles import Request, a_delivery, answer, opened, scripted, settings_for

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

MESSAGE_ID = "6f1b1f0e-3a53-4f6e-9a5f-1d2b3c4d5e6f"
NAMED = f'{{"chatMessageId": "{MESSAGE_ID}"}}'.encode()
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def in_pieces(answer: bytes, size: int) -> Callable[[asyncio.StreamWriter, Request], Awaitable[None]]:
    """Write a response in pieces of the given number of bytes."""

    async def write(writer: asyncio.StreamWriter, _request: Request) -> None:
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(answer), size):
                writer.write(answer[start : start + size])
                await writer.drain()
                await asyncio.sleep(0.001)
            await asyncio.sleep(60)

    return write


def endless(start: bytes, piece: bytes) -> Callable[[asyncio.StreamWriter, Request], Awaitable[None]]:
    """Write an endless response."""

    async def write(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(start)
        with contextlib.suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)  # because `drain` may return without yielding to the event loop

    return write


async def outcome_of(
    reply: bytes | Callable[[asyncio.StreamWriter, Request], Awaitable[None]], **settings: object
) -> Outcome:
    """Send one message to a server that responds with ``reply``, and return the outcome."""
    async with scripted(reply) as server, opened(HttpTransport(settings_for(server.url, **settings))) as transport:
        return await transport.send(a_delivery())


def names(outcome: Outcome) -> bool:
    """Return whether the outcome is `Sent` with the expected message id."""
    return isinstance(outcome, Sent) and str(outcome.chat_message_id) == MESSAGE_ID


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize(
    "reply",
    [
        answer(200, NAMED),
        b"HTTP/1.1 100 Continue\r\n\r\n" + answer(200, NAMED),
        CHUNKED + b"5;a=b\r\n" + NAMED[:5] + b"\r\n%x\r\n%s\r\n0\r\ndate: x\r\n\r\n" % (len(NAMED) - 5, NAMED[5:]),
    ],
    ids=["content-length", "informational first", "chunked"],
)
async def test_an_answer_may_come_in_pieces(reply: bytes, size: int) -> None:
    """A response may be split into segments at any byte."""
    assert names(await outcome_of(in_pieces(reply, size)))


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\ncontent-length: %d\n\n%s" % (len(NAMED), NAMED),
        b"HTTP/1.1 200\r\ncontent-length: %d\r\n\r\n%s" % (len(NAMED), NAMED),
        b"HTTP/1.1 200 OK\r\nx-odd: \x01\xff\r\n folded\r\ncontent-length: %d\r\n\r\n%s" % (len(NAMED), NAMED),
        CHUNKED + b"%x  \r\n%s\r\n0\r\n\r\n" % (len(NAMED), NAMED),
    ],
    ids=["bare LF", "no reason", "odd headers", "spaces after the chunk size"],
)
async def test_a_slightly_malformed_answer_is_accepted(reply: bytes) -> None:
    """If a response has minor flaws, the transport accepts it and keeps the connection."""
    async with scripted(reply) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        assert names(await transport.send(a_delivery()))
        assert names(await transport.send(a_delivery()))
        assert server.connections == 1


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_a_body_without_a_length_ends_with_the_connection(version: bytes) -> None:
    """A body without content-length or chunks ends when the connection is closed."""

    async def reply(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(b"HTTP/%s 200 OK\r\n\r\n" % version + NAMED[:10])
        await asyncio.sleep(0.01)
        writer.write(NAMED[10:])

    assert names(await outcome_of(reply))


@pytest.mark.parametrize("size", [HEAD_LIMIT, 10_000])
async def test_the_status_counts_if_the_head_is_too_long(size: int) -> None:
    """If a head is longer than 64 KiB, its status counts, whether the head arrives whole or in pieces."""
    reply = b"HTTP/1.1 200 OK\r\nx-long: " + b"x" * HEAD_LIMIT + b"\r\ncontent-length: 0\r\n\r\n"
    expected = Sent(None, 200, "the header of the answer is longer than 64 KiB")
    assert await outcome_of(in_pieces(reply, size)) == expected
    assert await outcome_of(reply) == expected


@pytest.mark.parametrize(
    "headers",
    [
        "content-length: abc",
        "content-length: -1",
        "content-length: ",
        "content-length: 1\r\ncontent-length: 2",
        "transfer-encoding: gzip, chunked",
        "x-nul: \0",
        "no colon",
    ],
)
async def test_the_status_counts_if_a_header_is_invalid(headers: str) -> None:
    """If libcurl rejects a header, the status before it counts, and the connection is closed."""
    flaw = "a header of the answer is invalid"
    for status, expected in (
        (200, Sent(None, 200, flaw)),
        (403, Rejected("HTTP 403", 403)),
        (429, Snoozed("HTTP 429", timedelta(seconds=7), 429)),
        (500, Retry("HTTP 500", timedelta(seconds=7), 500)),
    ):
        reply = f"HTTP/1.1 {status} x\r\nretry-after: 7\r\n{headers}\r\n\r\nx".encode()
        async with scripted(reply) as server, opened(HttpTransport(settings_for(server.url))) as transport:
            for _ in range(2):
                assert await transport.send(a_delivery()) == expected
            assert (server.connections, len(server.requests)) == (2, 2)


async def test_a_head_that_is_cut_off_is_unknown() -> None:
    """If the connection ends within the head of a response, the outcome is unknown."""

    async def cut_off(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nserver: x\r\n")

    outcome = await outcome_of(cut_off)
    assert outcome == Unknown("the connection broke before an answer arrived (it ended within the header)")


@pytest.mark.parametrize("line", ["103 x", "101 x"])
async def test_an_informational_status_is_no_answer(line: str) -> None:
    """If a header of an informational response is invalid, the outcome is unknown."""
    assert isinstance(await outcome_of(f"HTTP/1.1 {line}\r\nno colon\r\n\r\n".encode()), Unknown)


@pytest.mark.parametrize("status", ["2000", "1000", "0200", "099", "600", "999", "200OK", "200.5"])
async def test_an_invalid_status_is_unknown(status: str, capfd: pytest.CaptureFixture[str]) -> None:
    """If the status is not a number from 100 to 599, the outcome is unknown."""
    outcome = await outcome_of(answer(status, NAMED))
    assert outcome == Unknown("no valid answer arrived (the status line is invalid)")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "line",
    ["HTTP/1.1 99 x", "HTTP/1.1 20 x", "HTTP/1.1", "HTTP/1.7 200 OK", "ICY 200 OK", "220 ready"],
)
async def test_an_answer_that_is_not_http_is_unknown(line: str) -> None:
    """If libcurl cannot read a response as HTTP, the outcome is unknown."""
    outcome = await outcome_of(f"{line}\r\ncontent-length: 0\r\n\r\n".encode())
    assert outcome == Unknown("no valid answer arrived (what arrived is not HTTP)")


async def test_an_empty_head_is_rejected(capfd: pytest.CaptureFixture[str]) -> None:
    """A response that begins with an empty line is rejected without a traceback."""
    outcome = await outcome_of(b"\r\n" + answer(200))
    assert outcome == Unknown("no valid answer arrived (the header of the answer is empty)")
    assert capfd.readouterr().err == ""


async def test_a_date_is_compared_with_the_receivers_clock() -> None:
    """A Retry-After date from the receiver is compared with the receiver's own Date header."""
    headers = {"retry-after": "Sun, 01 Mar 2026 12:00:30 GMT", "date": "Sun, 01 Mar 2026 12:00:20 GMT"}
    assert await outcome_of(answer(503, **headers)) == Snoozed("HTTP 503", timedelta(seconds=10), 503)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
@pytest.mark.parametrize(
    ("value", "after"),
    [
        ("7", timedelta(seconds=7)),
        ("Sun, 01 Mar 2026 11:00:00 GMT", timedelta(seconds=1)),
        ("Sun, 01 Mar 2026 12:00:50 GMT", timedelta(seconds=30)),
        ("9" * 30, timedelta(hours=24)),
        ("Wed, 01 Mar 2028 12:00:00 GMT", timedelta(hours=24)),
        ("soon", None),
        ("-5", None),
    ],
    ids=["seconds", "past", "future", "huge number", "huge date", "malformed", "negative"],
)
async def test_retry_after_in_each_form(status: int, value: str, after: timedelta | None) -> None:
    """Retry-After counts with each status that allows a retry; an invalid value is ignored."""
    outcome = await outcome_of(answer(status, retry_after=value, date="Sun, 01 Mar 2026 12:00:20 GMT"))
    snoozed = status == 429 or (status == 503 and after is not None)
    assert outcome == (Snoozed if snoozed else Retry)(f"HTTP {status}", after, status)


async def test_a_long_head_is_read() -> None:
    """A response head of up to 64 KiB is read, however long the body is."""
    reply = answer(200, NAMED.ljust(65_536), x_long="x" * (HEAD_LIMIT - 100))
    assert names(await outcome_of(reply))


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 ", b"HTTP/1.1 103 x\r\n\r\n", b"HTTP/1.1 200 OK\r\nx-long: "])
async def test_reading_of_an_endless_head_stops(start: bytes) -> None:
    """The transport stops reading an endless response head long before the timeout.

    A complete status line counts.
    """
    reply = endless(start, b"HTTP/1.1 103 x\r\n\r\n" if start.endswith(b"\n") else b"x" * 10_000)
    assert await outcome_of(reply) == (
        Sent(None, 200, "the header of the answer is longer than 64 KiB")
        if b"200 OK" in start
        else Unknown("no valid answer arrived (the header of the answer is longer than 64 KiB)")
    )


@pytest.mark.parametrize(
    ("start", "piece"),
    [(b"0\r\nx-trailer: ", b"x" * 10_000), (b"0\r\n", b"x: y\r\n" * 1_000), (b"", b"1;x\r\nx\r\n" * 1_000)],
)
async def test_reading_of_endless_chunks_stops(start: bytes, piece: bytes) -> None:
    """If a response has endless trailers or chunks, the transport stops reading and uses the status."""
    outcome = await outcome_of(endless(CHUNKED + start, piece))
    assert outcome == Sent(None, 200, "the body of the answer is longer than 64 KiB")


async def test_garbage_in_the_body_does_not_change_the_status() -> None:
    """If garbage follows a response, the outcome still depends only on the status."""
    outcome = await outcome_of(CHUNKED + b"no number\r\n")
    assert isinstance(outcome, Sent)
    assert outcome.detail.startswith("the body of the answer is incomplete")


@pytest.mark.parametrize("headers", [{}, {"connection": "upgrade", "upgrade": "h2c"}])
async def test_a_change_of_protocols_is_a_rejection(headers: dict[str, str]) -> None:
    """An unrequested 101 response counts as a rejection, and its connection is closed."""
    async with (
        scripted(answer(101, **headers) + b"\x00\x01") as server,
        opened(HttpTransport(settings_for(server.url))) as transport,
    ):
        for _ in range(2):
            assert await transport.send(a_delivery()) == Rejected("HTTP 101", 101)
        assert server.connections == 2


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_that_has_no_body_is_complete_with_its_head(status: int) -> None:
    """A 204 or 304 response has no body, whatever its headers contain."""
    outcome = await outcome_of(b"HTTP/1.1 %d No\r\nx: y\r\n\r\n" % status)
    assert outcome == (Sent(None, 204) if status == 204 else Rejected("HTTP 304", 304))


async def test_a_trailer_is_ignored() -> None:
    """Trailers after a response body have no effect."""
    reply = b"HTTP/1.1 503 No\r\ntransfer-encoding: chunked\r\n\r\n0\r\nretry-after: 7\r\n\r\n"
    outcome = await outcome_of(reply)
    assert outcome.after is None  # type: ignore[union-attr]


async def test_connections_are_kept_under_tls(context: ssl.SSLContext) -> None:
    """Consecutive calls over TLS share one connection until the receiver closes it."""
    async with (
        scripted(answer(200, NAMED), context) as server,
        opened(HttpTransport(settings_for(server.url))) as transport,
    ):
        for connections in (1, 2):
            for _ in range(3):
                assert names(await transport.send(a_delivery()))
            assert server.connections == connections
            server.writer.close()
            await asyncio.sleep(0.1)
