"""Tests of HTTP/2: outcomes are the same as over HTTP/1.1, and streams are independent."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import RequestReceived

from followups.transports.http import HttpTransport
from followups.transports.http_client import STREAMS
from followups.transports.port import Rejected, Retry, Sent, Unknown
from unit.transports.doubles import a_delivery, answer, listening, opened, scripted, settings_for
from unit.transports.http2 import Http2Server, Stream, serving_http2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from followups.transports.port import Outcome, Transport

OK = Sent(None, 200)
MESSAGE_ID = "6f1b1f0e-3a53-4f6e-9a5f-1d2b3c4d5e6f"


async def accept(stream: Stream) -> None:
    """Accept the message immediately."""
    stream.answer(200)


@pytest.fixture
async def server(context: ssl.SSLContext) -> AsyncIterator[Http2Server]:
    """Run a server that accepts every message unless a test changes that."""
    async with serving_http2(accept, context) as server:
        yield server


@pytest.fixture
async def transport(server: Http2Server) -> AsyncIterator[Transport]:
    """Open a transport to the server."""
    async with opened(HttpTransport(settings_for(server.url, transport_timeout=2))) as transport:
        yield transport


async def send_at_once(transport: Transport, count: int) -> list[Outcome]:
    """Send the given number of deliveries concurrently."""
    return await asyncio.gather(*[transport.send(a_delivery()) for _ in range(count)])


def keys(server: Http2Server) -> list[str]:
    """Return the idempotency keys of all requests that arrived."""
    return [each.headers["idempotency-key"] for each in server.requests]


async def test_calls_share_a_connection(server: Http2Server, transport: Transport) -> None:
    """Sequential and concurrent calls share one connection, and each gets its own response."""

    async def name(stream: Stream) -> None:
        await asyncio.sleep(0.02)
        stream.answer(200, b'{"chatMessageId": "%s"}' % stream.headers["idempotency-key"].encode())

    assert await transport.send(a_delivery()) == OK
    server.serve = name
    deliveries = [a_delivery() for _ in range(STREAMS)]
    outcomes = await asyncio.gather(*[transport.send(each) for each in deliveries])
    assert outcomes == [Sent(each.follow_up_id, 200) for each in deliveries]
    assert (len(server.connections), len(server.requests)) == (1, STREAMS + 1)
    assert server.requests[0].body.startswith(b'{"followUpId":')


@pytest.mark.parametrize("size", [10, 200_000])
async def test_http_1_1_is_required(context: ssl.SSLContext, size: int) -> None:
    """If a server refuses HTTP/2 for a request that was already sent, the request is not repeated over HTTP/1.1."""
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if writer.get_extra_info("ssl_object").selected_alpn_protocol() != "h2":
            received.append(await reader.read())
            return
        h2 = H2Connection(H2Configuration(client_side=False))
        h2.initiate_connection()
        writer.write(h2.data_to_send())
        while data := await reader.read(65_536):
            for event in h2.receive_data(data):
                if isinstance(event, RequestReceived) and event.stream_id:
                    h2.reset_stream(event.stream_id, ErrorCodes.HTTP_1_1_REQUIRED)
            writer.write(h2.data_to_send())

    context.set_alpn_protocols(["h2", "http/1.1"])
    async with (
        listening(serve, context) as url,
        opened(HttpTransport(settings_for(url, transport_timeout=2))) as transport,
    ):
        outcome = await transport.send(a_delivery(message="x" * size))
    assert outcome == Unknown("no valid answer arrived (the server asked for the request to be repeated over HTTP/1.1)")
    assert not any(received)


async def test_responses_may_overtake_each_other(server: Http2Server, transport: Transport) -> None:
    """On a new connection, later calls may be answered while the first one waits for its response."""
    late = asyncio.Event()

    async def wait(stream: Stream) -> None:
        server.serve = accept
        await late.wait()
        stream.answer(200)

    server.serve = wait
    first = asyncio.create_task(transport.send(a_delivery()))
    await server.requested.wait()
    for _ in range(3):
        assert await transport.send(a_delivery()) == OK
    late.set()
    assert await first == OK
    assert len(server.connections) == 1


async def test_an_endpoint_that_cannot_deduplicate_gets_http_1(context: ssl.SSLContext) -> None:
    """An endpoint that cannot deduplicate is called over HTTP/1.1.

    If an HTTP/2 connection broke, many follow-ups would end with an unknown outcome.
    """
    context.set_alpn_protocols(["h2", "http/1.1"])
    async with scripted(answer(200), context) as server:
        settings = settings_for(server.url, transport_deduplicates=False)
        async with opened(HttpTransport(settings)) as transport:
            assert await transport.send(a_delivery()) == OK


async def refuse(stream: Stream) -> None:
    """Refuse the stream. According to HTTP/2, a request whose stream was refused has not been processed."""
    stream.reset(ErrorCodes.REFUSED_STREAM)


async def demand_http_1(stream: Stream) -> None:
    """Require HTTP/1.1 for the request."""
    stream.reset(ErrorCodes.HTTP_1_1_REQUIRED)


async def fail(stream: Stream) -> None:
    """Reset the HTTP/2 stream with an error code."""
    stream.reset(ErrorCodes.INTERNAL_ERROR)


async def withdraw(stream: Stream) -> None:
    """Reset the stream without an error."""
    stream.reset(ErrorCodes.NO_ERROR)


async def go_away(stream: Stream) -> None:
    """Refuse the current stream and all later streams."""
    stream.connection.h2.close_connection(last_stream_id=stream.id - 1)
    stream.connection.flush()


async def go_away_and_close(stream: Stream) -> None:
    """Refuse all further streams with a GOAWAY frame and close the connection."""
    await go_away(stream)
    stream.connection.writer.close()


async def close(stream: Stream) -> None:
    """Close the connection."""
    stream.connection.writer.close()


async def abort(stream: Stream) -> None:
    """Reset the connection."""
    stream.connection.writer.transport.abort()


async def hint_and_fail(stream: Stream) -> None:
    """Send an informational response, then reset the stream instead of sending a final response."""
    stream.connection.h2.send_headers(stream.id, [(":status", "103")])
    await fail(stream)


async def send_garbage(stream: Stream) -> None:
    """Send an invalid frame."""
    stream.connection.writer.write(b"\xff" * 1000)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "fresh"])
@pytest.mark.parametrize(
    "end",
    [
        refuse,
        demand_http_1,
        fail,
        withdraw,
        go_away,
        go_away_and_close,
        close,
        abort,
        hint_and_fail,
        send_garbage,
    ],
)
async def test_however_a_stream_ends_the_request_went_out_once(
    end: Callable[[Stream], Awaitable[None]], server: Http2Server, transport: Transport, *, kept: bool
) -> None:
    """If the response is lost, the outcome is unknown and the request is not repeated."""
    if kept:
        assert await transport.send(a_delivery()) == OK
    server.serve = end
    assert isinstance(await transport.send(a_delivery()), Unknown)
    assert len(server.requests) == 1 + kept
    server.serve = accept
    assert await transport.send(a_delivery()) == OK
    assert len(server.requests) == 2 + kept


@pytest.mark.parametrize("end", [fail, abort])
@pytest.mark.parametrize(("status", "outcome"), [(200, Sent), (500, Retry), (403, Rejected)])
async def test_the_status_decides_when_the_body_breaks_off(
    end: Callable[[Stream], Awaitable[None]], status: int, outcome: type, server: Http2Server, transport: Transport
) -> None:
    """If a response's body breaks off, the response's status still determines the outcome."""

    async def break_off(stream: Stream) -> None:
        stream.answer(status, b"{", ends=False)
        await asyncio.sleep(0.02)
        await end(stream)

    server.serve = break_off
    assert isinstance(await transport.send(a_delivery()), outcome)
    assert len(server.requests) == 1


async def test_a_connection_that_breaks_sends_none_of_its_requests_again(
    server: Http2Server, transport: Transport
) -> None:
    """If a connection breaks, only its own calls get unknown outcomes."""

    async def break_first(stream: Stream) -> None:
        await asyncio.sleep(0.1)
        if stream.connection is server.connections[0]:
            await abort(stream)
        else:
            stream.answer(200)

    assert await transport.send(a_delivery()) == OK
    server.serve = break_first
    outcomes = await send_at_once(transport, 2 * STREAMS)
    lost = [each for each in outcomes if isinstance(each, Unknown)]
    assert (len(lost), outcomes.count(OK)) == (STREAMS, STREAMS)
    assert len(keys(server)) == len(set(keys(server))) == 2 * STREAMS + 1


def first_of(server: Http2Server, misbehave: Callable[[Stream], Awaitable[None]]) -> None:
    """Handle the next request with the given function; accept later requests after 0.2 s."""
    first = server.requests[-1].id + 2

    async def serve(stream: Stream) -> None:
        if stream.id == first:
            await misbehave(stream)
        else:
            await asyncio.sleep(0.2)
            stream.answer(200)

    server.serve = serve


async def answer_at_length(stream: Stream) -> None:
    """Send a response body of more than 64 KiB."""
    stream.answer(200, b'{"chatMessageId": "%s"}' % MESSAGE_ID.encode(), ends=False)
    for _ in range(10):
        if stream.id in stream.connection.resets:
            return
        stream.connection.h2.send_data(stream.id, b" " * 16_000)
        stream.connection.flush()
        await asyncio.sleep(0.01)


async def hint_without_end(stream: Stream) -> None:
    """Send informational responses until the client stops reading."""
    for _ in range(100):
        if stream.id in stream.connection.resets:
            return
        stream.connection.h2.send_headers(stream.id, [(":status", "103"), ("link", "x" * 1000)])
        stream.connection.flush()
        await asyncio.sleep(0.002)


@pytest.mark.parametrize(
    ("misbehave", "outcome"),
    [
        (answer_at_length, Sent(None, 200, "the body of the answer is longer than 64 KiB")),
        (hint_without_end, Unknown("no valid answer arrived (the header of the answer is longer than 64 KiB)")),
        (fail, Unknown("the connection broke before an answer arrived (Stream error in the HTTP/2 framing layer)")),
    ],
)
async def test_one_stream_harms_no_other(
    misbehave: Callable[[Stream], Awaitable[None]], outcome: Outcome, server: Http2Server, transport: Transport
) -> None:
    """If the head or body of a response never ends, only its stream is closed, not the connection."""
    assert await transport.send(a_delivery()) == OK
    first_of(server, misbehave)
    outcomes = await send_at_once(transport, STREAMS)
    assert outcomes == [outcome, *[OK] * (STREAMS - 1)]
    server.serve = accept
    assert await transport.send(a_delivery()) == OK
    assert len(server.connections) == 1


async def stay_silent(_stream: Stream) -> None:
    """Keep the connection open without ever responding."""


async def test_a_silent_stream_affects_only_its_call(server: Http2Server) -> None:
    """If one call gets no response, other calls in flight are still answered.

    If a call gets no response, the next call uses a new connection.
    """
    async with opened(HttpTransport(settings_for(server.url, transport_timeout=1))) as transport:
        assert await transport.send(a_delivery()) == OK
        first_of(server, stay_silent)
        outcomes = await send_at_once(transport, STREAMS)
        assert outcomes == [Unknown("no answer within 1 s"), *[OK] * (STREAMS - 1)]
        server.serve = accept
        for _ in range(3):
            assert await transport.send(a_delivery()) == OK
        assert len(server.connections) == 2


async def test_a_slow_body_affects_only_its_call(server: Http2Server) -> None:
    """If the body of a response does not arrive in time, the next call uses the same connection."""

    async def begin_to_answer(stream: Stream) -> None:
        stream.answer(200, b"{", ends=False)

    async with opened(HttpTransport(settings_for(server.url, transport_timeout=0.5))) as transport:
        assert await transport.send(a_delivery()) == OK
        server.serve = begin_to_answer
        assert await transport.send(a_delivery()) == Sent(None, 200, "the body of the answer did not arrive in time")
        server.serve = accept
        assert await transport.send(a_delivery()) == OK
        assert len(server.connections) == 1


async def test_a_call_that_is_cancelled_harms_no_other(server: Http2Server, transport: Transport) -> None:
    """Cancelling a call resets only its own stream."""
    assert await transport.send(a_delivery()) == OK
    first_of(server, stay_silent)
    calls = [asyncio.create_task(transport.send(a_delivery())) for _ in range(STREAMS)]
    await asyncio.sleep(0.1)
    calls[0].cancel()
    assert await asyncio.gather(*calls[1:]) == [OK] * (STREAMS - 1)
    assert server.connections[0].resets == [3]
    assert len(server.connections) == 1


async def test_a_connection_that_ended_while_idle_is_not_used(server: Http2Server, transport: Transport) -> None:
    """If a receiver closes the connection between two calls, both calls succeed.

    The connection may be closed normally, abruptly or after a GOAWAY frame.
    """
    for end in (close, abort, go_away_and_close):
        assert await transport.send(a_delivery()) == OK
        await end(server.requests[-1])
        await asyncio.sleep(0.05)
        assert await transport.send(a_delivery()) == OK
    assert len(server.connections) == 4


async def test_unread_frames_on_an_idle_connection_end_it(server: Http2Server, transport: Transport) -> None:
    """An idle connection with unread frames is closed, and the next call uses another one.

    An unread frame may be a GOAWAY, which announces the end of the connection.
    """
    assert await transport.send(a_delivery()) == OK
    server.connections[0].h2.close_connection()
    server.connections[0].flush()
    await asyncio.sleep(0.05)
    assert await transport.send(a_delivery()) == OK
    assert len(server.connections) == 2


async def test_unread_frames_after_a_cancelled_call(server: Http2Server, transport: Transport) -> None:
    """If the only call on a connection was cancelled, unread frames end the connection as if it had never been used."""
    server.serve = stay_silent
    call = asyncio.create_task(transport.send(a_delivery()))
    await server.requested.wait()
    call.cancel()
    await asyncio.wait([call])
    server.serve = accept
    server.connections[0].h2.close_connection()
    server.connections[0].flush()
    await asyncio.sleep(0.05)
    assert await transport.send(a_delivery()) == OK
    assert len(server.connections) == 2


async def test_no_call_joins_another_on_a_closed_connection(server: Http2Server, transport: Transport) -> None:
    """If the receiver has closed a connection that has a call in flight, further calls use another connection.

    This holds even before the event loop notices that the connection was closed.
    """
    assert await transport.send(a_delivery()) == OK
    server.serve = stay_silent
    call = asyncio.create_task(transport.send(a_delivery()))
    server.requested.clear()
    await server.requested.wait()
    server.serve = accept
    number = server.connections[0].writer.get_extra_info("socket").fileno()
    with socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM) as end:
        end.shutdown(socket.SHUT_WR)
    assert await transport.send(a_delivery()) == OK
    assert isinstance(await call, Unknown)


async def test_calls_that_replace_a_connection_together(server: Http2Server, transport: Transport) -> None:
    """If several calls find the same connection unusable, closing the client ends all of them."""
    assert await transport.send(a_delivery()) == OK
    server.serve = stay_silent
    server.connections[0].h2.close_connection()
    server.connections[0].flush()
    await asyncio.sleep(0.05)
    calls = [asyncio.create_task(transport.send(a_delivery())) for _ in range(3)]
    while len(server.requests) < 1 + len(calls):  # noqa: ASYNC110 - the server's list has no event for a number
        await asyncio.sleep(0.01)
    await transport.close()
    async with asyncio.timeout(1):
        assert {type(each) for each in await asyncio.gather(*calls)} == {Unknown}


async def test_a_server_may_send_before_the_first_request(context: ssl.SSLContext) -> None:
    """A request is sent on a new connection even if unread frames have arrived right behind the TLS handshake."""
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    settings, unknown = bytes.fromhex("000000 04 00 00000000"), bytes.fromhex("001000 fb 00 00000000") + bytes(0x1000)

    async def send_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(settings + unknown * 20)
        await server.run(reader, writer)

    server = Http2Server(accept)
    async with listening(send_first, context) as url, opened(HttpTransport(settings_for(url))) as transport:
        assert await transport.send(a_delivery()) == OK


async def test_pings_during_calls_keep_the_connection(server: Http2Server, transport: Transport) -> None:
    """A connection stays in use even if pings arrive during calls."""

    async def ping_and_answer(stream: Stream) -> None:
        stream.connection.h2.ping(b"01234567")
        stream.connection.flush()
        await asyncio.sleep(0.05)
        stream.answer(200)

    assert await transport.send(a_delivery()) == OK
    server.serve = ping_and_answer
    assert await send_at_once(transport, STREAMS) == [OK] * STREAMS
    assert len(server.connections) == 1


async def test_more_calls_than_streams_use_more_connections(context: ssl.SSLContext) -> None:
    """If calls exceed the receiver's limit of streams, the transport opens additional connections."""

    async def answer_late(stream: Stream) -> None:
        await asyncio.sleep(0.2)
        stream.answer(200)

    async with (
        serving_http2(accept, context, streams_at_once=2) as server,
        opened(HttpTransport(settings_for(server.url, transport_timeout=2))) as transport,
    ):
        assert await transport.send(a_delivery()) == OK
        server.serve = answer_late
        assert await send_at_once(transport, 6) == [OK] * 6
        assert len(server.connections) == 5
