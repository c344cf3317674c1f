"""Results that all viewers of a process share for a second; without viewers none is made."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

FRESH = 1.0
"""Seconds for which a result is used."""

MOST = 1_000
"""Most results kept, one for each workspace."""


class Recent:
    """The last result for each key; while one request makes a new one, others with the same key wait for it."""

    def __init__(self) -> None:
        """Start without any."""
        self._made: dict[Hashable, tuple[float, Any]] = {}
        self._locks: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - what is made
        """Return the result for the key, made now if the last one is older than a second."""
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
