"""Tests of connection reuse between two calls of the ``http`` transport."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, ClassVar
from uuid import UUID

import pycurl
import pytest
import uvloop

from followups.transports import descriptors, http_client
from followups.transports.curl_loop import CurlLoop
from followups.transports.http import HttpTransport
from followups.transports.http_client import KEEPALIVE
from followups.transports.port import Outcome, Rejected, Retry, Sent, Unknown
from followups.uptime import uptime
from stack import wait_until
from unit.transports.doubles import (
    Request,
    ScriptedServer,
    a_delivery,
    answer,
    listening,
    open_files,
    opened,
    scripted,
    settings_for,
    stay_silent,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from followups.transports.port import Transport

MESSAGE_ID = "6f1b1f0e-3a53-4f6e-9a5f-1d2b3c4d5e6f"
NAMED = f'{{"chatMessageId": "{MESSAGE_ID}"}}'.encode()
OTHER = answer(200, NAMED)
OK = answer(200)


class ThreadedServer:
    """A threaded server; each request to it must fit into one TCP segment.

    Because the server runs in threads, a test can block its own event loop.
    """

    def __init__(self) -> None:
        self.connections: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.connections.append(self._listening.accept()[0])
                self._threads.append(threading.Thread(target=self._serve, args=(self.connections[-1],)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while connection.recv(65_536):
                connection.sendall(OK)

    def hang_up(self) -> None:
        """Close the open connections; if SO_LINGER is 0, they are reset."""
        for one in self.connections:
            one.shutdown(socket.SHUT_RD)  # ends the blocking read in the connection's thread
            one.close()

    def close(self) -> None:
        for one in (self._listening, *self.connections):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(5)


@pytest.fixture
def threaded() -> Iterator[ThreadedServer]:
    """Run a `ThreadedServer`."""
    server = ThreadedServer()
    yield server
    server.close()


async def test_a_connection_that_ended_while_idle_is_not_used() -> None:
    """If a receiver closes the connection between two calls, both calls succeed."""
    async with scripted(OK) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        for _ in range(3):
            assert await transport.send(a_delivery()) == Sent(None, 200)
            server.writer.close()
            await asyncio.sleep(0.05)
        assert (server.connections, len(server.requests)) == (3, 3)


async def test_an_unread_close_is_noticed(threaded: ThreadedServer) -> None:
    """No request is sent on a closed connection, even before the event loop notices the close."""
    async with opened(HttpTransport(settings_for(threaded.url))) as transport:
        assert await transport.send(a_delivery()) == Sent(None, 200)
        threaded.connections[0].shutdown(socket.SHUT_WR)
        assert await transport.send(a_delivery()) == Sent(None, 200)
        assert len(threaded.connections) == 2


async def test_an_unread_unsolicited_response_is_discarded(threaded: ThreadedServer) -> None:
    """An unsolicited response is not mistaken for the response to the next call."""
    async with opened(HttpTransport(settings_for(threaded.url))) as transport:
        assert await transport.send(a_delivery()) == Sent(None, 200)
        threaded.connections[0].sendall(OTHER)
        assert await transport.send(a_delivery()) == Sent(None, 200)
        assert len(threaded.connections) == 2


@pytest.mark.parametrize("behind", [OTHER, OTHER[:1], b"garbage", b"\x00"])
async def test_extra_bytes_after_a_response_close_the_connection(behind: bytes) -> None:
    """If extra bytes follow a response, the connection is closed."""
    async with scripted(OK + behind) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        for _ in range(3):
            assert await transport.send(a_delivery()) == Sent(None, 200)
        assert server.connections == 3


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_second_response_under_tls(context: ssl.SSLContext, newest: ssl.TLSVersion) -> None:
    """An unsolicited response directly behind another one is not read as the answer to the next call.

    Both responses have a TLS record of their own, and are read from the socket together.
    """
    context.maximum_version = newest

    async def add_another() -> None:
        server.requested.clear()
        await server.requested.wait()
        server.writer.write(OTHER)

    async with scripted(OK, context) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        assert await transport.send(a_delivery()) == Sent(None, 200)
        adding = asyncio.create_task(add_another())
        await asyncio.sleep(0)
        for connections in (1, 2, 2):
            assert await transport.send(a_delivery()) == Sent(None, 200)
            assert server.connections == connections
            await asyncio.sleep(0.01)
        await adding


async def test_connections_are_kept_if_the_kernel_counts_no_bytes(
    context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS connections are also kept if the kernel does not report how many bytes a connection has received."""
    monkeypatch.setattr(descriptors, "_received", lambda _: 0)
    async with scripted(OK, context) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        for _ in range(3):
            assert await transport.send(a_delivery()) == Sent(None, 200)
        assert server.connections == 1


