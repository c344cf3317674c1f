"""Tests that retries spread out if the receiver fails, limits the rate or is unreachable."""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

import pytest

from faults.promises import Record, check
from faults.rig import Load, rows_of
from followups.store import rate_limits
from followups.store.rate_limits import LimitScope
from stack import wait_until

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from uuid import UUID

    from faults.figures import Figures
    from faults.rig import Rig

STATUSES = (500, 502, 503, 504, 408, 425)
"""Status codes of temporary failures."""
PATIENT = {
    "FOLLOWUPS_TRANSPORT_TIMEOUT": "20",
    "FOLLOWUPS_LEASE": "40",
    "FOLLOWUPS_RETRY_BASE": "0.2",
    "FOLLOWUPS_RETRY_CAP": "2",
    "FOLLOWUPS_MAX_ATTEMPTS": "200",
}
"""Settings for a slow machine: long time limits, and enough attempts to outlast an outage."""
WINDOWS = {"100_ms": 0.1, "1_s": 1.0}
"""Lengths in seconds of the windows in which requests are counted."""


def histogram(rig: Rig, ids: Sequence[UUID]) -> dict[int, int]:
    """Return how many follow-ups were sent after each number of attempts."""
    query = "SELECT attempts, count(*) FROM follow_ups WHERE id = ANY(:ids) AND status = 'sent' GROUP BY 1 ORDER BY 1"
    return dict(tuple(row) for row in rows_of(rig, query, ids=list(ids)))


def request_rates(requests: Collection[Mapping[str, Any]], since: float) -> dict[str, float]:
    """Return peak and mean request counts from ``since`` on, per tenth of a second and per second."""
    times = sorted(one["receivedMonotonic"] for one in requests if one["receivedMonotonic"] >= since)
    found: dict[str, float] = {}
    for name, window in WINDOWS.items():
        most = max(bisect_left(times, begin + window) - place for place, begin in enumerate(times))
        mean = len(times) / max(1.0, (times[-1] - times[0]) / window)
        found |= {f"most_in_{name}": most, f"mean_in_{name}": round(mean, 1)}
        found[f"most_to_mean_in_{name}_ratio"] = round(most / mean, 2)
    return found


def some_fail(rig: Rig, figures: Figures, count: int) -> None:
    """Let the first request fail in 1 % of the chats, then in 10 %, then in 50 %."""
    rig.options |= PATIENT
    rig.start()
    found = {}
    for share in (0.01, 0.1, 0.5):
        ids = rig.held(count)
        failing = rig.rng.sample(ids, int(count * share))
        chats = rows_of(rig, "SELECT chat_id FROM follow_ups WHERE id = ANY(:ids)", ids=failing)
        for (chat_id,) in chats:
            rig.behave(chat_id, kind="fail", times=1, status=rig.rng.choice(STATUSES))
        rig.release(ids, spread=count / 300)
        rig.settle_down(within=60 + count / 50)
        found[f"sent_by_attempts_with_{share:.0%}_failing"] = histogram(rig, ids)
        assert histogram(rig, ids) == {1: count - len(failing), 2: len(failing)}
    figures.keep(13, rig.verdict(), **found)


def storm(rig: Rig, figures: Figures, count: int, seconds: float) -> None:
    """For some seconds, answer every request with 429 and a Retry-After of 1; then accept all requests."""
    rig.options |= PATIENT
    rig.start()
    rig.behave(kind="rate_limit", retry_after=1)
    rig.bulk(count, spread=0.5)
    time.sleep(seconds)
    # until each follow-up has been retried once on average
    wait_until(lambda: len(rig.received()) >= count * 2, within=60, every=0.5)
    calm = time.monotonic()
    rig.behave(kind="accept")
    rig.settle_down(within=60 + count / 50)
    took = time.monotonic() - calm
    requests = rig.received()
    refused = [one for one in requests if one["outcome"] == "rate_limited"]
    used = rows_of(rig, "SELECT max(attempts) - 1 FROM follow_ups")[0][0]
    figures.keep(
        13,
        rig.verdict(),
        refused_requests=len(refused),
        attempts_used_by_429=used,
        all_sent_after_s=round(took, 2),
        **request_rates(requests, calm),
    )
    assert used == 0
    # the receiver requested a pause of one second, and measured it by its own clock
    assert shortest_pause(refused) > 0.95


def shortest_pause(refused: Collection[Mapping[str, Any]]) -> float:
    """Return the shortest time between two requests for the same follow-up."""
    by_id: dict[str, list[float]] = {}
    for one in refused:
        by_id.setdefault(one["followUpId"], []).append(one["receivedMonotonic"])
    return min(b - a for times in by_id.values() for a, b in itertools.pairwise(times))


def outage(rig: Rig, figures: Figures, rate: float, seconds: float) -> None:
    """Refuse connections for some seconds under load, then listen again on the same port."""
    rig.options |= PATIENT
    rig.start()
    sandbox = next(child for child in rig.processes.children if child.command.name == "sandbox")
    with Load(rig, rate, seconds + 2, spread=0.5) as load:
        time.sleep(0.5 + rig.rng.random() / 2)
        # the receiver accepts nothing from now on, so the set of accepted follow-ups is known
        rig.behave(kind="fail", status=500)
        before = rig.received()
        sandbox.stop()
        time.sleep(seconds)
        rig.sandbox()
        back = time.monotonic()
        load.wait()
    rig.settle_down(within=60 + seconds)
    took = time.monotonic() - back
    after = rig.received()
    verdict = check(rig.world.engine, [*before, *after], Record(frozenset(rig.created)))
    refused = "SELECT count(*) FROM failed_attempts WHERE status_code IS NULL"
    figures.keep(
        13,
        verdict,
        failed_calls=rig.world.scalar(refused),
        sent_by_attempts=histogram(rig, load.ids),
        all_sent_after_s=round(took, 2),
        **request_rates(after, back),
    )
    assert rig.world.scalar(refused)
    assert verdict.ended == {"sent": len(load.ids)}


