"""The circuit breaker: while the transport as a whole fails, only a few probes begin.

While the breaker is open, most due follow-ups of tripped workspaces are deferred: their rows get a later due time
(`followups.delivery.deferral`). All workers share one state in Redis (`BreakerStore`). Deliveries continue while Redis
is unreachable. During that time, a worker counts only its own failed attempts. After the configured number of different
follow-ups have failed in a row, the worker begins no further follow-ups of their workspaces. The worker resumes when it
next queries Redis, some seconds later. If Redis is wiped, the breaker closes, and new failures open it again.

    closed -> open: the configured number of different follow-ups failed, none succeeded in between, and at least one
        workspace is tripped
    open -> probing: the pause is over, and follow-ups wait; a few of them begin as probes. Each pause is twice as long
        as the previous one, up to a limit
    probing -> open: a probe failed
    open or probing -> recovering: an attempt succeeded
    recovering -> open: several different follow-ups failed in a row
    recovering -> closed: the permitted rate of begins, which doubles every second, has reached its limit

Instead of opening again, the breaker closes if no workspace is tripped any longer. While the breaker is not closed,
only outcomes of tripped workspaces count.

The breaker affects only tripped workspaces: those whose latest attempts, several in a row, have all failed. A workspace
stays tripped until the breaker closes. If the breaker opens again instead, workspaces whose latest attempt succeeded
are no longer tripped. Follow-ups of all other workspaces begin without restriction. A workspace with thousands of
failing chats therefore does not delay a workspace with few failures.

While the endpoint seems to refuse every message of a workspace, the breaker turns a 401 or 403 into `Snoozed`, so the
follow-up does not end. Otherwise, every probe would end as rejected until an expired secret is replaced.

(Nygard, "Release It!", 2nd edition, 2018, chapter 5; the slow start is nginx's and Envoy's.)
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from followups.flow_control import connect, script
from followups.flow_control.limiter import LONGEST_DEFERRAL
from followups.telemetry import metrics
from followups.telemetry.logs import get_logger
from followups.transports.port import Rejected, Retry, Sent, Snoozed, Unknown
from followups.uptime import uptime
from followups.waits import wait

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from uuid import UUID

    import redis

    from followups.settings import Settings
    from followups.transports.port import Outcome

CLOSED = "closed"
OPEN = "open"
RECOVERING = "recovering"

CALLER_REFUSED = {401, 403}
"""Status codes with which an endpoint may reject the caller rather than the message.

After a secret has expired, for example, the endpoint rejects every message with such a code. If the endpoint accepts
other messages, the code concerns one message, whose follow-up fails.
"""

REFUSED_DELAY = LONGEST_DEFERRAL
"""How long a refused follow-up waits while the transport fails as a whole.

It is as long as the longest deferral. Otherwise, follow-ups that are refused for ever, such as those for recipients who
have blocked the sender, would be the next probes again and again, and no other follow-up of their workspace would be
sent.
"""

READ_INTERVAL = 1.0
"""While the breaker is closed, its shared state is read at this interval, in seconds. A change to the shared state is
noticed within this time, or later if reads are slow (`READ_SHARE`).
"""
READ_INTERVAL_WHILE_OPEN = 0.1
"""Seconds between two reads of the shared breaker state while follow-ups wait for the breaker."""
READ_SHARE = 0.1
"""Maximum fraction of time spent reading the shared state. A read takes longer if many workspaces are tripped."""
LONGEST_READ_PAUSE = 1.0
"""Maximum number of seconds for which slow reads delay the next one."""
STATE_LIFETIME = 3600
"""Seconds without use after which the breaker's state is deleted."""
REDIS_PAUSE = 5.0
"""After a failure, Redis is not queried for this many seconds."""

log = get_logger(__name__)


class WorkspaceOutcomes(NamedTuple):
    """A workspace's outcomes since the last report; ``key`` is the key of its workspace queue."""

    key: int
    failures: int
    """Number of consecutive failures up to and including the latest attempt."""
    after_success: bool
    """Whether an attempt of the workspace succeeded before the reported failures. After a success, earlier failures no
    longer count.
    """


@dataclass(frozen=True, slots=True)
class OutcomeReport:
    """Outcomes recorded since the last report to the shared state.

    While the breaker is open, probing or recovering, only outcomes of tripped workspaces count.
    """

    failed: tuple[UUID, ...] = ()
    """The follow-ups that have failed since the last success.

    A success that does not count towards the breaker is ignored.
    """
    succeeded: bool = False
    """Whether any attempt that counts towards the breaker has succeeded."""
    runs: tuple[WorkspaceOutcomes, ...] = ()
    """The outcomes of each workspace since the last report."""


