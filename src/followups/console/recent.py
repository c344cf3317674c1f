"""A cache of results that all viewers of a process share for a second.

Without viewers, no results are computed.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

FRESH = 1.0
"""Seconds for which a result is reused."""

MOST = 1_000
"""Maximum number of cached results, one for each workspace."""


class Recent:
    """A cache of the last result for each key.

    Simultaneous requests with the same key wait for a single computation.
    """

    def __init__(self) -> None:
        """Create an empty cache."""
        self._made: dict[Hashable, tuple[float, Any]] = {}
        self._locks: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - what is made
        """Return the cached result of the key, or compute a new one if it is more than a second old."""
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
                    if len(self._made) > MOST:
                        oldest = next(iter(self._made))
                        del self._made[oldest]
                        self._locks.pop(oldest, None)
            return made[1]
