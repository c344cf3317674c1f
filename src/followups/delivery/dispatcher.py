"""The dispatcher runs ticks. Each tick claims and publishes until nothing is due or the next tick begins."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from followups.database_errors import concerns_a_row
from followups.delivery import events
from followups.delivery.claim import claim, claim_fairly, release, unclaimable
from followups.delivery.claim_interval import ClaimInterval
from followups.delivery.hints import batches
from followups.store import chat_order, claims, last_tick, pauses

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import Engine

    from followups.delivery.hints import Hint
    from followups.settings import Settings
    from followups.store.claims import Claim

SLOW = 1.0
"""If a claim takes longer than this limit (in seconds), the planner's statistics are probably wrong. A normal claim
takes milliseconds.
"""
MANY = 100
"""After a claim of at least this many rows, the dispatcher checks the planner's statistics."""
NEXT_STATISTICS = 60.0
"""Seconds between two checks of the planner's statistics."""

QUICK = 0.01
"""If a claim from the beginning of the index takes at most this long, the next one also starts there."""
LOOKING_SHARE = 0.1
"""Claims from the beginning of the index may take this share of the dispatcher's time."""

ORPHAN_SEARCH_SHARE = 0.01
"""The largest share of the dispatcher's time that is spent checking blocked and paused follow-ups.

Each blocked or paused follow-up is checked at least once per lease time, however long the checks take.
"""

SKIPPED_FOR = 60.0
"""Seconds for which claims skip a row that cannot be written."""

BACKOFF = 0.05
LONGEST_BACKOFF = 4.0
"""Longest pause between attempts to reach the database, in seconds. The pauses double up to this maximum."""
AFTER_ANOTHER = 0.01
"""Pause in seconds while another dispatcher is claiming; each further pause is twice as long.

A claim normally takes only a few milliseconds.
"""
LONGEST_AFTER_ANOTHER = 0.1
IN_GRACE = 0.5
"""Seconds between two claims during a grace period.

Each claim may take over expired leases without waiting for a tick.
"""


