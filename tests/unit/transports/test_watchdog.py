"""Tests of the watchdog and of descriptors: which sockets are shut down, and which are left alone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pycurl
import pytest

from followups.transports import descriptors, watchdog
from followups.transports.curl_loop import CurlLoop
from followups.transports.descriptors import Descriptor
from followups.transports.http import DIALECT, HttpTransport
from followups.transports.http_client import HttpClient
from followups.transports.http_sockets import Sockets
from followups.transports.port import Retry, Sent
from followups.transports.watchdog import HELD_UP, INTERVAL, LAST_RESORT, READ, Watchdog
from stack import wait_until
from unit.transports.doubles import a_delivery, answer, opened, scripted, settings_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Pair:
    """Both ends of a TCP connection; the near end belongs to the client."""

    def __init__(self, stack: contextlib.ExitStack, listener: socket.socket) -> None:
        self.near = stack.enter_context(socket.create_connection(listener.getsockname()))
        self.far = stack.enter_context(listener.accept()[0])
        self.far.setblocking(False)  # noqa: FBT003 - the parameter is positional-only

    @property
    def is_shut(self) -> bool:
        """Whether the near end was shut down."""
        try:
            return self.far.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True


@pytest.fixture
def pairs() -> Iterator[Callable[[], Pair]]:
    """Return a function that connects a new pair."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        yield lambda: Pair(stack, listener)


def flood(pair: Pair) -> threading.Thread:
    """Send without end from the far end, until the near end is shut down."""

    def send() -> None:
        far = pair.far.dup()
        far.setblocking(True)  # noqa: FBT003 - the parameter is positional-only
        with far, contextlib.suppress(OSError):
            while True:
                far.sendall(b"x" * 10_000)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def run_call(watching: Watchdog, work: Callable[[], object], seconds: float) -> float:
    """Repeat some work in a single call, until it returns nothing or the time is over; return the seconds."""
    watching.transitions += 1
    started = time.monotonic()
    while time.monotonic() < started + seconds and work():
        pass
    watching.transitions += 1
    return time.monotonic() - started


def test_the_socket_that_is_read_without_end_is_shut(pairs: Callable[[], Pair]) -> None:
    """Only the socket that holds up the call is shut down, not idle sockets, and not those with unread data."""
    watching, flooded, idle, unread = Watchdog(), pairs(), pairs(), pairs()
    for each in (flooded, idle, unread):
        watching.add(each.near.fileno())
    unread.far.sendall(b"x" * 1000)
    thread = flood(flooded)
    assert run_call(watching, lambda: flooded.near.recv(100), 10) < 8
    watching.stop()
    thread.join(5)
    assert flooded.is_shut
    assert not idle.is_shut
    assert not unread.is_shut
    assert unread.near.recv(1000) == b"x" * 1000
    assert watching.shut_sockets == {Descriptor.of(flooded.near.fileno())}


def wait_a_little(pair: Pair) -> object:
    """Wait and read a little, like a suspended or starved thread."""
    time.sleep(0.02)
    return pair.near.recv(1000)


@pytest.mark.parametrize(
    "work", [wait_a_little, lambda _pair: True], ids=["waits", "computes"]
)  # fmt: skip
def test_a_long_call_that_does_not_read_without_end(pairs: Callable[[], Pair], work: Callable[[Pair], object]) -> None:
    """A call that takes long for another reason shuts down no connection."""
    watching, pair = Watchdog(), pairs()
    watching.add(pair.near.fileno())
    pair.far.sendall(b"x" * 100_000)
    run_call(watching, lambda: work(pair), HELD_UP + 6 * INTERVAL)
    watching.stop()
    assert not pair.is_shut
    assert not watching.shut_sockets


def test_short_calls_may_read_much(pairs: Callable[[], Pair]) -> None:
    """A thread that reads a lot in many calls is not held up."""
    watching, pair = Watchdog(), pairs()
    watching.add(pair.near.fileno())
    thread = flood(pair)
    until = time.monotonic() + 6 * INTERVAL
    while time.monotonic() < until:
        run_call(watching, lambda: pair.near.recv(1000) and None, 1)
    watching.stop()
    assert not watching.shut_sockets
    pair.near.close()
    thread.join(5)


