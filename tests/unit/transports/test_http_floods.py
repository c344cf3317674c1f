"""Receivers that send without end: their calls end at the timeout, and nothing else is affected."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import Counter
from concurrent.futures import Future
from typing import TYPE_CHECKING

import pycurl
import pytest

from followups.transports import curl_loop, http_client, http_sockets
from followups.transports.curl_loop import CLOSED, CurlLoop
from followups.transports.http import HttpTransport
from followups.transports.http_client import STREAMS
from followups.transports.port import Retry, Sent, Unknown
from followups.uptime import uptime
from unit.transports.doubles import Request, a_delivery, answer, listening, opened, scripted, settings_for
from unit.transports.http2 import Stream, serving_http2

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

OK = Sent(None, 200)
ENDLESS = Sent(None, 200, "the answer is endless")
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture(autouse=True)
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detect floods early."""
    monkeypatch.setattr(http_client, "SWEEP_INTERVAL", 0.01)
    monkeypatch.setattr(http_sockets, "ALLOWANCE", 16_384)


async def repeat(writer: asyncio.StreamWriter, piece: bytes) -> None:
    """Write a piece without end, until the connection is closed."""
    with contextlib.suppress(ConnectionError):
        while not writer.is_closing():
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)  # because `drain` may return without yielding to the event loop


@pytest.mark.parametrize("secure", [False, True])
async def test_an_endless_chunk_extension_costs_its_call_the_timeout(context: ssl.SSLContext, *, secure: bool) -> None:
    """Reading of an endless chunk extension stops early, but its call ends only at the timeout.

    An endpoint that always answers like this could otherwise occupy a worker's processor. Other calls succeed.
    """
    unread = asyncio.Event()

    async def answer_some(writer: asyncio.StreamWriter, request: Request) -> None:
        if b"flood" in request.body:
            writer.write(CHUNKED + b"1;")
            await repeat(writer, b"x" * 10_000)
            unread.set()
        writer.write(answer(200))

    async with (
        scripted(answer_some, context if secure else None) as server,
        opened(HttpTransport(settings_for(server.url, transport_timeout=2))) as transport,
    ):
        flooded = [asyncio.create_task(transport.send(a_delivery(message="flood"))) for _ in range(5)]
        await unread.wait()
        for _ in range(5):
            assert await transport.send(a_delivery()) == OK
        assert not any(each.done() for each in flooded)
        for outcome in await asyncio.gather(*flooded):
            assert outcome == ENDLESS


async def test_a_slow_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit does not grow with time, so an endless response is also detected if it arrives slowly."""
    monkeypatch.setattr(http_client, "SWEEP_INTERVAL", 0.005)

    async def drip(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(CHUNKED + b"1;")
        while True:
            writer.write(b"x" * 4_000)
            await asyncio.sleep(0.02)

    async with (
        scripted(drip) as server,
        opened(HttpTransport(settings_for(server.url, transport_timeout=0.8))) as transport,
    ):
        assert await transport.send(a_delivery()) == ENDLESS


async def test_a_long_answer_is_no_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit applies to each call: a connection may receive any number of bytes in total."""
    monkeypatch.setattr(http_client, "SWEEP_INTERVAL", 0.001)
    monkeypatch.setattr(http_sockets, "ALLOWANCE", 256 * 1024)
    padding = b" " * 60_000
    async with (
        scripted(CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(padding), padding)) as server,
        opened(HttpTransport(settings_for(server.url))) as transport,
    ):
        for _ in range(20):
            assert await transport.send(a_delivery()) == OK
        assert server.connections == 1


def pong(_stream: Stream) -> bytes:
    """Return a response to a PING frame that was never sent."""
    return bytes.fromhex("0000080601000000000102030405060708")


def pad(stream: Stream) -> bytes:
    """Return a DATA frame that contains only padding."""
    return bytes.fromhex("00010000 08") + stream.id.to_bytes(4) + b"\xff" + bytes(255)


