"""The objects that all console requests share, including a cache of results.

Each result is cached for one second and shared by all viewers that the same process serves. Without viewers, no results
are computed.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from followups.console.access import FailedSignIns
from followups.database import make_engine, make_sessions
from followups.operations.circumstances import breaker_state
from followups.sending_hours import zone_of
from followups.settings import networks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from followups.flow_control.breaker import BreakerStatus
    from followups.settings import Settings


FRESH = 1.0
"""The number of seconds for which a cached result is valid."""

MAX_RESULTS = 1_000
"""Maximum number of cached results, one for each key."""


class ResultCache:
    """A cache of the last result for each key.

    Simultaneous requests with the same key share a single computation.
    """

    def __init__(self) -> None:
        """Create an empty cache."""
        self._made: dict[Hashable, tuple[float, Any]] = {}
        self._locks: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - what is made
        """Return the key's result; a result older than a second is computed again."""
        with self._lock:
            own = self._locks.setdefault(key, threading.Lock())
        with own:
            made = self._made.get(key)
            if made is None or time.monotonic() - made[0] > FRESH:
                result = make()
                made = (time.monotonic(), result)
                with self._lock:
                    self._made.pop(key, None)
                    self._made[key] = made
                    if len(self._made) > MAX_RESULTS:
                        oldest = next(iter(self._made))
                        del self._made[oldest]
                        self._locks.pop(oldest, None)
            return made[1]


CONNECTIONS = 4
"""Maximum number of database connections of the console. The API's connections are not included."""

STATEMENT_TIMEOUT = timedelta(seconds=5)

SECURE_COOKIE, PLAIN_COOKIE = "__Host-followups", "followups"
"""Names of the session cookie over HTTPS and over plain HTTP.

Over plain HTTP, browsers reject the `__Host-` prefix.
"""

PREFIX = "/console"


class ConsoleServices:
    """The console's settings, database connections, and in-memory state."""

    def __init__(self, settings: Settings, nudge: Callable[[], None]) -> None:
        """Store the settings and ``nudge``, a function that makes the workers run a tick.

        Connections are opened on first use.
        """
        self.settings = settings
        self.nudge = nudge
        self.engine = make_engine(
            settings.database_url.get_secret_value(),
            pool_size=CONNECTIONS,
            application_name="followups-console",
            statement_timeout=STATEMENT_TIMEOUT,
        )
        self.sessions = make_sessions(self.engine)
        self.failed_sign_ins = FailedSignIns()
        self.results = ResultCache()
        self.base = urlsplit(settings.public_url or "").path + PREFIX
        self.proxies = networks_of(settings.console_proxy_addresses)

    def breaker(self) -> BreakerStatus | None:
        """Return the breaker's state, at most a second old, or None if the broker is unreachable."""
        shown: BreakerStatus | None = self.results.get("breaker", lambda: breaker_state(self.settings))
        return shown

    def is_secure(self, scheme: str) -> bool:
        """Return whether browsers reach the console over HTTPS."""
        public = self.settings.public_url
        return public.startswith("https://") if public else scheme == "https"

    def cookie_name(self, scheme: str) -> str:
        """Return the name of the session cookie."""
        return SECURE_COOKIE if self.is_secure(scheme) else PLAIN_COOKIE

    @staticmethod
    @lru_cache(maxsize=1024)
    def is_zone(name: str) -> bool:
        """Return whether the time zone is known on this machine."""
        return zone_of(name) is not None

    def close(self) -> None:
        """Close the database connections."""
        self.engine.dispose()
