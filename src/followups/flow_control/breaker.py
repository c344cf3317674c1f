"""Breaker: while the transport fails as a whole, only a few probes begin, so no attempts are wasted.

Due follow-ups wait in their rows (`followups.delivery.deferral`), except for a few in the due queue. All workers share
one state in Redis (`BreakerStore`). Deliveries continue while Redis is unreachable. Only a worker that itself sees that
many failures in a row begins nothing until it next asks Redis, some seconds later. If Redis is wiped, the breaker is
closed and opens again with the next failures.

    closed -> open: so many different follow-ups failed, and none succeeded in between
    open -> probing: after a pause that doubles from one time to the next, a few may begin
    probing -> recovering: one succeeded; or open again: one failed
    recovering -> closed: the rate of begins doubles every second until nothing needs to wait

All of this applies to tripped workspaces: those whose last attempts failed, several in a row. Other workspaces begin as
usual: a workspace whose chats all fail, even thousands of them, must not delay a workspace in which some fail now and
then.

(Nygard, "Release It!", 2nd edition, 2018, chapter 5; the slow start is nginx's and Envoy's.)
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from followups.flow_control import connect, script
from followups.telemetry import metrics
from followups.telemetry.logs import get_logger
from followups.transports.port import Rejected, Retry, Snoozed, Unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from uuid import UUID

    import redis

    from followups.settings import Settings
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
KEPT = 3600
"""Seconds after which an unused state is forgotten."""
AWAY = 5.0
"""Seconds for which Redis is not asked again after a failure."""

log = get_logger(__name__)


class Run(NamedTuple):
    """Outcomes of a workspace's last attempts since the last report; ``key`` is its queue's."""

    key: int
    failures: int
    """Number of failures in a row, up to the last attempt."""
    anew: bool
    """Whether an attempt succeeded before these failures, so that those reported earlier do not count."""


@dataclass(frozen=True, slots=True)
class News:
    """Outcomes since the last report.

    While the breaker is not closed, only outcomes of tripped workspaces count.
    """

    failed: tuple[UUID, ...] = ()
    """Failures since the last success that counts."""
    succeeded: bool = False
    """Whether there was a success that counts."""
    runs: tuple[Run, ...] = ()
    """Runs of every workspace, tripped or not."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The shared state. While it is not closed, ``tripped`` workspaces may begin at most ``permits``."""

    state: str
    permits: int = 0
    changed: bool = False
    """Whether this very report changed the state."""
    tripped: frozenset[int] = frozenset()
    """The keys of the tripped workspaces."""


@dataclass(frozen=True, slots=True)
class RecoveryPolicy:
    """How soon, and how fast, a failed transport is tried again."""

    first_pause: float = 1.0
    longest_pause: float = 15.0
    """Longest pause before a probe, in seconds; each pause is twice the one before."""
    probes: int = 3
    """Attempts that may begin as a probe."""
    first_rate: float = 10.0
    """Begins a second, over all workers, after a successful probe; it doubles every second."""
    last_rate: float = 10_000.0
    """From this rate on the breaker is closed, some ten seconds later."""
    fails_again: int = 10
    """Different follow-ups failing in a row during recovery that open it again."""
    in_a_row: int = 5
    """Number of failed attempts in a row after which a workspace is tripped.

    At a hundred attempts a second, of which one in fifty fails, three in a row come every 21 minutes, four every 18
    hours, and five once in 37 days. Where one in ten fails, five come every 18 minutes. A higher number would cost
    every workspace more attempts while the transport is unreachable.
    """

    def arguments(self) -> tuple[float, ...]:
        """Return the script's arguments in its order; pauses are in milliseconds."""
        pauses = (self.first_pause * 1000, self.longest_pause * 1000)
        return (*pauses, self.probes, self.first_rate, self.last_rate, self.fails_again, KEPT)


class BreakerStore:
    """The state of one transport, shared by all workers: a script in Redis. For one event loop."""

    def __init__(self, settings: Settings, transport: str, policy: RecoveryPolicy = RecoveryPolicy()) -> None:
        """Store the settings; the first use connects."""
        self._redis = connect(settings)
        self._script = self._redis.register_script(script("breaker.lua"))
        name = _key(settings, transport)
        self._keys = [name, *(f"{name}:{part}" for part in ("failing", "runs", "held"))]
        self._threshold = settings.breaker_failures
        # A follow-up that is alone in its workspace must keep its last attempt.
        self._in_a_row = max(1, min(policy.in_a_row, settings.max_attempts - 1))
        self._policy = policy.arguments()

    async def report(self, news: News, wanted: int) -> Reading:
        """Report outcomes and request permits. Raises `redis.RedisError` or `OSError` if Redis is unreachable."""
        added = ([one.hex for one in news.failed], news.runs)
        arguments: list[float | str] = [
            self._threshold,
            wanted,
            int(news.succeeded),
            *self._policy,
            self._in_a_row,
            *map(json.dumps, added),
        ]
        state, permits, changed, tripped = await self._script(keys=self._keys, args=arguments)
        return Reading(state, int(permits), changed=bool(changed), tripped=frozenset(map(int, tripped)))

    async def close(self) -> None:
        """Close the connection."""
        await self._redis.aclose()


