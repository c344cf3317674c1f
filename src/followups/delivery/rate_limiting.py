"""Rate limiting: follow-ups over a limit are deferred before their attempt begins, oldest due first.

A `Limiter` keeps the state of each limit for all workers. A deferred follow-up uses up no attempt and no slot: for a
short wait it stays in the due queue, for a longer one in its row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import chain, product
from typing import TYPE_CHECKING, Protocol

from followups.delivery import events
from followups.delivery.begin import LEAD, Beginning, begin
from followups.halving import halve
from followups.store import rate_limits
from followups.transactions import in_loop, transact

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from followups.settings import Settings
    from followups.store.leases import Lease
    from followups.store.rate_limits import Limit, Place

IN_LINE = timedelta(seconds=1)
"""Up to this wait a follow-up keeps its lease, and stays in its worker's due queue."""

SHORTEST = timedelta(milliseconds=5)
"""Shortest wait: smaller ones would cost more requests than they are worth."""

LONGEST = timedelta(minutes=5)
"""Longest wait before a follow-up asks again: many before it may have been cancelled."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket: ``rate`` tokens a second flow in, up to ``burst``; each begin takes one."""

    key: str
    rate: float
    burst: int


@dataclass(frozen=True, slots=True)
class Request:
    """A follow-up that requests a token from each of its buckets. ``since`` and id are its place in the order."""

    id: UUID
    since: datetime
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """How long each has to wait, in the order of the requests; zero means that it may begin."""

    waits: tuple[timedelta, ...]
    moment: int | None = None
    """The moment of the answer by the limiter's own clock, or None if nothing was taken."""


class Limiter(Protocol):
    """Keeps the buckets. It never raises if its store is unreachable; then all may begin."""

    async def ask(self, requests: Sequence[Request], ended: Sequence[Request]) -> Answer:
        """Take tokens for those whose turn it is, in the order given; forget those that have ended."""

    async def give_back(self, requests: Sequence[Request], moment: int) -> None:
        """Return the tokens taken at ``moment`` for requests that did not begin after all."""

    async def close(self) -> None:
        """Close the connections."""


class Limits:
    """The current limits, by what they apply to."""

    def __init__(self, limits: Iterable[Limit]) -> None:
        """Index the limits."""
        self._of: dict[tuple[UUID | None, str | None], list[Limit]] = {}
        for limit in limits:
            self._of.setdefault((limit.workspace_id, limit.channel), []).append(limit)

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self._of)

    def request(self, place: Place) -> Request:
        """Return a follow-up's request: a token from each limit that matches it, possibly none."""
        scopes = product((None, place.workspace_id), (None, place.channel))
        matching = (limit for scope in scopes for limit in self._of.get(scope, ()))
        return Request(place.id, place.since, tuple(bucket_of(limit, place) for limit in matching))


def bucket_of(limit: Limit, place: Place) -> Bucket:
    """Return the bucket of a limit that applies to a follow-up."""
    sharers = {"all": "", "workspace": place.workspace_id.hex, "chat": f"{place.workspace_id.hex}{place.chat_id.hex}"}
    return Bucket(f"{limit.id.hex}:{sharers[limit.per]}", limit.rate, limit.burst)


def loosened(before: Iterable[Limit], after: Iterable[Limit]) -> set[tuple[UUID | None, str | None]]:
    """Return the workspaces and channels (None means all) for which a limit was removed or raised."""
    now = {limit.id: limit for limit in after}
    return {
        (limit.workspace_id, limit.channel)
        for limit in before
        if limit.id not in now or now[limit.id].rate > limit.rate or now[limit.id].burst > limit.burst
    }


@dataclass(frozen=True, slots=True)
class Round:
    """The result for a batch: which may begin, which wait in the due queue, and which in their rows."""

    free: list[Lease]
    taken: list[Request]
    moment: int | None
    shortly: tuple[tuple[Lease, timedelta], ...]
    later: tuple[tuple[Lease, timedelta], ...]