class Dispatcher:
    """The dispatcher, which runs in one thread of each worker process.

    Ticks and nudges that arrive during a tick are merged into one further tick.
    """

    def __init__(self, settings: Settings, engine: Engine, publish: Callable[[Hint], None]) -> None:
        """``publish`` sends one hint to the broker, or raises an exception."""
        self._settings = settings
        self._engine = engine
        self._publish = publish
        self._wanted = threading.Event()
        self._ticked_at = -inf
        """The monotonic time of the latest tick request."""
        self._stopping = threading.Event()
        self._backoff = BACKOFF
        self._in_grace = False
        self._busy_pause = AFTER_ANOTHER
        self._next_orphan_search = 0.0
        self._since: datetime | None = None
        self._claimed_since: datetime | None = None
        self._next_statistics = 0.0
        self._refreshing: threading.Thread | None = None
        self._next_whole = 0.0
        self._claimed_from_all = True
        self._left_some = False
        self._skipped: dict[UUID, float] = {}
        """The follow-ups that claims skip, and the monotonic time until which each is skipped."""
        self._interval = ClaimInterval(settings.max_in_flight)
        self.busy_since: float | None = None
        """The monotonic time at which the dispatcher began its current work, or None while it is idle."""
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)

    def start(self) -> None:
        """Start the thread, which waits for the first tick."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the dispatcher's thread is running."""
        return self._thread.is_alive()

    def tick(self) -> None:
        """Request a tick and return immediately."""
        self._ticked_at = time.monotonic()
        self._wanted.set()

    def claim_no_more(self) -> None:
        """Start no further claim. This method acquires no lock, so a signal handler may call it."""
        self._stopping.set()

    def stop(self) -> None:
        """Stop claiming, and wait until the current claim is published.

        Once `stop` has returned, the dispatcher no longer uses its database engine.
        """
        self.claim_no_more()
        self._wanted.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._refreshing is not None:
            self._refreshing.join()

    def _run(self) -> None:
        while True:
            self.busy_since = None
            self._wanted.wait(self._seconds_to_next_claim())
            self._wanted.clear()
            if self._stopping.is_set():
                return
            self.busy_since = time.monotonic()
            try:
                self._drain_due()
                self._backoff = BACKOFF
                events.succeeded("claim")
            except Exception as error:  # noqa: BLE001 - the next tick tries again, whatever it was
                events.failed("claim", error, self._engine)
                if self._skip_failing_rows(error):
                    self._wanted.set()
                    continue
                self._stopping.wait(self._backoff)
                self._backoff = min(self._backoff * 2, LONGEST_BACKOFF)

    def _skip_failing_rows(self, error: Exception) -> bool:
        """Find rows that made a claim fail, and skip them in later claims; return whether any were found."""
        if not concerns_a_row(error):
            return False
        with suppress(SQLAlchemyError):
            found = unclaimable(
                self._engine, self._settings, self._claimed_since, self._without(), fairly=self._left_some
            )
            self._skipped |= dict.fromkeys(found, time.monotonic() + SKIPPED_FOR)
            return bool(found)
        return False

    def _without(self) -> tuple[UUID, ...]:
        now = time.monotonic()
        self._skipped = {one: until for one, until in self._skipped.items() if until > now}
        return tuple(self._skipped)

    def _seconds_to_next_claim(self) -> float | None:
        """Return the seconds until the next claim, or None if a tick has to start that claim.

        The rest of a backlog is left to the next tick, which may have gone to another dispatcher. If both went on, they
        would make many small claims.
        """
        if self._in_grace:
            return IN_GRACE
        if self._claimed_from_all or self._left_some:
            return None
        # A tick may have been requested for a row below the low-water mark, where the last claim did not look.
        return max(0.0, max(self._next_whole, self._interval.next) - time.monotonic())

    def _drain_due(self) -> None:
        """Claim and publish until nothing more is due, or until a tick interval after the latest tick request.

        If that time is over already, a single claim is made.
        """
        self._interval.begin()
        self._release_orphans()
        while True:
            deadline = self._ticked_at + self._settings.tick_interval.total_seconds()
            if self._interval.next > max(deadline, time.monotonic()):
                return
            if self._stopping.wait(max(0.0, self._interval.next - time.monotonic())) or not self._claim_and_publish():
                return
            if time.monotonic() >= deadline:
                return

    def _release_orphans(self) -> None:
        """Unblock follow-ups that no longer have to wait, less often if the search for them is slow.

        If unblocking a follow-up fails, claims continue.
        """
        started = time.monotonic()
        if started < self._next_orphan_search:
            return
        with self._engine.begin() as connection:
            last_tick.ensure_recordable(connection)
        refused: dict[UUID, Exception] = {}
        for unblock in (chat_order.unblock_orphaned, pauses.release_orphaned):
            known = -1
            try:
                # unwritable rows must not keep later rows from being unblocked
                while len(refused) > known:
                    known = len(refused)
                    with self._engine.begin() as connection:
                        unblock(connection, refused.__setitem__, tuple(refused))
            except Exception as error:  # noqa: BLE001 - whatever it was, claims go on
                events.failed("unblock", error, self._engine)
        for follow_up_id, cause in refused.items():
            events.refused("unblock", follow_up_id, cause)
        # A row that cannot be written is retried at most once per lease duration.
        took = inf if refused else time.monotonic() - started
        self._next_orphan_search = started + min(took / ORPHAN_SEARCH_SHARE, self._settings.lease.total_seconds())

    def _claim_and_publish(self) -> bool:
        """Make one claim and publish its leases; return whether there may be more to claim."""
        claimed, took = self._claim()
        if claimed.busy:
            self._stopping.wait(self._busy_pause)
            self._busy_pause = min(self._busy_pause * 2, LONGEST_AFTER_ANOTHER)
            return True
        self._busy_pause = AFTER_ANOTHER
        size = self._settings.batch_size
        for number, hint in enumerate(batches(claimed.leases, size)):
            try:
                self._publish(hint)
            except Exception as error:  # noqa: BLE001 - whatever the broker's client raises
                events.broker_unreachable("publish", error)
                # Leases that could not be published are released immediately, instead of being left to expire.
                release(self._engine, claimed.leases[number * size :])
                return False
        self._refresh_statistics(took, len(claimed.leases))
        return claimed.more

    def _refresh_statistics(self, took: float, leased: int) -> None:
        """If the planner's statistics are certainly wrong, update them in a thread."""
        if (took > SLOW or leased >= MANY) and time.monotonic() >= self._next_statistics:
            self._next_statistics = time.monotonic() + NEXT_STATISTICS
            refreshing = threading.Thread(target=self._refresh, args=(took, leased), name="statistics", daemon=True)
            refreshing.start()
            self._refreshing = refreshing

    def _refresh(self, took: float, leased: int) -> None:
        try:
            if took > SLOW or claims.planner_expects_fewer_than(self._engine, leased):
                claims.refresh_planner_statistics(self._engine)
                # If the planner's estimate is still too low, another session is probably refreshing the statistics.
                if not claims.planner_expects_fewer_than(self._engine, leased):
                    events.statistics_refreshed(took)
        except Exception as error:  # noqa: BLE001 - a minute later it is tried again, whatever it was
            events.failed("statistics", error, self._engine)

    def _claim(self) -> tuple[Claim, float]:
        """Claim follow-ups due at or after the low-water mark; occasionally, claim all due follow-ups.

        A claim without a low-water mark also finds follow-ups inserted late with an early due time. If a claim leaves
        due follow-ups, the next claims prefer workspaces with the fewest follow-ups in flight. During a long
        transaction, index entries of sent follow-ups stay in front of those of pending ones. Skipping 36,000 such index
        entries took 34 ms.
        """
        started = time.monotonic()
        from_all = started >= self._next_whole
        take = claim_fairly if self._left_some else claim
        self._claimed_since = None if from_all else self._since
        claimed = take(self._engine, self._settings, self._claimed_since, self._without())
        took = time.monotonic() - started
        if claimed.busy:
            return claimed, took
        self._claimed_from_all = from_all
        self._in_grace = claimed.in_grace
        taken = len(claimed.leases) + len(claimed.ended)
        self._interval.record_claim(taken, started, more=claimed.more, cut_short=claimed.cut_short)
        self._left_some = claimed.more
        self._since = claimed.low_water
        if self._claimed_from_all and took > QUICK:
            self._next_whole = started + took / LOOKING_SHARE
        events.claimed(claimed, took)
        return claimed, took
