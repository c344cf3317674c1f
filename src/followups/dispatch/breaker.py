"""Breaker: while the transport fails for everybody, nothing begins but a few probes, so no attempts are burnt.

What is due waits in the line, leased and not begun, in its order: a cancel still reaches it. The state is one for
all workers, in a store (`BreakerStore`) that may be away: then deliveries go on, but that a worker which itself sees so
many fail in a row begins nothing until it next asks the store, some seconds later.

    closed -> open: so many different follow-ups failed, and none succeeded in between
    open -> probing: after a pause that doubles from one time to the next, a few may begin
    probing -> recovering: one succeeded; or open again: one failed
    recovering -> closed: the rate of begins doubles every second until nobody needs to be held back

(Nygard, "Release It!", 2nd edition, 2018, chapter 5; the slow start is nginx's and Envoy's.)
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from followups.dispatch import report
from followups.transports.port import Retry, Snoozed, Unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from followups.dispatch.send import Attempt

CLOSED = "closed"

LOOK = 1.0
"""Seconds between two looks at the shared state while it is closed; so long others may begin without knowing."""
LOOK_WHILE_OPEN = 0.1
"""The same while something waits for it."""
AWAY = 5.0
"""Seconds for which a store that failed is left alone."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The shared state. ``permits`` is how many the asker may begin; of no meaning while it is closed."""

    state: str
    permits: int = 0
    changed: bool = False
    """It became so by this very report."""


class BreakerStore(Protocol):
    """Where all workers' outcomes come together."""

    async def report(self, failed: Sequence[UUID], wanted: int, *, succeeded: bool) -> Reading:
        """Add outcomes: ``failed`` since the last success, if there was one; ask to begin ``wanted``.

        Raises whatever says that the store is away.
        """

    async def close(self) -> None:
        """Let go of the connection."""


class Breaker:
    """One worker's end of it: notes outcomes, tells the store, and says how many may begin. Of one event loop."""

    def __init__(self, store: BreakerStore | None, transport: str, failures: int) -> None:
        """``failures`` of different follow-ups in a row open it; without a store, or for 0, it is never open."""
        self._store = store if failures else None
        self._transport = transport
        self._failures = failures
        self._reading = Reading(CLOSED)
        self._permits = 0
        self._failed: dict[UUID, None] = {}
        self._untold: dict[UUID, None] = {}
        self._succeeded = False
        self._tell = asyncio.Event()

    @property
    def is_closed(self) -> bool:
        """Whether everybody may begin."""
        return self._store is None or (self._reading.state == CLOSED and len(self._failed) < self._failures)

    def most(self, most: int) -> int:
        """Return how many of ``most`` may begin now."""
        return most if self.is_closed else min(most, self._permits)

    def spend(self, count: int) -> None:
        """Note that so many have begun; perhaps more than there are permits, if it has opened meanwhile."""
        if not self.is_closed:
            self._permits = max(0, self._permits - count)

    def note(self, attempt: Attempt) -> None:
        """Take an outcome into account. A request to come later says nothing: whoever makes it is not away."""
        match attempt.outcome:
            case Snoozed():
                return
            case Retry() | Unknown():
                self._failed[attempt.begun.lease.id] = self._untold[attempt.begun.lease.id] = None
            case _:
                self._succeeded = True
                self._failed.clear()
                self._untold.clear()
        if self._reading.state != CLOSED or len(self._failed) == self._failures:
            self._tell.set()

    async def keep_informed(self, wanted: Callable[[], int], changed: Callable[[], None]) -> None:
        """Tell the store and ask it, until cancelled. ``wanted`` says how many wait to begin."""
        if self._store is None:
            return
        try:
            while True:
                await self._inform(self._store, wanted(), changed)
        finally:
            await self._store.close()

    async def _inform(self, store: BreakerStore, wanted: int, changed: Callable[[], None]) -> None:
        self._tell.clear()
        failed, succeeded = list(self._untold), self._succeeded
        self._untold.clear()
        self._succeeded = False
        try:
            reading = await store.report(failed, max(0, wanted - self._permits), succeeded=succeeded)
        except Exception as error:  # noqa: BLE001 - whatever the store's client raises
            report.breaker_unavailable(error, AWAY)
            self._take(Reading(CLOSED))
            changed()
            await asyncio.sleep(AWAY)
            return
        if reading.changed:
            report.breaker_changed(self._transport, reading.state)
        self._take(reading)
        changed()
        with suppress(TimeoutError):
            pause = LOOK_WHILE_OPEN if not self.is_closed and wanted else LOOK
            await asyncio.wait_for(self._tell.wait(), pause)

    def _take(self, reading: Reading) -> None:
        self._permits = reading.permits if reading.state != self._reading.state else self._permits + reading.permits
        self._reading = reading
        if reading.state == CLOSED:
            self._failed.clear()
