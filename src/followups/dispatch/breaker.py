"""Breaker: while the transport fails for everybody, nothing begins but a few probes, so no attempts are burnt.

What is due waits in its row (`followups.dispatch.deferral`), but for a few in the line. The state is one for
all workers, in a store (`BreakerStore`) that may be away: then deliveries go on, but that a worker which itself sees so
many fail in a row begins nothing until it next asks the store, some seconds later.

    closed -> open: so many different follow-ups failed, and none succeeded in between
    open -> probing: after a pause that doubles from one time to the next, a few may begin
    probing -> recovering: one succeeded; or open again: one failed
    recovering -> closed: the rate of begins doubles every second until nobody needs to be held back

All of this is for workspaces whose last attempts failed, several in a row. Any other begins as ever: a workspace whose
chats all fail, be they thousands, must not hold up another's, of which some fail now and then.

(Nygard, "Release It!", 2nd edition, 2018, chapter 5; the slow start is nginx's and Envoy's.)
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from followups.dispatch import report
from followups.store.leases import lane_of
from followups.transports.port import Rejected, Retry, Snoozed, Unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from uuid import UUID

    from followups.dispatch.send import Attempt
    from followups.transports.port import Outcome

CLOSED = "closed"
RECOVERING = "recovering"

REFUSING = {401, 403}
"""Statuses by which a receiver refuses the caller: every message is refused so when a secret has expired."""

LOOK = 1.0
"""Seconds between two looks at the shared state while it is closed: for so long others may begin unaware of a change.
"""
LOOK_WHILE_OPEN = 0.1
"""The same while follow-ups wait for it."""
AWAY = 5.0
"""Seconds for which a store that failed is not asked again."""


class Run(NamedTuple):
    """How the last attempts of a workspace ended since the last report. ``lane`` is its number."""

    lane: int
    failures: int
    """In a row, the last one among them."""
    anew: bool
    """An attempt succeeded before these, so that those reported earlier do not count."""


@dataclass(frozen=True, slots=True)
class News:
    """Outcomes since the last report. While the breaker is not closed, only those that are held count."""

    failed: tuple[UUID, ...] = ()
    """Failures since the last success that counts."""
    succeeded: bool = False
    """There was one that counts."""
    runs: tuple[Run, ...] = ()
    """Of every workspace, held or not."""


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
        """By lane; of outcomes that have not been told."""
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
        """The lanes that the shared state holds: for seconds at least, not only until the next look."""
        return self._reading.held

    @property
    def recovers(self) -> bool:
        """Whether more and more of those that are held may begin."""
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
    """Return whether an outcome speaks against the transport; a refusal speaks of one message, unless of the caller."""
    if isinstance(outcome, Rejected):
        return outcome.status_code in REFUSING
    return isinstance(outcome, Retry | Unknown)
