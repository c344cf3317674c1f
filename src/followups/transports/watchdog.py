"""Ends calls into libcurl that an endpoint holds up.

When libcurl closes a connection, and when it reads a proxy's answer, it reads until nothing more arrives, even if that
never ends. Meanwhile the thread can do nothing else, and no callback is called. The watchdog is another thread, which
then shuts down the socket that libcurl is reading.

A call counts as held up by the processor time of its thread, not by the time on the clock. If the process was suspended
or had to wait for the processor, and if libcurl waits for a name server, no connection is shut down.
"""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import suppress

from followups.transports.descriptors import Descriptor

INTERVAL = 0.1
"""Seconds between two looks at the current call."""

HELD_UP = 0.15
"""A call that has used this much processor time, in seconds, is held up. Normally it takes milliseconds."""

READ = 16 * 1024
"""If libcurl reads more bytes than this from a socket between two looks, within a single call, this socket holds up the
call. Otherwise, libcurl reads at most 10 KiB before it returns (`http_client.READ_SIZE`).
"""

LAST_RESORT = 2.0
"""After this much processor time, in seconds, all sockets are shut down. Some container sandboxes do not report how
much a connection has received.
"""


class Watchdog:
    """Watches one thread's calls into libcurl, in a thread of its own that ends after `stop`."""

    def __init__(self) -> None:
        """Watch the current thread."""
        self.calls = 0
        """How often libcurl was entered and left: an odd number while a call is running."""
        self.shut: set[Descriptor] = set()
        """The sockets that the watchdog has shut down."""
        self._sockets: dict[int, Descriptor] = {}
        """The sockets that belong to the watched thread, by file descriptor, including those closed since."""
        self._stopped = threading.Event()
        self._seen = 0
        self._spent_before = 0.0
        self._consumed: dict[Descriptor, int] = {}
        self.watch_this_thread()
        threading.Thread(target=_run, args=[weakref.ref(self)], name="curl-watchdog", daemon=True).start()

    def watch_this_thread(self) -> None:
        """Watch the calls of the current thread from now on."""
        self._clock = time.pthread_getcpuclockid(threading.get_ident())

    def add(self, number: int) -> None:
        """Add a socket that the watched thread has opened, or another file descriptor, which is never shut down."""
        with suppress(OSError):  # libcurl has closed it already
            self._sockets[number] = Descriptor.of(number)

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def wait(self) -> bool:
        """Wait for an interval; return False once the watchdog has stopped."""
        return not self._stopped.wait(INTERVAL)

    def look(self) -> None:
        """Shut down the sockets from which the current call has been reading for too long."""
        call = self.calls
        try:
            spent = time.clock_gettime(self._clock)
        except OSError:  # the thread has ended
            return
        if call % 2 == 0 or call != self._seen:
            self._seen, self._spent_before = call, spent
            self._consumed.clear()
            return
        held_up = spent - self._spent_before
        if held_up < INTERVAL / 2:  # the thread is waiting
            return
        consumed = {each: each.consumed() for each in tuple(self._sockets.values())}
        before, self._consumed = self._consumed, consumed
        for each, number in consumed.items():
            reads = held_up > HELD_UP and number - before.get(each, number) > READ
            if (reads or held_up > LAST_RESORT) and self.calls == call:
                self.shut.add(each)
                each.shut()


def _run(watchdog: weakref.ref[Watchdog]) -> None:
    # Without `stop`, the thread ends as soon as nothing else refers to the watchdog.
    while (found := watchdog()) and found.wait():
        found.look()
        del found