@dataclass(frozen=True, slots=True)
class SharedState:
    """The shared state of the breaker.

    While the breaker is not closed, all workspaces in ``tripped`` together may begin at most ``permits`` follow-ups.
    """

    state: str
    permits: int = 0
    changed: bool = False
    """Whether this report changed the breaker's state."""
    tripped: frozenset[int] = frozenset()
    """The keys of the tripped workspaces."""


@dataclass(frozen=True, slots=True)
class RecoveryPolicy:
    """The pauses before probes of a failed transport, and the attempt rates during recovery."""

    first_pause: float = 1.0
    longest_pause: float = 15.0
    """Each pause before a probe is twice the previous one, up to this number of seconds."""
    probes: int = 3
    """Number of follow-ups that may begin in one probe."""
    first_rate: float = 10.0
    """How many follow-ups may begin per second right after a successful probe, for all workers together. The rate then
    doubles every second.
    """
    last_rate: float = 10_000.0
    """The breaker closes once the rate reaches this many begins per second, after about ten seconds."""
    failures_to_reopen: int = 10
    """How many different follow-ups must fail in a row before a recovering breaker opens again."""
    failures_to_trip: int = 5
    """Number of failed attempts in a row after which a workspace is tripped.

    Suppose that a hundred attempts run per second, and one in fifty fails. At that rate of failures, three in a row
    occur every 21 minutes, four every 18 hours, and five once in 37 days. If one attempt in ten fails, five failures in
    a row occur every 18 minutes. With a higher number, every workspace would lose more attempts while the transport is
    unreachable.
    """

    def arguments(self) -> tuple[float, ...]:
        """Return the arguments in the Lua script's order; pauses are in milliseconds."""
        pauses = (self.first_pause * 1000, self.longest_pause * 1000)
        return (*pauses, self.probes, self.first_rate, self.last_rate, self.failures_to_reopen, STATE_LIFETIME)


class BreakerStore:
    """The breaker's state for one transport; all workers share this state through a script in Redis.

    An instance belongs to one event loop.
    """

    def __init__(self, settings: Settings, transport: str, policy: RecoveryPolicy = RecoveryPolicy()) -> None:
        """Store the settings without connecting to Redis."""
        self._redis = connect(settings)
        self._script = self._redis.register_script(script("breaker.lua"))
        name = _key(settings, transport)
        self._keys = [name, *(f"{name}:{part}" for part in ("failing", "runs", "held"))]
        self._threshold = settings.breaker_failures
        # A workspace with a single follow-up must be tripped before that follow-up's last attempt.
        self._failures_to_trip = max(1, min(policy.failures_to_trip, settings.max_attempts - 1))
        self._policy = policy.arguments()

    async def report(self, outcomes: OutcomeReport, wanted: int) -> SharedState:
        """Report outcomes to Redis, and ask Redis for permits.

        Raises `redis.RedisError` or `OSError` if Redis is unreachable.
        """
        added = ([one.hex for one in outcomes.failed], outcomes.runs)
        arguments: list[float | str] = [
            self._threshold,
            wanted,
            int(outcomes.succeeded),
            *self._policy,
            self._failures_to_trip,
            *map(json.dumps, added),
        ]
        state, permits, changed, tripped = await self._script(keys=self._keys, args=arguments)
        return SharedState(state, int(permits), changed=bool(changed), tripped=frozenset(map(int, tripped)))

    async def close(self) -> None:
        """Close the connection to Redis."""
        await self._redis.aclose()