def test_the_last_resort(pairs: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel does not count what a connection has received, the connection is shut down in the end."""
    monkeypatch.setattr(descriptors, "_received", lambda _: 0)
    monkeypatch.setattr(watchdog, "LAST_RESORT", 2 * HELD_UP)
    watching, flooded = Watchdog(), pairs()
    watching.add(flooded.near.fileno())
    thread = flood(flooded)
    assert run_call(watching, lambda: flooded.near.recv(100), 10) < 8
    watching.stop()
    thread.join(5)
    assert flooded.is_shut


def watchdogs() -> set[threading.Thread]:
    """Return the threads of all watchdogs. Those of earlier tests may still be ending."""
    return {thread for thread in threading.enumerate() if thread.name == "curl-watchdog"}


async def test_the_threads_end() -> None:
    """The threads of a client end when it is closed, and when its event loop ends without closing it."""
    before = watchdogs()
    async with scripted(answer(200)) as server:
        async with opened(HttpTransport(settings_for(server.url))) as transport:
            assert await transport.send(a_delivery()) == Sent(None, 200)
            (thread,) = watchdogs() - before
        await asyncio.to_thread(thread.join, 5)
        assert not thread.is_alive()

        def run_without_closing() -> threading.Thread:
            async def send() -> threading.Thread:
                before = watchdogs()
                transport = HttpTransport(settings_for(server.url))
                await transport.open()
                await transport.send(a_delivery())
                (thread,) = watchdogs() - before
                return thread

            thread = asyncio.run(send())
            gc.collect()
            thread.join(5)
            return thread

        assert not (await asyncio.to_thread(run_without_closing)).is_alive()


class Clock:
    """The processor time of the watched thread, and how much it has read from the only socket."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used, self.read = 0.0, 0
        self.watching = Watchdog()
        self.watching.stop()  # the test itself calls `check`
        monkeypatch.setattr(Descriptor, "consumed", lambda _: self.read)
        monkeypatch.setattr(watchdog.time, "clock_gettime", lambda _: self.used)

    def check(self, used: float, read: int) -> int:
        """Let the call use processor time and read; return how many sockets have been shut down."""
        self.used += used
        self.read += read
        self.watching.check()
        return len(self.watching.shut_sockets)


def test_when_a_call_is_held_up(pairs: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """A call must have used processor time, and must have read much, but not within any particular time."""
    clock, pair = Clock(monkeypatch), pairs()
    clock.watching.add(pair.near.fileno())
    clock.watching.transitions = 1
    assert clock.check(9, 9 * READ) == 0  # the first check of a call
    assert clock.check(INTERVAL, 9 * READ) == 0  # the first bytes that count
    assert clock.check(HELD_UP - INTERVAL - 0.01, 2 * READ) == 0
    clock.watching.transitions = 3
    for _ in range(9):  # a throttled process uses and reads little between two checks
        assert clock.check(HELD_UP / 8, READ // 7) == 0
    assert clock.check(HELD_UP, READ) == 1
    assert pair.is_shut


def test_all_sockets_are_shut_down_in_the_end(pairs: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """If no socket was read much, but the call does not end, all of its sockets are shut down."""
    clock, every = Clock(monkeypatch), [pairs(), pairs()]
    for each in every:
        clock.watching.add(each.near.fileno())
    clock.watching.transitions = 1
    assert clock.check(9, 0) == 0
    assert clock.check(LAST_RESORT, 0) == 0
    assert clock.check(INTERVAL, 0) == 2
    assert all(each.is_shut for each in every)


def test_other_calls_are_left_alone(pairs: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither many short calls, nor time outside of calls, count as one long call."""
    clock, pair = Clock(monkeypatch), pairs()
    clock.watching.add(pair.near.fileno())
    for transitions in (1, 3, 5, 6, 6, 6, 7):
        clock.watching.transitions = transitions
        assert clock.check(9 * HELD_UP, 9 * READ) == 0
    assert clock.check(HELD_UP / 9, 9 * READ) == 0
    assert not pair.is_shut


async def test_closing_is_watched(pairs: Callable[[], Pair]) -> None:
    """If an endpoint floods a connection while libcurl closes it, the connection is shut down."""
    pair = pairs()
    curls = CurlLoop({}, lambda: None)
    watching, multi = curls._watchdog, curls._multi  # noqa: SLF001 - not public

    class Closing:
        """A multi handle whose closing reads without end."""

        def setopt(self, *given: Any) -> None:
            multi.setopt(*given)

        def close(self) -> None:
            while pair.near.recv(100):
                pass
            multi.close()

    curls._multi = Closing()  # noqa: SLF001 - not public
    watching.add(pair.near.fileno())
    thread = flood(pair)
    curls.close()
    await asyncio.to_thread(thread.join, 8)
    assert watching.shut_sockets == {Descriptor.of(pair.near.fileno())}


async def test_a_spare_exchange_forgets_its_connection() -> None:
    """A call that opens no connection does not count as flooded because the previous one was."""
    async with scripted(answer(200)) as server:
        client = HttpClient(settings_for(server.url))
        await client.open()
        assert await client.deliver(server.url, [], b"{}", DIALECT) == Sent(None, 200)
        (spare,), curls = client._spare, client._curls  # noqa: SLF001 - not public
        assert curls
        curls._watchdog.shut_sockets.update(spare.descriptors)  # noqa: SLF001 - not public
        outcome = await client.deliver("http://no-such-host.invalid/", [], b"{}", DIALECT)
        assert outcome == Retry("no connection: the host name was not found (DNS)")
        await client.close()


async def test_other_sockets_are_not_watched(pairs: Callable[[], Pair]) -> None:
    """A loop's watchdog knows only the sockets of this loop, and ends when the loop has been closed."""
    pair = pairs()
    async with scripted(answer(200)) as server:
        curls = CurlLoop({}, lambda: None)
        curl = pycurl.Curl()
        curl.setopt(pycurl.URL, server.url)
        assert await curls.perform(curl) == pycurl.E_OK
        watching = curls._watchdog  # noqa: SLF001 - not public
        curls.close()
        await asyncio.to_thread(wait_until, lambda: not watching.wait())
    assert Descriptor.of(pair.near.fileno()) not in watching._sockets.values()  # noqa: SLF001 - not public
    assert watching._sockets  # noqa: SLF001 - not public


def test_a_file_descriptor_belongs_to_one_connection() -> None:
    """If a new connection gets the file descriptor of a closed one, the closed connection is removed."""
    sockets = Sockets(uses_tls=False, counts_records=False)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as one:
        port, found = one.getsockname()[1], Descriptor.of(one.fileno())
        old, new = ("127.0.0.2", "127.0.0.1", 1, port), ("127.0.0.1", "127.0.0.1", 1, port)
        assert sockets.may_send(old, [found])
        assert sockets.may_send(old, [])
        assert sockets.may_send(new, [found])
        assert not sockets.may_send(old, [])
        assert sockets.may_send(new, [])
        # a connection with the same ports may have another file descriptor by now
        with socket.create_connection(listener.getsockname()) as other:
            assert sockets.may_send((*new[:3], other.getsockname()[1]), [Descriptor.of(other.fileno())])
        assert sockets.may_send(new, [])


def test_a_file_descriptor_of_a_closed_socket() -> None:
    """If another socket has got the number of a closed socket, the other socket is left alone."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as one:
        found = Descriptor.of(one.fileno())
        assert found.local_port() == one.getsockname()[1]
        one.close()
        with socket.create_connection(listener.getsockname()) as other:
            found = found._replace(number=other.fileno())  # usually the same number, unless another thread took it
            assert found.local_port() is None
            found.shut()
            assert other.getpeername() == listener.getsockname()


def test_the_socket_of_a_connection_is_recognised_by_its_port() -> None:
    """Of several sockets that were opened for a connection, only the one with the connection's port is watched."""
    sockets = Sockets(uses_tls=False, counts_records=False)
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as clients:
        one, other = (clients.enter_context(socket.create_connection(listener.getsockname())) for _ in range(2))
        peers = [clients.enter_context(listener.accept()[0]) for _ in range(2)]
        address = ("127.0.0.1", "127.0.0.1", 1, one.getsockname()[1])
        peers[1].close()
        assert sockets.may_send(address, [Descriptor.of(each.fileno()) for each in (one, other)])
        peers[0].close()
        assert not sockets.may_send(address, [])