class Turnstile:
    """Begins what the rate limits allow, and defers the rest. For one event loop."""

    def __init__(self, settings: Settings, engine: AsyncEngine, limiter: Limiter | None) -> None:
        """Without a limiter there are no limits."""
        self._settings = settings
        self._engine = engine
        self._limiter = limiter
        self._standing: list[Limit] = []
        self._limits = Limits(())
        self._loosened: set[tuple[UUID | None, str | None]] = set()
        """Where a limit was removed or raised, and the follow-ups waiting under it are not released yet."""
        self._unsaid = 0
        """How many were deferred since the last log line about it."""

    def read(self, engine: Engine) -> None:
        """Read the current limits, release those that waited under a removed or raised one, and log how many wait.

        Raises database errors; the next call completes what is left.
        """
        if self._limiter is None:
            return
        self._tell()
        with engine.connect() as connection:
            standing = rate_limits.standing(connection)
        self._loosened |= loosened(self._standing, standing)
        self._standing, self._limits = standing, Limits(standing)
        for scope in tuple(self._loosened):
            _free(engine, *scope)
            self._loosened.discard(scope)

    async def close(self) -> None:
        """Close the limiter."""
        self._tell()
        if self._limiter:
            await self._limiter.close()

    async def begin(self, batch: Sequence[Lease]) -> Beginning:
        """Begin what may be sent now. Raises database errors; then no token is taken."""
        if not self._limits or self._limiter is None:
            return await in_loop(self._engine, begin, self._settings, batch)
        turn = await self._ask(self._limiter, batch)
        begun: set[UUID] = set()
        try:
            shortly = turn.shortly
            if turn.later:
                done = await in_loop(self._engine, defer, turn.later)
                # Its row is locked, or it is leased by another worker; begin will find out.
                shortly += tuple((lease, IN_LINE) for lease, _ in turn.later if lease.id not in done)
            beginning = Beginning()
            if turn.free:
                beginning = await in_loop(self._engine, begin, self._settings, turn.free)
            begun = {one.lease.id for one in beginning.begun}
        finally:
            unused = [request for request in turn.taken if request.id not in begun]
            if unused and turn.moment is not None:
                await self._limiter.give_back(unused, turn.moment)
        self._count(len(turn.later) + len(turn.shortly))
        return replace(beginning, later=shortly)

    async def _ask(self, limiter: Limiter, batch: Sequence[Lease]) -> Round:
        places = {one.id: one for one in await in_loop(self._engine, _places, self._settings, batch)}
        requests = [request for one in places.values() if (request := self._limits.request(one)).buckets]
        ended = [request for request in requests if places[request.id].ended]
        # Begin ends those whose time is over, and finds those leased elsewhere to be stale.
        asking = [request for request in requests if not places[request.id].is_over]
        if not asking and not ended:
            return Round(list(batch), [], None, (), ())
        asking.sort(key=lambda request: (request.since, request.id))
        answer = await limiter.ask(asking, ended)
        refused = ((one, wait) for one, wait in zip(asking, answer.waits, strict=True) if wait)
        waits = {one.id: _within(wait, places[one.id]) for one, wait in refused}
        put_off = [(lease, waits[lease.id]) for lease in batch if lease.id in waits]
        return Round(
            [lease for lease in batch if lease.id not in waits],
            [request for request in asking if request.id not in waits],
            answer.moment,
            tuple((lease, wait) for lease, wait in put_off if wait <= IN_LINE),
            tuple((lease, wait) for lease, wait in put_off if wait > IN_LINE),
        )

    def _count(self, number: int) -> None:
        events.count_limited(number)
        self._unsaid += number

    def _tell(self) -> None:
        if self._unsaid:
            events.limited(self._unsaid)
            self._unsaid = 0


def _within(wait: timedelta, place: Place) -> timedelta:
    """Return for how long one is deferred: not beyond its end, so that it ends on time.

    The due queue releases a little early, so without the lead a follow-up would come before its turn.
    """
    wait = min(max(wait, SHORTEST) + LEAD, LONGEST)
    return wait if place.left is None else min(wait, place.left + SHORTEST + LEAD)


def _places(engine: Engine, settings: Settings, batch: Sequence[Lease]) -> list[Place]:
    def read(part: Sequence[Lease]) -> list[Place]:
        with engine.connect() as connection:
            return rate_limits.places(connection, part, settings.max_lateness)

    # Rows that cannot be read go to `begin`, which logs them.
    return list(chain.from_iterable(halve(batch, read).done))


def _free(engine: Engine, workspace_id: UUID | None, channel: str | None) -> None:
    freed = 1
    while freed:
        with engine.begin() as connection:
            freed = rate_limits.free(connection, workspace_id, channel, LONGEST)


def defer(engine: Engine, waits: Sequence[tuple[Lease, timedelta]]) -> set[UUID]:
    """Defer leased follow-ups, each by its delay; return those now deferred, without rows that cannot be written."""
    work = rate_limits.put_off_if_leased
    return set().union(*halve(waits, lambda part: transact(engine, partial(work, waits=part))).done)
