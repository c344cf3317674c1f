"""Limits on failed sign-ins, for each client and for all clients together."""

from __future__ import annotations

import threading
import time
from ipaddress import ip_address, ip_network

EACH = 10
"""Maximum number of failed sign-ins by one client within `WINDOW`."""

ALL = 600
"""Maximum number of failed sign-ins by all clients within `WINDOW`, in this process."""

WINDOW = 60.0
"""Seconds over which failed sign-ins are counted."""

CLIENTS = 10_000
"""Maximum number of clients whose failed sign-ins are remembered."""


class Tries:
    """Counts the failed sign-ins of the last minute."""

    def __init__(self) -> None:
        """Create the counter with no failed sign-ins."""
        self._failed: dict[str, list[float]] = {}
        self._all: list[float] = []
        self._lock = threading.Lock()

    def wait(self, client: str) -> float:
        """Return the seconds until the client may try to sign in again, or 0 if it may try now."""
        now = time.monotonic()
        with self._lock:
            mine = _recent(self._failed.get(network_of(client), []), now)
            self._all = _recent(self._all, now)
            waits = [each[0] + WINDOW - now for each, most in ((mine, EACH), (self._all, ALL)) if len(each) >= most]
            return max(waits, default=0.0)

    def failed(self, client: str) -> None:
        """Record that a sign-in by the client has failed."""
        now, network = time.monotonic(), network_of(client)
        with self._lock:
            self._failed[network] = [*_recent(self._failed.pop(network, []), now), now]
            self._all.append(now)
            if len(self._failed) > CLIENTS:
                del self._failed[next(iter(self._failed))]


def _recent(moments: list[float], now: float) -> list[float]:
    return [each for each in moments if each > now - WINDOW]


def network_of(client: str) -> str:
    """Return the network that counts as one client: an IPv4 address, or an IPv6 address's /64 network.

    >>> network_of("10.0.0.7"), network_of("2001:db8::1"), network_of("")
    ('10.0.0.7', '2001:db8::/64', '')
    """
    try:
        address = ip_address(client)
    except ValueError:
        return client
    return str(address) if address.version == 4 else str(ip_network(f"{address}/64", strict=False))  # noqa: PLR2004 - IPv4
