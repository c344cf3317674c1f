"""Checks of open connections: whether a request may be sent, and whether too much arrives.

libcurl examines a kept connection at most once a second. Without the checks of this module, libcurl could take
unsolicited data for the answer to the next request.

Moreover, libcurl never stops reading an endless answer whose head and body do not grow. Endless answers are limited as
follows:

- `CurlLoop` stops calling libcurl after some milliseconds, and then begins with the sockets of short answers.
- `Exchange` limits the head and the body, and the TLS records that libcurl processes before it returns.
- A `Watchdog` shuts a socket down if libcurl reads from it without end in a single call.
- `Sockets.flooded` finds the connections that have received too much. `HttpClient` then stops reading from them, but
  the calls end only at their timeouts.
"""

from __future__ import annotations

import asyncio
import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from followups.transports.descriptors import Descriptor

ALLOWANCE = 256 * 1024
"""How many bytes a connection may receive per call, counted from the first check for floods during the call.

The limit does not grow with time. Chunk extensions, frames and TLS records count here, but not towards the limits of an
answer's head and body.
"""

LAST_MESSAGES = 16 * 1024
"""If more unread bytes than this are left when libcurl closes a connection, the endpoint is flooding."""

Address = tuple[str, str, int, int]
"""A connection: the remote and the local IP address, the remote and the local port."""


