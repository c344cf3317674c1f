"""Interrupts libcurl when an endpoint keeps it reading without end.

libcurl reads until no more data arrives, both when it closes a connection and when it reads a proxy's answer. If data
keeps arriving, this never ends. Meanwhile the thread can do nothing else, and no callback is called. The watchdog runs
in another thread and shuts down the socket that libcurl is reading. `http_sockets` lists the other limits on endless
answers.

Processor time decides whether libcurl is held up, not elapsed time. No connection is shut down while the process is
suspended, waits for a processor, or waits for a name server.
"""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import suppress

from followups.transports.descriptors import Descriptor

INTERVAL = 0.1
"""Seconds between two checks."""

HELD_UP = 0.15
"""Processor time in seconds, from the first check of a call into libcurl, after which the socket that it reads may be
shut down. A normal call takes milliseconds.
"""

READ = 16 * 1024
"""Number of bytes. A socket holds up a call into libcurl if the call reads more than this from it between two checks.

A normal call reads at most ten buffers (`http_client.READ_SIZE`). The two checks may be far apart, because a throttled
process reads little in an interval.
"""

LAST_RESORT = 2.0
"""After this much processor time, in seconds, all sockets of the thread are shut down. This is needed where the kernel
does not report how much a connection has received, as in some container sandboxes.
"""


class Watchdog:
    """Watches one thread's calls into libcurl, in a thread of its own that ends after `stop`."""

    def __init__(self) -> None:
        """Watch the current thread. Raises `RuntimeError` if the process can start no more threads."""
        self.transitions = 0
        """Incremented on every entry into libcurl and every exit; odd while libcurl is running."""
        self.shut_sockets: set[Descriptor] = set()
        """The sockets that the watchdog has shut down."""
        self._sockets: dict[int, Descriptor] = {}
        """Every descriptor that was passed to `add`, by number. Some may be closed by now."""
        self._stopped = threading.Event()
        self._checked = 0
        self._used_before = 0.0
        self._consumed: dict[Descriptor, int] = {}
        """How much libcurl had read from each socket when it was first checked during the current call."""
        self.watch_this_thread()
        threading.Thread(target=_run, args=[weakref.ref(self)], name="curl-watchdog", daemon=True).start()

    def watch_this_thread(self) -> None:
        """Watch the calls of the current thread from now on."""
        self._clock = time.pthread_getcpuclockid(threading.get_ident())

    def add(self, number: int) -> None:
        """Add a socket of the watched thread. Descriptors that are not sockets are accepted and ignored."""
        with suppress(OSError):  # libcurl has closed it already
            self._sockets[number] = Descriptor.of(number)

    def stop(self) -> None:
        """Stop watching; the watchdog's own thread ends."""
        self._stopped.set()

    def wait(self) -> bool:
        """Wait for an interval; return False once the watchdog has stopped."""
        return not self._stopped.wait(INTERVAL)

    def check(self) -> None:
        """Shut down the sockets from which the current call has been reading for too long."""
        call = self.transitions
        try:
            now = time.clock_gettime(self._clock)
        except OSError:  # the thread has ended
            return
        if call % 2 == 0 or call != self._checked:
            self._checked, self._used_before = call, now
            self._consumed.clear()
            return
        used = now - self._used_before
        if used < INTERVAL / 2:  # the thread was mostly waiting
            return
        for each in tuple(self._sockets.values()):
            consumed = each.consumed()
            read = consumed - self._consumed.setdefault(each, consumed)
            if ((used > HELD_UP and read > READ) or used > LAST_RESORT) and self.transitions == call:
                self.shut_sockets.add(each)
                each.shut()


def _run(watchdog: weakref.ref[Watchdog]) -> None:
    # Without `stop`, the thread ends as soon as nothing else refers to the watchdog.
    while (found := watchdog()) and found.wait():
        found.check()
        del found