@pytest.mark.parametrize("frame", [pong, pad])
async def test_endless_frames_cost_their_calls_the_timeout(
    frame: Callable[[Stream], bytes], context: ssl.SSLContext
) -> None:
    """If frames arrive without end, calls on the connection time out; later calls are not affected."""

    async def accept(stream: Stream) -> None:
        stream.answer(200)

    async def flood(stream: Stream) -> None:
        stream.answer(200, ends=False)
        await asyncio.sleep(0.1)  # meanwhile the client reads the heads of all responses
        await repeat(stream.connection.writer, frame(stream) * 1_000)

    async with (
        serving_http2(accept, context) as server,
        opened(HttpTransport(settings_for(server.url, transport_timeout=2))) as transport,
    ):
        assert await transport.send(a_delivery()) == OK
        server.serve = flood
        calls = asyncio.gather(*[transport.send(a_delivery()) for _ in range(STREAMS)])
        await asyncio.sleep(0.5)  # meanwhile the flood is detected
        server.serve = accept
        assert await transport.send(a_delivery()) == OK
        assert not calls.done()
        assert await calls == [ENDLESS] * STREAMS
        assert len(server.connections) == 2


async def test_many_answers_beside_a_slow_one_are_no_flood(context: ssl.SSLContext) -> None:
    """Each call on an HTTP/2 connection raises the limit, so the connection may have a slow call all the time."""
    late = asyncio.Event()

    async def serve(stream: Stream) -> None:
        if b"slow" in stream.body:
            await late.wait()
        stream.answer(200, b" " * 6_000)

    async with (
        serving_http2(serve, context) as server,
        opened(HttpTransport(settings_for(server.url))) as transport,
    ):
        slow = asyncio.create_task(transport.send(a_delivery(message="slow")))
        await server.requested.wait()
        for _ in range(10):
            assert await transport.send(a_delivery()) == OK
            await asyncio.sleep(0.03)
        late.set()
        assert await slow == OK
        assert len(server.connections) == 1


async def test_a_flood_on_a_replaced_connection(context: ssl.SSLContext) -> None:
    """A flood is also detected on a connection that gets no new calls, but has a call in flight."""

    async def serve(stream: Stream) -> None:
        if b"flood" in stream.body:
            await replaced.wait()
            stream.answer(200, ends=False)
            await repeat(stream.connection.writer, pong(stream) * 1_000)
        elif b"silent" not in stream.body:
            stream.answer(200)

    loop, errors, replaced = asyncio.get_running_loop(), [], asyncio.Event()
    loop.set_exception_handler(lambda _, context: errors.append(context))
    async with (
        serving_http2(serve, context) as server,
        opened(HttpTransport(settings_for(server.url, transport_timeout=0.8))) as transport,
    ):
        assert await transport.send(a_delivery()) == OK
        silent = asyncio.create_task(transport.send(a_delivery(message="silent")))
        await asyncio.sleep(0.4)
        flood = asyncio.create_task(transport.send(a_delivery(message="flood")))
        assert await silent == Unknown("no answer within 0.8 s")
        assert await transport.send(a_delivery()) == OK
        assert len(server.connections) == 2
        replaced.set()
        assert await flood == ENDLESS
    assert not errors


@pytest.mark.parametrize("idle", [0, 0.2])
async def test_floods_are_detected_again(monkeypatch: pytest.MonkeyPatch, idle: float) -> None:
    """Floods are also detected after earlier ones, and after all connections have been closed."""

    async def flood(writer: asyncio.StreamWriter, request: Request) -> None:
        if b"flood" not in request.body:
            writer.write(answer(200))
            return
        writer.write(CHUNKED + b"1;")
        await repeat(writer, b"x" * 10_000)

    async with (
        scripted(flood) as server,
        opened(HttpTransport(settings_for(server.url, transport_timeout=1))) as transport,
    ):
        monkeypatch.setattr(http_client, "KEEPALIVE", 0.05)
        first = asyncio.create_task(transport.send(a_delivery(message="flood")))
        await asyncio.sleep(0.2 + idle)
        assert await transport.send(a_delivery()) == OK
        assert await transport.send(a_delivery(message="flood")) == ENDLESS
        assert await first == ENDLESS