def fail_for(rig: Rig, figures: Figures, rate: float, seconds: float, limit: int | None = None) -> int:
    """Make every chat fail for some seconds under load; return the number of failures.

    ``limit`` is the number of deliveries allowed per second.
    """
    if limit:
        with rig.world.engine.begin() as connection:
            rate_limits.put(connection, LimitScope(None, None, "all"), limit, limit // 10)
    rig.start()
    with Load(rig, rate, seconds + 4) as load:
        wait_until(lambda: len(rig.received()) >= rate / 2, within=60)
        rig.behave(kind="fail", status=503)
        time.sleep(seconds)
        failed = sum(one["outcome"] == "failed" for one in rig.received())
        waiting = rig.world.scalar("SELECT count(*) FROM follow_ups WHERE status = 'pending' AND due_date < now()")
        lost = rig.world.scalar("SELECT count(*) FROM follow_ups WHERE status = 'failed'")
        back = time.monotonic()
        rig.behave(kind="accept")
        load.wait()
    rig.settle_down(within=60 + 2 * seconds)
    took = time.monotonic() - back
    verdict = rig.verdict()
    figures.keep(
        13,
        verdict,
        outage_s=seconds,
        limit_per_s=limit or "none",
        due_at_its_end=waiting + lost,
        attempts_used_up=failed,
        given_up=lost,
        sent_by_attempts=histogram(rig, load.ids),
        all_sent_after_s=round(took, 2),
        **request_rates(rig.received(), back),
    )
    return failed


def check_breaker_outage(rig: Rig, figures: Figures, rate: float, seconds: float, limit: int | None = None) -> None:
    """Check that only a few follow-ups use up an attempt in an outage, and that none uses up its last one."""
    failed = fail_for(rig, figures, rate, seconds, limit)
    assert rig.world.scalar("SELECT count(*) FROM follow_ups WHERE status <> 'sent'") == 0
    assert [line["state"] for line in rig.events("breaker")][:2] == ["open", "probing"]
    # Besides attempts that began before the breaker opened, at most three for each probe may have failed.
    assert failed <= int(rig.options["FOLLOWUPS_BREAKER_FAILURES"]) + 100 + 3 * (4 + seconds / 15)


def test_some_fail(rig: Rig, figures: Figures) -> None:
    """If some chats fail once, only the follow-ups in these chats are attempted twice."""
    some_fail(rig, figures, count=200)


def test_storm_of_429(rig: Rig, figures: Figures) -> None:
    """While the receiver limits the rate, no retry comes early and no attempt is used up."""
    storm(rig, figures, count=200, seconds=1)


def test_outage(rig: Rig, figures: Figures) -> None:
    """After an outage, the receiver gets every message once, but not all of them at the same time."""
    outage(rig, figures, rate=60, seconds=2)


def test_left_alone(rig: Rig, figures: Figures) -> None:
    """If the transport fails for all workspaces, no follow-up uses up all its attempts."""
    rig.options |= PATIENT | {"FOLLOWUPS_BREAKER_FAILURES": "20", "FOLLOWUPS_MAX_ATTEMPTS": "8"}
    check_breaker_outage(rig, figures, rate=120, seconds=4)


AS_THEY_COME = {
    "FOLLOWUPS_TRANSPORT_TIMEOUT": "10",
    "FOLLOWUPS_LEASE": "60",
    "FOLLOWUPS_TICK_INTERVAL": "1",
    "FOLLOWUPS_RETRY_BASE": "5",
    "FOLLOWUPS_RETRY_CAP": "3600",
    "FOLLOWUPS_MAX_ATTEMPTS": "8",
    "FOLLOWUPS_BREAKER_FAILURES": "50",
}
"""The defaults of the settings that affect these tests."""


@pytest.mark.faults_long
def test_left_alone_for_long(rig: Rig, figures: Figures) -> None:
    """By default, no follow-up runs out of attempts in a two-minute outage."""
    rig.options |= AS_THEY_COME
    check_breaker_outage(rig, figures, rate=100, seconds=120, limit=300)


@pytest.mark.faults_long
def test_not_left_alone(rig: Rig, figures: Figures) -> None:
    """Without the breaker, an outage uses up many attempts; the figures serve for comparison."""
    rig.options |= AS_THEY_COME | {"FOLLOWUPS_BREAKER_FAILURES": "0", "FOLLOWUPS_RETRY_CAP": "60"}
    assert fail_for(rig, figures, rate=100, seconds=120, limit=300) > 1_000


@pytest.mark.faults_long
def test_some_fail_of_many(rig: Rig, figures: Figures) -> None:
    """If a few chats among thousands fail once, only their follow-ups need a second attempt."""
    some_fail(rig, figures, count=5_000)


@pytest.mark.faults_long
def test_long_storm_of_429(rig: Rig, figures: Figures) -> None:
    """If requests for thousands of chats get 429 for half a minute, the retries wait without using up attempts."""
    storm(rig, figures, count=3_000, seconds=30)


@pytest.mark.faults_long
def test_long_outage(rig: Rig, figures: Figures) -> None:
    """After a one-minute outage at 100 follow-ups per second, the receiver gets every message once."""
    outage(rig, figures, rate=100, seconds=60)
