"""Checks of open connections: whether a request may be sent, and whether too much arrives.

libcurl examines a kept connection at most once a second. Without the checks of this module, libcurl could take
unsolicited data for the response to the next request. Moreover, libcurl never stops reading an endless response whose
head and body do not grow.
"""

from __future__ import annotations

import select
import socket
import struct
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

ALLOWANCE = 256 * 1024
"""How many bytes a connection may receive for each of its calls after the first check for floods.

Chunk extensions, frames and TLS records count here, but not towards the limits of a response's head and body.
"""

_BYTES_RECEIVED = struct.Struct("=128xQ")
"""The number of bytes that a connection has received, in Linux's ``struct tcp_info`` (since Linux 4.1)."""

Address = tuple[str, str, int, int]
"""A connection: the remote and the local IP address, the remote and the local port."""


class Sockets:
    """Sockets of open connections, keyed by the addresses that identify each connection in libcurl."""

    def __init__(self, *, speak_first: bool, counts_records: bool) -> None:
        """Start without sockets.

        ``speak_first`` means that the receiver may send data before the first request, as with TLS. ``counts_records``
        means that `add_consumed` is called for everything that libcurl reads from a connection.
        """
        self.speak_first = speak_first
        self.counts_records = counts_records
        self._consumed: dict[Address, int] = {}
        """How many bytes libcurl has processed on each HTTP/1.1 connection over TLS."""
        self._known: dict[Address, select.poll] = {}
        self._numbers: dict[Address, int] = {}
        self._calls: dict[Address, int] = {}
        self._allowed: dict[Address, int] = {}
        """How many bytes each connection may have received at the next check for floods."""

    def clear(self) -> None:
        """Remove all sockets."""
        for each in (self._known, self._numbers, self._consumed, self._allowed):
            each.clear()

    def begin(self, address: Address) -> None:
        """Count another call on this connection. Only HTTP/2 allows several simultaneous calls on one connection."""
        others = self._calls.get(address, 0)
        self._calls[address] = others + 1
        if not others:
            self._allowed.pop(address, None)
        elif address in self._allowed:
            self._allowed[address] += ALLOWANCE

    def end(self, address: Address) -> None:
        """Decrement this connection's call count when a call has finished."""
        left = self._calls.pop(address) - 1
        if left:
            self._calls[address] = left

    def distrust(self, address: Address) -> None:
        """Send no further request on this connection."""
        self._known.pop(address, None)

    def is_in_order(self, address: Address, opened: Sequence[int]) -> bool:
        """Return whether a request may be sent on this connection.

        ``opened`` lists the sockets of a new connection; for a reused connection, ``opened`` is empty. An HTTP/2 server
        may send unsolicited data to announce that it will close the connection.
        """
        for each in opened:
            if _local_port(each) == address[3]:
                self._numbers[address] = each
                self._known[address] = poll = select.poll()
                poll.register(each, select.POLLIN | select.POLLRDHUP)
        if opened and self.speak_first:
            return True
        if address not in self._known:
            return False
        seen = self._known[address].poll(0)
        if self.speak_first and address in self._calls and address not in self._consumed:  # HTTP/2
            return not seen or seen[0][1] == select.POLLIN
        return not seen and not self._has_buffered(address)

    # libcurl reads TLS data from the socket in large pieces. If an unsolicited response directly follows another
    # response, libcurl reads both together. The following methods count the processed bytes, so that `is_in_order` and
    # `Exchange` can detect the second response.

    def begin_counting(self, address: Address, consumed: int) -> None:
        """Begin to count the bytes that libcurl processes on a new connection.

        ``consumed`` bytes were processed before the first request. Nothing is counted if the kernel does not report how
        many bytes a connection has received. Some container sandboxes report 0.
        """
        if self.counts_records and self._received(address):
            self._consumed[address] = consumed

    def counts(self, address: Address) -> bool:
        """Return whether the processed bytes of this connection are counted."""
        return address in self._consumed

    def stop_counting(self, address: Address) -> None:
        """Stop counting on an HTTP/2 connection, because its responses name their requests."""
        self._consumed.pop(address, None)

    def add_consumed(self, address: Address, number: int) -> None:
        """Add to the number of bytes that libcurl has processed on a connection."""
        if address in self._consumed:
            self._consumed[address] += number

    def _has_buffered(self, address: Address) -> bool:
        consumed = self._consumed.get(address)
        return consumed is not None and self._received(address) != consumed

    def flooded(self) -> set[Address]:
        """Return the connections that have received more than `ALLOWANCE` for each of their calls.

        Bytes count from the first check during a call. A call that ends before its second check is therefore never
        reported.
        """
        flooded = set()
        for address, calls in self._calls.items():
            received = self._received(address)
            if not received:
                continue
            most = received + calls * ALLOWANCE
            allowed = self._allowed.get(address, most)
            if received > allowed:
                flooded.add(address)
            self._allowed[address] = min(allowed, most)
        return flooded

    def _received(self, address: Address) -> int:
        """Return how many bytes an open connection has received, or 0 if that is not known."""
        number = self._numbers.get(address, -1)
        # The connection may just have been closed, and its file descriptor may already belong to another connection.
        if _local_port(number) != address[3]:
            return 0
        info = _ask(number, _tcp_info) or b""
        return int(_BYTES_RECEIVED.unpack(info)[0]) if len(info) == _BYTES_RECEIVED.size else 0


def _local_port(number: int) -> int | None:
    return _ask(number, lambda opened: int(opened.getsockname()[1]))


def _tcp_info(opened: socket.socket) -> bytes:
    return opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)


def _ask(number: int, question: Callable[[socket.socket], T]) -> T | None:
    """Return what ``question`` returns for a TCP socket of libcurl's, or None if libcurl has closed the socket."""
    try:
        opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, number)
    except OSError:
        return None
    try:
        return question(opened)
    except (OSError, IndexError):  # the file descriptor belongs to a file, or to a socket of another family
        return None
    finally:
        opened.detach()