async def test_closing_ends_the_wait() -> None:
    """If the client is closed, a call with an endless response ends immediately."""

    async def flood(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(CHUNKED + b"1;")
        await repeat(writer, b"x" * 10_000)
        unread.set()

    unread = asyncio.Event()
    async with scripted(flood) as server, opened(HttpTransport(settings_for(server.url))) as transport:
        call = asyncio.create_task(transport.send(a_delivery()))
        await unread.wait()
        await transport.open()  # has no effect
        await transport.close()
        async with asyncio.timeout(2):
            assert await call == ENDLESS


async def test_an_endless_tls_handshake(trusted: None) -> None:  # noqa: ARG001 - clients need an authority
    """A handshake without end stops neither the event loop nor the timeout."""
    hello_requests = b"\x16\x03\x03" + (16_384).to_bytes(2) + bytes(16_384)

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65_536)
        await repeat(writer, hello_requests)
        unread.set()

    unread = asyncio.Event()
    async with (
        listening(flood) as url,
        opened(HttpTransport(settings_for(url.replace("http:", "https:"), transport_timeout=1))) as transport,
    ):
        call = asyncio.create_task(transport.send(a_delivery()))
        await unread.wait()
        assert not call.done()
        assert await call == Retry("no connection: the endpoint sends data without end")


@pytest.mark.parametrize("start", [b"content-length: 99999999999\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n1;"])
async def test_the_body_of_a_proxys_refusal_is_not_read(monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    """If a proxy refuses a tunnel, the call ends with the proxy's status, even if the refusal never ends."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65_536)
        writer.write(b"HTTP/1.1 407 No\r\n" + start)
        await repeat(writer, b"x" * 10_000)

    async with listening(refuse) as url:
        monkeypatch.setenv("HTTPS_PROXY", url)
        async with opened(HttpTransport(settings_for("https://127.0.0.1:9"))) as transport:
            assert await transport.send(a_delivery()) == Retry("no connection: the proxy answered HTTP 407")


@pytest.mark.parametrize("deduplicates", [True, False])
async def test_data_behind_the_last_response_is_not_read(context: ssl.SSLContext, *, deduplicates: bool) -> None:
    """If a connection is not kept, nothing is read after its response.

    libcurl would read for two seconds until the receiver closes the TLS connection.
    """

    async def flood(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(answer(200, connection="close"))
        await repeat(writer, b"x" * 10_000)
        unread.set()

    unread = asyncio.Event()
    async with scripted(flood, context) as server:
        settings = settings_for(server.url, transport_deduplicates=deduplicates, transport_timeout=1)
        async with opened(HttpTransport(settings)) as transport, asyncio.timeout(1.5):
            assert await transport.send(a_delivery()) in {OK, ENDLESS}
            await unread.wait()


async def test_a_proxys_endless_header_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a proxy continues a header line without end, its connection is shut down, and the event loop goes on.

    libcurl reads such a line byte by byte without returning, and passes none of it on. The call ends at its timeout.
    """

    async def fold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65_536)
        writer.write(b"HTTP/1.1 200 OK\r\nx: y\r\n")
        await repeat(writer, b" " * 10_000)

    def proxy(ready: Future[str]) -> None:
        async def serve() -> None:
            async with listening(fold) as url, asyncio.timeout(8):
                ready.set_result(url)
                await asyncio.Event().wait()

        with contextlib.suppress(TimeoutError):
            asyncio.run(serve())

    url: Future[str] = Future()
    threading.Thread(target=proxy, args=[url], daemon=True).start()  # because the event loop of the test is held up
    monkeypatch.setenv("HTTPS_PROXY", await asyncio.wrap_future(url))
    async with opened(HttpTransport(settings_for("https://127.0.0.1:9", transport_timeout=3))) as transport:
        call = asyncio.create_task(transport.send(a_delivery()))
        started = uptime()
        while not call.done():
            at, used = uptime(), time.thread_time()
            await asyncio.sleep(0.01)
            assert uptime() - at < 5
            assert time.thread_time() - used < 1
        assert await call == Retry("no connection: the endpoint sends data without end")
        assert 2.9 < uptime() - started < 7