class Breaker:
    """One worker's side of the breaker: records outcomes, reports them, and returns what may begin."""

    def __init__(self, store: BreakerStore | None, transport: str, failures: int) -> None:
        """``failures`` of different follow-ups in a row open it; without a store, or with 0, it never opens."""
        self._store = store if failures else None
        self._transport = transport
        self._failures = failures
        self._reading = Reading(CLOSED)
        self.permits = 0
        """How many follow-ups of tripped workspaces may begin, as probes or during recovery."""
        self._failed: dict[UUID, int] = {}
        """Follow-ups that failed since the last success, with the keys of their workspaces."""
        self._unreported: dict[UUID, None] = {}
        self._runs: dict[int, Run] = {}
        """Runs that have not been reported yet, by workspace."""
        self._succeeded = False
        self._news_came = asyncio.Event()

    @property
    def tripped(self) -> frozenset[int]:
        """The keys of the workspaces that may begin nothing without a permit."""
        if self._reading.state != CLOSED:
            return self._reading.tripped
        return frozenset(self._failed.values()) if self._store and len(self._failed) >= self._failures else frozenset()

    @property
    def tripped_for_all(self) -> frozenset[int]:
        """The keys of the workspaces that are tripped in the shared state.

        They stay tripped for seconds at least, not only until the next look.
        """
        return self._reading.tripped

    @property
    def recovers(self) -> bool:
        """Whether more and more follow-ups of tripped workspaces may begin."""
        return self._reading.state == RECOVERING

    def spend(self, keys: Iterable[int]) -> None:
        """Spend a permit for each follow-up of a tripped workspace that has begun, given the keys of all that have.

        There may be more of them than permits, if the breaker opened in the meantime.
        """
        if tripped := self.tripped:
            self.permits = max(0, self.permits - sum(key in tripped for key in keys))

    def note(self, follow_up_id: UUID, key: int, outcome: Outcome) -> None:
        """Record an outcome. A request for a later try does not count: the endpoint that makes it is reachable."""
        if self._store is None or isinstance(outcome, Snoozed):
            return
        failed = _failed(outcome)
        run = self._runs.get(key, Run(key, 0, anew=False))
        self._runs[key] = Run(key, run.failures + 1, run.anew) if failed else Run(key, 0, anew=True)
        counts = self._reading.state == CLOSED or key in self._reading.tripped
        if counts and failed:
            self._failed[follow_up_id] = key
            self._unreported[follow_up_id] = None
        elif counts:
            self._succeeded = True
            self._failed.clear()
            self._unreported.clear()
        if self._reading.state != CLOSED or len(self._failed) == self._failures:
            self._news_came.set()

    async def run(self, wanted: Callable[[], int], changed: Callable[[], None]) -> None:
        """Report to the store and read it, until cancelled. ``wanted`` returns how many follow-ups wait to begin."""
        if self._store is None:
            return
        try:
            while True:
                await self._inform(self._store, wanted(), changed)
        finally:
            await self._store.close()

    async def _inform(self, store: BreakerStore, wanted: int, changed: Callable[[], None]) -> None:
        self._news_came.clear()
        try:
            reading = await store.report(self._news(), max(0, wanted - self.permits))
        except Exception as error:  # noqa: BLE001 - whatever the store's client raises
            metrics.BREAKER_UNAVAILABLE.inc()
            log.warning("breaker_unavailable", error=type(error).__name__, pause_s=AWAY)
            self._take(Reading(CLOSED))
            changed()
            await asyncio.sleep(AWAY)
            return
        if reading.changed:
            self._log_change(reading.state)
        self._take(reading)
        changed()
        with suppress(TimeoutError):
            pause = LOOK_WHILE_OPEN if self.tripped and wanted else LOOK
            await asyncio.wait_for(self._news_came.wait(), pause)

    def _log_change(self, state: str) -> None:
        if state == "open":
            metrics.BREAKER_OPENED.labels(transport=self._transport).inc()
            log.warning("breaker", transport=self._transport, state=state)
        else:
            log.info("breaker", transport=self._transport, state=state)

    def _news(self) -> News:
        news = News(tuple(self._unreported), self._succeeded, tuple(self._runs.values()))
        self._runs.clear()
        self._unreported.clear()
        self._succeeded = False
        return news

    def _take(self, reading: Reading) -> None:
        self.permits = reading.permits if reading.state != self._reading.state else self.permits + reading.permits
        self._reading = reading
        if reading.state == CLOSED:
            self._failed.clear()


@dataclass(frozen=True, slots=True)
class Shown:
    """The state for display: its age in seconds, the failed probes, and the tripped workspaces."""

    state: str
    seconds: float
    probed: int
    tripped: frozenset[int] = frozenset()
    """The keys of the workspaces (`followups.store.leases.key_of`)."""


def read(client: redis.Redis, settings: Settings) -> Shown:
    """Return the breaker's state for the configured transport. Raises `redis.RedisError` if Redis is unreachable."""
    key = _key(settings, settings.transport)
    kept = cast("dict[str, str]", client.hgetall(key))
    fields: dict[str, Any] = {_text(name): _text(value) for name, value in kept.items()}
    if not fields:
        return Shown(CLOSED, 0.0, 0)
    since = float(fields.get("since", 0))
    seconds = (float(fields.get("clock", since)) - since) / 1000
    tripped = cast("set[str]", client.smembers(f"{key}:held"))
    return Shown(fields["name"], seconds, max(0, int(fields.get("tries", 1)) - 1), frozenset(map(int, tripped)))


def _key(settings: Settings, transport: str) -> str:
    return f"{settings.broker_prefix}breaker:{transport}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _failed(outcome: Outcome) -> bool:
    """Return whether an outcome is a failure of the transport.

    A refusal concerns one message only, unless the receiver refuses the caller.
    """
    if isinstance(outcome, Rejected):
        return outcome.status_code in REFUSING
    return isinstance(outcome, Retry | Unknown)
