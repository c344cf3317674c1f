"""Rate limiting: follow-ups over a limit are deferred before their attempt begins; the earliest due goes first.

A `Limiter` keeps each limit's state for all workers: token buckets and waiting queues. Two scripts (``take``,
``give_back``) update this state in Redis. If Redis loses the limits' state, one extra burst is possible, and waiting
follow-ups lose their order. A deferred follow-up uses up no attempt and no slot. A follow-up with a short wait stays in
the due queue. A follow-up with a long wait is deferred in the database.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain, product
from typing import TYPE_CHECKING

from redis import RedisError

from followups.flow_control import PAUSE, TIMEOUT, connect, script
from followups.halving import halve
from followups.store import rate_limits
from followups.telemetry import metrics
from followups.telemetry.logs import get_logger
from followups.transactions import in_loop, transact

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence
    from uuid import UUID

    from redis.commands.core import AsyncScript
    from sqlalchemy import Engine
    from sqlalchemy.ext.asyncio import AsyncEngine

    from followups.settings import Settings
    from followups.store.leases import Lease
    from followups.store.rate_limits import Limit, Limitable

    Scope = tuple[UUID | None, str | None]
    """A workspace and a channel; None means all workspaces or all channels."""

IN_QUEUE = timedelta(seconds=1)
"""A follow-up that waits for at most this time keeps its lease and stays in the due queue."""

SHORTEST = timedelta(milliseconds=5)
"""The minimum wait for a token; shorter waits would cause too many requests."""

LONGEST_DEFERRAL = timedelta(minutes=5)
"""A follow-up without a token requests one again after at most this time. If follow-ups ahead in the queue are
cancelled, a token becomes free earlier than predicted.
"""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket gains ``rate`` tokens per second, up to ``burst``; each begin uses one."""

    key: str
    rate: float
    burst: int


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A follow-up's request for one token from each bucket that applies.

    Requests are served in order of ``since``; ties are broken by id.
    """

    id: UUID
    since: datetime
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, slots=True)
class LimiterReply:
    """How long each request must wait, in the order of the requests; zero means no wait."""

    waits: tuple[timedelta, ...]
    moment: int | None = None
    """The time of the reply on the Redis server's clock, or None if no token was acquired."""