async def test_the_rest_of_a_record_is_not_read_as_a_response(context: ssl.SSLContext) -> None:
    """If the end of a response shares its TLS record with another response, the second one is never used.

    Both are decrypted together. Nothing shows that the second response is there until libcurl reads it.
    """

    async def split(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
        await asyncio.sleep(0.01)
        writer.write(b"{}" + OTHER)
        await asyncio.sleep(60)

    async with scripted(split, context) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        assert await transport.send(a_delivery()) == Sent(None, 200)
        assert await transport.send(a_delivery()) == Unknown(
            "no valid answer arrived (another answer had arrived before the request)"
        )
        assert await transport.send(a_delivery()) == Sent(None, 200)
        assert server.connections == 2


@pytest.mark.parametrize("secure", [False, True])
async def test_concurrent_calls_use_no_unsolicited_response(context: ssl.SSLContext, *, secure: bool) -> None:
    """An unsolicited response is discarded even if another call is waiting for the connection when it arrives."""

    async def answer_twice(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(OK)
        writer.write(OTHER)

    async with (
        scripted(answer_twice, context if secure else None) as server,
        opened(HttpTransport(settings_for(server.url, concurrency=4))) as transport,
    ):
        for _ in range(20):
            for outcome in await asyncio.gather(*[transport.send(a_delivery()) for _ in range(8)]):
                assert outcome == Sent(None, 200)


async def test_line_breaks_after_a_response_are_ignored() -> None:
    """Line breaks after a response affect neither this call nor the next."""
    async with scripted(OK + b"\r\n") as server, opened(HttpTransport(settings_for(server.url))) as transport:
        for _ in range(3):
            assert await transport.send(a_delivery()) == Sent(None, 200)
            server.writer.write(b"\r\n")
            await asyncio.sleep(0.05)
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("reply", "connections"),
    [
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n", 2),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n", 2),
        (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 0\r\n\r\n", 1),
        (b"HTTP/1.1 204 No\r\n\r\n", 1),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 1),
    ],
)
async def test_the_receiver_decides_whether_a_connection_is_kept(reply: bytes, connections: int) -> None:
    """A connection is kept, except after ``connection: close`` or HTTP/1.0 without keep-alive."""
    async with scripted(reply) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        for _ in range(2):
            assert isinstance(await transport.send(a_delivery()), Sent)
        assert server.connections == connections


async def test_a_connection_that_is_used_once_is_closed_after_its_response() -> None:
    """If the receiver does not deduplicate, each connection is closed at once, even if the receiver would keep it."""
    ended = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(OK)
        assert not await reader.read()
        ended.set()

    async with listening(listen) as url:
        settings = settings_for(url, transport_deduplicates=False)
        async with opened(HttpTransport(settings)) as transport:
            assert await transport.send(a_delivery()) == Sent(None, 200)
            await asyncio.wait_for(ended.wait(), KEEPALIVE / 2)