class Sockets:
    """Sockets of open connections, keyed by the addresses that identify each connection in libcurl."""

    def __init__(self, *, uses_tls: bool, counts_records: bool) -> None:
        """Start without sockets.

        ``uses_tls`` means that the endpoint may send data before the first request, as with TLS. ``counts_records``
        means that `add_consumed` is called for everything that libcurl reads from a connection.
        """
        self.uses_tls = uses_tls
        self.action = 0
        """The number of calls into libcurl (`CurlLoop`) so far."""
        self._counts_records = counts_records
        self._consumed: dict[Address, int] = {}
        """How many bytes libcurl has processed on each TLS connection that is not known to use HTTP/2."""
        self._http2: set[Address] = set()
        self._known: dict[Address, select.poll] = {}
        self._descriptors: dict[Address, Descriptor] = {}
        self._addresses: dict[int, Address] = {}
        self._calls: dict[Address, int] = {}
        self._unanswered: dict[Address, int] = {}
        """Number of calls on each TLS connection whose answers have not begun."""
        self._allowed: dict[Address, int] = {}
        """How many bytes each connection may have received at the next check for floods."""
        self._exceeding: set[Address] = set()
        """The connections that had received more than allowed at the last check for floods."""

    def begin_action(self) -> None:
        """Count another call into libcurl."""
        self.action += 1

    def clear(self) -> None:
        """Remove all sockets."""
        for address in tuple(self._descriptors):
            self._forget(address)

    def _forget(self, address: Address) -> None:
        if found := self._descriptors.pop(address, None):
            self._addresses.pop(found.number, None)
        self._http2.discard(address)
        for each in (self._known, self._consumed, self._allowed):
            each.pop(address, None)

    def begin(self, address: Address) -> None:
        """Count another call on this connection. Only HTTP/2 allows several simultaneous calls on one connection."""
        others = self._calls.get(address, 0)
        self._calls[address] = others + 1
        if not others:
            self._allowed.pop(address, None)
        elif address in self._allowed:
            self._allowed[address] += ALLOWANCE
        if self.uses_tls:
            self._unanswered[address] = self._unanswered.get(address, 0) + 1

    def answer(self, address: Address, *, http2: bool) -> None:
        """Record that an answer over TLS has begun.

        An HTTP/2 answer carries the stream id of its request, so no records need to be counted.
        """
        left = self._unanswered.pop(address) - 1
        if left:
            self._unanswered[address] = left
        if http2 and address not in self._http2:
            self._http2.add(address)
            self._consumed.pop(address, None)

    def end(self, address: Address, *, answered: bool) -> None:
        """Decrement this connection's call count when a call has finished."""
        if self.uses_tls and not answered:
            self.answer(address, http2=False)
        left = self._calls.pop(address) - 1
        if left:
            self._calls[address] = left

    def do_not_reuse(self, address: Address) -> None:
        """Send no further request on this connection."""
        self._known.pop(address, None)

    def may_send(self, address: Address, opened: Sequence[Descriptor]) -> bool:
        """Return whether a request may be sent on this connection.

        ``opened`` lists the sockets of a new connection; for a reused connection, ``opened`` is empty. An idle
        connection with unread data is not used. Over HTTP/2, such data may announce that the server closes the
        connection.
        """
        for each in opened:
            if each.local_port() == address[3]:
                # libcurl has closed the connection that had this number; its address may have another socket by now
                closed = self._addresses.get(each.number, address)
                if self._descriptors.get(closed, each).number == each.number:
                    self._forget(closed)
                self._descriptors[address] = each
                self._addresses[each.number] = address
                self._known[address] = poll = select.poll()
                poll.register(each.number, select.POLLIN | select.POLLRDHUP)
        if opened and self.uses_tls:
            return True
        if address not in self._known:
            return False
        seen = self._known[address].poll(0)
        # Over HTTP/1.1, the previous call has ended in libcurl, but its task may not have resumed yet.
        if self.uses_tls and address in (self._calls if address in self._http2 else self._unanswered):
            return not seen or seen[0][1] == select.POLLIN
        return not seen and not self._has_buffered(address)

    # libcurl reads TLS data from the socket in large pieces. If an unsolicited answer directly follows another
    # answer, libcurl reads both together. The following methods count the processed bytes, so that `may_send` and
    # `Exchange` can detect the second answer.

    def begin_counting(self, address: Address, consumed: int) -> None:
        """Begin to count the bytes that libcurl processes on a new connection.

        ``consumed`` bytes were processed before the first request. Nothing is counted if the kernel does not report how
        many bytes a connection has received. Some container sandboxes report 0.
        """
        if self._counts_records and self._received(address):
            self._consumed[address] = consumed

    def counts(self, address: Address) -> bool:
        """Return whether the processed bytes of this connection are counted."""
        return address in self._consumed

    def add_consumed(self, address: Address, number: int) -> None:
        """Add to the number of bytes that libcurl has processed on a connection."""
        if address in self._consumed:
            self._consumed[address] += number

    def _has_buffered(self, address: Address) -> bool:
        consumed = self._consumed.get(address)
        return consumed is not None and self._received(address) != consumed

    def descriptors_of(self, address: Address) -> Sequence[Descriptor]:
        """Return the known socket of a connection in a list, or an empty list. libcurl may have closed it."""
        found = self._descriptors.get(address)
        return [found] if found else []

    def shut(self, address: Address) -> None:
        """Shut this connection down, so that libcurl reads nothing more from it."""
        if found := self._descriptors.get(address):
            found.shut()

    def finish(self, address: Address) -> bool:
        """Shut this connection down soon, or immediately if it receives data; return whether it receives too much.

        libcurl is about to send its last message (close_notify).
        """
        found = self._descriptors.get(address)
        unread = found.unread() if found else 0
        if self._has_unread(address):
            self.shut(address)
        else:
            asyncio.get_running_loop().call_soon(self.shut, address)
        return unread > LAST_MESSAGES

    def shut_unread(self) -> None:
        """Shut down the idle TLS connections that have unread data.

        Otherwise, libcurl would read the data when it closes these connections, even if the data never ends.
        """
        for address in self._known if self.uses_tls else ():
            if address not in self._calls and self._has_unread(address):
                self.shut(address)

    def _has_unread(self, address: Address) -> bool:
        return address in self._known and bool(self._known[address].poll(0))

    def flooded(self) -> set[Address]:
        """Return the connections that have received more than `ALLOWANCE` for each of their calls.

        Bytes count from the first check after an idle connection has got a call. Only connections that exceed their
        limit at two checks in a row are returned, because a long answer may have arrived while the event loop was
        stopped, and libcurl has to read it first. A connection is therefore returned at the third check of a call at
        the earliest.
        """
        exceeding = set()
        for address, calls in self._calls.items():
            received = self._received(address)
            if not received:
                continue
            most = received + calls * ALLOWANCE
            allowed = self._allowed.get(address, most)
            if received > allowed:
                exceeding.add(address)
            self._allowed[address] = min(allowed, most)
        flooded = exceeding & self._exceeding
        self._exceeding = exceeding
        return flooded

    def _received(self, address: Address) -> int:
        """Return how many bytes an open connection has received, or 0 if that is not known."""
        found = self._descriptors.get(address)
        return found.received() if found else 0
