"""Breaker: while the transport fails as a whole, only a few probes begin, so no attempts are wasted.

Due follow-ups wait in their rows (`followups.delivery.deferral`), except for a few in the due queue. All workers share
one state in a store (`BreakerStore`). Deliveries continue while the store is unreachable. Only a worker that itself
sees that many failures in a row begins nothing until it next asks the store, some seconds later.

    closed -> open: so many different follow-ups failed, and none succeeded in between
    open -> probing: after a pause that doubles from one time to the next, a few may begin
    probing -> recovering: one succeeded; or open again: one failed
    recovering -> closed: the rate of begins doubles every second until nothing needs to be held

All of this applies to workspaces whose last attempts failed, several in a row. Other workspaces begin as usual: a
workspace whose chats all fail, even thousands of them, must not delay a workspace in which some fail now and then.

(Nygard, "Release It!", 2nd edition, 2018, chapter 5; the slow start is nginx's and Envoy's.)
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from followups.delivery import events
from followups.store.leases import lane_of
from followups.transports.port import Rejected, Retry, Snoozed, Unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from uuid import UUID

    from followups.delivery.send import Attempt
    from followups.transports.port import Outcome

CLOSED = "closed"
RECOVERING = "recovering"

REFUSING = {401, 403}
"""Status codes with which a receiver refuses the caller rather than the message.

When a secret has expired, every message is refused with one of these codes.
"""

LOOK = 1.0
"""Seconds between two looks at the shared state while it is closed: for so long others may begin unaware of a change.
"""
LOOK_WHILE_OPEN = 0.1
"""The same while follow-ups wait for it."""
AWAY = 5.0
"""Seconds for which a store that failed is not asked again."""


class Run(NamedTuple):
    """Outcomes of a workspace's last attempts since the last report; ``lane`` is its queue's key."""

    lane: int
    failures: int
    """Number of failures in a row, up to the last attempt."""
    anew: bool
    """Whether an attempt succeeded before these failures, so that those reported earlier do not count."""


@dataclass(frozen=True, slots=True)
class News:
    """Outcomes since the last report.

    While the breaker is not closed, only outcomes of held workspaces count.
    """

    failed: tuple[UUID, ...] = ()
    """Failures since the last success that counts."""
    succeeded: bool = False
    """Whether there was a success that counts."""
    runs: tuple[Run, ...] = ()
    """Runs of every workspace, held or not."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The shared state. While it is not closed, ``held`` may begin at most ``permits``."""

    state: str
    permits: int = 0
    changed: bool = False
    """Whether this very report changed the state."""
    held: frozenset[int] = frozenset()


class BreakerStore(Protocol):
    """Where all workers' outcomes come together."""

    async def report(self, news: News, wanted: int) -> Reading:
        """Report outcomes and request permits for ``wanted`` held follow-ups. Raises if the store is unreachable."""

    async def close(self) -> None:
        """Close the connection."""


class Breaker:
    """One worker's side of the breaker: records outcomes, reports them, and returns what may begin."""

    def __init__(self, store: BreakerStore | None, transport: str, failures: int) -> None:
        """``failures`` of different follow-ups in a row open it; without a store, or with 0, it never opens."""
        self._store = store if failures else None
        self._transport = transport
        self._failures = failures
        self._reading = Reading(CLOSED)
        self.permits = 0
        """How many held follow-ups may begin all the same."""
        self._failed: dict[UUID, int] = {}
        """Those that failed since the last success, with their lanes."""
        self._untold: dict[UUID, None] = {}
        self._runs: dict[int, Run] = {}
        """Runs that have not been reported yet, by workspace."""
        self._succeeded = False
        self._tell = asyncio.Event()

    @property
    def held(self) -> frozenset[int]:
        """The lanes that may begin nothing without a permit."""
        if self._reading.state != CLOSED:
            return self._reading.held
        return frozenset(self._failed.values()) if self._store and len(self._failed) >= self._failures else frozenset()

    @property
    def left_alone(self) -> frozenset[int]:
        """Workspaces that the shared state holds.

        They stay held for seconds at least, not only until the next look.
        """
        return self._reading.held

    @property
    def recovers(self) -> bool:
        """Whether more and more of the held follow-ups may begin."""
        return self._reading.state == RECOVERING

    def spend(self, lanes: Iterable[int]) -> None:
        """Note that so many of these lanes have begun; perhaps more than there are permits, if it opened meanwhile."""
        if held := self.held:
            self.permits = max(0, self.permits - sum(lane in held for lane in lanes))

    def note(self, attempt: Attempt) -> None:
        """Record an outcome. A request for a later try does not count: the endpoint that makes it is reachable."""
        if self._store is None or isinstance(attempt.outcome, Snoozed):
            return
        lane = lane_of(attempt.begun.workspace_id)
        failed = _failed(attempt.outcome)
        run = self._runs.get(lane, Run(lane, 0, anew=False))
        self._runs[lane] = Run(lane, run.failures + 1, run.anew) if failed else Run(lane, 0, anew=True)
        counts = self._reading.state == CLOSED or lane in self._reading.held
        if counts and failed:
            self._failed[attempt.begun.lease.id] = lane
            self._untold[attempt.begun.lease.id] = None
        elif counts:
            self._succeeded = True
            self._failed.clear()
            self._untold.clear()
        if self._reading.state != CLOSED or len(self._failed) == self._failures:
            self._tell.set()

    async def keep_informed(self, wanted: Callable[[], int], changed: Callable[[], None]) -> None:
        """Report to the store and read it, until cancelled. ``wanted`` returns how many follow-ups wait to begin."""
        if self._store is None:
            return
        try:
            while True:
                await self._inform(self._store, wanted(), changed)
        finally:
            await self._store.close()

    async def _inform(self, store: BreakerStore, wanted: int, changed: Callable[[], None]) -> None:
        self._tell.clear()
        try:
            reading = await store.report(self._news(), max(0, wanted - self.permits))
        except Exception as error:  # noqa: BLE001 - whatever the store's client raises
            events.breaker_unavailable(error, AWAY)
            self._take(Reading(CLOSED))
            changed()
            await asyncio.sleep(AWAY)
            return
        if reading.changed:
            events.breaker_changed(self._transport, reading.state)
        self._take(reading)
        changed()
        with suppress(TimeoutError):
            pause = LOOK_WHILE_OPEN if self.held and wanted else LOOK
            await asyncio.wait_for(self._tell.wait(), pause)

    def _news(self) -> News:
        news = News(tuple(self._untold), self._succeeded, tuple(self._runs.values()))
        self._runs.clear()
        self._untold.clear()
        self._succeeded = False
        return news

    def _take(self, reading: Reading) -> None:
        self.permits = reading.permits if reading.state != self._reading.state else self.permits + reading.permits
        self._reading = reading
        if reading.state == CLOSED:
            self._failed.clear()


def _failed(outcome: Outcome) -> bool:
    """Return whether an outcome is a failure of the transport.

    A refusal concerns one message only, unless the receiver refuses the caller.
    """
    if isinstance(outcome, Rejected):
        return outcome.status_code in REFUSING
    return isinstance(outcome, Retry | Unknown)