async def test_the_end_of_a_tls_connection_is_announced(context: ssl.SSLContext) -> None:
    """Before the client closes a TLS connection, it sends close_notify, so the receiver sees no broken connection."""

    def listen() -> bytes:  # runs in a thread, because a stream of asyncio does not tell the two ends apart
        connection, _ = listener.accept()
        with context.wrap_socket(connection, server_side=True, suppress_ragged_eofs=False) as secure:
            secure.recv(65_536)
            secure.sendall(OK)
            return secure.recv(65_536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        served = asyncio.get_running_loop().run_in_executor(None, listen)
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        async with opened(HttpTransport(settings_for(url, transport_deduplicates=False))) as transport:
            assert await transport.send(a_delivery()) == Sent(None, 200)
        assert await served == b""


async def test_a_body_that_ends_with_the_connection_closes_it() -> None:
    """If the server ends a response by closing the connection, the next call opens a new connection."""

    async def until_the_end(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

    async with scripted(until_the_end) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        for _ in range(2):
            assert await transport.send(a_delivery()) == Sent(None, 200)
        assert server.connections == 2


async def test_a_cancelled_call_closes_its_connection() -> None:
    """The response to a cancelled call is discarded, and its connection is closed."""
    hung_up = asyncio.Event()

    async def late(writer: asyncio.StreamWriter, _request: Request) -> None:
        if server.connections == 1:
            await asyncio.sleep(0.1)
            hung_up.set()
        writer.write(OTHER if server.connections == 1 else OK)

    async with scripted(late) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        call = asyncio.create_task(transport.send(a_delivery()))
        await server.requested.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await hung_up.wait()
        assert await transport.send(a_delivery()) == Sent(None, 200)
        assert server.connections == 2


@pytest.mark.parametrize("deduplicates", [True, False])
async def test_there_are_never_more_connections_than_calls_at_once(*, deduplicates: bool) -> None:
    """If the connection limit is reached, further calls wait until another call ends."""
    open_now, most = 0, 0

    async def count(writer: asyncio.StreamWriter, _request: Request) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await asyncio.sleep(0.01)
        open_now -= 1
        writer.write(answer(200, connection="close"))

    settings = {"concurrency": 2, "transport_deduplicates": deduplicates}
    async with scripted(count) as server, opened(HttpTransport(settings_for(server.url, **settings))) as transport:
        outcomes = await asyncio.gather(*[transport.send(a_delivery()) for _ in range(8)])
        assert outcomes == [Sent(None, 200)] * 8
        assert most == 2


async def test_waiting_calls_share_open_connections() -> None:
    """Calls that wait for a slot reuse open connections instead of opening new ones."""
    async with scripted(OK) as server, opened(HttpTransport(settings_for(server.url, concurrency=2))) as transport:
        for _ in range(3):
            outcomes = await asyncio.gather(*[transport.send(a_delivery()) for _ in range(8)])
            assert outcomes == [Sent(None, 200)] * 8
        assert server.connections == 2


async def test_an_old_connection_is_not_used_while_another_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that was idle for too long is not used, even if a call on another connection takes as long."""
    monkeypatch.setattr(http_client, "KEEPALIVE", 1)

    async def answer_late(writer: asyncio.StreamWriter, request: Request) -> None:
        await asyncio.sleep(1.2 if b"slow" in request.body else 0)
        writer.write(OK)
        await asyncio.sleep(60)

    async with scripted(answer_late) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        slow = asyncio.create_task(transport.send(a_delivery(message="slow")))
        assert await transport.send(a_delivery()) == Sent(None, 200)
        await asyncio.sleep(1.1)
        assert not slow.done()
        assert await transport.send(a_delivery()) == Sent(None, 200)
        assert await slow == Sent(None, 200)
        assert server.connections == 3


async def test_waiting_for_a_connection_counts_towards_the_timeout() -> None:
    """If a call times out while waiting for a connection, it sends nothing and frees its slot."""

    async def answer_late(writer: asyncio.StreamWriter, _request: Request) -> None:
        await asyncio.sleep(1)
        writer.write(OK)

    settings = {"concurrency": 1, "transport_timeout": 0.2}
    async with (
        scripted(answer_late) as server,
        opened(HttpTransport(settings_for(server.url, **settings))) as transport,
    ):
        outcomes = await asyncio.gather(*[transport.send(a_delivery()) for _ in range(2)])
        assert outcomes == [Unknown("no answer within 0.2 s"), Retry("no connection within 0.2 s")]
        server.answer = OK
        assert await transport.send(a_delivery()) == Sent(None, 200)


async def test_timeouts_leave_the_client_usable() -> None:
    """If calls time out while other calls begin, the client stays usable.

    uvloop cannot report the time of a timer that fires within half a millisecond.
    """

    async def answer_most(writer: asyncio.StreamWriter, _request: Request) -> None:
        if len(server.requests) % 10:
            writer.write(OK)
        else:
            await asyncio.sleep(60)

    async def call_repeatedly() -> None:
        for _ in range(250):
            outcome = await transport.send(a_delivery())
            assert isinstance(outcome, Sent | Unknown | Retry)
            assert "closed here" not in outcome.detail

    async with (
        scripted(answer_most) as server,
        opened(HttpTransport(settings_for(server.url, transport_timeout=0.01))) as transport,
        asyncio.timeout(60),
    ):
        await asyncio.gather(*[call_repeatedly() for _ in range(10)])


class BreakableMulti(pycurl.CurlMulti):
    """A multi handle of libcurl that performs no more transfers after a test has made one of its callbacks fail."""

    handles: ClassVar[list[BreakableMulti]] = []

    def __init__(self) -> None:
        self.handles.append(self)

    def break_in(self, callback: int) -> None:
        def fail(*_: object) -> None:
            raise OSError

        self.setopt(callback, fail)


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> list[BreakableMulti]:
    """Make the client use breakable handles, and return those that it has created."""
    monkeypatch.setattr(pycurl, "CurlMulti", BreakableMulti)
    monkeypatch.setattr(BreakableMulti, "handles", [])
    return BreakableMulti.handles


CALLBACKS = [pycurl.M_TIMERFUNCTION, pycurl.M_SOCKETFUNCTION]


@pytest.fixture
async def silent() -> AsyncIterator[ScriptedServer]:
    """Run a server that does not answer unless a test changes that."""
    async with scripted(stay_silent) as server:
        yield server


async def calls_in_flight(transport: Transport, server: ScriptedServer, count: int) -> list[asyncio.Task[Outcome]]:
    """Start calls, and return them once all requests have arrived."""
    calls = [asyncio.create_task(transport.send(a_delivery())) for _ in range(count)]
    while len(server.requests) < count:  # noqa: ASYNC110 - the server's list has no event for a number
        await asyncio.sleep(0.01)
    return calls


@pytest.mark.parametrize("callback", CALLBACKS, ids=["timer", "socket"])
async def test_a_broken_multi_handle_is_replaced(
    callback: int, handles: list[BreakableMulti], silent: ScriptedServer
) -> None:
    """If libcurl's multi handle breaks, its calls end with an outcome, and later calls use another handle."""
    async with asyncio.timeout(4), opened(HttpTransport(settings_for(silent.url))) as transport:
        in_flight = await calls_in_flight(transport, silent, 3)
        handles[0].break_in(callback)
        silent.answer = OK
        outcomes = await asyncio.gather(*in_flight, *[transport.send(a_delivery()) for _ in range(3)])
        assert {type(each) for each in outcomes[:3]} == {Unknown}
        assert {type(each) for each in outcomes[3:]} <= {Retry, Sent}
        assert await transport.send(a_delivery()) == Sent(None, 200)
    assert len(handles) == 2


@pytest.mark.parametrize("callback", CALLBACKS, ids=["timer", "socket"])
async def test_cancelling_a_call_of_a_broken_handle(
    callback: int, handles: list[BreakableMulti], silent: ScriptedServer
) -> None:
    """If a multi handle breaks when a call is cancelled, the call ends as cancelled, and later calls succeed."""
    async with asyncio.timeout(10), opened(HttpTransport(settings_for(silent.url, transport_timeout=1))) as transport:
        first, *others = await calls_in_flight(transport, silent, 3)
        handles[0].break_in(callback)
        first.cancel()
        assert {type(each) for each in await asyncio.gather(*others)} == {Unknown}
        assert first.cancelled()
        silent.answer = OK
        for _ in range(3):
            outcomes = await asyncio.gather(*[transport.send(a_delivery()) for _ in range(5)])
        assert outcomes == [Sent(None, 200)] * 5
    assert len(handles) == 2


async def test_an_answer_that_breaks_the_handle_counts(handles: list[BreakableMulti]) -> None:
    """If a multi handle breaks when it has read a whole response, the response counts completely."""

    async def answer_late(writer: asyncio.StreamWriter, _request: Request) -> None:
        await broken.wait()
        writer.write(answer(200, NAMED, connection="close"))

    broken = asyncio.Event()
    async with scripted(answer_late) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        (call,) = await calls_in_flight(transport, server, 1)
        handles[0].break_in(pycurl.M_SOCKETFUNCTION)
        broken.set()
        assert await call == Sent(UUID(MESSAGE_ID), 200)


async def test_a_replaced_handle_is_closed(
    handles: list[BreakableMulti], silent: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a multi handle was replaced shortly before, closing the client closes both handles, and may be repeated."""
    monkeypatch.setattr(http_client, "SWEEP_INTERVAL", 60)
    before = open_files()
    transport = HttpTransport(settings_for(silent.url))
    await transport.open()
    calls = await calls_in_flight(transport, silent, 3)
    handles[0].break_in(pycurl.M_TIMERFUNCTION)
    silent.answer = OK
    calls.append(asyncio.create_task(transport.send(a_delivery())))
    await asyncio.wait(calls)
    assert await transport.send(a_delivery()) == Sent(None, 200)
    for _ in range(2):
        await transport.close()
    assert len(handles) == 2
    # connections are closed in another thread; the server's ends stay open
    await asyncio.to_thread(wait_until, lambda: open_files() - before <= 5)


@pytest.mark.parametrize("steps", range(1, 8))
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "fresh"])
async def test_closing_while_a_call_begins(threaded: ThreadedServer, steps: int, *, kept: bool) -> None:
    """If the client is closed at any step of a call, the call ends with an outcome and leaves nothing behind.

    The call may just have found out that the receiver has closed a kept connection.
    """
    loop, errors = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    async with opened(HttpTransport(settings_for(threaded.url))) as transport:
        if kept:
            assert await transport.send(a_delivery()) == Sent(None, 200)
            threaded.connections[0].shutdown(socket.SHUT_WR)
        call = asyncio.create_task(transport.send(a_delivery()))
        for _ in range(steps):  # iterations of the event loop
            await asyncio.sleep(0)
        await transport.close()
        async with asyncio.timeout(1):
            assert isinstance(await call, Retry | Unknown | Sent)
    await asyncio.sleep(0.01)
    assert not errors


@pytest.mark.parametrize("callback", CALLBACKS, ids=["timer", "socket"])
async def test_closing_a_broken_handle(callback: int, handles: list[BreakableMulti], silent: ScriptedServer) -> None:
    """A client whose multi handle breaks while closing closes all connections, and may be closed again."""
    loop, errors = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    before = open_files()
    transport = HttpTransport(settings_for(silent.url))
    await transport.open()
    calls = await calls_in_flight(transport, silent, 3)
    handles[0].break_in(callback)
    for _ in range(2):
        await transport.close()
    async with asyncio.timeout(2):
        assert {type(each) for each in await asyncio.gather(*calls)} == {Unknown}
    # connections are closed in another thread; the server's ends stay open
    await asyncio.to_thread(wait_until, lambda: open_files() - before <= 3)
    assert not errors


async def test_an_idle_connection_is_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle connection is closed after its time limit, even if no other call is made."""
    monkeypatch.setattr(http_client, "KEEPALIVE", 1)
    ends: asyncio.Queue[float] = asyncio.Queue()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65_536):
            writer.write(OK)
        writer.close()
        ends.put_nowait(time.monotonic())

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with opened(HttpTransport(settings_for(url))) as transport:
            for _ in range(2):
                assert await transport.send(a_delivery()) == Sent(None, 200)
                used = time.monotonic()
                assert await asyncio.wait_for(ends.get(), 10) - used > 0.5
            await transport.send(a_delivery())
        await asyncio.wait_for(ends.get(), 10)


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "end"])
async def test_a_connection_closed_before_any_data_is_retried(*, reset: bool) -> None:
    """If the receiver closes a new connection before it receives any data, the call is retried.

    Between the two, the client runs for one to seven iterations of the event loop.
    """
    outcomes = [await hung_up_after(steps, reset=reset) for steps in range(1, 8)]
    assert {type(outcome) for outcome, received in outcomes if not received} == {Retry}
    assert {type(outcome) for outcome, received in outcomes if received} == {Unknown}