class Breaker:
    """A worker's breaker, which records and reports outcomes, and decides which follow-ups may begin."""

    def __init__(self, store: BreakerStore | None, transport: str, failures: int) -> None:
        """Create a breaker that opens after ``failures`` different follow-ups have failed in a row.

        The breaker never opens if ``failures`` is 0 or no store is given.
        """
        self._store = store if failures else None
        self._transport = transport
        self._failures = failures
        self._shared = SharedState(CLOSED)
        self.permits = 0
        """How many follow-ups of tripped workspaces may begin, as probes or during recovery."""
        self._failed: dict[UUID, int] = {}
        """Follow-ups that failed since the last success, with the keys of their workspaces.

        This set is cleared after each report while the breaker is closed or Redis is unreachable.
        """
        self._too_many = max(2, failures)
        """From this many 401 or 403 answers in a row, including the current one, the endpoint is assumed to refuse
        every message. At least 2.
        """
        self._refusals = 0
        """How many attempts of this worker were refused with 401 or 403 since its last attempt without a failure.

        Other failures do not count, because they say nothing about the secret.
        """
        self._refusals_of: dict[int, int] = {}
        """The same number for each workspace."""
        self._accepted: set[int] = set()
        """Tripped workspaces of which an attempt has succeeded since the breaker last opened.

        A 401 or 403 then concerns one message. Otherwise, recipients who have blocked the sender would open the breaker
        again and again.
        """
        self._unreported: dict[UUID, None] = {}
        self._runs: dict[int, WorkspaceOutcomes] = {}
        """The outcomes not yet reported, for each workspace."""
        self._succeeded = False
        self._healthy: set[int] = set()
        """Workspaces with a success that is already noted, so that `record` can skip further successes.

        Empty unless the breaker is closed. Cleared by every report, every reading and every failure of any workspace.
        """
        self._report_due = asyncio.Event()

    @property
    def tripped(self) -> frozenset[int]:
        """The keys of the workspaces that need a permit to begin a follow-up."""
        if self._shared.state != CLOSED:
            return self._shared.tripped
        return frozenset(self._failed.values()) if self._store and len(self._failed) >= self._failures else frozenset()

    @property
    def tripped_in_redis(self) -> frozenset[int]:
        """The keys of the workspaces that the shared state lists as tripped.

        They are empty while the breaker is closed. A worker's own failures do not count here.
        """
        return self._shared.tripped

    @property
    def is_recovering(self) -> bool:
        """Whether the breaker is recovering. During recovery, the limit for follow-ups of tripped workspaces rises."""
        return self._shared.state == RECOVERING

    def spend(self, keys: Iterable[int]) -> None:
        """Use up a permit for each begun follow-up of a tripped workspace.

        ``keys`` has one workspace key for each follow-up that has begun. Just after the breaker has opened, there may
        be fewer permits than begun follow-ups.
        """
        if tripped := self.tripped:
            self.permits = max(0, self.permits - sum(key in tripped for key in keys))

    def record(self, follow_up_id: UUID, key: int, outcome: Outcome) -> Outcome:
        """Record the outcome of an attempt, and return the outcome to settle.

        `Snoozed` is neither a failure nor a success: either the endpoint is busy, or this worker's own limits prevented
        the call. The same applies to a message that the transport rejects without a call, and to a 401 or 403 of a
        workspace whose messages have been accepted since the breaker opened. While the endpoint seems to refuse every
        message of a workspace, a 401 or 403 becomes `Snoozed`.
        """
        if isinstance(outcome, Sent) and key in self._healthy:
            return outcome
        if self._store is None or isinstance(outcome, Snoozed) or _is_without_call(outcome):
            return outcome
        failed = _failed(outcome)
        refusal = outcome if failed and isinstance(outcome, Rejected) else None
        self._count_refusals(key, failed=failed, refused=refusal is not None)
        if refusal and key in self._accepted:
            return refusal
        if failed:
            self._healthy.clear()
            run = self._runs.get(key, WorkspaceOutcomes(key, 0, after_success=False))
            self._runs[key] = WorkspaceOutcomes(key, run.failures + 1, run.after_success)
        else:
            self._runs[key] = WorkspaceOutcomes(key, 0, after_success=True)
            if self._shared.state == CLOSED:
                self._healthy.add(key)
        counts = self._shared.state == CLOSED or key in self._shared.tripped
        if counts and failed:
            self._failed[follow_up_id] = key
            self._unreported[follow_up_id] = None
        elif counts:
            self._succeeded = True
            self._failed.clear()
            self._unreported.clear()
        if self._shared.state != CLOSED or len(self._failed) == self._failures:
            self._report_due.set()
        if refusal and self._endpoint_refuses_all(key):
            return Snoozed(refusal.detail, REFUSED_DELAY, refusal.status_code)
        return outcome

    def _count_refusals(self, key: int, *, failed: bool, refused: bool) -> None:
        if not failed:
            self._refusals = 0
            self._refusals_of.pop(key, None)
            self._accepted |= {key} & self._shared.tripped
        elif refused:
            self._refusals += 1
            self._refusals_of[key] = self._refusals_of.get(key, 0) + 1
            if self._refusals_of[key] >= self._too_many:
                self._accepted.discard(key)

    def _endpoint_refuses_all(self, key: int) -> bool:
        """Return whether the endpoint seems to refuse every message, or at least those of the workspace with this key.

        The worker's own refusals count too, because it reads the shared state up to a second late, or later if reads
        are slow, and not at all while Redis is unreachable. Moreover, the breaker stays closed if no workspace has
        enough failures in a row to be tripped.
        """
        in_a_row = max(self._refusals, self._refusals_of.get(key, 0))
        return in_a_row >= self._too_many or key in self._shared.tripped

    async def run(self, wanted: Callable[[], int], changed: Callable[[], None]) -> None:
        """Report outcomes to the store and read the shared state, until cancelled.

        ``wanted`` is a function that returns how many due follow-ups wait for the breaker.
        """
        if self._store is None:
            return
        try:
            while True:
                await self._inform(self._store, wanted(), changed)
        finally:
            await self._store.close()

    async def _inform(self, store: BreakerStore, wanted: int, changed: Callable[[], None]) -> None:
        self._report_due.clear()
        started = uptime()
        try:
            reading = await store.report(self._next_report(), max(0, wanted - self.permits))
        except Exception as error:  # noqa: BLE001 - whatever the store's client raises
            metrics.BREAKER_UNAVAILABLE.inc()
            log.warning("breaker_unavailable", error=type(error).__name__, pause_s=REDIS_PAUSE)
            self._take(SharedState(CLOSED))
            changed()
            await asyncio.sleep(REDIS_PAUSE)
            return
        if reading.changed:
            self._log_change(reading.state)
        self._take(reading)
        changed()
        pause = READ_INTERVAL_WHILE_OPEN if self.tripped and wanted else READ_INTERVAL
        await wait(self._report_due, max(pause, min((uptime() - started) / READ_SHARE, LONGEST_READ_PAUSE)))

    def _log_change(self, state: str) -> None:
        if state == OPEN:
            metrics.BREAKER_OPENED.labels(transport=self._transport).inc()
            log.warning("breaker", transport=self._transport, state=state)
        else:
            log.info("breaker", transport=self._transport, state=state)

    def _next_report(self) -> OutcomeReport:
        outcomes = OutcomeReport(tuple(self._unreported), self._succeeded, tuple(self._runs.values()))
        self._runs.clear()
        self._unreported.clear()
        self._succeeded = False
        self._healthy.clear()
        return outcomes

    def _take(self, reading: SharedState) -> None:
        self.permits = reading.permits if reading.state != self._shared.state else self.permits + reading.permits
        if reading.state == OPEN != self._shared.state:
            self._accepted.clear()
        self._accepted &= reading.tripped
        self._shared = reading
        self._healthy.clear()
        if reading.state == CLOSED:
            self._failed.clear()


