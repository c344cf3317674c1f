"""Drives libcurl's multi handle from an event loop. Only closing, and the watchdog, use a thread each.

pycurl has its own driver for event loops, `AsyncCurlMulti`. `AsyncCurlMulti` adds and removes a watcher for every call,
so a call takes 40 us of processor time. With one epoll for all sockets, a call takes 24 us of processor time.
"""

from __future__ import annotations

import asyncio
import math
import select
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import pycurl

from followups.transports.watchdog import Watchdog
from followups.uptime import uptime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from followups.transports.descriptors import Descriptor

RESOLUTION = 0.001
"""Seconds by which a timer may call libcurl too early. libcurl then sets the timer again."""

SLICE = 0.005
"""Seconds after which other callbacks of the event loop get their turn, even if more sockets are ready."""

CLOSED = -1
"""The result code of transfers that `CurlLoop` itself ends; not one of libcurl's codes."""

_WANTED = {
    pycurl.POLL_IN: select.EPOLLIN,
    pycurl.POLL_OUT: select.EPOLLOUT,
    pycurl.POLL_INOUT: select.EPOLLIN | select.EPOLLOUT,
}
_IN = select.EPOLLIN | select.EPOLLHUP


class CurlLoop:
    """Runs HTTP transfers on an event loop, and keeps their connections for reuse."""

    def __init__(self, options: Mapping[int, int], begin_action: Callable[[], None]) -> None:
        """Register with the running event loop; ``options`` are libcurl's options for the multi handle.

        ``begin_action`` is called before each call into libcurl that performs transfers. Raises `OSError` or
        `pycurl.error` if the limit of open files is reached, and `RuntimeError` if that of threads is.
        """
        self._begin_action = begin_action
        self._watchdog = Watchdog()
        self._sockets = select.epoll()
        self._loop = asyncio.get_running_loop()
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        for option, value in options.items():
            self._multi.setopt(option, value)
        self._turns: dict[int, int] = {}
        """How often each watched socket was ready since it last had no transfer."""
        self._overran = False
        self._kick: asyncio.Handle | None = None
        self._timer: asyncio.Handle | None = None
        self._timer_at = math.inf  # the event loop's time at which the timer fires
        self._wanted = math.inf  # when libcurl must be called next, in the event loop's time
        self.is_broken = False
        """Whether libcurl has reported that this multi handle can no longer perform transfers."""
        self._running: dict[pycurl.Curl, asyncio.Future[int]] = {}
        self._loop.add_reader(self._sockets.fileno(), self._handle_ready_sockets)

    @property
    def is_idle(self) -> bool:
        """Whether no transfer is in progress."""
        return not self._running

    async def perform(self, curl: pycurl.Curl) -> int:
        """Perform a transfer and return libcurl's result code.

        Cancelling a transfer also closes its connection.
        """
        ended: asyncio.Future[int] = self._loop.create_future()
        try:
            self._multi.add_handle(curl)
        except pycurl.error:
            self._break()
            return CLOSED
        self._running[curl] = ended
        try:
            return await ended
        finally:
            if self._running.pop(curl, None):
                self._remove(curl)

    def end(self, curl: pycurl.Curl, code: int) -> None:
        """End a transfer with the given result code, and close its connection unless other transfers use it."""
        if curl in self._running:
            self._end(curl, code)

    def has_shut(self, descriptors: Iterable[Descriptor]) -> bool:
        """Return whether the watchdog has shut down one of these sockets."""
        return not self._watchdog.shut_sockets.isdisjoint(descriptors)

    def close(self) -> None:
        """End every transfer, and close every connection in another thread.

        Closing can block: libcurl waits for its look-up threads, up to half a minute if a name server does not answer.
        One of the two threads (IPv4, IPv6) may still be running after the transfer has ended.
        """
        for curl in tuple(self._running):
            self._end(curl, CLOSED)
        self._loop.remove_reader(self._sockets.fileno())
        self._sockets.close()
        for callback in (pycurl.M_SOCKETFUNCTION, pycurl.M_TIMERFUNCTION):
            self._multi.setopt(callback, None)
        try:
            threading.Thread(target=self._close_multi, name="curl-close", daemon=True).start()
        except RuntimeError:  # the process can start no more threads
            self._close_multi()
        for timer in (self._kick, self._timer):
            if timer is not None:
                timer.cancel()

    def _close_multi(self) -> None:
        self._watchdog.watch_this_thread()
        self._watchdog.transitions += 1
        try:
            self._multi.close()
        finally:
            self._watchdog.stop()

    def _watch(self, what: int, socket: int, _multi: object, _data: object) -> None:
        wanted = _WANTED.get(what)
        if wanted is None:
            # The socket stays registered, because the next transfer usually begins within milliseconds.
            self._turns.pop(socket, None)
            return
        self._turns.setdefault(socket, 0)
        try:
            self._sockets.modify(socket, wanted)
        except FileNotFoundError:  # a new socket can have the number of a closed socket
            self._sockets.register(socket, wanted)
            self._watchdog.add(socket)

    def _handle_ready_sockets(self) -> None:
        # An endless answer makes its socket ready in every iteration of the event loop. Many such sockets can use up
        # the whole time slice. The next iteration then begins with the sockets that were ready least often, which are
        # those of short answers.
        ready = self._sockets.poll(0)
        if self._overran:
            ready.sort(key=lambda one: self._turns.get(one[0], 0))
        until = uptime() + SLICE
        self._overran = False
        for socket, events in ready:
            if socket not in self._turns:
                with suppress(OSError):  # libcurl closed this socket while it handled another socket's event
                    self._sockets.unregister(socket)
                continue
            self._turns[socket] += 1
            wanted = pycurl.CSELECT_IN if events & _IN else 0
            wanted |= pycurl.CSELECT_OUT if events & select.EPOLLOUT else 0
            wanted |= pycurl.CSELECT_ERR if events & select.EPOLLERR else 0
            self._act(socket, wanted)
            if uptime() > until:
                self._overran = True
                break
        self._collect()

    def _set_timer(self, milliseconds: int) -> None:
        # No callback may call libcurl. With every transfer, libcurl sets the time at which it must be called next. A
        # timer that fires too early only sets itself again.
        if milliseconds == 0:
            self._kick = self._kick or self._loop.call_soon(self._kicked)
            return
        self._wanted = self._loop.time() + milliseconds / 1000 if milliseconds > 0 else math.inf
        if self._timer_at > self._wanted:
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = self._wanted
        self._timer = None if self._wanted == math.inf else self._loop.call_at(self._wanted, self._time_out)

    def _kicked(self) -> None:
        if self._kick is not None:
            self._kick.cancel()
        self._kick = None
        self._act(pycurl.SOCKET_TIMEOUT, 0)
        self._collect()

    def _time_out(self) -> None:
        self._timer, self._timer_at = None, math.inf
        # uvloop's clock counts whole milliseconds. A wait of less than a millisecond would start again in every
        # iteration of the loop.
        if self._wanted - self._loop.time() >= RESOLUTION:
            self._arm()
            return
        self._wanted = math.inf
        self._kicked()
        # Every transfer has a time limit, so libcurl always sets another timer, unless a callback has failed.
        if self._running and self._wanted == math.inf and self._kick is None:
            self._break()

    def _act(self, socket: int, ready: int) -> None:
        if self.is_broken:
            return
        self._begin_action()
        self._watchdog.transitions += 1
        try:
            self._multi.socket_action(socket, ready)
        except pycurl.error:
            self._break()
        finally:
            self._watchdog.transitions += 1

    def _break(self) -> None:
        if self.is_broken or self._sockets.closed:
            return
        self.is_broken = True
        self._loop.remove_reader(self._sockets.fileno())
        self._collect()
        for curl in tuple(self._running):
            self._end(curl, CLOSED)

    def _collect(self) -> None:
        left = 1
        while left:
            left, complete, failed = self._multi.info_read()
            for curl in complete:
                self._end(curl, pycurl.E_OK)
            for curl, code, _ in failed:
                self._end(curl, code)

    def _end(self, curl: pycurl.Curl, code: int) -> None:
        ended = self._running.pop(curl)
        self._remove(curl)
        if not ended.done():
            ended.set_result(code)

    def _remove(self, curl: pycurl.Curl) -> None:
        self._watchdog.transitions += 1
        try:
            self._multi.remove_handle(curl)
        except pycurl.error:
            self._loop.call_soon(self._break)  # later, because the caller is ending transfers
        finally:
            self._watchdog.transitions += 1