@pytest.mark.parametrize("deduplicates", [True, False])
async def test_a_receiver_that_ignores_the_end(context: ssl.SSLContext, *, deduplicates: bool) -> None:
    """If a receiver goes on sending after the client has closed the TLS connection, nothing of it is read."""

    def listen() -> float:  # runs in a thread, because a stream of asyncio closes the connection when the client does
        connection, _ = listener.accept()
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(65_536)
            secure.sendall(answer(200, connection="close"))
            began = time.monotonic()
            with contextlib.suppress(OSError):
                while True:
                    secure.sendall(b"x" * 10_000)
            return time.monotonic() - began

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        served = asyncio.get_running_loop().run_in_executor(None, listen)
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        settings = settings_for(url, transport_deduplicates=deduplicates, transport_timeout=1)
        async with opened(HttpTransport(settings)) as transport:
            assert await transport.send(a_delivery()) in {OK, ENDLESS}
            assert await served < 1.5  # libcurl itself would read for 2 s


async def test_a_long_answer_after_a_pause_of_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that arrives while the event loop is stopped is read, even if it is longer than the limit."""
    monkeypatch.setattr(http_client, "SWEEP_INTERVAL", 0.05)

    def listen() -> None:  # runs in a thread that is not stopped
        connection, _ = listener.accept()
        with connection:
            connection.recv(65_536)
            assert stopped.wait(5)
            connection.sendall(answer(200, b" " * 60_000))
            connection.recv(65_536)

    stopped, loop = threading.Event(), asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        served = loop.run_in_executor(None, listen)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with opened(HttpTransport(settings_for(url))) as transport:
            call = asyncio.create_task(transport.send(a_delivery()))
            await asyncio.sleep(0.2)  # several checks for floods
            stopped.set()
            time.sleep(0.1)  # noqa: ASYNC251 - the test stops the event loop
            assert await call == OK
        await served


async def test_short_answers_come_before_endless_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if one socket uses up the whole time slice of the event loop, endless answers do not delay short ones."""
    monkeypatch.setattr(http_client, "SWEEP_INTERVAL", 60)  # floods are not ended
    monkeypatch.setattr(curl_loop, "SLICE", 0)

    async def answer_some(writer: asyncio.StreamWriter, request: Request) -> None:
        if b"flood" in request.body:
            writer.write(CHUNKED + b"1;")
            await repeat(writer, b"x" * 100_000)
        writer.write(answer(200))

    async with (
        scripted(answer_some) as server,
        opened(HttpTransport(settings_for(server.url, transport_timeout=1))) as transport,
    ):
        flooded = [asyncio.create_task(transport.send(a_delivery(message="flood"))) for _ in range(3)]
        await asyncio.sleep(0.1)
        for _ in range(10):
            assert await transport.send(a_delivery()) == OK
        assert not any(each.done() for each in flooded)


async def test_other_callbacks_get_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time slice, a `CurlLoop` lets other callbacks run, even if more sockets are ready."""
    monkeypatch.setattr(curl_loop, "SLICE", 0)
    turn = 0
    actions: list[int] = []

    async def count() -> None:
        nonlocal turn
        while True:
            await asyncio.sleep(0)
            turn += 1

    async def flood(writer: asyncio.StreamWriter, _request: Request) -> None:
        writer.write(CHUNKED + b"1;")
        await repeat(writer, b"x" * 100_000)

    async with scripted(flood) as server:
        counting = asyncio.create_task(count())
        curls = CurlLoop({}, lambda: actions.append(turn))
        calls = []
        for _ in range(5):
            curl = pycurl.Curl()
            curl.setopt(pycurl.URL, server.url)
            calls.append(asyncio.create_task(curls.perform(curl)))
        await asyncio.sleep(0.2)
        curls.close()
        assert await asyncio.gather(*calls) == [CLOSED] * 5
        counting.cancel()
    latest = Counter(actions[len(actions) // 2 :])
    assert len(latest) > 10
    assert max(latest.values()) <= 2