@dataclass(frozen=True, slots=True)
class BreakerStatus:
    """The breaker's state, the seconds since it opened, how often it opened again since, and the tripped workspaces."""

    state: str
    seconds: float
    probed: int
    tripped: frozenset[int] = frozenset()
    """The queue keys of the tripped workspaces, as returned by `followups.store.leases.key_of`."""


def read(client: redis.Redis, settings: Settings) -> BreakerStatus:
    """Return the breaker's state for the configured transport.

    Raises `redis.RedisError` if Redis is unreachable.
    """
    key = _key(settings, settings.transport)
    kept = cast("dict[str, str]", client.hgetall(key))
    fields: dict[str, Any] = {_text(name): _text(value) for name, value in kept.items()}
    if not fields:
        return BreakerStatus(CLOSED, 0.0, 0)
    since = float(fields.get("since", 0))
    seconds = (float(fields.get("clock", since)) - since) / 1000
    tripped = cast("set[str]", client.smembers(f"{key}:held"))
    return BreakerStatus(fields["name"], seconds, max(0, int(fields.get("tries", 1)) - 1), frozenset(map(int, tripped)))


def _key(settings: Settings, transport: str) -> str:
    return f"{settings.broker_prefix}breaker:{transport}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _is_without_call(outcome: Outcome) -> bool:
    return isinstance(outcome, Rejected) and outcome.status_code is None


def _failed(outcome: Outcome) -> bool:
    """Return whether an outcome is a failure of the transport.

    A 401 or 403 is a failure of the transport; every other rejection concerns one message.
    """
    if isinstance(outcome, Rejected):
        return outcome.status_code in CALLER_REFUSED
    return isinstance(outcome, Retry | Unknown)