async def hung_up_after(steps: int, *, reset: bool) -> tuple[Outcome, bytes]:
    """Send to a receiver that hangs up after so many iterations; return the outcome and what was received."""
    received: list[bytes] = []

    def hang_up() -> None:  # runs in a thread, so it does not block the event loop
        connection, _ = listening.accept()
        with connection:
            time.sleep(0.05)
            connection.setblocking(False)  # noqa: FBT003 - a method of the standard library
            with contextlib.suppress(BlockingIOError):
                received.append(connection.recv(65_536))
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(5)
        hanging_up = loop.run_in_executor(None, hang_up)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        async with opened(HttpTransport(settings_for(url, transport_deduplicates=False))) as transport:
            sending = loop.create_task(transport.send(a_delivery()))
            for _ in range(steps):  # iterations of the event loop
                await asyncio.sleep(0)
            time.sleep(0.1)  # noqa: ASYNC251 - the loop is blocked until the receiver disconnects
            outcome = await sending
        await hanging_up
    return outcome, b"".join(received)


async def test_the_rest_of_a_timed_out_request_is_not_sent() -> None:
    """If a call times out, the rest of its request is never sent."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        settings = settings_for(
            f"http://127.0.0.1:{listening.getsockname()[1]}", transport_timeout=timedelta(seconds=0.1)
        )
        async with asyncio.timeout(10), opened(HttpTransport(settings)) as transport:
            outcome = await transport.send(a_delivery(message="x" * 16_000_000))
        assert outcome == Unknown("no answer within 0.1 s")
        connection, _ = listening.accept()
        with connection:
            connection.settimeout(5)
            received = 0
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(1_000_000):
                    received += len(part)
    assert received < 16_000_000


async def test_a_connection_with_half_a_request_is_not_used_again() -> None:
    """If only half of a request was sent, the connection is closed."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.append(writer)
        await reader.read(1000)
        writer.write(answer(413))
        await writer.drain()

    peers: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(refuse, "127.0.0.1", 0, limit=1024)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with asyncio.timeout(10), server, opened(HttpTransport(settings_for(url))) as transport:
        for _ in range(2):
            outcome = await transport.send(a_delivery(message="x" * 16_000_000))
            assert outcome == Rejected("HTTP 413", 413)
        for peer in peers:
            peer.close()
    assert len(peers) == 2


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_ended_event_loop_closes_its_connections(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """If an event loop ends during a call, that call's connection is closed."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        transport = HttpTransport(settings_for(f"http://127.0.0.1:{silent.getsockname()[1]}"))

        async def begin() -> None:
            await transport.open()
            sending.append(asyncio.create_task(transport.send(a_delivery())))
            await asyncio.sleep(0.05)

        sending: list[asyncio.Task[Outcome]] = []
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(begin())
        assert sending[0].cancelled()
        connection, _ = silent.accept()
        with connection:
            connection.settimeout(5)
            assert connection.recv(65_536)
            assert not connection.recv(65_536)


async def test_unread_data_on_an_idle_connection_costs_nothing(threaded: ThreadedServer) -> None:
    """Until an idle connection with unread data is closed, the event loop ignores the connection."""
    async with opened(HttpTransport(settings_for(threaded.url))) as transport:
        assert await transport.send(a_delivery()) == Sent(None, 200)
        threaded.connections[0].sendall(OTHER)
        await asyncio.sleep(0.05)
        before = time.thread_time()
        await asyncio.sleep(0.3)
        assert time.thread_time() - before < 0.15


async def test_a_call_that_is_cancelled_when_its_response_arrives(threaded: ThreadedServer) -> None:
    """If a call is cancelled in the moment in which its response is read, the call is cancelled without an error."""
    loop, errors = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    async with opened(HttpTransport(settings_for(threaded.url))) as transport:
        for steps in range(8):
            call = asyncio.create_task(transport.send(a_delivery()))
            for _ in range(steps):  # iterations of the event loop
                await asyncio.sleep(0)
            time.sleep(0.02)  # noqa: ASYNC251 - until the response has arrived
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
        assert await transport.send(a_delivery()) == Sent(None, 200)
    assert not errors


async def test_calls_in_flight_are_answered_before_closing() -> None:
    """A stopping worker closes its connections only after all calls in flight have been answered."""

    async def answer_late(writer: asyncio.StreamWriter, _request: Request) -> None:
        await asyncio.sleep(0.1)
        writer.write(OK)

    async with scripted(answer_late) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        outcomes = await asyncio.gather(*[transport.send(a_delivery()) for _ in range(20)])
        assert outcomes == [Sent(None, 200)] * 20


async def test_a_connection_closed_by_libcurl_does_not_stop_the_loop() -> None:
    """If libcurl closes a socket that has a pending event, the event loop continues."""
    loop, errors = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as peers:
        listening.setblocking(False)  # noqa: FBT003 - the parameter is positional-only
        curls = CurlLoop({pycurl.M_MAXCONNECTS: 1}, lambda: None)

        async def begin() -> tuple[asyncio.Task[int], socket.socket]:
            curl = pycurl.Curl()
            curl.setopt(pycurl.URL, f"http://127.0.0.1:{listening.getsockname()[1]}")
            curl.setopt(pycurl.FRESH_CONNECT, 1)
            call = asyncio.create_task(curls.perform(curl))
            peer = peers.enter_context((await loop.sock_accept(listening))[0])
            await loop.sock_recv(peer, 1000)
            return call, peer

        async with asyncio.timeout(10):
            first, idle = await begin()
            idle.sendall(OK)
            await first
            second, busy = await begin()
            busy.sendall(OK)  # libcurl may keep only one connection, so it closes the idle one
            idle.close()
            assert await second == pycurl.E_OK
        await asyncio.sleep(0.02)
        curls.close()
    assert not errors


async def test_a_second_connection_gets_no_second_timeout(context: ssl.SSLContext) -> None:
    """If a call has waited for a connection that then turns out to be stale, its timeout does not start anew."""

    async def answer_twice(writer: asyncio.StreamWriter, _request: Request) -> None:
        if len(server.requests) == 1:
            await asyncio.sleep(0.8)
            writer.write(OK)
            writer.write(OK)
        await asyncio.sleep(5)

    async with (
        scripted(answer_twice, context) as server,
        opened(HttpTransport(settings_for(server.url, transport_timeout=1, concurrency=1))) as transport,
    ):
        started = uptime()
        first = asyncio.create_task(transport.send(a_delivery()))
        await asyncio.sleep(0.05)
        second = await transport.send(a_delivery())
        assert await first == Sent(None, 200)
        assert second == Unknown("no answer within 1 s")
        assert uptime() - started < 1.5