class Limiter:
    """The token buckets in Redis.

    If Redis is unreachable, no error is raised, and all follow-ups may begin. An instance belongs to one event loop.
    """

    def __init__(self, settings: Settings, timeout: timedelta = TIMEOUT) -> None:
        """Store the settings without connecting to Redis."""
        self._prefix = f"{settings.broker_prefix}limit:"
        self._client = connect(settings, timeout)
        self._take = self._client.register_script(script("take.lua"))
        self._put_back = self._client.register_script(script("give_back.lua"))
        self._ask_again_at = 0.0

    async def ask(self, requests: Sequence[TokenRequest], ended: Sequence[TokenRequest]) -> LimiterReply:
        """Acquire tokens, in the given order, for requests whose turn it is; remove ended requests."""
        buckets = _numbered((*requests, *ended))
        limits = [(bucket.rate, bucket.burst) for bucket in buckets]
        documents = (limits, _documents(requests, buckets), _documents(ended, buckets))
        longest = str(LONGEST_DEFERRAL // MICROSECOND)
        found = await self._try(self._take, buckets, *map(json.dumps, documents), longest)
        if found is None:
            metrics.LIMITER_UNAVAILABLE.inc(len(requests))
            return LimiterReply((timedelta(0),) * len(requests))
        moment, *waits = map(int, found)
        return LimiterReply(tuple(wait * MICROSECOND for wait in waits), moment)

    async def give_back(self, requests: Sequence[TokenRequest], moment: int) -> None:
        """Return the tokens acquired at ``moment`` for follow-ups that did not begin.

        If Redis is unreachable, the returned tokens are lost.
        """
        unused = Counter(bucket for request in requests for bucket in request.buckets)
        limits = [(bucket.rate, bucket.burst, count) for bucket, count in unused.items()]
        await self._try(self._put_back, unused, str(moment), json.dumps(limits))

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _try(self, scripted: AsyncScript, buckets: Iterable[Bucket], *arguments: str) -> list[str] | None:
        """Return the script's result, or None if Redis has just been found unreachable."""
        if time.monotonic() < self._ask_again_at:
            return None
        try:
            answer: list[str] = await scripted([f"{self._prefix}{bucket.key}" for bucket in buckets], arguments)
        except (RedisError, OSError) as error:
            self._ask_again_at = time.monotonic() + PAUSE.total_seconds()
            log.warning("limiter_unavailable", error=type(error).__name__, pause_s=PAUSE.total_seconds())
            return None
        return answer


def _numbered(requests: Iterable[TokenRequest]) -> dict[Bucket, int]:
    """Return each bucket with its number; the numbers start at 1, as in Lua."""
    buckets = dict.fromkeys(bucket for request in requests for bucket in request.buckets)
    return {bucket: number for number, bucket in enumerate(buckets, start=1)}


def _documents(requests: Iterable[TokenRequest], buckets: dict[Bucket, int]) -> list[tuple[str, str, list[int]]]:
    # Times are passed as text, because Lua would turn a number of sixteen digits into 1.7e+15.
    return [
        (request.id.hex, str((request.since - EPOCH) // MICROSECOND), [buckets[each] for each in request.buckets])
        for request in requests
    ]


class Limits:
    """The current rate limits, by workspace and channel."""

    def __init__(self, limits: Iterable[Limit]) -> None:
        """Index the rate limits by workspace and channel."""
        self._of: dict[Scope, list[Limit]] = {}
        for limit in limits:
            self._of.setdefault((limit.workspace_id, limit.channel), []).append(limit)

    def __bool__(self) -> bool:
        """Return whether there are any rate limits."""
        return bool(self._of)

    def request(self, one: Limitable) -> TokenRequest:
        """Return the request for a follow-up's tokens, with a bucket for each limit that applies."""
        scopes = product((None, one.workspace_id), (None, one.channel))
        matching = (limit for scope in scopes for limit in self._of.get(scope, ()))
        return TokenRequest(one.id, one.since, tuple(bucket_of(limit, one) for limit in matching))


def bucket_of(limit: Limit, one: Limitable) -> Bucket:
    """Return the bucket that a rate limit uses for the follow-up."""
    sharers = {"all": "", "workspace": one.workspace_id.hex, "chat": f"{one.workspace_id.hex}{one.chat_id.hex}"}
    return Bucket(f"{limit.id.hex}:{sharers[limit.per]}", limit.rate, limit.burst)


def loosened(before: Iterable[Limit], after: Iterable[Limit]) -> set[Scope]:
    """Return the workspaces and channels for which a limit was removed or raised."""
    now = {limit.id: limit for limit in after}
    return {
        (limit.workspace_id, limit.channel)
        for limit in before
        if limit.id not in now or now[limit.id].rate > limit.rate or now[limit.id].burst > limit.burst
    }


class RateLimits:
    """A worker's rate limiter: it reads the limits and requests tokens before follow-ups begin.

    An instance belongs to one event loop.
    """

    def __init__(self, settings: Settings, engine: AsyncEngine, limiter: Limiter | None, lead: timedelta) -> None:
        """Store the limiter; None means that there are no rate limits.

        A follow-up requests a token at its due time minus ``lead``.
        """
        self._settings = settings
        self._engine = engine
        self._limiter = limiter
        self._lead = lead
        self._standing: list[Limit] = []
        self._limits = Limits(())
        self._loosened: set[Scope] = set()
        """Scopes that still have deferred follow-ups although their limit was removed or raised."""
        self._unlogged = 0
        """Number of follow-ups deferred since the last log line about deferrals."""

    def read(self, engine: Engine) -> None:
        """Read the current limits, and release follow-ups whose rate limit was removed or raised.

        The number of waiting follow-ups is logged. If the database raises an error, the next call of `read` completes
        the release.
        """
        if self._limiter is None:
            return
        self._log()
        with engine.connect() as connection:
            standing = rate_limits.standing(connection)
        self._loosened |= loosened(self._standing, standing)
        self._standing, self._limits = standing, Limits(standing)
        for scope in tuple(self._loosened):
            release_deferred(engine, scope)
            self._loosened.discard(scope)

    def __bool__(self) -> bool:
        """Return whether there are any limits."""
        return bool(self._limits)

    @asynccontextmanager
    async def tokens(self, leases: Sequence[Lease]) -> AsyncIterator[tuple[dict[UUID, timedelta], set[UUID]]]:
        """Acquire tokens for the leases whose turn has come.

        Yields a pair: how long each lease without a token must wait, and an empty set. When a follow-up has begun, the
        caller adds it to the yielded set. Tokens are returned to their buckets if their follow-ups did not begin.
        """
        limitable = {one.id: one for one in await in_loop(self._engine, limitable_of, self._settings, leases)}
        requests = [request for one in limitable.values() if (request := self._limits.request(one)).buckets]
        ended = [request for request in requests if limitable[request.id].ended]
        # The begin statement ends expired follow-ups. Begin also detects leases that another worker's lease has
        # replaced.
        asking = [request for request in requests if not limitable[request.id].is_over]
        if self._limiter is None or (not asking and not ended):
            yield {}, set()
            return
        asking.sort(key=lambda request: (request.since, request.id))
        answer = await self._limiter.ask(asking, ended)
        refused = ((one, wait) for one, wait in zip(asking, answer.waits, strict=True) if wait)
        waits = {one.id: self._within(wait, limitable[one.id]) for one, wait in refused}
        begun: set[UUID] = set()
        try:
            yield waits, begun
        finally:
            unused = [request for request in asking if request.id not in waits and request.id not in begun]
            if unused and answer.moment is not None:
                await self._limiter.give_back(unused, answer.moment)
        metrics.LIMITED.inc(len(waits))
        self._unlogged += len(waits)

    async def defer(self, waits: Sequence[tuple[Lease, timedelta]]) -> tuple[tuple[Lease, timedelta], ...]:
        """Defer all follow-ups whose wait is long, and store the deferrals in the database.

        Return the follow-ups whose wait is short; these stay in the due queue.
        """
        long = [(lease, wait) for lease, wait in waits if wait > IN_QUEUE]
        deferred = await in_loop(self._engine, defer, long) if long else set()
        # A row that was not deferred is locked or leased by another worker. The begin step then detects the lock or the
        # other worker's lease.
        return tuple((lease, min(wait, IN_QUEUE)) for lease, wait in waits if lease.id not in deferred)

    async def close(self) -> None:
        """Close the limiter."""
        self._log()
        if self._limiter:
            await self._limiter.close()

    def _log(self) -> None:
        if self._unlogged:  # one log line for each batch would be too many
            log.info("limited", count=self._unlogged)
            self._unlogged = 0

    def _within(self, wait: timedelta, one: Limitable) -> timedelta:
        """Return how long to defer a follow-up.

        No deferral lasts beyond the follow-up's expiry, so the follow-up ends on time. The due queue releases
        follow-ups slightly early; the wait is lengthened by this lead. Without the lead, a follow-up would ask for a
        token before its turn.
        """
        wait = min(max(wait, SHORTEST) + self._lead, LONGEST_DEFERRAL)
        return wait if one.left is None else min(wait, one.left + SHORTEST + self._lead)


def limitable_of(engine: Engine, settings: Settings, leases: Sequence[Lease]) -> list[Limitable]:
    """Return what the rate limits and the breaker's deferral need to know about each valid lease."""

    def read(part: Sequence[Lease]) -> list[Limitable]:
        with engine.connect() as connection:
            return rate_limits.limitable(connection, part, settings.max_lateness)

    # A lease whose row cannot be read still goes to `begin`, which logs the row.
    return list(chain.from_iterable(halve(leases, read).done))


def release_deferred(engine: Engine, scope: Scope) -> None:
    """Release all follow-ups that a limit has deferred, except unwritable rows."""
    refused: list[UUID] = []
    while True:
        with engine.begin() as connection:
            halved = rate_limits.release(connection, scope, LONGEST_DEFERRAL, refused)
        refused += [follow_up_id for follow_up_id, _ in halved.refused]
        if not halved.refused and not sum(halved.done):
            return


def defer(engine: Engine, waits: Sequence[tuple[Lease, timedelta]]) -> set[UUID]:
    """Defer each leased follow-up by its own delay; return the follow-ups that are now deferred.

    Follow-ups whose rows cannot be written are not returned.
    """
    work = rate_limits.defer_if_leased
    return set().union(*halve(waits, lambda part: transact(engine, partial(work, waits=part))).done)
